//! How a value of each kind is read, checked and printed.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::redact::HIDDEN;
use super::units::{parse_duration, parse_size, print_duration, print_number, print_size};
use super::{AfterFailure, Color, Route, Settings, StartFrom, Strategy, UnknownEvents, redact_url};

/// Where in [`Settings`] a value lives.
pub(super) struct Field<T> {
    pub get: fn(&Settings) -> &T,
    pub get_mut: fn(&mut Settings) -> &mut T,
}

macro_rules! field {
    ($($name:ident).+) => {
        Field { get: |settings| &settings.$($name).+, get_mut: |settings| &mut settings.$($name).+ }
    };
}
pub(super) use field;

pub(super) enum Kind {
    Switch(Field<bool>),
    Count(Field<u32>, RangeInclusive<u32>),
    Size(Field<usize>, RangeInclusive<usize>),
    Time(Field<Duration>, RangeInclusive<Duration>),
    Url(Field<Option<String>>, &'static [&'static str]),
    /// Of HTTP; empty is none.
    Endpoint(Field<Option<String>>),
    /// Never shown; empty is none.
    Secret(Field<Option<String>>),
    /// A path; empty is none.
    File(Field<Option<String>>),
    /// `None` is off.
    Address(Field<Option<SocketAddr>>),
    /// A part of a whole: 0 to 1.
    Ratio(Field<f64>),
    Schema(Field<String>),
    Name(Field<String>),
    /// A name that may be missing; empty is none.
    Label(Field<Option<String>>),
    Color(Field<Color>),
    /// Of a URL; empty, or from a slash on.
    Path(Field<String>),
    Prefix(Field<String>),
    Strategy(Field<Strategy>),
    AfterFailure(Field<AfterFailure>),
    UnknownEvents(Field<UnknownEvents>),
    StartFrom(Field<StartFrom>),
    /// An open map: event type to route.
    Routes(Field<BTreeMap<String, Route>>),
}

/// Why a value is refused.
pub(super) struct Refusal {
    pub reason: String,
    pub cause: Option<Box<dyn Error + Send + Sync>>,
}

impl Refusal {
    fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), cause: None }
    }
}

const STRATEGIES: &[(&str, Strategy)] =
    &[("hybrid", Strategy::Hybrid), ("outbox", Strategy::Outbox), ("streams", Strategy::Streams)];
const AFTER_FAILURE: &[(&str, AfterFailure)] = &[("release", AfterFailure::Release), ("hold", AfterFailure::Hold)];
const UNKNOWN_EVENTS: &[(&str, UnknownEvents)] =
    &[("skip", UnknownEvents::Skip), ("park", UnknownEvents::Park), ("error", UnknownEvents::Error)];
const START_FROM: &[(&str, StartFrom)] = &[("beginning", StartFrom::Beginning), ("now", StartFrom::Now)];
const ROUTES: &[(&str, Route)] = &[("outbox", Route::Outbox), ("streams", Route::Streams)];
const COLORS: &[(&str, Color)] = &[
    (Color::Gray.name(), Color::Gray),
    (Color::Blue.name(), Color::Blue),
    (Color::Green.name(), Color::Green),
    (Color::Amber.name(), Color::Amber),
    (Color::Red.name(), Color::Red),
    (Color::Violet.name(), Color::Violet),
];
// As in HOCON; the first of each value is the one that is printed.
const SWITCHES: &[(&str, bool)] = &[("true", true), ("false", false), ("yes", true), ("no", false), ("on", true), ("off", false)];

/// What an address is where there is none.
const OFF: &str = "off";

/// PostgreSQL cuts longer names off, silently.
const LONGEST_IDENTIFIER: usize = 63;
/// Of names that only people read, in bytes.
const LONGEST_NAME: usize = 255;
const HTTP_SCHEMES: &[&str] = &["http://", "https://"];
const RATIOS: &str = "allowed are 0 to 1, for example 0.01";

