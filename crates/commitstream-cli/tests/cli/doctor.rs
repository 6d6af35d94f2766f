//! `doctor`: as the person on call reads it, as programs do, and its exit codes.

use anyhow::{Context, Result};
use commitstream::doctor::CHECKS;
use commitstream_sandbox::{Postgres, Redis};

use crate::support::{Running, World, eventually, finish};

#[test]
fn it_says_what_is_wrong_why_and_what_to_do_and_the_worst_first() -> Result<()> {
    let world = World::new()?;
    world.publish_user("1")?;
    let answer = world.run(&["doctor"])?;
    assert_eq!((answer.code, answer.stderr.as_str()), (Some(4), ""), "{answer:?}");
    let lines: Vec<&str> = answer.stdout.lines().collect();
    let at =
        lines.iter().position(|line| line.starts_with("error:   no relay is alive; waiting: 1 event")).context("a finding")?;
    assert!(lines[at].ends_with("[relays]"), "{answer:?}");
    assert!(lines[at + 1].starts_with("  why   nothing is published"), "{answer:?}");
    assert_eq!(lines[at + 2..at + 4], ["  fix   commitstream relay", ""]);
    let severities: Vec<&str> = lines.iter().filter_map(|line| line.split_once(": ").map(|(word, _)| word)).collect();
    assert!(severities.iter().rposition(|word| *word == "error") < severities.iter().position(|word| *word == "warning"));
    let last = lines.last().context("a verdict")?;
    assert!(last.contains(" errors, ") && last.ends_with(" checks passed"), "{answer:?}");
    let listed = world.run(&["doctor", "--passed"])?;
    assert!(listed.stdout.contains(" checks passed:\n") && listed.stdout.contains("\n  migration\n"), "{listed:?}");
    Ok(())
}

#[test]
fn programs_get_everything_and_the_exit_code_is_the_worst() -> Result<()> {
    let world = World::new()?;
    let answer = world.run(&["doctor", "--json"])?;
    assert_eq!(answer.code, Some(4), "the sandbox does not sync: {answer:?}");
    let json = answer.json()?;
    assert_eq!(json["worst"], "error");
    let relays = json["findings"].as_array().context("findings")?.iter().find(|finding| finding["check"] == "relays");
    let relays = relays.context("the finding")?;
    assert_eq!((&relays["severity"], &relays["mend"]), (&"note".into(), &"commitstream relay".into()));
    assert!(relays["seen"].is_string() && relays["why"].is_string());
    assert!(json["passed"].as_array().context("passed")?.contains(&"schema".into()));
    Ok(())
}

/// Exit codes 0 and 3, on servers that sync.
#[test]
fn where_all_is_well_it_says_so() -> Result<()> {
    let postgres = Postgres::start_with(&[("fsync", "on")])?;
    let redis = Redis::start_with(&[("appendfsync", "everysec")])?;
    let world = World::on(&redis)?;
    let on_own = |args: &[&str]| {
        let mut command = world.command(args);
        command.env("DATABASE_URL", postgres.url());
        command
    };
    finish(on_own(&["migrate"]))?;
    let answer = finish(on_own(&["doctor"]))?;
    assert_eq!(answer.code, Some(0), "with nothing to relay, no relay is a note: {answer:?}");
    assert!(answer.stdout.starts_with("note:    no relay is alive, and nothing waits  [relays]\n"), "{answer:?}");
    assert!(answer.stdout.contains(&format!("\n2 notes; {} checks passed\n", CHECKS.len() - 2)), "{answer:?}");
    finish(on_own(&["relays", "pause"]))?;
    let answer = finish(on_own(&["doctor"]))?;
    assert_eq!(answer.code, Some(3), "a pause is a warning: {answer:?}");
    assert!(answer.stdout.contains(&format!("\n1 warning, 2 notes; {} checks passed\n", CHECKS.len() - 3)), "{answer:?}");
    finish(on_own(&["relays", "resume"]))?;

    let _relay = Running::new(on_own(&["relay"]))?;
    eventually("the relay to be seen", || Ok(!finish(on_own(&["doctor"]))?.stdout.contains("no relay is alive")))?;
    let answer = finish(on_own(&["doctor"]))?;
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert!(answer.stdout.starts_with("note:    no event was ever written"), "{answer:?}");
    finish(on_own(&["publish", "--type", "A", "--aggregate-type", "user", "--aggregate-id", "1"]))?;
    let answer = finish(on_own(&["doctor"]))?;
    assert_eq!((answer.code, answer.stdout), (Some(0), format!("all is well; {} checks passed\n", CHECKS.len())));
    let json = finish(on_own(&["doctor", "--json"]))?.json()?;
    assert_eq!((&json["worst"], json["findings"].as_array().map(Vec::len)), (&serde_json::Value::Null, Some(0)));
    Ok(())
}

#[test]
fn servers_that_are_not_set_or_away_are_findings_and_wrong_settings_are_wrong_use() -> Result<()> {
    let world = World::new()?;
    let mut without = world.command(&["doctor"]);
    without.env_remove("DATABASE_URL").env("REDIS_URL", "redis://:hunter2@127.0.0.1:1");
    let answer = finish(without)?;
    assert_eq!(answer.code, Some(4), "{answer:?}");
    assert!(answer.stdout.contains("error:   app.database.url (DATABASE_URL) is not set  [postgres-reachable]"), "{answer:?}");
    assert!(answer.stdout.contains("error:   redis://:***@127.0.0.1:1: ") && !answer.stdout.contains("hunter2"), "{answer:?}");
    let mut wrong = world.command(&["doctor"]);
    wrong.env("OUTBOX_BATCH_SIZE", "none");
    assert_eq!(finish(wrong)?.code, Some(2));
    Ok(())
}
