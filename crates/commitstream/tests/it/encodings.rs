//! Databases that are not UTF8.

use anyhow::{Context, Result};
use commitstream::doctor::Severity;
use commitstream::outbox::{self, Selection};
use commitstream::relay::OutboxProcessor;
use commitstream_sandbox::Sandbox;

use crate::doctor_report::{examine, found, only};
use crate::support::{PATIENCE, World, eventually};

async fn world_in(encoding: &str) -> Result<World> {
    let sandbox = Sandbox::shared();
    let world = World::on(sandbox.database_encoded(encoding)?, &sandbox.redis_url(), sandbox.key_prefix()?)?;
    world.outbox.migrate(&mut world.connect().await?).await?;
    Ok(world)
}

/// Latin-1 bytes in each column that is sent, among readable events; those of aggregate 0 have one in the middle.
const UNREADABLE: &str = r#"
INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload, headers) VALUES
    ('E', 'user', '0', '{"n": 1}', '{}'),
    ('E', 'user', '0', ('{"name": "Ren' || chr(233) || '"}')::jsonb, '{}'),
    ('E', 'user', '0', '{"n": 3}', '{}'),
    ('E', 'user', 'Ren' || chr(233), '1', '{}'),
    ('Caf' || chr(233), 'user', '1', '1', '{}'),
    ('E', 'user', '2', '1', ('{"name": "Ren' || chr(233) || '"}')::jsonb),
    ('E', 'caf' || chr(233), '3', '1', '{}'),
    ('E', 'caf' || chr(233), '4', '1', '{}'),
    ('E', 'order', '5', '1', '{}');"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_not_utf_8_fails_and_all_others_go_on() -> Result<()> {
    let world = world_in("SQL_ASCII").await?;
    world.insert(50, 10).await?;
    world.database.psql(UNREADABLE)?;
    world.insert(50, 10).await?;
    let relay = world.relay()?;
    world.drained().await.with_context(|| format!("{:?}", relay.status()))?;
    let mut session = outbox::connect(world.database.url(), "test", PATIENCE).await?;
    let failed = world.outbox.failed(&mut session, &Selection::All { event_type: None }, 100).await?;
    let errors: Vec<_> = failed.iter().map(|event| event.last_error.as_deref().unwrap_or_default()).collect();
    assert_eq!(errors.len(), 6, "{errors:?}");
    for column in ["payload", "aggregate_id", "event_type", "headers", "aggregate_type"] {
        assert!(errors.iter().any(|error| error.starts_with(&format!("not UTF-8: {column};"))), "{column}: {errors:?}");
    }
    assert_eq!(OutboxProcessor::new(world.settings.clone())?.stats().await?.recent_failures.len(), 6);
    only(&examine(&world).await, "postgres-encoding", Severity::Warning, "SQL_ASCII");
    world.database.psql("DELETE FROM event_outbox WHERE status = 'FAILED';")?;
    world.insert(1, 1).await?;
    world.drained().await?;
    assert_eq!(world.audit().await?, 104);
    relay.stop().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_in_latin1_is_published_and_examined() -> Result<()> {
    let mut world = world_in("LATIN1").await?;
    world.settings.publishing.max_payload_bytes = 1_024;
    world.database.psql(
        r#"INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES
            ('E', 'user', 'Ren' || chr(233), ('{"name": "Ren' || chr(233) || '"}')::jsonb), ('E', 'user', '2', to_jsonb(repeat('x', 2000)));"#,
    )?;
    world.settings.outbox.processor.max_retries = 0;
    let relay = world.relay()?;
    world.drained().await?;
    relay.stop().await?;
    assert_eq!(world.audit().await?, 1);
    let entries = world.raw_entries("user").await?;
    assert!(entries[0].iter().any(|(field, value)| field == "payload" && value.contains("Ren\u{e9}")), "{entries:?}");
    // A transaction that holds vacuum back has its query shown in part.
    let mut holder = world.connect().await?;
    sqlx::raw_sql("BEGIN; SELECT pg_current_xact_id(), 'a literal'").execute(&mut holder).await?;
    eventually("doctor to examine", async || {
        let report = examine(&world).await;
        let seen: Vec<_> = report.findings.iter().map(|finding| finding.seen.as_str()).collect();
        assert!(!seen.iter().any(|seen| seen.contains("could not be examined")), "{seen:?}");
        Ok(!found(&report, "postgres-encoding").is_empty())
    })
    .await?;
    only(&examine(&world).await, "postgres-encoding", Severity::Note, "LATIN1");
    Ok(())
}
