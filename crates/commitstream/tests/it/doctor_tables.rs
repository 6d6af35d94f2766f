//! What doctor finds of the outbox tables beyond what `doctor.rs` provokes: rights, locks, space, and parts that were changed.

use anyhow::{Context, Result};
use commitstream::doctor::{self, Report, Severity};
use sqlx::{Connection, Executor};

use crate::doctor_report::{eventually_mended, examine, found, mend, only, passes};
use crate::support::{Form, MIGRATIONS, World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_rights_is_told_which_to_give() -> Result<()> {
    let world = World::new().await?;
    let role = format!("r_{}", world.database.name());
    world.database.psql(&format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'p'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role};
         GRANT INSERT, UPDATE, DELETE ON event_outbox, outbox_batch, outbox_relay TO {role}; GRANT DELETE ON event_inbox TO {role};
         REVOKE SELECT ON outbox_audit FROM {role};"
    ))?;
    let mut settings = world.settings.clone();
    let (_, place) = world.database.url().rsplit_once('@').context("a login")?;
    settings.database.url = Some(format!("postgres://{role}:p@{place}"));
    let report = doctor::examine(&settings).await;
    let told = found(&report, "privileges");
    assert_eq!(told.len(), 2, "{told:#?}");
    assert!(
        told[0].severity == Severity::Error && told[0].seen.ends_with("(outbox_lease: UPDATE; outbox_stream: INSERT, UPDATE)"),
        "{told:#?}"
    );
    let operators = "(outbox_audit: SELECT, INSERT, UPDATE; outbox_pause: INSERT, DELETE)";
    assert!(told[1].severity == Severity::Warning && told[1].seen.ends_with(operators), "{told:#?}");
    mend(&world.settings, told[0])?;
    settings.console.enabled = false;
    let report = doctor::examine(&settings).await;
    mend(&world.settings, only(&report, "privileges", Severity::Note, operators))?;
    let report = doctor::examine(&settings).await;
    passes(&report, "privileges");
    passes(&report, "writers");
    mend(&world.settings, only(&report, "postgres-visibility", Severity::Note, "sees only its own sessions"))?;
    passes(&doctor::examine(&settings).await, "postgres-visibility");
    world.database.psql(&format!("DROP OWNED BY {role}; DROP ROLE {role};"))?;
    Ok(())
}

/// Nothing can be read then, not even which migration there is, and the one finding about it says all.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_any_right_is_told_exactly_what_to_grant() -> Result<()> {
    for reads_the_version in [false, true] {
        let mut world = World::new().await?;
        let (role, schema) = (format!("s_{}", world.database.name()), "our \"events\"");
        let name = r#""our ""events""""#;
        world.settings.database.schema = schema.to_owned();
        let migrated = commitstream::outbox::OutboxRepository::new(schema);
        migrated.migrate(&mut world.connect().await?).await?;
        world.database.psql(&format!("CREATE ROLE {role} LOGIN PASSWORD 'p';"))?;
        if reads_the_version {
            world
                .database
                .psql(&format!("GRANT USAGE ON SCHEMA {name} TO {role}; GRANT SELECT ON {name}.outbox_migration TO {role};"))?;
        }
        let mut settings = world.settings.clone();
        let (_, place) = world.database.url().rsplit_once('@').context("a login")?;
        settings.database.url = Some(format!("postgres://{role}:p@{place}"));
        let report = doctor::examine(&settings).await;
        let told = found(&report, "privileges");
        let severities: Vec<_> = told.iter().map(|finding| finding.severity).collect();
        assert_eq!(severities, [Severity::Error, Severity::Warning], "{told:#?}");
        assert!(!report.findings.iter().any(|finding| finding.seen.contains("denied")), "{report:#?}");
        let first = if reads_the_version {
            "event_inbox: SELECT, DELETE; event_outbox: SELECT, "
        } else {
            "schema: USAGE; event_inbox: "
        };
        assert!(told[0].seen.contains(&format!("({first}")), "{told:#?}");
        // A relay works with these, and whoever uses the console with the others.
        mend(&world.settings, told[0])?;
        let report = doctor::examine(&settings).await;
        mend(
            &world.settings,
            only(&report, "privileges", Severity::Warning, "lacks rights on the outbox tables (outbox_audit: "),
        )?;
        let report = doctor::examine(&settings).await;
        ["privileges", "migration", "schema", "leases", "failed-events", "pause"]
            .into_iter()
            .for_each(|check| passes(&report, check));
        world.database.psql(&format!("DROP OWNED BY {role}; DROP ROLE {role};"))?;
    }
    Ok(())
}

