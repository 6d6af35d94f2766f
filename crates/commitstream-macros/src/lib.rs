//! `#[derive(DomainEvent)]`, re-exported by the crate `commitstream`.
//!
//! The way of an input: `attributes` reads each `#[event(…)]`, `model` checks that they make a whole event, `expand` writes the
//! implementation. All three work on `proc_macro2` tokens, so that the tests can read each error message without a compiler.

mod attributes;
mod expand;
mod model;
#[cfg(test)]
mod tests;

use proc_macro::TokenStream;

/// Implements `DomainEvent` for a struct (one event) or an enum (one event for each variant), and `DecodeEvent`.
///
/// The type must also implement `serde::Serialize`, which gives the payload.
///
/// ```
/// use chrono::{DateTime, Utc};
/// use commitstream::{DomainEvent, Lane};
/// use serde::Serialize;
/// use uuid::Uuid;
///
/// #[derive(Serialize, DomainEvent)]
/// #[event(aggregate = "user")]
/// struct UserCreated {
///     #[event(key)]
///     user_id: Uuid,
///     email: String,
///     #[event(time)]
///     created_at: DateTime<Utc>,
/// }
///
/// #[derive(Serialize, DomainEvent)]
/// #[event(aggregate = "training")]
/// enum Training {
///     #[event(name = "TrainingStarted")]
///     Started {
///         #[event(key)]
///         job: i64,
///     },
///     #[event(name = "TrainingProgress", lane = "high-frequency")]
///     Progress {
///         #[event(key)]
///         job: i64,
///         percent: u8,
///     },
/// }
///
/// let progress = Training::Progress { job: 7, percent: 40 };
/// assert_eq!(progress.event_type(), "TrainingProgress");
/// assert_eq!(progress.aggregate_type(), "training");
/// assert_eq!(progress.aggregate_id(), "7");
/// assert_eq!(progress.lane(), Lane::HighFrequency);
/// assert_eq!(progress.payload()?.get(), r#"{"job":7,"percent":40}"#);
/// # Ok::<(), serde_json::Error>(())
/// ```
///
/// # Attributes
///
/// | attribute | where | meaning | default |
/// |---|---|---|---|
/// | `aggregate = "…"` | struct, enum, variant | kind of aggregate: names the stream `events:…` | none: required |
/// | `lane = "critical"` | struct, enum, variant | through the outbox, in the caller's transaction | this lane |
/// | `lane = "high-frequency"` | struct, enum, variant | straight to Redis Streams | |
/// | `name = "…"` | struct, variant | event type | name of the struct or variant |
/// | `key` | field | the aggregate's id; any type that implements `Display` | none: exactly one |
/// | `time` | field | when it happened; a type that is `Clone + Into<DateTime<Utc>>` | the time of the call |
///
/// What an enum states holds for each variant that does not state its own. An aggregate or a name has 1 to 255 bytes and no NUL;
/// an aggregate has no braces either, and does not end in `:dead`. All of this is checked when the macro runs, and the errors say what to write.
///
/// # Payload
///
/// A struct's payload is what serde writes for it. An enum with serde's default tagging loses the tag, because the event type
/// already says which variant it is: `{"Progress":{"job":7}}` becomes `{"job":7}`. With `#[serde(tag = "…")]`,
/// `#[serde(untagged)]` (on the enum or a variant) or `#[serde(into = "…")]` the payload stays as serde writes it. An enum with a
/// hand-written `Serialize` must write one of serde's enum forms, or implement `DomainEvent` by hand too.
///
/// # Generic types
///
/// The bounds are those written on the type. Each type parameter that is part of the payload needs
/// `T: serde::Serialize + Send + Sync`, a parameter used as the key also `std::fmt::Display`.
///
/// # Errors
///
/// A type that does not say which field is the key does not compile:
///
/// ```compile_fail
/// #[derive(serde::Serialize, commitstream::DomainEvent)]
/// #[event(aggregate = "user")]
/// struct UserCreated {
///     user_id: i64, // no field is marked as the key: write `#[event(key)]` …
/// }
/// ```
///
/// # Reading back
///
/// A type that also implements `serde::Deserialize` implements `DecodeEvent`. The envelope's aggregate type and event type say
/// which variant it holds:
///
/// ```
/// use commitstream::{DecodeEvent, DomainEvent};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Debug, PartialEq, Serialize, Deserialize, DomainEvent)]
/// #[event(aggregate = "training")]
/// enum Training {
///     Started {
///         #[event(key)]
///         job: i64,
///     },
///     Stopped {
///         #[event(key)]
///         job: i64,
///     },
/// }
///
/// let envelope = Training::Stopped { job: 7 }.envelope()?;
/// assert_eq!(envelope.payload.get(), r#"{"job":7}"#);
/// assert_eq!(Training::decode(&envelope)?, Training::Stopped { job: 7 });
/// # Ok::<(), commitstream::EventError>(())
/// ```
///
/// Serde's options say what else a payload may hold: `#[serde(default)]` on a field that older events lack,
/// `#[serde(deny_unknown_fields)]` against fields that newer ones add. Variants with `#[serde(skip)]` or
/// `#[serde(skip_deserializing)]` are not read. Of several variants with the same aggregate and name the first is read, unless serde
/// chooses (`tag`, `untagged`).
#[proc_macro_derive(DomainEvent, attributes(event))]
pub fn derive_domain_event(input: TokenStream) -> TokenStream {
    expand::domain_event(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
