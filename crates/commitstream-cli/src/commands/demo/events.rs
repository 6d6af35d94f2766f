//! The events of the reference. Each carries its number within its aggregate, so that the order can be checked in the stream
//! itself.

use chrono::{DateTime, Utc};
use commitstream::{DomainEvent, Lane};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[derive(Serialize, DomainEvent)]
#[event(aggregate = "user")]
pub struct UserCreated {
    #[event(key)]
    pub user_id: Uuid,
    pub sequence: i64,
    pub email: String,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

#[derive(Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "user")]
pub struct PaymentProcessed {
    #[event(key)]
    pub user_id: Uuid,
    pub sequence: i64,
    pub payment_id: Uuid,
    pub amount_cents: i64,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

#[derive(Serialize, DomainEvent)]
#[event(aggregate = "training")]
pub struct TrainingStarted {
    #[event(key)]
    pub user_id: Uuid,
    pub sequence: i64,
    pub job_id: Uuid,
    pub model: &'static str,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

#[derive(Serialize, DomainEvent)]
#[event(aggregate = "session", lane = "high-frequency")]
pub struct SessionStarted {
    #[event(key)]
    pub device_id: Uuid,
    pub sequence: i64,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

#[derive(Serialize, DomainEvent)]
#[event(aggregate = "metric", lane = "high-frequency")]
pub struct MetricUpdated {
    #[event(key)]
    pub device_id: Uuid,
    pub sequence: i64,
    pub name: &'static str,
    pub value: f64,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

/// The aggregate types above: each has a stream.
pub const AGGREGATES: [&str; 4] = ["user", "training", "session", "metric"];

/// The lane of an event type above; `None` for any other.
pub fn lane_of(event_type: &str) -> Option<Lane> {
    match event_type {
        "UserCreated" | "PaymentProcessed" | "TrainingStarted" => Some(Lane::Critical),
        "SessionStarted" | "MetricUpdated" => Some(Lane::HighFrequency),
        _ => None,
    }
}
