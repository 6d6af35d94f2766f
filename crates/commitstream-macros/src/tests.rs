//! Each wrong input and the message it gets; `tests/derive.rs` compiles and runs the right ones.

use std::str::FromStr;

use proc_macro2::TokenStream;

use crate::expand::domain_event;

/// The messages for one input, in order; empty when it expands.
fn messages(input: &str) -> Vec<String> {
    let tokens = TokenStream::from_str(input).unwrap();
    match domain_event(tokens) {
        Ok(_) => Vec::new(),
        Err(error) => error.into_iter().map(|error| error.to_string()).collect(),
    }
}

#[track_caller]
fn assert_message(input: &str, expected: &str) {
    assert_eq!(messages(input), [expected], "for {input}");
}

/// A struct whose container attribute is under test.
fn container(attribute: &str) -> String {
    format!("{attribute} struct UserCreated {{ #[event(key)] id: i64 }}")
}

/// A struct whose fields are under test.
fn fields(fields: &str) -> String {
    format!("#[event(aggregate = \"user\")] struct UserCreated {{ {fields} }}")
}

#[test]
fn right_inputs_expand_to_an_event_and_the_way_back() {
    for input in [
        container("#[event(aggregate = \"user\", lane = \"high-frequency\", name = \"user.created\",)]"),
        container("#[event(aggregate = \"user\")] #[event(lane = \"critical\")]"),
        "#[event(aggregate = \"user\")] struct UserCreated<'a, T: Ord>(#[event(key)] &'a str, #[event(time)] T) where T: Clone;"
            .into(),
        "enum E { #[event(aggregate = \"a\")] A { #[event(key)] id: i64 }, #[event(aggregate = \"b\")] B(#[event(key)] i64) }"
            .into(),
    ] {
        let tokens = domain_event(TokenStream::from_str(&input).unwrap()).unwrap();
        assert_eq!(tokens.to_string().matches("impl ").count(), 2, "{tokens}");
    }
}

#[test]
fn generated_paths_are_absolute() {
    let tokens =
        domain_event(TokenStream::from_str(&fields("#[event(key)] id: i64, #[event(time)] at: SystemTime")).unwrap()).unwrap();
    let text = tokens.to_string().replace(' ', "");
    for name in ["commitstream", "std", "core"] {
        assert_eq!(text.matches(&format!("{name}::")).count(), text.matches(&format!("::{name}::")).count(), "{name} in {text}");
    }
}

#[test]
fn unknown_options_list_the_known_ones() {
    let options = r#"`aggregate = "…"`, `lane = "critical"` or "high-frequency", `name = "…"`"#;
    assert_message(&container("#[event(agregate = \"user\")]"), &format!("unknown option `agregate`: write {options}"));
    assert_message(&container("#[event(a::b)]"), &format!("unknown option `a::b`: write {options}"));
    assert_message(
        &fields("#[event(key)] id: i64, #[event(tiem)] at: SystemTime"),
        "unknown option `tiem`: write `#[event(key)]` or `#[event(time)]`",
    );
    assert_message(
        "#[event(agg = \"a\")] enum E { A(#[event(key)] i64) }",
        r#"unknown option `agg`: write `aggregate = "…"`, `lane = "critical"` or "high-frequency""#,
    );
}

#[test]
fn an_attribute_without_options_is_refused() {
    let message = r#"`#[event(…)]` needs a list of options: write `aggregate = "…"`, `lane = "critical"` or "high-frequency", `name = "…"`"#;
    for attribute in ["#[event]", "#[event()]", "#[event = \"user\"]"] {
        assert_message(&container(attribute), message);
    }
    assert_message(
        &fields("#[event] id: i64"),
        "`#[event(…)]` needs a list of options: write `#[event(key)]` or `#[event(time)]`",
    );
}

#[test]
fn malformed_lists_say_what_to_write() {
    for attribute in ["#[event(aggregate \"user\")]", "#[event(\"user\")]", "#[event(aggregate =)]"] {
        let [message] = messages(&container(attribute)).try_into().unwrap();
        assert!(message.contains(": write `aggregate = \"…\"`"), "{message}");
    }
}

