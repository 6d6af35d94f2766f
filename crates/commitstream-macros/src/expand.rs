//! Writes the implementation. Generated code names everything by its absolute path, whatever the caller has in scope.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{DeriveInput, Result};

use crate::attributes::Lane;
use crate::model::{Event, MarkedField, events};

impl ToTokens for Lane {
    fn to_tokens(&self, tokens: &mut TokenStream) {
        tokens.extend(match self {
            Self::Critical => quote!(::commitstream::event::Lane::Critical),
            Self::HighFrequency => quote!(::commitstream::event::Lane::HighFrequency),
        });
    }
}

pub(crate) fn domain_event(input: TokenStream) -> Result<TokenStream> {
    let input: DeriveInput = syn::parse2(input)?;
    let events = events(&input)?;
    let ident = &input.ident;
    let (impl_generics, type_generics, where_clause) = input.generics.split_for_impl();

    let event_type = arms(&events, |event| event.name.to_token_stream());
    let aggregate_type = arms(&events, |event| event.aggregate.to_token_stream());
    let lane = arms(&events, |event| event.lane.to_token_stream());
    let aggregate_id = events.iter().map(aggregate_id_arm);
    let occurred_at = occurred_at(&events);
    let payload = payload(&events);
    let decode = decode(&input, &events);

    Ok(quote! {
        // A deprecated variant is still an event.
        #[allow(deprecated)]
        #[automatically_derived]
        impl #impl_generics ::commitstream::event::DomainEvent for #ident #type_generics #where_clause {
            fn event_type(&self) -> &str {
                match self { #event_type }
            }
            fn aggregate_type(&self) -> &str {
                match self { #aggregate_type }
            }
            fn aggregate_id(&self) -> ::std::string::String {
                match self { #(#aggregate_id)* }
            }
            fn lane(&self) -> ::commitstream::event::Lane {
                match self { #lane }
            }
            #occurred_at
            fn payload(&self) -> ::core::result::Result<
                ::std::boxed::Box<::commitstream::event::derive_support::RawValue>,
                ::commitstream::event::derive_support::JsonError,
            > {
                #payload
            }
        }

        #decode
    })
}

/// The way back, for types that serde reads. The bound names a lifetime of its own, so that it may be false: then the
/// type just has no way back.
fn decode(input: &DeriveInput, events: &[Event]) -> TokenStream {
    let ident = &input.ident;
    let mut generics = input.generics.clone();
    let (_, type_generics, _) = input.generics.split_for_impl();
    generics.make_where_clause().predicates.push(syn::parse_quote! {
        for<'__commitstream> #ident #type_generics:
            ::commitstream::event::derive_support::Deserialize<'__commitstream> + ::core::marker::Send + 'static
    });
    let (impl_generics, _, where_clause) = generics.split_for_impl();
    // Of several variants with one aggregate and name the first is read, unless serde chooses.
    let mut read: Vec<&Event> = Vec::new();
    for event in events.iter().filter(|event| event.number.is_some()) {
        if !read.iter().any(|known| (&known.aggregate, &known.name) == (&event.aggregate, &event.name)) {
            read.push(event);
        }
    }
    let kinds = read.iter().map(|Event { aggregate, name, .. }| {
        quote!(::commitstream::event::EventKind { aggregate_type: #aggregate, event_type: #name })
    });
    let arms = read.iter().map(|Event { aggregate, name, tagged, number, .. }| {
        let call = match tagged {
            true => quote!(::commitstream::event::derive_support::decode_variant(#number, envelope)),
            false => quote!(::commitstream::event::derive_support::decode(envelope)),
        };
        quote!((#aggregate, #name) => #call,)
    });
    let wanted = ident.to_string();
    quote! {
        #[automatically_derived]
        impl #impl_generics ::commitstream::event::DecodeEvent for #ident #type_generics #where_clause {
            const KINDS: &'static [::commitstream::event::EventKind] = &[#(#kinds),*];

            fn decode(
                envelope: &::commitstream::event::EventEnvelope,
            ) -> ::core::result::Result<Self, ::commitstream::event::EventError> {
                match (envelope.aggregate_type.as_str(), envelope.event_type.as_str()) {
                    #(#arms)*
                    _ => ::core::result::Result::Err(::commitstream::event::derive_support::another_type(envelope, #wanted)),
                }
            }
        }
    }
}

/// One arm for each event that reads none of its fields.
fn arms(events: &[Event], value: impl Fn(&Event) -> TokenStream) -> TokenStream {
    events
        .iter()
        .map(|event| {
            let path = &event.path;
            let value = value(event);
            quote!(#path { .. } => #value,)
        })
        .collect()
}

fn aggregate_id_arm(event: &Event) -> TokenStream {
    field_arm(event, &event.key, |value, span| quote_spanned!(span=> ::std::string::ToString::to_string(#value)))
}

/// The method, or nothing when every event takes the trait's default: now.
fn occurred_at(events: &[Event]) -> Option<TokenStream> {
    events.iter().any(|event| event.time.is_some()).then(|| {
        let time = quote!(::commitstream::event::derive_support::DateTime<::commitstream::event::derive_support::Utc>);
        let arms = events.iter().map(|event| match &event.time {
            Some(field) => field_arm(
                event,
                field,
                |value, span| quote_spanned!(span=> ::core::convert::Into::<#time>::into(::core::clone::Clone::clone(#value))),
            ),
            None => {
                let path = &event.path;
                quote!(#path { .. } => ::commitstream::event::derive_support::Utc::now(),)
            }
        });
        quote! {
            fn occurred_at(&self) -> #time {
                match self { #(#arms)* }
            }
        }
    })
}

/// An arm that reads one field. A type that does not fit is reported at the field's type.
fn field_arm(event: &Event, field: &MarkedField, value: impl Fn(&Ident, Span) -> TokenStream) -> TokenStream {
    let (path, member) = (&event.path, &field.member);
    // The place of the type, but names resolved as in the rest of the macro.
    let span = field.ty.span().resolved_at(Span::call_site());
    let binding = Ident::new("__commitstream_field", span);
    let value = value(&binding, span);
    quote!(#path { #member: #binding, .. } => #value,)
}

fn payload(events: &[Event]) -> TokenStream {
    let call = |tagged: bool| match tagged {
        true => quote!(::commitstream::event::derive_support::variant_payload(self)),
        false => quote!(::commitstream::event::derive_support::payload(self)),
    };
    let Some(first) = events.first().filter(|first| events.iter().all(|event| event.tagged == first.tagged)) else {
        let arms = arms(events, |event| call(event.tagged));
        return quote!(match self { #arms });
    };
    call(first.tagged)
}
