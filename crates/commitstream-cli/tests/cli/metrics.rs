//! Metrics: what a daemon exports, and the files that name them.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use commitstream::metrics::METRICS;
use redis::streams::StreamRangeReply;

use crate::http::Daemon;
use crate::support::{World, eventually};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(root().join(path)).with_context(|| path.to_owned())
}

/// Names of metrics in a text, without what the format adds to those of histograms.
fn names(text: &str) -> BTreeSet<String> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_of_name(c)).filter(|word| word.starts_with("commitstream_"));
    let base =
        |word: &str| ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word).to_owned();
    words.map(base).collect()
}

fn known() -> BTreeSet<String> {
    METRICS.iter().map(|metric| metric.name.to_owned()).collect()
}

/// The value of the one sample whose name and labels are these.
fn value(text: &str, sample: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn a_daemon_exports_what_is_documented_with_right_values() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(&world)?;
    for user in ["1", "2", "3"] {
        world.publish_user(user)?;
    }
    let expected = [
        ("commitstream_events_total{lane=\"outbox\",type=\"UserCreated\",outcome=\"published\"}", Some(3.0)),
        ("commitstream_backlog_events", Some(0.0)),
        ("commitstream_append_latency_seconds_count", None),
        ("commitstream_batch_events_sum", Some(3.0)),
        ("commitstream_redis_seconds_count{operation=\"append\"}", None),
        ("commitstream_postgres_seconds_count{operation=\"settle\"}", None),
        ("commitstream_postgres_seconds_count{operation=\"claim\"}", None),
        ("commitstream_partitions", Some(64.0)),
        ("commitstream_relay_state{state=\"active\"}", Some(1.0)),
        ("commitstream_relay_state{state=\"unable\"}", Some(0.0)),
        ("commitstream_failed_events", Some(0.0)),
        ("commitstream_open_batches", Some(0.0)),
        ("commitstream_oldest_unpublished_age_seconds", Some(0.0)),
        ("commitstream_duplicates_prevented_total", Some(0.0)),
        ("commitstream_failures_total{server=\"redis\",class=\"unreachable\"}", Some(0.0)),
    ];
    // All of them: an event is counted before its batch is settled, and the backlog is read now and then.
    let mut text = String::new();
    for (sample, expected) in expected {
        eventually(&format!("{sample} to be {}", expected.map_or("counted".to_owned(), |value| value.to_string())), || {
            text = daemon.get("/metrics")?.1;
            Ok(value(&text, sample).is_some_and(|found| expected.map_or(found > 0.0, |expected| expected == found)))
        })?;
    }
    // A consumer runs in the process of an application, and no stream has a group.
    let of_consumers = |name: &String| name.starts_with("commitstream_consumer_");
    let expected: BTreeSet<_> = known().into_iter().filter(|name| !of_consumers(name)).collect();
    assert_eq!(names_of_samples(&text), expected);
    for metric in METRICS.iter().filter(|metric| expected.contains(metric.name)) {
        assert!(text.contains(&format!("# HELP {} ", metric.name)), "{} has no help text", metric.name);
    }
    check_metrics(&text)?;
    // As Prometheus asks.
    let (_, open) =
        daemon.get_as("/metrics", "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4")?;
    assert!(open.contains("# TYPE commitstream_events counter\n") && open.ends_with("\n# EOF\n"), "{open}");
    assert_eq!(names_of_samples(&open), expected);
    daemon.end()
}

#[test]
fn events_that_are_given_up_are_counted_and_stand_in_the_backlog_until_somebody_acts() -> Result<()> {
    let world = World::new()?;
    let insert = "INSERT INTO event_outbox (event_type, aggregate_type, aggregate_id, payload)
                  SELECT 'UserCreated', 'user', n::text, jsonb_build_object('fill', repeat('x', 2000000)) FROM generate_series(1, 2) n
                  RETURNING id;";
    let answer = world.database.psql(insert)?;
    let ids: Vec<&str> = answer.lines().collect();
    // A look at the backlog each quarter of this.
    let daemon = Daemon::with(&world, &[("OUTBOX_MAX_RETRIES", "0"), ("HTTP_STALLED_AFTER", "1s")])?;
    let failed = "commitstream_events_total{lane=\"outbox\",type=\"UserCreated\",outcome=\"failed\"}";
    let shows = |events: f64| {
        let text = daemon.get("/metrics")?.1;
        Ok(value(&text, failed) == Some(2.0) && value(&text, "commitstream_failed_events") == Some(events))
    };
    eventually("both to be counted", || shows(2.0))?;
    world.ok(&["failed", "discard", ids[0].trim()])?;
    eventually("one to be left", || shows(1.0))?;
    assert_eq!(daemon.health("/livez")?.0, 200, "events that are refused are no reason for a restart");
    daemon.end()
}

