//! `held`: the drain while a transaction stays open that began before everything else, against the drain without it.
//!
//! Such a transaction keeps vacuum from removing what is dead: the 500,000 events that were sent before leave their dead index entries
//! where a claim might have to step over them.

use sqlx::{Connection, PgConnection};

use super::drain::by_relay;
use super::figure::{Aim, Figure, Measured, Round};
use super::stage::{KEPT, Stage, per_second};

const SENT_BEFORE: u64 = 500_000;
const EVENTS: u64 = 300_000;
const ROUNDS: u32 = 2;

pub async fn measure(stage: &Stage) -> anyhow::Result<Measured> {
    let mut rounds = Vec::new();
    let mut connection = stage.connect("held").await?;
    for round in stage.rounds(ROUNDS) {
        let what = format!("held, round {round}");
        stage.clear(&mut connection).await?;
        let mut holder = stage.connect("held: an open transaction").await?;
        let mut open = holder.begin().await?;
        sqlx::query("SELECT pg_current_xact_id()").execute(&mut *open).await?;
        let figure = one_side(stage, &mut connection, &what).await?;
        open.rollback().await?;
        stage.clear(&mut connection).await?;
        let baseline = one_side(stage, &mut connection, &format!("{what}, baseline")).await?;
        rounds.push(Round::new(figure, baseline));
    }
    stage.clear(&mut connection).await?;
    let figures = vec![Figure::new("held", "events/s", Some(Aim::RatioAtLeast(0.9)), rounds)];
    Ok(Measured { name: "held", figures, notes: Vec::new() })
}

/// Events a second of the drain that counts.
async fn one_side(stage: &Stage, connection: &mut PgConnection, what: &str) -> anyhow::Result<f64> {
    let (before, events) = (stage.events(SENT_BEFORE), stage.events(EVENTS));
    stage.fill(connection, before, what).await?;
    stage.settle(connection).await?;
    by_relay(stage, connection, before, KEPT, &format!("{what}, sent before")).await?;
    stage.fill(connection, events, what).await?;
    stage.settle(connection).await?;
    Ok(per_second(events, by_relay(stage, connection, events, KEPT, what).await?))
}
