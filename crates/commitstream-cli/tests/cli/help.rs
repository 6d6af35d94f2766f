//! The help of every command.

use anyhow::Result;

use crate::support::{bare_command, finish};

const COMMANDS: [&[&str]; 25] = [
    &[],
    &["demo"],
    &["migrate"],
    &["relay"],
    &["relays"],
    &["relays", "pause"],
    &["relays", "resume"],
    &["publish"],
    &["stats"],
    &["failed"],
    &["failed", "list"],
    &["failed", "retry"],
    &["failed", "discard"],
    &["groups"],
    &["dead"],
    &["dead", "list"],
    &["dead", "retry"],
    &["dead", "discard"],
    &["cleanup"],
    &["tail"],
    &["verify"],
    &["doctor"],
    &["console"],
    &["config"],
    &["bench"],
];

#[test]
fn every_help_has_an_example() -> Result<()> {
    for command in COMMANDS {
        for option in ["--help", "-h"] {
            let help = finish(bare_command(&[command, &[option]].concat()))?;
            assert_eq!(help.code, Some(0), "{command:?}");
            assert!(help.stdout.contains("Example"), "{command:?}: {}", help.stdout);
            assert_eq!(help.stderr, "");
        }
    }
    Ok(())
}

#[test]
fn help_that_nobody_asked_for_is_wrong_use() -> Result<()> {
    let answer = finish(bare_command(&[]))?;
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""));
    assert!(answer.stderr.contains("Commands:"), "{answer:?}");
    Ok(())
}

#[test]
fn the_version() -> Result<()> {
    let version = finish(bare_command(&["--version"]))?;
    assert_eq!(version.stdout, format!("commitstream {}\n", env!("CARGO_PKG_VERSION")));
    Ok(())
}