/// A look that takes too long is a finding, and all others are there.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_locked_is_a_finding_of_its_own() -> Result<()> {
    let events = locked("event_outbox", &["backlog", "failed-events", "writers"], "relays");
    let relays = locked("outbox_relay, outbox_lease, outbox_pause", &["schema", "relays", "pause"], "failed-events");
    let batches = locked("outbox_batch", &["open-batches", "writers"], "relays");
    let migration = locked("outbox_migration", &["migration"], "autovacuum");
    // Mostly waiting.
    tokio::try_join!(events, relays, batches, migration)?;
    Ok(())
}

async fn locked(tables: &str, unknown: &[&str], known: &str) -> Result<()> {
    let world = World::new().await?;
    let mut other = world.connect().await?;
    let mut transaction = other.begin().await?;
    transaction.execute(sqlx::AssertSqlSafe(format!("LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE"))).await?;
    let report = examine(&world).await;
    for check in unknown {
        only(&report, check, Severity::Warning, "this could not be examined: PostgreSQL refused while ");
    }
    assert!(report.passed.contains(&known) || !found(&report, known).is_empty(), "{tables}: {known}");
    passes(&report, "redis-reachable");
    Ok(())
}

/// What is read in full is 270 MiB for 35 rows.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_and_an_index_that_are_mostly_empty_are_found_and_mended() -> Result<()> {
    let world = World::of(Form::Whole).await?;
    // So that few rows fill many pages.
    world.database.psql(
        "ALTER TABLE event_outbox SET (fillfactor = 10, autovacuum_enabled = off);
         ALTER TABLE event_inbox SET (autovacuum_enabled = off);
         ALTER INDEX event_inbox_pkey SET (fillfactor = 10);
         INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
         SELECT 'E', 'user', n::text, jsonb_build_object('x', repeat('x', 500)) FROM generate_series(1, 35000) n;
         INSERT INTO event_inbox (consumer, event_id) SELECT repeat('mail', 50), gen_random_uuid() FROM generate_series(1, 35000);
         REINDEX INDEX event_inbox_pkey;
         DELETE FROM event_outbox WHERE seq % 1000 <> 0;
         DELETE FROM event_inbox WHERE ctid NOT IN (SELECT ctid FROM event_inbox LIMIT 35);",
    )?;
    // What a session has counted is added some time after its end, and must not come on top of what VACUUM counts.
    let deleted = "SELECT sum(pg_stat_get_tuples_deleted(oid)) FROM pg_class WHERE relname IN ('event_outbox', 'event_inbox');";
    eventually("the deleted rows to be counted", async || Ok(world.database.psql(deleted)?.trim() == "69930")).await?;
    // Not always the first one removes them: autovacuum may be looking at the catalog of this database just then.
    let mut report = Report::default();
    eventually("vacuum to leave 35 of each", async || {
        world.database.psql("VACUUM event_outbox, event_inbox;")?;
        report = examine(&world).await;
        let told = found(&report, "bloat");
        Ok(told.len() == 2 && told[0].seen.ends_with(" for 35 entries") && told[1].seen.ends_with(" for 35 rows"))
    })
    .await?;
    let told = found(&report, "bloat");
    assert!(told[0].severity == Severity::Warning && told[0].seen.starts_with("the index event_inbox_pkey takes "), "{told:#?}");
    assert!(told[1].severity == Severity::Note && told[1].seen.starts_with("the table event_outbox takes 2"), "{told:#?}");
    eventually_mended(&world, "bloat").await
}

