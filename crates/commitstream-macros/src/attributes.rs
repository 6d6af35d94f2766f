//! Reads `#[event(…)]` on containers, variants and fields, and the few `#[serde(…)]` options that change a payload's form.

use proc_macro2::Span;
use quote::ToTokens;
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{Attribute, Error, Expr, ExprLit, Lit, LitStr, Meta, Path, Result, Token};

/// Limit of an aggregate and of an event type, in bytes; the library and its tables have the same limit.
const MAX_NAME_BYTES: usize = 255;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Critical,
    HighFrequency,
}

/// Where an attribute stands; decides which options are known there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Struct,
    Enum,
    Variant,
    Field,
}

impl Place {
    fn usage(self) -> &'static str {
        match self {
            Self::Struct | Self::Variant => r#"`aggregate = "…"`, `lane = "critical"` or "high-frequency", `name = "…"`"#,
            Self::Enum => r#"`aggregate = "…"`, `lane = "critical"` or "high-frequency""#,
            Self::Field => "`#[event(key)]` or `#[event(time)]`",
        }
    }
}

/// All errors of one input, so that they are reported at once.
#[derive(Default)]
pub(crate) struct Errors {
    all: Option<Error>,
    count: usize,
}

impl Errors {
    pub(crate) fn push(&mut self, error: Error) {
        self.count += 1;
        match &mut self.all {
            Some(all) => all.combine(error),
            none => *none = Some(error),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    pub(crate) fn finish<T>(self, value: T) -> Result<T> {
        self.all.map_or(Ok(value), Err)
    }
}

/// Options of a struct, an enum or a variant.
#[derive(Default)]
pub(crate) struct ContainerOptions {
    pub(crate) aggregate: Option<LitStr>,
    pub(crate) lane: Option<Lane>,
    pub(crate) name: Option<LitStr>,
    /// An option was wrong and is reported already: do not also report that it is missing.
    pub(crate) faulty: bool,
}

impl ContainerOptions {
    pub(crate) fn read(attributes: &[Attribute], place: Place, errors: &mut Errors) -> Self {
        let mut options = Self::default();
        let before = errors.count();
        for option in event_options(attributes, place, errors) {
            if let Err(error) = options.take(&option, place) {
                errors.push(error);
            }
        }
        options.faulty = errors.count() > before;
        options
    }

    fn take(&mut self, option: &Meta, place: Place) -> Result<()> {
        let path = option.path();
        if path.is_ident("aggregate") {
            let value = name_literal(option)?;
            if value.value().contains(['{', '}']) {
                let message = "an aggregate has no braces, they would change the Redis Cluster slot of its stream: write it without `{` and `}`";
                return Err(Error::new(value.span(), message));
            }
            if value.value().ends_with(":dead") {
                let message =
                    "an aggregate does not end in `:dead`, the streams of dead letters are named so: write another name";
                return Err(Error::new(value.span(), message));
            }
            set_once(&mut self.aggregate, value, option)
        } else if path.is_ident("lane") {
            set_once(&mut self.lane, lane(option)?, option)
        } else if path.is_ident("name") && place == Place::Enum {
            let message = "`name` belongs on a variant: write `#[event(name = \"…\")]` on each variant to rename";
            Err(Error::new_spanned(path, message))
        } else if path.is_ident("name") {
            set_once(&mut self.name, name_literal(option)?, option)
        } else if path.is_ident("key") || path.is_ident("time") {
            let name = text(path);
            let message =
                format!("`{name}` belongs on a field: write `#[event({name})]` on the field that holds {}", holds(&name));
            Err(Error::new_spanned(path, message))
        } else {
            Err(unknown(path, place))
        }
    }
}

/// What a field is marked as.
#[derive(Default)]
pub(crate) struct FieldMarks {
    pub(crate) key: Option<Span>,
    pub(crate) time: Option<Span>,
    /// As in [`ContainerOptions`].
    pub(crate) faulty: bool,
}

impl FieldMarks {
    pub(crate) fn read(attributes: &[Attribute], errors: &mut Errors) -> Self {
        let mut marks = Self::default();
        let before = errors.count();
        for option in event_options(attributes, Place::Field, errors) {
            if let Err(error) = marks.take(&option) {
                errors.push(error);
            }
        }
        marks.faulty = errors.count() > before;
        marks
    }

    fn take(&mut self, option: &Meta) -> Result<()> {
        let path = option.path();
        if path.is_ident("key") {
            set_once(&mut self.key, word(option)?, option)
        } else if path.is_ident("time") {
            set_once(&mut self.time, word(option)?, option)
        } else if ["aggregate", "lane", "name"].iter().any(|known| path.is_ident(known)) {
            let name = text(path);
            let message = format!(
                "`{name}` does not belong on a field: write `#[event({name} = \"…\")]` above the struct, enum or variant"
            );
            Err(Error::new_spanned(path, message))
        } else {
            Err(unknown(path, Place::Field))
        }
    }
}

/// What the field marked `#[event(name)]` holds.
fn holds(name: &str) -> &'static str {
    if name == "key" { "the aggregate's id" } else { "when it happened" }
}

/// True when serde writes the enum without its default tag, so that there is no tag to strip.
pub(crate) fn serde_changes_tagging(attributes: &[Attribute]) -> bool {
    has_serde_option(attributes, &["tag", "untagged", "into"])
}

/// True when serde does not read this variant, and does not count it.
pub(crate) fn serde_skips_reading(attributes: &[Attribute]) -> bool {
    has_serde_option(attributes, &["skip", "skip_deserializing"])
}

fn has_serde_option(attributes: &[Attribute], names: &[&str]) -> bool {
    let in_list = |attribute: &Attribute| {
        // What cannot be read here is serde's to report.
        let options = attribute.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated);
        options.unwrap_or_default().iter().any(|option| names.iter().any(|name| option.path().is_ident(name)))
    };
    attributes.iter().any(|attribute| attribute.path().is_ident("serde") && in_list(attribute))
}

