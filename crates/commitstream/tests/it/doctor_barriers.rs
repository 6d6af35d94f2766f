//! What doctor finds of row-level security, triggers, rules and foreign keys that others set up on the tables.

use anyhow::{Context, Result};
use commitstream::doctor::{self, Severity};

use crate::doctor_report::{examine, found, mend, only, passes};
use crate::support::{Form, World};

#[tokio::test(flavor = "multi_thread")]
async fn row_level_security_is_found_and_mended() -> Result<()> {
    let world = World::new().await?;
    passes(&examine(&world).await, "row-security");
    let role = format!("r_{}", world.database.name());
    world.database.psql(&format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'p'; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role};
         ALTER TABLE event_outbox ENABLE ROW LEVEL SECURITY; ALTER TABLE outbox_batch ENABLE ROW LEVEL SECURITY;"
    ))?;
    only(&examine(&world).await, "row-security", Severity::Warning, "event_outbox, outbox_batch, and in force for other users");
    let mut settings = world.settings.clone();
    let (_, place) = world.database.url().rsplit_once('@').context("a login")?;
    settings.database.url = Some(format!("postgres://{role}:p@{place}"));
    world.insert(3, 3).await?;
    let report = doctor::examine(&settings).await;
    let told = only(&report, "row-security", Severity::Error, "event_outbox, outbox_batch, and in force for this user");
    mend(&world.settings, told)?;
    passes(&doctor::examine(&settings).await, "row-security");
    world.database.psql(&format!("DROP OWNED BY {role}; DROP ROLE {role};"))?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_rules_and_references_of_others_are_found() -> Result<()> {
    for form in Form::BOTH {
        let world = World::of(form).await?;
        passes(&examine(&world).await, "triggers");
        world.database.psql(
            "CREATE FUNCTION pass() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
             CREATE TRIGGER before_all BEFORE UPDATE ON event_outbox FOR EACH ROW EXECUTE FUNCTION pass();
             CREATE TRIGGER after_all AFTER INSERT ON outbox_batch FOR EACH ROW EXECUTE FUNCTION pass();
             CREATE RULE nothing AS ON DELETE TO event_inbox DO INSTEAD NOTHING;
             CREATE TABLE receipt (batch_id uuid REFERENCES outbox_batch, other uuid REFERENCES outbox_batch ON DELETE CASCADE);",
        )?;
        let report = examine(&world).await;
        let told = found(&report, "triggers");
        let seen: Vec<_> = told.iter().map(|finding| (finding.severity, finding.seen.as_str())).collect();
        let expected = [
            (Severity::Error, "the rule nothing of event_inbox is none of Commitstream's"),
            (Severity::Warning, "the trigger before_all of event_outbox is none of Commitstream's"),
            (Severity::Note, "the foreign key receipt_batch_id_fkey of receipt refers to outbox_batch"),
            (Severity::Note, "the trigger after_all of outbox_batch is none of Commitstream's"),
        ];
        assert_eq!(seen, expected);
        for finding in told.iter().filter(|finding| finding.mend.contains("psql ")) {
            mend(&world.settings, finding)?;
        }
        only(&examine(&world).await, "triggers", Severity::Note, "receipt_batch_id_fkey");
    }
    Ok(())
}
