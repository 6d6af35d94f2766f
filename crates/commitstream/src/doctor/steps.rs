//! What to do, part by part: commands that can be pasted, one a line, and words about them.

use super::Finding;

/// A part of what [`Finding::mend`] says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A line for a shell.
    Command(String),
    Words(String),
}

/// What commands begin with; a setting of the environment may stand before.
const PROGRAMS: [&str; 6] = ["commitstream", "psql", "redis-cli", "export", "systemctl", "timedatectl"];

/// What stands between two parts, outside of quotes and parentheses.
const BETWEEN: [&str; 5] = [" && ", "; ", ": ", ", then ", ", or "];

impl Finding {
    /// What to do, in the order in which it is to be done.
    #[must_use]
    pub fn steps(&self) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for (part, behind) in parts(&self.mend) {
            let (command, words) = if is_command(part) { cut(part) } else { ("", part) };
            if !command.is_empty() {
                steps.push(Step::Command(command.to_owned()));
            }
            // Words go on until the next command.
            match (steps.last_mut(), words.is_empty()) {
                (_, true) => {}
                (Some(Step::Words(before)), _) => *before += words,
                _ => steps.push(Step::Words(words.to_owned())),
            }
            if let Some(Step::Words(before)) = steps.last_mut() {
                *before += behind;
            }
        }
        steps.iter_mut().for_each(|step| {
            if let Step::Words(words) = step {
                *words = words.trim().trim_end_matches([';', ',']).trim_start_matches("then ").to_owned();
            }
        });
        steps.retain(|step| !matches!(step, Step::Words(words) if words.is_empty()));
        steps
    }
}

/// The parts, each with what stands behind it.
fn parts(text: &str) -> Vec<(&str, &str)> {
    let (mut found, mut begin, mut skip) = (Vec::new(), 0, 0);
    let (mut quote, mut depth) = (None, 0_u32);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            _ if at < skip => continue,
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            // An apostrophe within a word is none.
            (None, '\'' | '"') if !text[..at].ends_with(char::is_alphanumeric) => quote = Some(c),
            (None, '(') => depth += 1,
            (None, ')') => depth = depth.saturating_sub(1),
            _ => {}
        }
        if quote.is_none()
            && depth == 0
            && let Some(between) = BETWEEN.iter().find(|between| text[at..].starts_with(**between))
        {
            found.push((&text[begin..at], *between));
            (begin, skip) = (at + between.len(), at + between.len());
        }
    }
    found.push((&text[begin..], ""));
    found
}

fn is_command(part: &str) -> bool {
    let is_setting =
        |word: &&str| word.split_once('=').is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'));
    let mut words = part.trim_start().split(' ').skip_while(is_setting);
    words.next().is_some_and(|word| PROGRAMS.contains(&word.trim_end_matches(',')))
}

/// Of a part that begins with a command, the command and the words in parentheses behind it.
fn cut(part: &str) -> (&str, &str) {
    let part = part.trim();
    match part.strip_suffix(')').and_then(|_| part.rfind(" (")) {
        Some(at) if !part[at..].contains(['\'', '"']) => part.split_at(at),
        _ => (part, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{note, warning};
    use super::*;

    fn steps(mend: &str) -> Vec<String> {
        let told = |step| match step {
            Step::Command(command) => format!("$ {command}"),
            Step::Words(words) => words,
        };
        note("", "", mend).steps().into_iter().map(told).collect()
    }

    #[test]
    fn commands_stand_alone_whatever_is_said_about_them() {
        assert_eq!(steps("commitstream cleanup"), ["$ commitstream cleanup"]);
        assert_eq!(
            steps("commitstream failed list; when the cause is fixed: commitstream failed retry --all"),
            ["$ commitstream failed list", "when the cause is fixed:", "$ commitstream failed retry --all"]
        );
        assert_eq!(
            steps("redis-cli -u \"$REDIS_URL\" RENAME a 'was: a; && b' && commitstream failed retry --all"),
            ["$ redis-cli -u \"$REDIS_URL\" RENAME a 'was: a; && b'", "$ commitstream failed retry --all"]
        );
        assert_eq!(
            steps("psql \"$DATABASE_URL\" -c 'ALTER SYSTEM SET x = 1', then restart PostgreSQL; or end sessions"),
            ["$ psql \"$DATABASE_URL\" -c 'ALTER SYSTEM SET x = 1'", "restart PostgreSQL; or end sessions"]
        );
        assert_eq!(
            steps("commitstream relays; if they are busy, another one: OUTBOX_BATCH_SIZE=1000 commitstream relay"),
            ["$ commitstream relays", "if they are busy, another one:", "$ OUTBOX_BATCH_SIZE=1000 commitstream relay"]
        );
        assert_eq!(
            steps("commitstream cleanup (trims what is read); then more memory: redis-cli CONFIG SET maxmemory 2gb"),
            ["$ commitstream cleanup", "(trims what is read); then more memory:", "$ redis-cli CONFIG SET maxmemory 2gb"]
        );
        assert_eq!(steps("export REDIS_URL=redis://:password@host:6379"), ["$ export REDIS_URL=redis://:password@host:6379"]);
        assert_eq!(steps("give its disk space; it goes on by itself"), ["give its disk space; it goes on by itself"]);
        assert_eq!(
            steps("with its password in REDISCLI_AUTH: redis-cli -h a -p 1 PING"),
            ["with its password in REDISCLI_AUTH:", "$ redis-cli -h a -p 1 PING"]
        );
        assert!(warning("", "", "").steps().is_empty());
    }
}
