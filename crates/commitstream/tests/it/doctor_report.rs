//! Reading what doctor found, and doing what it says.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use commitstream::config::Settings;
use commitstream::doctor::{self, Finding, Report, Severity};

use crate::support::{World, eventually};

pub async fn examine(world: &World) -> Report {
    doctor::examine(&world.settings).await
}

pub fn found<'a>(report: &'a Report, check: &str) -> Vec<&'a Finding> {
    report.findings.iter().filter(|finding| finding.check == check).collect()
}

/// The only finding of a check.
#[track_caller]
pub fn only<'a>(report: &'a Report, check: &str, severity: Severity, seen: &str) -> &'a Finding {
    let told = found(report, check);
    assert!(told.len() == 1 && told[0].severity == severity && told[0].seen.contains(seen), "{check}: {told:#?}");
    told[0]
}

#[track_caller]
pub fn passes(report: &Report, check: &str) {
    assert!(report.passed.contains(&check), "{check}: {:#?}", found(report, check));
}

/// Waits until a check finds something: settings and statistics take a moment to be in force.
pub async fn eventually_found(world: &World, check: &str) -> Result<Report> {
    let mut report = Report::default();
    eventually(&format!("{check} to be found"), async || {
        report = examine(world).await;
        Ok(!found(&report, check).is_empty())
    })
    .await?;
    Ok(report)
}

/// Waits until a check finds nothing any more.
pub async fn eventually_passes(world: &World, check: &str) -> Result<()> {
    eventually(&format!("{check} to pass"), async || Ok(examine(world).await.passed.contains(&check))).await
}

/// Does what a check advises until it finds nothing any more. Once is not always enough: a login that is under way, in whatever
/// database, holds back what vacuum may remove.
pub async fn eventually_mended(world: &World, check: &str) -> Result<()> {
    eventually(&format!("{check} to be mended"), async || {
        let report = examine(world).await;
        for finding in found(&report, check) {
            mend(&world.settings, finding)?;
        }
        Ok(report.passed.contains(&check))
    })
    .await
}

/// What a person would type of what a finding advises: without the words before it and the remarks behind it.
fn command(mend: &str) -> Option<&str> {
    let start = ["psql ", "redis-cli ", "vacuumdb "].iter().filter_map(|program| mend.find(program)).min()?;
    let command = mend[start..].split(" && commitstream").next()?;
    let mut quote = None;
    let end = command.char_indices().find(|(at, c)| {
        match quote {
            Some(open) if open == *c => quote = None,
            None if ['\'', '"'].contains(c) => quote = Some(*c),
            None => return [" (", ", ", "; "].iter().any(|remark| command[*at..].starts_with(remark)),
            Some(_) => {}
        }
        false
    });
    Some(&command[..end.map_or(command.len(), |(at, _)| at)])
}

#[test]
fn a_command_is_told_from_the_remarks_around_it() {
    for (mend, expected) in [
        ("psql \"$DATABASE_URL\" -c 'VACUUM (FULL) t, u' (relays wait)", "psql \"$DATABASE_URL\" -c 'VACUUM (FULL) t, u'"),
        ("do this first, then: redis-cli A && redis-cli B; or more", "redis-cli A && redis-cli B"),
        ("redis-cli RENAME 'it'\\''s' x && commitstream failed retry --all", "redis-cli RENAME 'it'\\''s' x"),
    ] {
        assert_eq!(command(mend), Some(expected));
    }
    assert_eq!(command("commitstream cleanup"), None);
}

/// Runs the command of a finding.
pub fn mend(settings: &Settings, finding: &Finding) -> Result<()> {
    mend_for(settings, "the_user", finding)
}

/// The same, with the name of the user of Redis where the finding leaves it open.
pub fn mend_for(settings: &Settings, user: &str, finding: &Finding) -> Result<()> {
    let command = command(&finding.mend).with_context(|| format!("a command in {finding:?}"))?.replace("the_user", user);
    let url = settings.redis.url.as_deref().unwrap_or_default();
    let mut shell = Command::new("sh");
    shell.args(["-c", &command]).env("DATABASE_URL", settings.database.url.as_deref().unwrap_or_default()).env("REDIS_URL", url);
    shell.env_remove("REDISCLI_AUTH");
    if finding.mend.contains("with its password in REDISCLI_AUTH: redis-cli ") {
        let login = url.rsplit_once('@').and_then(|(login, _)| login.rsplit_once(':'));
        shell.env("REDISCLI_AUTH", login.context("a password")?.1);
    }
    let ran = shell.output()?;
    let (said, error) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    // redis-cli ends well whatever the server says.
    let refused = said.lines().any(|line| {
        ["ERR", "NOPERM", "NOAUTH", "WRONGPASS", "MISCONF", "MOVED", "CROSSSLOT"].iter().any(|code| line.starts_with(code))
    });
    ensure!(ran.status.success() && !refused, "{command}: {said}{error}");
    Ok(())
}
