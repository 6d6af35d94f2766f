//! The routes. Each handler that changes data does it in one transaction, together with its event.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use chrono::Utc;
use commitstream::publisher::DomainEventPublisher;
use lettre::Address;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use uuid::Uuid;

use crate::error::ApiError;
use crate::events::{PaymentProcessed, SessionStarted, TrainingStarted, UserCreated};

/// What the handlers work with. The service does not know which way its events take: the publisher and the settings do.
#[derive(Clone)]
pub struct Service {
    pub pool: PgPool,
    pub publisher: Arc<dyn DomainEventPublisher>,
}

/// The HTTP interface: JSON in, `{"id": …}` out.
pub fn router(service: Service) -> Router {
    Router::new()
        .route("/users", post(register))
        .route("/payments", post(pay))
        .route("/trainings", post(start_training))
        .route("/sessions", post(start_session))
        .with_state(service)
}

#[derive(Serialize)]
struct Created {
    id: Uuid,
}

fn created(id: Uuid) -> (StatusCode, Json<Created>) {
    (StatusCode::CREATED, Json(Created { id }))
}

type Answer = Result<(StatusCode, Json<Created>), ApiError>;

#[derive(Deserialize)]
struct Registration {
    email: String,
}

async fn register(State(service): State<Service>, Json(Registration { email }): Json<Registration>) -> Answer {
    if email.parse::<Address>().is_err() {
        return Err(ApiError::Address(email));
    }
    let event = UserCreated { user_id: Uuid::now_v7(), email, occurred_at: Utc::now() };
    let mut transaction = service.pool.begin().await?;
    sqlx::query("INSERT INTO users (user_id, email, created_at) VALUES ($1, $2, $3)")
        .bind(event.user_id)
        .bind(&event.email)
        .bind(event.occurred_at)
        .execute(&mut *transaction)
        .await?;
    service.publisher.publish(&mut transaction, &event).await?;
    transaction.commit().await?; // the user and the event, or neither
    Ok(created(event.user_id))
}

#[derive(Deserialize)]
struct Payment {
    user_id: Uuid,
    amount_cents: i64,
}

async fn pay(State(service): State<Service>, Json(Payment { user_id, amount_cents }): Json<Payment>) -> Answer {
    if amount_cents <= 0 {
        return Err(ApiError::Amount);
    }
    let event = PaymentProcessed { payment_id: Uuid::now_v7(), user_id, amount_cents, occurred_at: Utc::now() };
    let mut transaction = service.pool.begin().await?;
    sqlx::query("INSERT INTO payments (payment_id, user_id, amount_cents, paid_at) VALUES ($1, $2, $3, $4)")
        .bind(event.payment_id)
        .bind(event.user_id)
        .bind(event.amount_cents)
        .bind(event.occurred_at)
        .execute(&mut *transaction)
        .await?;
    service.publisher.publish(&mut transaction, &event).await?;
    transaction.commit().await?;
    Ok(created(event.payment_id))
}

#[derive(Deserialize)]
struct Training {
    user_id: Uuid,
    model: String,
}

async fn start_training(State(service): State<Service>, Json(Training { user_id, model }): Json<Training>) -> Answer {
    let event = TrainingStarted { training_id: Uuid::now_v7(), user_id, model, occurred_at: Utc::now() };
    let mut transaction = service.pool.begin().await?;
    sqlx::query("INSERT INTO trainings (training_id, user_id, model, started_at) VALUES ($1, $2, $3, $4)")
        .bind(event.training_id)
        .bind(event.user_id)
        .bind(&event.model)
        .bind(event.occurred_at)
        .execute(&mut *transaction)
        .await?;
    service.publisher.publish(&mut transaction, &event).await?;
    transaction.commit().await?;
    Ok(created(event.training_id))
}

#[derive(Deserialize)]
struct Session {
    user_id: Uuid,
}

/// High-frequency: nothing is written to PostgreSQL. The connection is there for settings that send these events through the
/// outbox.
async fn start_session(State(service): State<Service>, Json(Session { user_id }): Json<Session>) -> Answer {
    let event = SessionStarted { session_id: Uuid::now_v7(), user_id, occurred_at: Utc::now() };
    let mut connection = service.pool.acquire().await?;
    service.publisher.publish(&mut connection, &event).await?;
    Ok(created(event.session_id))
}
