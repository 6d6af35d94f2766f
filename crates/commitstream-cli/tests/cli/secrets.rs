//! Passwords: in no output of any command, whatever goes wrong.

use anyhow::Result;

use crate::support::{World, finish};

const SECRET: &str = "hunter2";

/// The URL with another password.
fn with_password(url: &str, password: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let (login, server) = rest.rsplit_once('@')?;
    let user = login.split(':').next()?;
    Some(format!("{scheme}://{user}:{password}@{server}"))
}

#[test]
fn no_output_shows_a_password() -> Result<()> {
    let world = World::new()?;
    let wrong = |url: &str| with_password(url, SECRET).unwrap_or_default();
    let databases = [
        wrong(world.database.url()),
        format!("postgres://app:{SECRET}@127.0.0.1:1/app"),
        format!("postgres://app:a/{SECRET}@127.0.0.1:1/app"),
        format!("postgres://127.0.0.1:1/app?user=app&password={SECRET}"),
        format!("postgres:/app:{SECRET}@127.0.0.1/app"),
        format!("app:{SECRET}@127.0.0.1"),
    ];
    let caches = [
        wrong(&world.redis_url),
        format!("redis://:{SECRET}@127.0.0.1:1"),
        format!("redis://:a/{SECRET}@127.0.0.1:1"),
        format!("redis://:{SECRET}@127.0.0.1:port"),
        format!("redis-sentinel://:{SECRET}@127.0.0.1:1,127.0.0.1:2/0#master"),
        format!("redis-sentinel://:{SECRET}@127.0.0.1:1"),
        format!("redis-cluster://:{SECRET}@127.0.0.1:1,127.0.0.1:2"),
        format!("redis-cluster://:{SECRET}@127.0.0.1:port"),
        format!("http://:{SECRET}@127.0.0.1"),
    ];
    let publish = ["publish", "--type", "A", "--aggregate-type", "a", "--aggregate-id", "1", "--lane", "high-frequency"];
    let commands = [
        ["stats"].as_slice(),
        &["migrate", "--json"],
        &["relay", "--until-empty", "-v"],
        &["tail", "--no-follow"],
        &["verify"],
        &["doctor"],
        &["doctor", "--json"],
        &["config"],
        &["config", "--json"],
        &publish,
        &publish[..7],
        &["unknown"],
    ];
    let pairs = databases.iter().map(|url| ("DATABASE_URL", "--database-url", url));
    let pairs = pairs.chain(caches.iter().map(|url| ("REDIS_URL", "--redis-url", url)));
    for (variable, flag, url) in pairs {
        for args in commands {
            let mut by_variable = world.command(args);
            by_variable.env(variable, url);
            let by_flag = world.command(&[args, &[flag, url]].concat());
            for command in [by_variable, by_flag] {
                let answer = finish(command)?;
                let shown = format!("{}{}", answer.stdout, answer.stderr);
                assert!(!shown.contains(SECRET), "{args:?} with {url}: {shown}");
            }
        }
        // In the wrong place altogether.
        let answer = world.run(&["stats", url])?;
        assert_eq!(answer.code, Some(2));
        if url.contains("://") {
            assert!(!answer.stderr.contains(SECRET), "{url}: {answer:?}");
        }
    }
    Ok(())
}

#[test]
fn a_refused_login_says_what_to_check() -> Result<()> {
    let world = World::new()?;
    for args in [["stats"].as_slice(), &["relay"]] {
        let mut command = world.command(args);
        command.env("DATABASE_URL", with_password(world.database.url(), SECRET).unwrap_or_default());
        let answer = finish(command)?;
        assert_eq!(answer.code, Some(1), "{answer:?}");
        for text in ["password authentication failed", "hint: check the user, the password", "DATABASE_URL"] {
            assert!(answer.stderr.contains(text), "{answer:?}");
        }
    }
    for args in [["tail"].as_slice(), &["relay"]] {
        let mut command = world.command(args);
        command.env("REDIS_URL", with_password(&world.redis_url, SECRET).unwrap_or_default());
        let answer = finish(command)?;
        assert_eq!(answer.code, Some(1), "{answer:?}");
        assert!(answer.stderr.contains("hint: check the user and the password in REDIS_URL"), "{answer:?}");
    }
    Ok(())
}