#[tokio::test(flavor = "multi_thread")]
async fn constraints_triggers_and_functions_of_others_are_found_and_mended() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        world.database.psql(
            "ALTER TABLE event_outbox DROP CONSTRAINT event_outbox_aggregate_type_has_no_brace,
                 ADD CONSTRAINT event_outbox_aggregate_type_has_no_brace CHECK (aggregate_type <> '');
             CREATE FUNCTION other() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             DROP TRIGGER event_outbox_wake_relay ON event_outbox;
             CREATE TRIGGER event_outbox_wake_relay AFTER DELETE ON event_outbox FOR EACH STATEMENT EXECUTE FUNCTION other();
             ALTER FUNCTION outbox_wake_relay() RENAME TO was_outbox_wake_relay;",
        )?;
        let report = examine(&world).await;
        let told = found(&report, "schema");
        let seen: Vec<_> = told.iter().map(|finding| finding.seen.as_str()).collect();
        assert_eq!(seen.len(), 3, "{seen:#?}");
        assert!(
            seen[0].starts_with("the constraint event_outbox.event_outbox_aggregate_type_has_no_brace is CHECK "),
            "{seen:#?}"
        );
        assert_eq!(seen[1], "the function outbox_wake_relay is missing");
        assert!(seen[2].starts_with("the trigger event_outbox_wake_relay is type 8 EXECUTE other, not type 4 "), "{seen:#?}");
        assert!(told.iter().all(|finding| finding.severity == Severity::Error));
        mend(&world.settings, told[0])?;
        assert!(told[1].mend.starts_with("apply the CREATE FUNCTION outbox_wake_relay of migrations/V9"), "{:?}", told[1]);
        let mut functions = MIGRATIONS[6].split("CREATE OR REPLACE FUNCTION ");
        let function = functions.find(|text| text.starts_with("outbox_wake_relay")).context("a function")?;
        let function: String = function.split_inclusive("$$").take(2).collect();
        world.database.psql(&format!("CREATE OR REPLACE FUNCTION {function};"))?;
        mend(&world.settings, told[2])?;
        passes(&examine(&world).await, "schema");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_and_tables_that_are_gone_are_found() -> Result<()> {
    let world = World::new().await?;
    world.database.psql("ALTER TABLE outbox_audit DROP COLUMN about;")?;
    let report = examine(&world).await;
    let finding = only(&report, "schema", Severity::Error, "the column outbox_audit.about is missing");
    assert!(finding.mend.contains(r#"make the column about of "public".outbox_audit again what the files"#), "{finding:?}");
    world.database.psql("DROP TABLE event_inbox;")?;
    let report = examine(&world).await;
    let told = found(&report, "schema");
    assert!(told.iter().any(|finding| finding.seen.starts_with("the column event_inbox.consumer is missing")), "{told:#?}");
    only(&report, "indexes", Severity::Error, "the index idx_inbox_handled is missing");
    Ok(())
}

/// It is not validated by the migration, which would have to read the table.
#[tokio::test(flavor = "multi_thread")]
async fn a_constraint_may_be_validated_and_is_mended_without_reading_the_table() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        let name = "event_outbox_aggregate_type_does_not_end_in_dead";
        world.database.psql(&format!("ALTER TABLE event_outbox VALIDATE CONSTRAINT {name};"))?;
        passes(&examine(&world).await, "schema");
        world.database.psql(&format!("ALTER TABLE event_outbox DROP CONSTRAINT {name};"))?;
        world.database.psql(
            "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload) VALUES ('E', 'user:dead', '1', '{}');",
        )?;
        let report = examine(&world).await;
        let seen = format!("the constraint event_outbox.{name} is missing");
        mend(&world.settings, only(&report, "schema", Severity::Error, &seen))?;
        passes(&examine(&world).await, "schema");
        let relay = world.relay()?;
        eventually("what came meanwhile to fail", async || Ok(world.stats().await?.failed == 1)).await?;
        relay.stop().await?;
        assert_eq!(world.audit().await?, 0);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_and_a_clean_up_that_is_switched_off_are_found() -> Result<()> {
    for (form, days) in [(Form::Whole, 1), (Form::ByDay, 2)] {
        let mut world = World::of(form).await?;
        let mut connection = world.connect().await?;
        world.outbox.pause(&mut connection, "ann").await?;
        only(&examine(&world).await, "pause", Severity::Warning, "publishing is paused by ann since ");
        world.outbox.resume(&mut connection, "ann").await?;
        passes(&examine(&world).await, "pause");

        world.insert(1, 1).await?;
        world.settings.outbox.cleanup.enabled = false;
        let kept = world.settings.outbox.cleanup.retention_days + days;
        for (hours, is_found) in [(-1, false), (1, true)] {
            world.database.psql(&format!(
                "UPDATE event_outbox SET status = 'PUBLISHED', published_at = now() - interval '{kept} days {hours} hours';"
            ))?;
            let report = examine(&world).await;
            assert_eq!(found(&report, "cleanup").len(), usize::from(is_found), "{form:?} {hours}");
        }
        let report = examine(&world).await;
        let finding = only(&report, "cleanup", Severity::Warning, "published events are kept for ");
        assert!(finding.why.starts_with("outbox.cleanup.enabled is false"), "{finding:?}");
    }
    Ok(())
}
