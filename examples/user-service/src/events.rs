//! The events: what happened, to whom, when; complete, so that a consumer need not ask back.

use chrono::{DateTime, Utc};
use commitstream::DomainEvent;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Critical, like every event that does not say otherwise: it goes through the outbox.
#[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "user")]
pub struct UserCreated {
    #[event(key)]
    pub user_id: Uuid,
    pub email: String,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

#[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "payment")]
pub struct PaymentProcessed {
    #[event(key)]
    pub payment_id: Uuid,
    pub user_id: Uuid,
    pub amount_cents: i64,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

#[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "training")]
pub struct TrainingStarted {
    #[event(key)]
    pub training_id: Uuid,
    pub user_id: Uuid,
    pub model: String,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

/// One of very many, and no data of the service depends on it: it goes straight to its stream.
#[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "session", lane = "high-frequency")]
pub struct SessionStarted {
    #[event(key)]
    pub session_id: Uuid,
    pub user_id: Uuid,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}