impl Kind {
    /// Reads `text` into the settings. `member` is the event type when the kind is a map.
    pub fn set(&self, settings: &mut Settings, member: &str, text: &str) -> Result<(), Refusal> {
        let word = text.trim();
        match self {
            Kind::Switch(field) => *(field.get_mut)(settings) = named(word, SWITCHES)?,
            Kind::Count(field, range) => *(field.get_mut)(settings) = parse_count(word, range)?,
            Kind::Size(field, range) => {
                let refusal = || Refusal::new(format!("not a number of bytes such as 65536, 64KiB or 16MiB; {}", sizes(range)));
                *(field.get_mut)(settings) = parse_size(word).ok_or_else(refusal)?;
            }
            Kind::Time(field, range) => *(field.get_mut)(settings) = parse_time(word, range)?,
            Kind::Ratio(field) => {
                *(field.get_mut)(settings) = word.parse().map_err(|_| Refusal::new(format!("not a number; {RATIOS}")))?;
            }
            Kind::Url(field, _) => *(field.get_mut)(settings) = Some(word.to_owned()),
            Kind::Endpoint(field) => *(field.get_mut)(settings) = (!word.is_empty()).then(|| word.to_owned()),
            Kind::Secret(field) | Kind::File(field) => *(field.get_mut)(settings) = (!text.is_empty()).then(|| text.to_owned()),
            Kind::Address(field) => *(field.get_mut)(settings) = parse_address(word)?,
            Kind::Label(field) => *(field.get_mut)(settings) = (!word.is_empty()).then(|| word.to_owned()),
            Kind::Color(field) => *(field.get_mut)(settings) = named(word, COLORS)?,
            Kind::Path(field) => *(field.get_mut)(settings) = word.trim_end_matches('/').to_owned(),
            Kind::Schema(field) | Kind::Prefix(field) | Kind::Name(field) => *(field.get_mut)(settings) = text.to_owned(),
            Kind::Strategy(field) => *(field.get_mut)(settings) = named(word, STRATEGIES)?,
            Kind::AfterFailure(field) => *(field.get_mut)(settings) = named(word, AFTER_FAILURE)?,
            Kind::UnknownEvents(field) => *(field.get_mut)(settings) = named(word, UNKNOWN_EVENTS)?,
            Kind::StartFrom(field) => *(field.get_mut)(settings) = named(word, START_FROM)?,
            Kind::Routes(field) => {
                let route = named(word, ROUTES)?;
                (field.get_mut)(settings).insert(member.to_owned(), route);
            }
        }
        self.check(settings)
    }

    /// Whether what the settings hold is allowed.
    pub fn check(&self, settings: &Settings) -> Result<(), Refusal> {
        let (holds, reason) = match self {
            Kind::Count(field, range) => (range.contains((field.get)(settings)), counts(range)),
            Kind::Size(field, range) => (range.contains((field.get)(settings)), sizes(range)),
            Kind::Time(field, range) => (range.contains((field.get)(settings)), times(range)),
            Kind::Endpoint(field) => url(field, settings, HTTP_SCHEMES),
            Kind::Url(field, schemes) => url(field, settings, schemes),
            Kind::Schema(field) => {
                let name = (field.get)(settings);
                let holds = !name.is_empty() && name.len() <= LONGEST_IDENTIFIER && !name.contains('\0');
                (holds, format!("must be the name of a schema, 1 to {LONGEST_IDENTIFIER} bytes without NUL"))
            }
            Kind::Ratio(field) => ((0.0..=1.0).contains((field.get)(settings)), RATIOS.to_owned()),
            Kind::Name(field) => {
                let name = (field.get)(settings);
                let holds = !name.trim().is_empty() && name.len() <= LONGEST_NAME && !name.contains(char::is_control);
                (holds, format!("must be a name of 1 to {LONGEST_NAME} bytes, on one line"))
            }
            Kind::Label(field) => {
                let is_name = |name: &String| name.len() <= LONGEST_NAME && !name.contains(char::is_control);
                let holds = (field.get)(settings).as_ref().is_none_or(is_name);
                (holds, format!("must be a name of at most {LONGEST_NAME} bytes, on one line"))
            }
            Kind::Path(field) => {
                let path = (field.get)(settings);
                let is_plain = |c: char| c.is_ascii_alphanumeric() || "/-_.~".contains(c);
                // Two slashes at the beginning would lead to another host.
                let holds = path.is_empty()
                    || (path.starts_with('/') && !path.contains("//") && !path.ends_with('/') && path.chars().all(is_plain));
                (holds, "must be empty, or a path such as /ops/events: letters, digits, and - _ . ~ between slashes".to_owned())
            }
            Kind::Prefix(field) => (
                !(field.get)(settings).contains(['{', '}']),
                "must not contain { or }: Redis Cluster takes braces for a hash tag".to_owned(),
            ),
            Kind::Routes(field) => (!(field.get)(settings).contains_key(""), "an event type must not be empty".to_owned()),
            Kind::File(field) => {
                let holds = (field.get)(settings).as_ref().is_none_or(|path| !path.is_empty() && !path.contains('\0'));
                (holds, "must be the path of a file".to_owned())
            }
            Kind::Switch(_) | Kind::Secret(_) | Kind::Address(_) => return Ok(()),
            Kind::Color(_) | Kind::Strategy(_) | Kind::AfterFailure(_) | Kind::UnknownEvents(_) | Kind::StartFrom(_) => {
                return Ok(());
            }
        };
        if holds { Ok(()) } else { Err(Refusal::new(reason)) }
    }

