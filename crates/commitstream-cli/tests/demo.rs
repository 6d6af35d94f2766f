//! `commitstream demo`, as a newcomer runs it.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::{Redis, Sandbox, TestDatabase};
use redis::streams::{StreamId, StreamRangeReply};
use serde_json::Value;

/// The program, in an environment that names no servers and a directory without settings.
fn commitstream() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_commitstream"));
    for variable in ["DATABASE_URL", "REDIS_URL", "OUTBOX_ENABLED", "EVENT_PUBLISHING_STRATEGY"] {
        command.env_remove(variable);
    }
    command.current_dir(env!("CARGO_TARGET_TMPDIR"));
    command
}

/// The one JSON object on standard output, which says that all is well.
fn clean_report(output: &Output) -> Result<Value> {
    let stdout = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {stdout}{}", output.status, String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&stdout).with_context(|| format!("not one JSON object: {stdout}"))?;
    for fault in ["lost", "duplicated", "out_of_order", "invented", "failed_operations"] {
        ensure!(report[fault] == 0, "{fault}: {report}");
    }
    ensure!(report["ok"] == true, "{report}");
    for lane in ["critical", "high_frequency"] {
        ensure!(report[lane]["events"].as_u64() > Some(0), "{lane}: {report}");
        ensure!(report[lane]["p50_ms"].as_f64() <= report[lane]["p99_ms"].as_f64(), "{lane}: {report}");
    }
    Ok(report)
}

#[test]
fn with_private_servers() -> Result<()> {
    let output = commitstream().args(["demo", "--seconds", "3", "--rate", "500", "--json"]).output()?;
    let report = clean_report(&output)?;
    ensure!(report["private_servers"] == true, "{report}");
    ensure!(report["rolled_back"].as_u64() > Some(0), "{report}");
    Ok(())
}

#[test]
fn on_given_servers_nothing_stays_behind() -> Result<()> {
    let database = Sandbox::shared().database()?;
    let redis = Redis::start()?;
    let before = schemas(&database)?;
    let mut command = commitstream();
    command.env("DATABASE_URL", database.url()).env("REDIS_URL", redis.url());
    let report = clean_report(&command.args(["demo", "--seconds", "3", "--rate", "500", "--json"]).output()?)?;
    ensure!(report["private_servers"] == false, "{report}");
    ensure!(schemas(&database)? == before, "{}", schemas(&database)?);
    ensure!(keys(&redis)? == 0);
    Ok(())
}

#[test]
fn ctrl_c_ends_early_with_a_summary_and_nothing_stays_behind() -> Result<()> {
    let database = Sandbox::shared().database()?;
    let redis = Redis::start()?;
    let before = schemas(&database)?;
    let mut demo = long_demo(&database, &redis)?;
    entries(&mut demo, &redis)?;
    interrupt(&demo)?;
    let report = clean_report(&demo.wait_with_output()?)?;
    ensure!(report["seconds"].as_f64() < Some(60.0), "{report}");
    ensure!(schemas(&database)? == before, "{}", schemas(&database)?);
    ensure!(keys(&redis)? == 0);
    Ok(())
}

#[test]
fn a_stream_that_somebody_changed_is_found_out() -> Result<()> {
    let database = Sandbox::shared().database()?;
    let redis = Redis::start()?;
    let mut demo = long_demo(&database, &redis)?;
    let (stream, [first, second]) = entries(&mut demo, &redis)?;
    let mut connection = redis::Client::open(redis.url())?.get_connection()?;
    let text = |value: &redis::Value| redis::from_redis_value::<String>(value.clone());
    let fields = first.map.iter().map(|(name, value)| Ok((name, text(value)?))).collect::<Result<Vec<_>>>()?;
    redis::cmd("XADD").arg(&stream).arg("*").arg(fields).exec(&mut connection)?;
    redis::cmd("XDEL").arg(&stream).arg(&second.id).exec(&mut connection)?;
    interrupt(&demo)?;
    let output = demo.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["ok"] == false && report["duplicated"] == 1 && report["lost"] == 1, "{report}");
    ensure!(report["faults"].to_string().contains(&text(&second.map["id"])?), "{report}");
    ensure!(keys(&redis)? == 0);
    Ok(())
}

#[test]
fn too_much_is_wrong_use() -> Result<()> {
    let output = commitstream().args(["demo", "--seconds", "3600", "--rate", "100000"]).output()?;
    ensure!(output.status.code() == Some(2), "{}", output.status);
    ensure!(String::from_utf8_lossy(&output.stderr).contains("lower one of them"));
    Ok(())
}

/// A demonstration that runs until it is interrupted.
fn long_demo(database: &TestDatabase, redis: &Redis) -> Result<Child> {
    let mut command = commitstream();
    command.env("DATABASE_URL", database.url()).env("REDIS_URL", redis.url());
    command.args(["demo", "--seconds", "600", "--rate", "500", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command.spawn()?)
}

/// Waits until a stream has two entries, which means that the load is running.
fn entries(demo: &mut Child, redis: &Redis) -> Result<(String, [StreamId; 2])> {
    let mut connection = redis::Client::open(redis.url())?.get_connection()?;
    loop {
        let streams: Vec<String> = redis::cmd("KEYS").arg("demo_*:events:user").query(&mut connection)?;
        for stream in streams {
            let found: StreamRangeReply =
                redis::cmd("XRANGE").arg(&stream).arg(&["-", "+", "COUNT", "2"]).query(&mut connection)?;
            if let Ok(two) = <[StreamId; 2]>::try_from(found.ids) {
                return Ok((stream, two));
            }
        }
        ensure!(demo.try_wait()?.is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn interrupt(demo: &Child) -> Result<()> {
    ensure!(Command::new("kill").args(["-INT", &demo.id().to_string()]).status()?.success());
    Ok(())
}

fn schemas(database: &TestDatabase) -> Result<String> {
    Ok(database
        .psql("SELECT string_agg(nspname, ' ' ORDER BY nspname) FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_';")?)
}

fn keys(redis: &Redis) -> Result<u64> {
    let mut connection = redis::Client::open(redis.url())?.get_connection()?;
    Ok(redis::cmd("DBSIZE").query(&mut connection)?)
}
