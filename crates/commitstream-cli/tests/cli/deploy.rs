//! The files of `deploy` are held to what the binary knows: commands, variables, ports and paths that they name.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::http::Daemon;
use crate::metrics::read;
use crate::support::{World, bare_command, finish};

const DOCKERFILE: &str = "deploy/Dockerfile";
const UNIT: &str = "deploy/commitstream.service";
const COMPOSE: &str = "deploy/compose.yml";
const KUBERNETES: &str = "deploy/kubernetes/relay.yml";
const KUBERNETES_MIGRATE: &str = "deploy/kubernetes/migrate.yml";

/// What stands between the two marks, each time.
fn between<'a>(text: &'a str, begin: &str, end: &str) -> Vec<&'a str> {
    text.split(begin).skip(1).filter_map(|rest| Some(rest.split_once(end)?.0)).collect()
}

/// Words in capitals with an underscore.
fn variables(text: &str) -> BTreeSet<&str> {
    let is_of_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    text.split(|c: char| !is_of_name(c)).filter(|word| word.len() > 3 && word.contains('_')).collect()
}

#[test]
fn commands_and_their_options_exist() -> Result<()> {
    let (dockerfile, unit) = (read(DOCKERFILE)?, read(UNIT)?);
    let (compose, kubernetes) = (read(COMPOSE)?, read(KUBERNETES)? + &read(KUBERNETES_MIGRATE)?);
    let lists = [between(&dockerfile, "CMD [", "]"), between(&compose, "command: [", "]"), between(&kubernetes, "args: [", "]")];
    ensure!(lists.iter().map(Vec::len).eq([1, 2, 2]), "{lists:?}");
    let lists = lists.concat().into_iter().map(|list| list.replace(['"', ','], ""));
    let lines = between(&unit, "ExecStart=/usr/local/bin/commitstream ", "\n").into_iter().map(str::to_owned);
    for line in lists.chain(lines).filter(|line| !line.starts_with("redis-server ")) {
        let words: Vec<&str> = line.split(' ').chain(["--help"]).collect();
        ensure!(finish(bare_command(&words))?.code == Some(0), "commitstream {line}");
    }
    Ok(())
}

#[test]
fn environment_variables_exist_and_their_values_are_taken() -> Result<()> {
    let settings = finish(bare_command(&["config"]))?.stdout;
    let known: BTreeSet<&str> = settings.lines().filter_map(|line| line.split(' ').next_back()).collect();
    let (dockerfile, compose) = (read(DOCKERFILE)?, read(COMPOSE)?);
    for (file, text) in [(DOCKERFILE, &dockerfile), (UNIT, &read(UNIT)?), (COMPOSE, &compose), (KUBERNETES, &read(KUBERNETES)?)] {
        // Of other programs: PostgreSQL, Grafana, and what systemd calls address families.
        let others =
            |name: &str| ["POSTGRES_", "GF_", "AF_", "COMMITSTREAM_CONFIG"].iter().any(|program| name.starts_with(program));
        let named: BTreeSet<&str> = variables(text).into_iter().filter(|name| !others(name)).collect();
        let unknown: Vec<_> = named.difference(&known).collect();
        ensure!(!named.is_empty() && unknown.is_empty(), "{file} names {unknown:?}");
    }
    let mut config = bare_command(&["config"]);
    let image =
        between(&dockerfile, "ENV ", "\n").into_iter().flat_map(|line| line.split(' ')).filter_map(|set| set.split_once('='));
    let composed = compose.lines().filter_map(|line| line.trim().split_once(": "));
    let composed = composed.filter(|(name, _)| known.contains(name)).map(|(name, value)| (name, value.trim_matches('"')));
    config.envs(image.chain(composed));
    let answer = finish(config)?;
    ensure!(answer.code == Some(0) && answer.stdout.contains(" 0.0.0.0:9464 "), "{answer:?}");
    Ok(())
}