/// Every option inside every `#[event(…)]` of one place.
fn event_options(attributes: &[Attribute], place: Place, errors: &mut Errors) -> Vec<Meta> {
    let mut all = Vec::new();
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("event")) {
        let usage = place.usage();
        let parse = Punctuated::<Meta, Token![,]>::parse_terminated;
        match &attribute.meta {
            Meta::List(list) if !list.tokens.is_empty() => match list.parse_args_with(parse) {
                Ok(options) => all.extend(options),
                Err(error) => errors.push(Error::new(error.span(), format!("{error}: write {usage}"))),
            },
            _ => errors.push(Error::new_spanned(attribute, format!("`#[event(…)]` needs a list of options: write {usage}"))),
        }
    }
    all
}

fn set_once<T>(slot: &mut Option<T>, value: T, option: &Meta) -> Result<()> {
    if slot.is_some() {
        let message = format!("`{}` is given twice: write it once", text(option.path()));
        return Err(Error::new_spanned(option, message));
    }
    *slot = Some(value);
    Ok(())
}

fn word(option: &Meta) -> Result<Span> {
    let name = text(option.path());
    let message = format!("`{name}` takes no value: write `#[event({name})]`");
    option.require_path_only().map(Spanned::span).map_err(|_| Error::new_spanned(option, message))
}

fn string_literal(option: &Meta) -> Result<LitStr> {
    match option {
        Meta::NameValue(pair) => match &pair.value {
            Expr::Lit(ExprLit { lit: Lit::Str(literal), .. }) => Ok(literal.clone()),
            other => Err(Error::new_spanned(other, needs_string(option.path()))),
        },
        _ => Err(Error::new_spanned(option, needs_string(option.path()))),
    }
}

fn needs_string(path: &Path) -> String {
    let name = text(path);
    format!("`{name}` takes a string literal: write `{name} = \"…\"`")
}

fn name_literal(option: &Meta) -> Result<LitStr> {
    let literal = string_literal(option)?;
    check_name(&text(option.path()), &literal.value(), literal.span())?;
    Ok(literal)
}

/// The limits that the library would otherwise refuse at run time.
pub(crate) fn check_name(option: &str, value: &str, span: Span) -> Result<()> {
    let message = match value.len() {
        0 => format!("`{option}` is empty: write 1 to {MAX_NAME_BYTES} bytes"),
        bytes if bytes > MAX_NAME_BYTES => format!("`{option}` has {bytes} bytes: write at most {MAX_NAME_BYTES}"),
        _ if value.contains('\0') => format!("`{option}` contains a NUL, which PostgreSQL cannot store: write it without"),
        _ => return Ok(()),
    };
    Err(Error::new(span, message))
}

fn lane(option: &Meta) -> Result<Lane> {
    let literal = string_literal(option)?;
    match literal.value().as_str() {
        "critical" => Ok(Lane::Critical),
        "high-frequency" => Ok(Lane::HighFrequency),
        other => {
            let message = format!(
                "lane {other:?} is not known: write `lane = \"critical\"` (outbox, same transaction) \
                 or `lane = \"high-frequency\"` (straight to Redis Streams)"
            );
            Err(Error::new(literal.span(), message))
        }
    }
}

fn unknown(path: &Path, place: Place) -> Error {
    Error::new_spanned(path, format!("unknown option `{}`: write {}", text(path), place.usage()))
}

fn text(path: &Path) -> String {
    path.to_token_stream().to_string().replace(' ', "")
}