#[test]
fn values_are_string_literals() {
    for attribute in
        ["#[event(aggregate)]", "#[event(aggregate = user)]", "#[event(aggregate(\"user\"))]", "#[event(aggregate = 1)]"]
    {
        assert_message(&container(attribute), "`aggregate` takes a string literal: write `aggregate = \"…\"`");
    }
    assert_message(
        &container("#[event(aggregate = \"user\", lane = Critical)]"),
        "`lane` takes a string literal: write `lane = \"…\"`",
    );
    assert_message(&fields("#[event(key = \"id\")] id: i64"), "`key` takes no value: write `#[event(key)]`");
    assert_message(
        &fields("#[event(key)] id: i64, #[event(time(utc))] at: SystemTime"),
        "`time` takes no value: write `#[event(time)]`",
    );
}

#[test]
fn unknown_lanes_list_the_known_ones() {
    let input = container("#[event(aggregate = \"user\", lane = \"fast\")]");
    assert_message(
        &input,
        "lane \"fast\" is not known: write `lane = \"critical\"` (outbox, same transaction) \
         or `lane = \"high-frequency\"` (straight to Redis Streams)",
    );
}

#[test]
fn literals_obey_the_limits_of_the_library() {
    let aggregate = |value: &str| container(&format!("#[event(aggregate = \"{value}\")]"));
    let name = |value: &str| container(&format!("#[event(aggregate = \"user\", name = \"{value}\")]"));
    assert!(messages(&aggregate(&"x".repeat(255))).is_empty());
    assert!(messages(&name(&"x".repeat(255))).is_empty());
    assert!(messages(&name("a{b}")).is_empty());
    assert_message(&aggregate(""), "`aggregate` is empty: write 1 to 255 bytes");
    assert_message(&name(""), "`name` is empty: write 1 to 255 bytes");
    assert_message(&aggregate(&"é".repeat(128)), "`aggregate` has 256 bytes: write at most 255");
    assert_message(&name(&"x".repeat(256)), "`name` has 256 bytes: write at most 255");
    assert_message(&aggregate("a\\0b"), "`aggregate` contains a NUL, which PostgreSQL cannot store: write it without");
    assert_message(&name("a\\0b"), "`name` contains a NUL, which PostgreSQL cannot store: write it without");
    let brace =
        "an aggregate has no braces, they would change the Redis Cluster slot of its stream: write it without `{` and `}`";
    assert_message(&aggregate("{user}"), brace);
    assert_message(&aggregate("user}"), brace);
    assert_message(
        &aggregate("user:dead"),
        "an aggregate does not end in `:dead`, the streams of dead letters are named so: write another name",
    );
    let long = "X".repeat(256);
    assert_message(
        &format!("#[event(aggregate = \"user\")] struct {long}(#[event(key)] i64);"),
        "`name` has 256 bytes: write at most 255",
    );
}

#[test]
fn a_missing_aggregate_is_reported() {
    assert_message(&container(""), "no aggregate is given: write `#[event(aggregate = \"…\")]` above the struct");
    let input = "enum E { #[event(aggregate = \"a\")] A(#[event(key)] i64), B(#[event(key)] i64) }";
    assert_message(
        input,
        "no aggregate is given for variant `B`: write `#[event(aggregate = \"…\")]` above the enum (for all variants) or above this one",
    );
}

#[test]
fn exactly_one_key() {
    assert_message(
        &fields("id: i64"),
        "no field is marked as the key of struct `UserCreated`: write `#[event(key)]` on the field that holds the aggregate's id",
    );
    assert_message(
        "#[event(aggregate = \"a\")] enum E { A(#[event(key)] i64), B(i64) }",
        "no field is marked as the key of variant `B`: write `#[event(key)]` on the field that holds the aggregate's id",
    );
    let input = fields("#[event(key)] id: i64, #[event(key)] other: i64");
    assert_message(&input, "two fields are marked as the key: write `#[event(key)]` on one of them only");
}

