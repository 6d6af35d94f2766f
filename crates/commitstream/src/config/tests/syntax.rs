use super::{load, refusal, settings};

/// The prefix is the one setting that takes any text, so it shows what the parser made of it.
fn prefix(text: &str, env: &[(&str, &str)]) -> String {
    load(text, env, &[]).unwrap().settings.redis.stream_prefix
}

#[test]
fn the_many_ways_to_write_a_value() {
    let cases = [
        ("app.redis.streamPrefix = a", "a"),
        ("app.redis.streamPrefix : a", "a"),
        ("app { redis { streamPrefix = a } }", "a"),
        ("{ app : { redis : { streamPrefix : a } } }", "a"),
        ("{\"app\":{\"redis\":{\"streamPrefix\":\"a:\"}}}", "a:"),
        ("\u{feff}# comment with a \\ and a {\n// another \"\napp.redis.streamPrefix = a # tail", "a"),
        ("app.redis.streamPrefix = a//tail", "a"),
        ("app.redis.streamPrefix = a/b", "a/b"),
        ("app.redis.streamPrefix = a b  c ", "a b  c"),
        ("app.redis.streamPrefix = \"#a\" // \"x\"", "#a"),
        ("app.redis.streamPrefix = 1e3", "1e3"),
        ("app.redis.streamPrefix = \"\\u0041\\ud83d\\ude00\\t\\\\\"", "A\u{1f600}\t\\"),
        ("app.redis.streamPrefix = \"\"\"a\n\\\"b\"\"\"\"", "a\n\\\"b\""),
        ("app.redis.streamPrefix =\n  a", "a"),
        ("app {\r\n  redis.streamPrefix = a\r\n}\r\n", "a"),
        ("app.redis { streamPrefix = a, connectTimeout = 1s, }", "a"),
        ("app . redis . \"streamPrefix\" = a", "a"),
        ("app.redis.streamPrefix = a\napp { redis.streamPrefix = b }", "b"),
        ("app.redis.streamPrefix = a\napp = 1\napp.redis.connectTimeout = 1s", "events:"),
        ("other = [1, [2], { a = [\"]\"] }]\napp.redis.streamPrefix = a\ni=1", "a"),
    ];
    for (text, expected) in cases {
        assert_eq!(prefix(text, &[]), expected, "{text}");
    }
}

#[test]
fn references_to_the_file_and_to_the_environment() {
    let env = [("NAME", "n"), ("EMPTY", "")];
    let cases = [
        ("app.redis.streamPrefix = ${NAME}", "n"),
        ("app.redis.streamPrefix = a\napp.redis.streamPrefix = ${?NAME}", "n"),
        ("app.redis.streamPrefix = a\napp.redis.streamPrefix = ${?UNSET}", "a"),
        ("app.redis.streamPrefix = ${?UNSET}", "events:"),
        ("app.redis.streamPrefix = a${?UNSET}b", "ab"),
        ("app.redis.streamPrefix = pre\"-\"${NAME}${x}\nx = y", "pre-ny"),
        ("NAME = file\napp.redis.streamPrefix = ${NAME}", "file"),
        ("x = ${?UNSET}\napp.redis.streamPrefix = a\napp.redis.streamPrefix = ${?x}", "a"),
        ("base { streamPrefix = a, connectTimeout = 1s }\napp.redis = ${base} { connectTimeout = 2s }", "a"),
        ("base { streamPrefix = a }\napp.redis = ${base}\napp.redis.connectTimeout = 1s", "a"),
        ("app.redis.streamPrefix = a\napp.redis.streamPrefix = ${app.redis.streamPrefix}b", "ab"),
        ("app.redis { streamPrefix = a }\napp.redis = ${app.redis} { connectTimeout = 1s }", "a"),
        ("a.b = c\nc = ${a}\napp.redis.streamPrefix = ${c.b}", "c"),
    ];
    for (text, expected) in cases {
        assert_eq!(prefix(text, &env), expected, "{text}");
    }
    // In quotes it is plain text.
    let quoted = refusal("app.redis.streamPrefix = \"${NAME}\"", &env, &[]);
    assert!(quoted.contains("must not contain { or }"), "{quoted}");
}

