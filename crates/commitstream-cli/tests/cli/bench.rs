//! `commitstream bench`, scaled down: its shape, and what it leaves behind. What the figures are worth is for a quiet machine to say.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::{Redis, Sandbox, TestDatabase};
use serde_json::Value;

use crate::support::{Answer, Running, World, bare_command, eventually, finish};

/// Servers on which nobody else leaves anything.
fn servers() -> Result<(World, Redis)> {
    let redis = Redis::start()?;
    let world = World { redis_url: redis.url(), ..World::unmigrated()? };
    Ok((world, redis))
}

fn ensure_nothing_is_left(world: &World) -> Result<()> {
    ensure!(schemas(&world.database)? == "0\n", "a schema is left behind");
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut world.redis()?)?;
    ensure!(keys.is_empty(), "left behind: {keys:?}");
    Ok(())
}

fn schemas(database: &TestDatabase) -> Result<String> {
    Ok(database.psql("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'commitstream_bench_%';")?)
}

/// A figure, what it is compared with, and the rounds that both come from.
fn ensure_figure(figure: &Value) -> Result<()> {
    ensure!(figure["figure"].as_f64() > Some(0.0) && figure["unit"].is_string() && figure["met"].is_boolean(), "{figure}");
    let round = &figure["rounds"][0];
    ensure!(figure["figure"] == round["figure"] && figure["baseline"] == round["baseline"], "{figure}");
    ensure!(figure["ratio"] == round["ratio"], "{figure}");
    Ok(())
}

#[test]
fn one_benchmark_is_one_object_and_nothing_stays_behind() -> Result<()> {
    let (world, _redis) = servers()?;
    let report = world.json(&["bench", "drain", "--events", "2000", "--rounds", "1"])?;
    ensure!(report["name"] == "drain" && report["aim"] == "ratio ≥ 1.3" && report["unit"] == "events/s", "{report}");
    ensure!(report["baseline"].as_f64() > Some(0.0) && report["rounds"].as_array().map(Vec::len) == Some(1), "{report}");
    ensure_figure(&report)?;
    ensure!(report["figures"].as_array().map(Vec::len) == Some(1), "{report}");
    ensure_figure(&report["figures"][0])?;
    ensure_nothing_is_left(&world)
}

#[test]
fn several_benchmarks_are_a_list_and_their_relays_end() -> Result<()> {
    let (world, _redis) = servers()?;
    let names = ["drain", "held", "latency", "sustained", "publish", "publish_all", "observed", "idle"];
    let arguments = ["--retention", "0", "--events", "300", "--rounds", "1"];
    let report = world.json(&[&["bench"], &names[..], &arguments].concat())?;
    let reports = report.as_array().context("a list")?;
    let found: Vec<_> = reports.iter().filter_map(|report| report["name"].as_str()).collect();
    ensure!(found == names, "{found:?}");
    ensure!(reports[0]["figures"][0]["name"] == "drain, retention 0", "{report}");
    for figure in reports.iter().flat_map(|report| report["figures"].as_array().into_iter().flatten()) {
        ensure!(figure["rounds"].as_array().map(Vec::len) == Some(1), "{figure}");
    }
    ensure_nothing_is_left(&world)?;
    let sessions = "SELECT count(*) FROM pg_stat_activity
        WHERE application_name LIKE 'commitstream%' AND datname = current_database();";
    eventually("the sessions of all relays to end", || Ok(world.database.psql(sessions)? == "0\n"))
}

#[test]
fn the_long_benchmarks_and_private_servers() -> Result<()> {
    let page = Path::new(env!("CARGO_TARGET_TMPDIR")).join("benchmarks.md");
    let chart = page.with_extension("svg");
    fs::remove_file(&page).ok();
    let files = ["--markdown", &page.to_string_lossy(), "--svg", &chart.to_string_lossy()];
    let Answer { code, stdout, stderr } = finish(with_path(
        &[&["bench", "streams", "scale", "cleanup", "console", "--events", "500", "--rounds", "1"], &files[..]].concat(),
    ))?;
    ensure!(code == Some(0), "{stdout}{stderr}");
    ensure!(stderr.contains("a private PostgreSQL"), "{stderr}");
    for name in ["streams, 64 tasks", "scale, 5,000,000 waiting", "scale, 4 relays", "cleanup, p99 during", "console, failures"] {
        ensure!(stdout.contains(name), "{name}: {stdout}");
        ensure!(fs::read_to_string(&page)?.contains(&format!("| {name} |")), "{name}");
    }
    ensure!(stdout.contains("Scaled down to 500 events"), "{stdout}");
    ensure!(fs::read_to_string(&chart)?.contains("streams, 64 tasks"));
    Ok(())
}

/// Private servers are looked for in the PATH.
fn with_path(arguments: &[&str]) -> std::process::Command {
    let mut command = bare_command(arguments);
    command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command
}

#[test]
fn what_is_interrupted_leaves_nothing_behind() -> Result<()> {
    let (world, _redis) = servers()?;
    let mut bench = Running::new(world.command(&["bench", "idle"]))?;
    eventually("a relay of the benchmark", || {
        let prefix = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'commitstream relay%'";
        Ok(world.database.psql(&format!("{prefix} AND datname = current_database();"))? != "0\n")
    })?;
    bench.signal("INT")?;
    let answer = bench.ended()?;
    ensure!(answer.code == Some(130) && answer.stdout.is_empty() && answer.stderr.contains("interrupted"), "{answer:?}");
    ensure_nothing_is_left(&world)
}

#[test]
fn a_wrong_name_and_a_page_without_a_place_are_wrong_use() -> Result<()> {
    let answer = finish(bare_command(&["bench", "drian"]))?;
    ensure!(answer.code == Some(2) && answer.stderr.contains("drain"), "{answer:?}");
    let page = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-marks.md");
    fs::write(&page, "# Not ours\n")?;
    let answer = finish(bare_command(&["bench", "--markdown", &page.to_string_lossy()]))?;
    ensure!(answer.code == Some(2) && answer.stderr.contains("no place for the table"), "{answer:?}");
    ensure!(fs::read_to_string(&page)? == "# Not ours\n");
    for names in [["publish", "idle"].as_slice(), &["held"]] {
        let answer = finish(bare_command(&[&["bench", "--retention", "0"], names].concat()))?;
        ensure!(answer.code == Some(2) && answer.stderr.contains("--retention is for drain"), "{answer:?}");
    }
    Ok(())
}

/// It may take forty minutes until there is something to write.
#[test]
fn a_file_that_cannot_be_written_is_told_before_anything_is_measured() -> Result<()> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).to_string_lossy();
    for option in ["--markdown", "--svg"] {
        for file in [&format!("{directory}/absent/x.md"), &*directory] {
            let answer = finish(with_path(&["bench", "idle", "--events", "100", "--rounds", "1", option, file]))?;
            ensure!(answer.code == Some(1) && answer.stderr.contains(file), "{answer:?}");
            ensure!(!answer.stderr.contains("a private PostgreSQL"), "{answer:?}");
        }
    }
    Ok(())
}

#[test]
fn a_shared_server_with_a_password_has_no_redis_benchmark() -> Result<()> {
    let sandbox = Sandbox::shared();
    let world = World { redis_url: sandbox.redis_url(), ..World::unmigrated()? };
    let report = world.json(&["bench", "streams", "--events", "200", "--rounds", "1"])?;
    ensure!(report["figure"].is_null() && report["notes"][0].as_str().unwrap_or("").contains("skipped"), "{report}");
    Ok(())
}
