//! From the parsed type to its checked events: a struct is one event, an enum one for each variant.

use proc_macro2::{Span, TokenStream};
use quote::quote;
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{Data, DataEnum, DeriveInput, Error, Fields, Ident, Index, Member, Result, Type, Variant};

use crate::attributes::{
    ContainerOptions, Errors, FieldMarks, Lane, Place, check_name, serde_changes_tagging, serde_skips_reading,
};

const MARK_KEY: &str = "write `#[event(key)]` on the field that holds the aggregate's id";

/// One kind of event: what the generated code says about it.
pub(crate) struct Event {
    /// `Self` or `Self::Variant`.
    pub(crate) path: TokenStream,
    pub(crate) name: String,
    pub(crate) aggregate: String,
    pub(crate) lane: Lane,
    pub(crate) key: MarkedField,
    pub(crate) time: Option<MarkedField>,
    /// Serde puts its default tag around this event; the payload goes without it.
    pub(crate) tagged: bool,
    /// Its number among the variants that serde reads; `None` if it does not read this one.
    pub(crate) number: Option<u64>,
}

/// A field that is the key or the time.
#[derive(Clone)]
pub(crate) struct MarkedField {
    pub(crate) member: Member,
    pub(crate) ty: Type,
}

/// Checks everything and reports all errors at once.
pub(crate) fn events(input: &DeriveInput) -> Result<Vec<Event>> {
    let mut errors = Errors::default();
    let events = match &input.data {
        Data::Struct(data) => struct_event(input, &data.fields, &mut errors).into_iter().collect(),
        Data::Enum(data) => enum_events(input, data, &mut errors),
        Data::Union(data) => {
            let message = "a union cannot be an event: write a struct, or an enum with one event for each variant";
            errors.push(Error::new(data.union_token.span(), message));
            Vec::new()
        }
    };
    errors.finish(events)
}

fn struct_event(input: &DeriveInput, fields: &Fields, errors: &mut Errors) -> Option<Event> {
    let options = ContainerOptions::read(&input.attrs, Place::Struct, errors);
    if options.aggregate.is_none() && !options.faulty {
        let message = "no aggregate is given: write `#[event(aggregate = \"…\")]` above the struct";
        errors.push(Error::new(input.ident.span(), message));
    }
    let owner = Owner { kind: "struct", ident: &input.ident };
    let (key, time) = marked_fields(&owner, fields, errors);
    Some(Event {
        path: quote!(Self),
        name: event_name(&options, &input.ident, errors),
        aggregate: options.aggregate?.value(),
        lane: options.lane.unwrap_or(Lane::Critical),
        key: key?,
        time,
        tagged: false,
        number: Some(0),
    })
}

fn enum_events(input: &DeriveInput, data: &DataEnum, errors: &mut Errors) -> Vec<Event> {
    let defaults = ContainerOptions::read(&input.attrs, Place::Enum, errors);
    if data.variants.is_empty() {
        let message = format!("enum `{}` has no variants: write one variant for each event", input.ident);
        errors.push(Error::new(input.ident.span(), message));
    }
    let tagged = !serde_changes_tagging(&input.attrs);
    let mut read = 0..;
    let mut event = |variant: &Variant| {
        let number = if serde_skips_reading(&variant.attrs) { None } else { read.next() };
        variant_event(variant, &defaults, tagged, number, errors)
    };
    data.variants.iter().filter_map(&mut event).collect()
}

fn variant_event(
    variant: &Variant,
    defaults: &ContainerOptions,
    tagged: bool,
    number: Option<u64>,
    errors: &mut Errors,
) -> Option<Event> {
    let options = ContainerOptions::read(&variant.attrs, Place::Variant, errors);
    let aggregate = options.aggregate.as_ref().or(defaults.aggregate.as_ref());
    if aggregate.is_none() && !options.faulty && !defaults.faulty {
        let message = format!(
            "no aggregate is given for variant `{}`: write `#[event(aggregate = \"…\")]` above the enum (for all variants) or above this one",
            variant.ident
        );
        errors.push(Error::new(variant.ident.span(), message));
    }
    let owner = Owner { kind: "variant", ident: &variant.ident };
    let (key, time) = marked_fields(&owner, &variant.fields, errors);
    let ident = &variant.ident;
    Some(Event {
        path: quote!(Self::#ident),
        name: event_name(&options, ident, errors),
        aggregate: aggregate?.value(),
        lane: options.lane.or(defaults.lane).unwrap_or(Lane::Critical),
        key: key?,
        time,
        tagged: tagged && !serde_changes_tagging(&variant.attrs),
        number,
    })
}

/// The struct or variant that holds the fields, for messages.
struct Owner<'a> {
    kind: &'static str,
    ident: &'a Ident,
}

fn event_name(options: &ContainerOptions, ident: &Ident, errors: &mut Errors) -> String {
    if let Some(name) = &options.name {
        return name.value();
    }
    let name = ident.unraw().to_string();
    if let Err(error) = check_name("name", &name, ident.span()) {
        errors.push(error);
    }
    name
}

/// The one key and the time, if there is one.
fn marked_fields(owner: &Owner, fields: &Fields, errors: &mut Errors) -> (Option<MarkedField>, Option<MarkedField>) {
    let Owner { kind, ident } = owner;
    if fields.is_empty() {
        let message = format!("{kind} `{ident}` has no fields, but an event needs a key: add a field and {MARK_KEY}");
        errors.push(Error::new(ident.span(), message));
        return (None, None);
    }
    let (mut key, mut time) = (None, None);
    let mut faulty = false;
    for (index, field) in fields.iter().enumerate() {
        let marks = FieldMarks::read(&field.attrs, errors);
        faulty |= marks.faulty;
        let member = field.ident.clone().map_or_else(|| Member::Unnamed(Index::from(index)), Member::Named);
        let marked = MarkedField { member, ty: field.ty.clone() };
        mark(&mut key, marks.key, &marked, "key", errors);
        mark(&mut time, marks.time, &marked, "time", errors);
    }
    if key.is_none() && !faulty {
        errors.push(Error::new(ident.span(), format!("no field is marked as the key of {kind} `{ident}`: {MARK_KEY}")));
    }
    (key, time)
}

fn mark(slot: &mut Option<MarkedField>, mark: Option<Span>, field: &MarkedField, name: &str, errors: &mut Errors) {
    match (mark, &slot) {
        (None, _) => {}
        (Some(_), None) => *slot = Some(field.clone()),
        (Some(span), Some(_)) => {
            errors.push(Error::new(
                span,
                format!("two fields are marked as the {name}: write `#[event({name})]` on one of them only"),
            ));
        }
    }
}
