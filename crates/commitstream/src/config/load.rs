//! Defaults < file < environment < flags, and a record of where each value came from.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::error::{ConfigError, from_where};
use super::file;
use super::hocon::Place;
use super::keys::{KEYS, Key, Setting, is_section, sections};
use super::kinds::{Kind, Refusal};
use super::resolve::{Document, Meaning};
use super::units::print_duration;
use super::{RedisSettings, Settings, suggest};

/// The file that is read when none is named, if the current directory has it.
pub const DEFAULT_FILE: &str = "application.conf";

/// Where our settings are in the file.
const ROOT: &str = "app";

/// Names inside names that are walked in the file; deeper ones are no settings.
const MAX_NAMES: usize = 16;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Default,
    /// `line` counts from 1.
    File {
        path: Arc<Path>,
        line: u32,
    },
    Environment(&'static str),
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("the default"),
            Source::File { path, line } => write!(f, "{}:{line}", path.display()),
            Source::Environment(name) => f.write_str(name),
            Source::Flag => f.write_str("the command line"),
        }
    }
}

impl From<&Place> for Source {
    fn from(place: &Place) -> Self {
        Source::File { path: Arc::clone(&place.file), line: place.line }
    }
}

/// Settings and where they came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    pub settings: Settings,
    sources: BTreeMap<String, Source>,
}

/// One setting, ready to be printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As it is written in the file, for example `app.outbox.processor.batchSize`.
    pub key: String,
    /// Passwords are hidden. `None` if it is not set.
    pub value: Option<String>,
    pub source: Source,
    /// The environment variable that sets it.
    pub env: Option<&'static str>,
    pub default: Option<String>,
}

/// Variables that begin so are also for other libraries of the process, which may take values that are none of ours.
const SHARED: &str = "OTEL_";

impl Settings {
    /// Puts the settings together: defaults, then the file, then the environment, then the flags; the later one wins.
    ///
    /// - `file`: a HOCON file, which must exist. `None` means [`DEFAULT_FILE`] in the current directory if it is there.
    /// - `env`: looks an environment variable up. It serves the variables of the settings (an empty one counts as not set, and so
    ///   does one of OpenTelemetry, which is for every library of the process, when it does not fit here)
    ///   and the `${NAME}` in the file; the process environment is not read otherwise.
    /// - `flags`: keys as in the file, for example `app.redis.url`, and their values.
    ///
    /// Of the file, only the sections of `app` that settings are in are read: a name in
    /// them that is no setting is refused, and so is a section whose name is nearly one of these. The rest is the
    /// application's own.
    ///
    /// # Errors
    /// The first thing that is wrong, with its key, where it came from, its value and what is allowed.
    pub fn load(
        file: Option<&Path>,
        env: impl Fn(&str) -> Option<String>,
        flags: &[(String, String)],
    ) -> Result<Loaded, ConfigError> {
        let mut loaded = Loaded { settings: Settings::default(), sources: BTreeMap::new() };
        loaded.read_file(file, &env)?;
        for key in KEYS {
            if let Some(name) = key.env
                && let Some(value) = env(name).filter(|value| !value.is_empty())
                && (!name.starts_with(SHARED) || fits(key, &value))
            {
                loaded.set_from_env(key, name, &value)?;
            }
        }
        for (key, value) in flags {
            loaded.set(key, value, Source::Flag)?;
        }
        check(&loaded.settings, |name| Some(loaded.source(name)))?;
        Ok(loaded)
    }

    /// Checks settings that were built in code against the same rules.
    ///
    /// # Errors
    /// The first value that is not allowed.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check(self, |_| None)
    }

    /// Refuses time-outs of Redis with which one lost connection costs a consumer its life: until it has another, it is silent. The
    /// defaults are no obstacle to a shorter `claimIdle`, as heartbeats wait for a part of it at most.
    pub(crate) fn validate_heartbeat(&self) -> Result<(), ConfigError> {
        let defaults = RedisSettings::default();
        let chosen = |time: Duration, default: Duration| if time == default { Duration::ZERO } else { time };
        let connect = chosen(self.redis.connect_timeout, defaults.connect_timeout);
        let response = chosen(self.redis.response_timeout, defaults.response_timeout);
        if connect + response <= self.consumer.claim_idle {
            return Ok(());
        }
        let (connect, response) = (self.redis.connect_timeout, self.redis.response_timeout);
        Err(ConfigError::Conflict {
            key: "app.redis.connectTimeout + app.redis.responseTimeout".to_owned(),
            value: format!("{} + {}", print_duration(connect), print_duration(response)),
            origin: None,
            limit: format!("app.consumer.claimIdle = {}", print_duration(self.consumer.claim_idle)),
        })
    }
}

impl Loaded {
    /// Every setting in a fixed order; overrides once for each event type.
    pub fn entries(&self) -> Vec<Entry> {
        let defaults = Settings::default();
        let entry = |setting: Setting| {
            let key = setting.name();
            Entry {
                value: setting.key.kind.print(&self.settings, &setting.member),
                source: self.source(&key),
                env: setting.key.env,
                default: setting.key.kind.print(&defaults, &setting.member),
                key,
            }
        };
        Setting::all(&self.settings).into_iter().map(entry).collect()
    }