#[test]
fn the_lag_of_a_group_is_exported_whether_a_consumer_is_alive_or_not() -> Result<()> {
    let world = World::new()?;
    let (stream, redis) = (world.user_stream(), &mut world.redis()?);
    world.note("user")?;
    redis::cmd("XGROUP").arg(&["CREATE", &stream, "mail", "0", "MKSTREAM"]).exec(redis)?;
    // A look each quarter of this.
    let daemon = Daemon::with(&world, &[("HTTP_STALLED_AFTER", "1s")])?;
    let sample = format!("commitstream_consumer_lag_events{{stream=\"{stream}\",group=\"mail\"}}");
    let becomes = |events: f64| {
        eventually(&format!("a lag of {events}"), || Ok(value(&daemon.get("/metrics")?.1, &sample) == Some(events)))
    };
    becomes(0.0)?;
    for user in ["1", "2", "3", "4"] {
        world.publish_user(user)?;
    }
    becomes(4.0)?;
    let entries: StreamRangeReply = redis::cmd("XRANGE").arg(&[&stream, "-", "+"]).query(redis)?;
    let id = |n: usize| entries.ids[n].id.clone();
    redis::cmd("XREADGROUP").arg(&["GROUP", "mail", "c", "COUNT", "1", "STREAMS", &stream, ">"]).exec(redis)?;
    // Where an entry was deleted, Redis does not know the lag.
    redis::cmd("XDEL").arg(&[&stream, &id(2)]).exec(redis)?;
    becomes(3.0)?;
    redis::cmd("XACK").arg(&[&stream, "mail", &id(0)]).exec(redis)?;
    becomes(2.0)?;
    check_metrics(&daemon.get("/metrics")?.1)?;
    redis::cmd("XGROUP").arg(&["DESTROY", &stream, "mail"]).exec(redis)?;
    becomes(0.0)?;
    daemon.end()
}

fn names_of_samples(text: &str) -> BTreeSet<String> {
    names(&text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect::<String>())
}

#[test]
fn every_metric_is_documented_and_what_dashboards_and_rules_name_exists() -> Result<()> {
    let documented = read("docs/metrics.md")?;
    for metric in METRICS {
        let row = documented.lines().find(|line| line.starts_with(&format!("| `{}` |", metric.name)));
        let row = row.with_context(|| format!("docs/metrics.md has no row for {}", metric.name))?;
        ensure!(row.contains(&format!("{:?}", metric.kind).to_lowercase()), "the kind in {row}");
        for label in metric.labels {
            ensure!(row.contains(&format!("`{label}`")), "{label} is missing in {row}");
        }
    }
    for file in [
        "docs/metrics.md",
        "deploy/grafana/commitstream.json",
        "deploy/prometheus/alerts.yml",
        "deploy/prometheus/alerts.test.yml",
    ] {
        let unknown: Vec<_> = names(&read(file)?).difference(&known()).cloned().collect();
        ensure!(unknown.is_empty(), "{file} names {unknown:?}");
    }
    let _: serde_json::Value = serde_json::from_str(&read("deploy/grafana/commitstream.json")?)?;
    Ok(())
}

#[test]
fn the_alert_rules_fire_when_they_should() -> Result<()> {
    let mut promtool = Command::new("promtool");
    promtool.args(["test", "rules", "alerts.test.yml"]).current_dir(root().join("deploy/prometheus"));
    match promtool.output() {
        Ok(done) => ensure!(done.status.success(), "{done:?}"),
        Err(error) => {
            println!(
                "promtool cannot be run ({error}): the rules are not tested; Debian has it in the package prometheus, and scripts/install-servers.sh --tests installs it"
            )
        }
    }
    Ok(())
}

/// Whether Prometheus can read this.
fn check_metrics(text: &str) -> Result<()> {
    let started = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            println!(
                "promtool cannot be run ({error}): the format is not checked; Debian has it in the package prometheus, and scripts/install-servers.sh --tests installs it"
            );
            return Ok(());
        }
    };
    child.stdin.take().context("standard input is piped")?.write_all(text.as_bytes())?;
    let done = child.wait_with_output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}
