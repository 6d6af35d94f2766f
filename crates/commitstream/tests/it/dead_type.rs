//! Events whose aggregate type ends in `:dead`, as the table took them before migration V8: in their stream they would pass for dead
//! letters of another type.

use anyhow::Result;
use commitstream::outbox::{Deed, FailureFilter, FailurePlace, Migrated, Remedy};

use crate::support::{Form, MIGRATIONS, World, eventually};

/// Eleven of them, of three aggregates: new ones, one that waits for its next attempt, two that a relay had claimed before it died, and one
/// that was published and that Redis has lost since.
const ROWS: &str = "
INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
SELECT 'E', 'user:dead', (n % 3)::text, '{}' FROM generate_series(1, 11) n;
UPDATE event_outbox SET next_retry_at = now() + interval '0.2 s', retry_count = 1, last_error = 'why' WHERE aggregate_type = 'user:dead' AND seq % 11 = 1;
UPDATE event_outbox SET status = 'PUBLISHED', published_at = now() WHERE aggregate_type = 'user:dead' AND seq % 11 = 2;
INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids)
SELECT gen_random_uuid(), gen_random_uuid(), '{stream}', array_agg(id ORDER BY seq) FROM event_outbox WHERE aggregate_type = 'user:dead' AND seq % 11 IN (3, 4);
INSERT INTO outbox_batch (batch_id, relay_id, stream, event_ids, settled_at, appended)
SELECT gen_random_uuid(), gen_random_uuid(), '{stream}', array_agg(id), now(), 1 FROM event_outbox WHERE aggregate_type = 'user:dead' AND seq % 11 = 2;";

const ERROR: &str = "aggregate_type \"user:dead\" ends in :dead: the streams of dead letters are named so; \
                     UPDATE its row in event_outbox with another aggregate_type, then retry it, or discard it";

async fn world_of_before(form: Form) -> Result<World> {
    let world = World::unmigrated()?;
    world.database.psql(&MIGRATIONS[..5].concat())?;
    if form == Form::ByDay {
        world.partition_days_ago(10).await?;
    }
    world.database.psql(&ROWS.replace("{stream}", &world.streams.stream_of("user:dead")))?;
    world.insert(100, 10).await?;
    let migrated = world.outbox.migrate(&mut world.connect().await?).await?;
    assert_eq!(migrated, Migrated { from: Some(7), to: 9 }, "{form:?}");
    Ok(world)
}

#[tokio::test(flavor = "multi_thread")]
async fn those_that_are_there_already_fail_with_a_way_out_and_hold_up_no_other() -> Result<()> {
    for form in Form::BOTH {
        let world = world_of_before(form).await?;
        let relay = world.relay()?;
        eventually("all of them to fail", async || Ok(world.stats().await?.failed == 11)).await?;
        world.drained().await?;
        assert_eq!(world.audit().await?, 100, "and nothing else is in any stream");
        assert_eq!(world.streams.list().await?, [world.user_stream()]);
        let errors = "SELECT DISTINCT last_error, next_retry_at FROM event_outbox WHERE status = 'FAILED';";
        assert_eq!(world.database.psql(errors)?, format!("{ERROR}|\n"));

        let mut connection = world.connect().await?;
        let deed = Deed { who: "ada", about: "all" };
        let (filter, start) = (FailureFilter::default(), FailurePlace::default());
        for (first, failed) in [("", 11), ("UPDATE event_outbox SET aggregate_type = 'user-death' WHERE status = 'FAILED'", 0)] {
            world.database.psql(first)?;
            world.outbox.remedy_step(&mut connection, deed, Remedy::Retry, &filter, &start, None).await?;
            world.drained().await?;
            assert_eq!(world.stats().await?.failed, failed);
        }
        relay.stop().await?;
        assert_eq!(world.audit().await?, 111, "the error names a way out");
    }
    Ok(())
}

/// What copies rows checks them again.
#[tokio::test(flavor = "multi_thread")]
async fn those_that_are_there_already_stand_in_the_way_of_nothing() -> Result<()> {
    let validate = "ALTER TABLE event_outbox VALIDATE CONSTRAINT event_outbox_aggregate_type_does_not_end_in_dead;";
    for form in Form::BOTH {
        let world = world_of_before(form).await?;
        world.database.psql(validate)?;
    }
    let world = world_of_before(Form::Whole).await?;
    // So that they are copied.
    let ids =
        "UPDATE event_outbox SET id = ('f' || substr(gen_random_uuid()::text, 2))::uuid WHERE aggregate_type = 'user:dead';";
    world.database.psql(ids)?;
    assert_eq!(world.outbox.partition_by_day(&mut world.connect().await?).await?, Some(11));
    let insert =
        "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user:dead', '1', '{}');";
    assert!(world.database.psql(insert).is_err(), "a new one is refused");
    world.database.psql(validate)?;
    Ok(())
}
