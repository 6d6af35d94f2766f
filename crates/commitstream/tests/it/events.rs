//! The events that tests publish, after those of the reference, and envelopes made by hand.

use anyhow::Result;
use chrono::{DateTime, SubsecRound, Utc};
use commitstream::{DomainEvent, EventEnvelope};
use serde::{Deserialize, Serialize};
use serde_json::value::to_raw_value;
use uuid::Uuid;

/// Critical.
#[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
#[event(aggregate = "user")]
pub struct UserCreated {
    #[event(key)]
    pub user_id: u64,
    pub email: String,
    #[event(time)]
    pub occurred_at: DateTime<Utc>,
}

/// High-frequency.
#[derive(Debug, Clone, Serialize, DomainEvent)]
#[event(aggregate = "session", lane = "high-frequency")]
pub struct SessionStarted {
    #[event(key)]
    pub session_id: u64,
}

/// Both.
#[derive(Debug, Clone, Serialize, DomainEvent)]
#[event(aggregate = "training")]
pub enum Training {
    #[event(name = "TrainingStarted")]
    Started {
        #[event(key)]
        job: Uuid,
        gpus: Vec<String>,
    },
    #[event(name = "MetricUpdated", lane = "high-frequency")]
    Metric {
        #[event(key)]
        job: Uuid,
        name: String,
        step: Option<u32>,
    },
}

pub fn user(user_id: u64) -> UserCreated {
    UserCreated { user_id, email: format!("\"{user_id}\"\\\n@example.org"), occurred_at: Utc::now() }
}

pub fn session(session_id: u64) -> SessionStarted {
    SessionStarted { session_id }
}

/// An envelope, whose id the test therefore knows. Critical, as envelopes are.
pub fn envelope(aggregate_type: &str, aggregate_id: &str, payload: &impl Serialize) -> Result<EventEnvelope> {
    Ok(EventEnvelope {
        id: Uuid::now_v7(),
        event_type: "Happened".into(),
        aggregate_type: aggregate_type.into(),
        aggregate_id: aggregate_id.into(),
        occurred_at: Utc::now().trunc_subsecs(6),
        payload: to_raw_value(payload)?,
        headers: serde_json::Map::new(),
    })
}