#[test]
fn ports_and_paths_are_those_that_a_relay_serves() -> Result<()> {
    let (dockerfile, compose, kubernetes) = (read(DOCKERFILE)?, read(COMPOSE)?, read(KUBERNETES)?);
    let prometheus = read("deploy/prometheus/prometheus.yml")?;
    let listens =
        [between(&dockerfile, "HTTP_LISTEN=0.0.0.0:", " "), between(&kubernetes, "HTTP_LISTEN, value: \"0.0.0.0:", "\"")];
    let [of_image, of_kubernetes] = listens.each_ref().map(|ports| ports.first().copied().unwrap_or_default());
    for (port, expected) in [
        (between(&dockerfile, "EXPOSE ", "\n"), of_image),
        (between(&compose, "ports: [\"127.0.0.1:9464:", "\"]"), of_image),
        (between(&prometheus, "targets: [\"relay:", "\"]"), of_image),
        (between(&kubernetes, "containerPort: ", " }"), of_kubernetes),
        (between(&kubernetes, "prometheus.io/port: \"", "\""), of_kubernetes),
    ] {
        ensure!(port == [expected] && !expected.is_empty(), "{port:?} is not {expected:?}");
    }
    let probes = between(&kubernetes, "httpGet: { path: ", ", port: http }");
    ensure!(probes.len() == 2 && kubernetes.contains("{ name: http, containerPort: "), "{probes:?}");
    let world = World::new()?;
    let daemon = Daemon::start(&world)?;
    for path in probes.into_iter().chain(["/metrics"]) {
        ensure!(daemon.get(path)?.0 != 404, "{path}");
    }
    daemon.end()
}

/// An image without a tag is whatever was pulled last, on each node; and relays of the old version must not meet new tables.
#[test]
fn kubernetes_runs_this_version_and_migrates_before_its_relays() -> Result<()> {
    let (relay, migrate) = (read(KUBERNETES)?, read(KUBERNETES_MIGRATE)?);
    let version = env!("CARGO_PKG_VERSION");
    for text in [&relay, &migrate] {
        ensure!(between(text, "image: ", "\n") == [format!("commitstream:{version}")], "another version than {version}");
    }
    ensure!(!relay.contains("initContainers") && migrate.contains("kind: Job"));
    ensure!(migrate.contains(&format!("name: commitstream-migrate-{version}\n")));
    Ok(())
}

/// The unit starts the relay in the directory that has its settings file.
#[test]
fn the_unit_finds_the_settings_file_in_its_directory() -> Result<()> {
    let unit = read(UNIT)?;
    ensure!(between(&unit, "\nWorkingDirectory=", "\n") == ["/etc/commitstream"], "{unit}");
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("settings-of-the-unit");
    std::fs::create_dir_all(&directory)?;
    std::fs::write(directory.join("application.conf"), "app.outbox.processor.batchSize = 77")?;
    let mut config = bare_command(&["config"]);
    config.current_dir(&directory);
    let found = finish(config)?.stdout;
    ensure!(found.contains("application.conf:1"), "{found}");
    let mut elsewhere = bare_command(&["config"]);
    elsewhere.env("COMMITSTREAM_CONFIG", directory.join("application.conf"));
    let found = finish(elsewhere)?.stdout;
    ensure!(found.contains("application.conf:1"), "{found}");
    let mut missing = bare_command(&["config"]);
    missing.env("COMMITSTREAM_CONFIG", directory.join("missing.conf"));
    let answer = finish(missing)?;
    ensure!(answer.code == Some(2) && answer.stderr.contains("missing.conf"), "{answer:?}");
    let mut empty = bare_command(&["config"]);
    empty.env("COMMITSTREAM_CONFIG", "");
    ensure!(finish(empty)?.code == Some(0), "an empty variable counts as not set");
    Ok(())
}

#[test]
fn systemd_understands_the_unit() -> Result<()> {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("commitstream.service");
    std::fs::write(&path, read(UNIT)?.replace("/usr/local/bin/commitstream", env!("CARGO_BIN_EXE_commitstream")))?;
    let verified = Command::new("systemd-analyze").arg("verify").arg(&path).output();
    std::fs::remove_file(&path)?;
    let Ok(verified) = verified else {
        println!("left out: there is no systemd-analyze; Debian has it in the package systemd");
        return Ok(());
    };
    let said = String::from_utf8(verified.stderr).context("text")?;
    // It looks at other units of this machine as well.
    let of_ours: Vec<_> = said.lines().filter(|line| line.contains("commitstream.service")).collect();
    ensure!(of_ours.is_empty(), "{of_ours:?}");
    Ok(())
}
