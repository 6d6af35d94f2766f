//! A settings file with everything it includes.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ConfigError;
use super::hocon::{self, Assignment, Include, Item, Value};

/// Includes inside included files; an include that leads back to itself ends here.
const MAX_INCLUDES: u32 = 16;

/// The fields of the file, included ones in their places; `None` if there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<Vec<Item>>, ConfigError> {
    read_nested(path, 0)
}

/// A file that was asked for by name is not there.
pub(super) fn missing(path: &Path) -> ConfigError {
    ConfigError::Read { path: path.to_owned(), cause: ErrorKind::NotFound.into() }
}

fn read_nested(path: &Path, depth: u32) -> Result<Option<Vec<Item>>, ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(ConfigError::Read { path: path.to_owned(), cause }),
    };
    let file: Arc<Path> = Arc::from(path);
    let items = hocon::parse(&file, &text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: error.line,
        reason: error.reason,
    })?;
    follow_all(items, path, depth).map(Some)
}

fn follow_all(items: Vec<Item>, from: &Path, depth: u32) -> Result<Vec<Item>, ConfigError> {
    let mut followed = Vec::with_capacity(items.len());
    for item in items {
        match item {
            Item::Include(include) => followed.extend(follow(&include, from, depth)?),
            Item::Field(field) => {
                let value = follow_within(field.value, from, depth)?;
                followed.push(Item::Field(Assignment { value, ..field }));
            }
        }
    }
    Ok(followed)
}

fn follow_within(value: Value, from: &Path, depth: u32) -> Result<Value, ConfigError> {
    Ok(match value {
        Value::Object(items) => Value::Object(follow_all(items, from, depth)?),
        Value::Joined(pieces) => {
            Value::Joined(pieces.into_iter().map(|piece| follow_within(piece, from, depth)).collect::<Result<_, _>>()?)
        }
        other => other,
    })
}

fn follow(include: &Include, from: &Path, depth: u32) -> Result<Vec<Item>, ConfigError> {
    let refuse =
        |reason| ConfigError::Include { path: from.to_owned(), line: include.line, target: include.target.clone(), reason };
    if matches!(include.location, Some("url" | "classpath")) || include.target.contains("://") {
        return Err(refuse("only files can be included"));
    }
    if depth == MAX_INCLUDES {
        return Err(refuse("too many includes inside includes; does the file include itself?"));
    }
    let target = from.parent().unwrap_or(Path::new("")).join(&include.target);
    let mut items = Vec::new();
    let mut found = false;
    for candidate in candidates(&target) {
        if let Some(read) = read_nested(&candidate, depth + 1)? {
            items.extend(read);
            found = true;
        }
    }
    // HOCON lets the target of a plain include be absent.
    if found || !include.required { Ok(items) } else { Err(missing(&target)) }
}

/// A name without an extension means both formats; `.conf` comes last and so wins.
fn candidates(target: &Path) -> Vec<PathBuf> {
    match target.extension() {
        Some(_) => vec![target.to_owned()],
        None => vec![target.with_extension("json"), target.with_extension("conf")],
    }
}