#[test]
fn references_that_lead_nowhere() {
    let cases = [
        (
            "\napp.redis.streamPrefix = ${UNSET}",
            "application.conf:2: ${UNSET} is set neither in the file nor in the environment; write ${?UNSET} if it may be absent",
        ),
        ("app.redis.streamPrefix = ${a}\na = ${b}\nb = ${a}", "application.conf:3: ${a} is set neither in the file"),
        ("app.outbox { a = ${app.outbox}, b = ${app.outbox} }", "app.outbox.a.a (from application.conf:1) is not a setting"),
    ];
    for (text, message) in cases {
        let refused = refusal(text, &[], &[]);
        assert!(refused.contains(message), "{refused}");
    }
    let chain: String = (0..50_000).map(|i| format!("x{i} = ${{x{}}}\n", i + 1)).collect();
    let refused = refusal(&format!("{chain}app.redis.streamPrefix = ${{x0}}"), &[], &[]);
    assert!(refused.ends_with("too many references inside references"), "{refused}");
    // Each doubles the one before: 2^40 look-ups, were there no limit.
    let doubling: String = (0..40).map(|i| format!("x{i} = ${{x{}}}${{x{}}}\n", i + 1, i + 1)).collect();
    let refused = refusal(&format!("{doubling}x40 = a\napp.redis.streamPrefix = ${{x0}}"), &[], &[]);
    assert!(refused.ends_with("too many references inside references"), "{refused}");
}

#[test]
fn what_does_not_parse_says_the_line() {
    let cases = [
        ("app {\n  outbox {\n    enabled = true\n", "application.conf:2: this { is never closed"),
        ("app { outbox.enabled = true } }", "application.conf:1: a closing } too many"),
        ("{ app.outbox.enabled = true }\nx = 1", "application.conf:2: expected the end of the file, found x"),
        ("app.outbox.enabled = true\napp.outbox", "application.conf:2: expected = or { after app.outbox, but the file ends here"),
        ("\napp.outbox.enabled =", "application.conf:2: expected a value, but the file ends here"),
        ("app { outbox.enabled =\n}", "application.conf:2: expected a value, found }"),
        ("a = \"open\nb = 1", "application.conf:1: this \" is never closed"),
        ("a = \"\"\"open\nb = 1", "application.conf:1: this \"\"\" is never closed"),
        ("a = [1, 2\nb = 3", "application.conf:2"),
        ("a = \"\\q\"", "after \\ comes one of"),
        ("a = \"\\u12g4\"", "four hexadecimal digits"),
        ("a = \"\\ud800\"", "\\u must name a character"),
        ("= 1", "expected a name, found ="),
        ("a..b = 1", "expected a name, found ."),
        ("a = ${b", "expected } after ${, but the file ends here"),
        ("app.redis.url = redis://h:6379", "needs double quotes), found :"),
        ("a = b = c", "needs double quotes), found ="),
        ("a +  = 1", "expected = or { after a, found +"),
    ];
    for (text, message) in cases {
        let refused = refusal(text, &[], &[]);
        assert!(refused.starts_with("application.conf:") && refused.contains(message), "{text}: {refused}");
    }
    let deep = "a {".repeat(100_000);
    assert!(refusal(&deep, &[], &[]).contains("more than 64 objects"));
    assert!(refusal(&format!("a = {}", "[".repeat(100_000)), &[], &[]).contains("more than 64 objects"));
}

#[test]
fn a_damaged_file_never_panics() {
    let text = "app { redis.streamPrefix = \"\u{e9}\" ${?X}\n# c\n x = [1, { y = \"\"\"z\"\"\" }] }\ninclude \"none\"\n";
    let refused_or_not = |text: &str| load(text, &[], &[]).is_ok();
    assert!(refused_or_not(text));
    for (at, _) in text.char_indices() {
        let (before, after) = text.split_at(at);
        let rest = &after[after.chars().next().unwrap().len_utf8()..];
        for put in ["", "{", "}", "\"", "$", "\\", ".", "=", "\n"] {
            refused_or_not(&format!("{before}{put}{rest}"));
        }
        refused_or_not(before);
    }
}

#[test]
fn dots_in_names_are_kept_where_they_are_quoted() {
    let read = settings("app.eventPublishing.overrides.\"a.b\" = outbox\napp.\"outbox.enabled\" = false");
    assert!(read.publishing.overrides.contains_key("a.b"));
    assert!(read.outbox.enabled, "app.\"outbox.enabled\" is another name");
}