#[test]
fn at_most_one_time() {
    let input = fields("#[event(key)] id: i64, #[event(time)] a: SystemTime, #[event(time)] b: SystemTime");
    assert_message(&input, "two fields are marked as the time: write `#[event(time)]` on one of them only");
}

#[test]
fn options_are_given_once() {
    let twice = |option: &str| format!("`{option}` is given twice: write it once");
    assert_message(&container("#[event(aggregate = \"a\", aggregate = \"b\")]"), &twice("aggregate"));
    assert_message(&container("#[event(aggregate = \"a\")] #[event(aggregate = \"b\")]"), &twice("aggregate"));
    assert_message(&container("#[event(aggregate = \"a\", lane = \"critical\", lane = \"critical\")]"), &twice("lane"));
    assert_message(&container("#[event(aggregate = \"a\", name = \"b\", name = \"c\")]"), &twice("name"));
    assert_message(&fields("#[event(key, key)] id: i64"), &twice("key"));
    assert_message(&fields("#[event(key)] id: i64, #[event(time)] #[event(time)] at: SystemTime"), &twice("time"));
}

#[test]
fn options_on_the_wrong_place_say_the_right_one() {
    assert_message(
        &container("#[event(aggregate = \"user\", key)]"),
        "`key` belongs on a field: write `#[event(key)]` on the field that holds the aggregate's id",
    );
    assert_message(
        "#[event(aggregate = \"a\")] enum E { #[event(time)] A(#[event(key)] i64) }",
        "`time` belongs on a field: write `#[event(time)]` on the field that holds when it happened",
    );
    assert_message(
        &fields("#[event(key, aggregate = \"user\")] id: i64"),
        "`aggregate` does not belong on a field: write `#[event(aggregate = \"…\")]` above the struct, enum or variant",
    );
    assert_message(
        &fields("#[event(key)] id: i64, #[event(lane = \"critical\")] x: i64"),
        "`lane` does not belong on a field: write `#[event(lane = \"…\")]` above the struct, enum or variant",
    );
    assert_message(
        "#[event(aggregate = \"a\", name = \"b\")] enum E { A(#[event(key)] i64) }",
        "`name` belongs on a variant: write `#[event(name = \"…\")]` on each variant to rename",
    );
}

#[test]
fn shapes_without_a_key_are_refused() {
    let no_fields = |owner: &str| {
        format!(
            "{owner} has no fields, but an event needs a key: add a field and write `#[event(key)]` on the field that holds the aggregate's id"
        )
    };
    assert_message("#[event(aggregate = \"a\")] struct Tick;", &no_fields("struct `Tick`"));
    assert_message("#[event(aggregate = \"a\")] struct Tick {}", &no_fields("struct `Tick`"));
    assert_message("#[event(aggregate = \"a\")] enum E { A(#[event(key)] i64), B }", &no_fields("variant `B`"));
    assert_message("#[event(aggregate = \"a\")] enum E {}", "enum `E` has no variants: write one variant for each event");
    assert_message(
        "#[event(aggregate = \"a\")] union U { #[event(key)] a: i64 }",
        "a union cannot be an event: write a struct, or an enum with one event for each variant",
    );
}

#[test]
fn all_errors_are_reported_at_once() {
    let input = "#[event(aggregate = \"{\", lane = \"fast\")] enum E { A(i64), #[event(name = \"\")] B(#[event(kee)] i64), C }";
    let starts = [
        "an aggregate has no braces",
        "lane \"fast\"",
        "no field is marked",
        "`name` is empty",
        "unknown option `kee`",
        "variant `C`",
    ];
    let messages = messages(input);
    assert_eq!(messages.len(), starts.len(), "{messages:#?}");
    for (message, start) in messages.iter().zip(starts) {
        assert!(message.starts_with(start), "{message:?} should start with {start:?}");
    }
}