    /// Where the value of this key came from.
    pub fn source(&self, key: &str) -> Source {
        self.sources.get(key).cloned().unwrap_or(Source::Default)
    }

    fn read_file(&mut self, path: Option<&Path>, env: &dyn Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
        let items = match path {
            Some(path) => file::read(path)?.ok_or_else(|| file::missing(path))?,
            None => file::read(Path::new(DEFAULT_FILE))?.unwrap_or_default(),
        };
        let document = Document::new(&items, env);
        let root = vec![ROOT.to_owned()];
        for section in document.names(&root)? {
            let path = [root.as_slice(), std::slice::from_ref(&section)].concat();
            if sections().any(|known| known == section) {
                self.read_tree(&document, path)?;
            } else if let Some(known) = sections().find(|known| suggest::is_near_miss(&section, known))
                && let Some((_, place)) = document.meaning(&path)?
            {
                let suggestion = format!("{ROOT}.{known}");
                return Err(ConfigError::UnknownKey { key: path.join("."), origin: Source::from(&place), suggestion });
            }
        }
        Ok(())
    }

    /// Reads everything at `path` and below. Answers whether there was anything.
    fn read_tree(&mut self, document: &Document<'_>, path: Vec<String>) -> Result<bool, ConfigError> {
        let Some((meaning, place)) = document.meaning(&path)? else { return Ok(false) };
        let key = path.join(".");
        let source = Source::from(&place);
        let shown = match meaning {
            // As in HOCON, null stands for "not set".
            Meaning::Null => return Ok(true),
            Meaning::Text(text) => return self.set(&key, &text, source).map(|()| true),
            Meaning::List => "[...]",
            Meaning::Object => {
                let names = if path.len() < MAX_NAMES { document.names(&path)? } else { BTreeSet::new() };
                let mut found = false;
                for name in names {
                    found |= self.read_tree(document, [path.as_slice(), &[name]].concat())?;
                }
                if found || is_section(&key) {
                    return Ok(found);
                }
                "{...}"
            }
        };
        find(&key, &source)?;
        let reason = "must be one value".to_owned();
        Err(ConfigError::Value { key, value: shown.to_owned(), origin: Some(source), reason, cause: None })
    }

    /// A map is written as `UserCreated=outbox,MetricUpdated=streams`.
    fn set_from_env(&mut self, key: &'static Key, name: &'static str, value: &str) -> Result<(), ConfigError> {
        let source = Source::Environment(name);
        if !matches!(key.kind, Kind::Routes(_)) {
            return self.set(key.path, value, source);
        }
        for pair in value.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (member, route) = pair.split_once('=').ok_or_else(|| ConfigError::Value {
                key: key.path.to_owned(),
                value: key.kind.shown(pair),
                origin: Some(source.clone()),
                reason: "must be pairs such as UserCreated=outbox,MetricUpdated=streams".to_owned(),
                cause: None,
            })?;
            self.set(&format!("{}.{}", key.path, member.trim()), route, source.clone())?;
        }
        Ok(())
    }

    fn set(&mut self, path: &str, text: &str, source: Source) -> Result<(), ConfigError> {
        let setting = find(path, &source)?;
        let kind = &setting.key.kind;
        match kind.set(&mut self.settings, &setting.member, text) {
            Ok(()) => {
                self.sources.insert(setting.name(), source);
                Ok(())
            }
            Err(Refusal { reason, cause }) => {
                Err(ConfigError::Value { key: setting.name(), value: kind.shown(text), origin: Some(source), reason, cause })
            }
        }
    }
}

/// Whether the value alone is one of this setting.
fn fits(key: &Key, value: &str) -> bool {
    let mut alone = Settings::default();
    let fits = key.kind.set(&mut alone, "", value).is_ok() && key.kind.check(&alone).is_ok();
    if !fits {
        tracing::warn!("{} is ignored: it has no value of {}", key.env.unwrap_or_default(), key.path);
    }
    fits
}

fn find(path: &str, source: &Source) -> Result<Setting, ConfigError> {
    Setting::find(path).ok_or_else(|| {
        let suggestion = suggest::nearest(path, KEYS, |key| key.path).map(Key::pattern).unwrap_or_default();
        ConfigError::UnknownKey { key: path.to_owned(), origin: source.clone(), suggestion }
    })
}

/// Each value alone, then the pairs that bound each other.
fn check(settings: &Settings, origin: impl Fn(&str) -> Option<Source>) -> Result<(), ConfigError> {
    for key in KEYS {
        if let Err(Refusal { reason, cause }) = key.kind.check(settings) {
            let value = key.kind.print(settings, "").map(|printed| key.kind.shown(&printed)).unwrap_or_default();
            return Err(ConfigError::Value { key: key.path.to_owned(), value, origin: origin(key.path), reason, cause });
        }
    }
    let shown = |key: &Key| key.kind.print(settings, "").unwrap_or_default();
    for key in KEYS {
        let Some(limit) = key.not_above.and_then(Setting::find).map(|setting| setting.key) else { continue };
        if key.kind.magnitude(settings) > limit.kind.magnitude(settings) {
            return Err(ConfigError::Conflict {
                key: key.path.to_owned(),
                value: shown(key),
                origin: origin(key.path),
                limit: format!("{} = {}{}", limit.path, shown(limit), from_where(origin(limit.path).as_ref())),
            });
        }
    }
    Ok(())
}