    /// The value as it could be written in the file, without passwords; `None` if it is not set.
    pub fn print(&self, settings: &Settings, member: &str) -> Option<String> {
        Some(match self {
            Kind::Switch(field) => name_of(*(field.get)(settings), SWITCHES),
            Kind::Count(field, _) => (field.get)(settings).to_string(),
            Kind::Size(field, _) => print_size(*(field.get)(settings)),
            Kind::Time(field, _) => print_duration(*(field.get)(settings)),
            Kind::Url(field, _) | Kind::Endpoint(field) => redact_url((field.get)(settings).as_deref()?),
            Kind::Secret(field) => (field.get)(settings).as_ref().map(|_| HIDDEN.to_owned())?,
            Kind::File(field) => (field.get)(settings).clone()?,
            Kind::Address(field) => (field.get)(settings).map_or_else(|| OFF.to_owned(), |address| address.to_string()),
            Kind::Ratio(field) => (field.get)(settings).to_string(),
            Kind::Label(field) => (field.get)(settings).clone()?,
            Kind::Color(field) => name_of(*(field.get)(settings), COLORS),
            Kind::Path(field) => (field.get)(settings).clone(),
            Kind::Schema(field) | Kind::Prefix(field) | Kind::Name(field) => (field.get)(settings).clone(),
            Kind::Strategy(field) => name_of(*(field.get)(settings), STRATEGIES),
            Kind::AfterFailure(field) => name_of(*(field.get)(settings), AFTER_FAILURE),
            Kind::UnknownEvents(field) => name_of(*(field.get)(settings), UNKNOWN_EVENTS),
            Kind::StartFrom(field) => name_of(*(field.get)(settings), START_FROM),
            Kind::Routes(field) => name_of(*(field.get)(settings).get(member)?, ROUTES),
        })
    }

    /// A refused text as it may be shown.
    pub fn shown(&self, text: &str) -> String {
        match self {
            Kind::Url(..) | Kind::Endpoint(_) => redact_url(text.trim()),
            Kind::Secret(_) => HIDDEN.to_owned(),
            // Quoted where the eye would miss what is wrong: an empty name, a NUL.
            Kind::Schema(_) | Kind::Prefix(_) | Kind::Name(_) | Kind::File(_) | Kind::Label(_) | Kind::Path(_) => {
                format!("{:?}", harmless(text))
            }
            _ => harmless(text.trim()).escape_debug().to_string(),
        }
    }

    /// Size for comparing two settings of one kind.
    pub fn magnitude(&self, settings: &Settings) -> Option<u128> {
        match self {
            Kind::Count(field, _) => Some(u128::from(*(field.get)(settings))),
            Kind::Size(field, _) => Some(*(field.get)(settings) as u128),
            Kind::Time(field, _) => Some((field.get)(settings).as_nanos()),
            _ => None,
        }
    }
}

/// Whether it is no URL or one of these schemes, and what it must be.
fn url(field: &Field<Option<String>>, settings: &Settings, schemes: &[&str]) -> (bool, String) {
    let starts = |url: &String| schemes.iter().any(|scheme| url.starts_with(scheme) && url.len() > scheme.len());
    let reason = format!("must be a URL that starts with {}", schemes.join(" or "));
    ((field.get)(settings).as_ref().is_none_or(starts), reason)
}

/// A URL that was given to the wrong setting holds its password there, too.
fn harmless(text: &str) -> String {
    if text.contains("://") { redact_url(text) } else { text.to_owned() }
}

fn parse_count(word: &str, range: &RangeInclusive<u32>) -> Result<u32, Refusal> {
    word.parse().map_err(|cause: std::num::ParseIntError| {
        // A negative or huge number is a number: saying that it is none would mislead.
        let digits = word.strip_prefix('-').unwrap_or(word);
        let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let reason = if is_number { counts(range) } else { format!("not a whole number; {}", counts(range)) };
        Refusal { reason, cause: Some(cause.into()) }
    })
}

fn parse_time(word: &str, range: &RangeInclusive<Duration>) -> Result<Duration, Refusal> {
    const EXAMPLES: &str = "write for example 500ms, 1s, 5m or 1h";
    if !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Refusal::new(format!(
            "a duration needs a unit (HOCON would take milliseconds): {EXAMPLES}; {}",
            times(range)
        )));
    }
    parse_duration(word).map_err(|cause| Refusal {
        reason: format!("{:?} is not a duration: {EXAMPLES}", harmless(word)),
        cause: Some(cause.into()),
    })
}

fn parse_address(word: &str) -> Result<Option<SocketAddr>, Refusal> {
    if word.eq_ignore_ascii_case(OFF) {
        return Ok(None);
    }
    word.parse().map(Some).map_err(|cause: std::net::AddrParseError| Refusal {
        reason: format!("not an IP address with a port: write for example 127.0.0.1:9464, 0.0.0.0:9464, [::1]:9464 or {OFF}"),
        cause: Some(cause.into()),
    })
}

fn named<T: Copy>(word: &str, names: &[(&str, T)]) -> Result<T, Refusal> {
    let found = names.iter().find(|(name, _)| name.eq_ignore_ascii_case(word));
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        Refusal::new(format!("allowed are {}", names.join(", ")))
    })
}

fn name_of<T: PartialEq>(value: T, names: &[(&str, T)]) -> String {
    names.iter().find(|(_, named)| *named == value).map_or_else(String::new, |(name, _)| (*name).to_owned())
}

fn counts(range: &RangeInclusive<u32>) -> String {
    format!("allowed are {} to {}", print_number(*range.start()), print_number(*range.end()))
}

fn sizes(range: &RangeInclusive<usize>) -> String {
    format!("allowed are {} to {}", print_size(*range.start()), print_size(*range.end()))
}

fn times(range: &RangeInclusive<Duration>) -> String {
    format!("allowed are {} to {}", print_duration(*range.start()), print_duration(*range.end()))
}
