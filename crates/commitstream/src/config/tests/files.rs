use super::super::ConfigError;
use super::{Directory, load_path};

#[test]
fn includes_take_their_place_among_the_fields() {
    let directory = Directory::new();
    directory.write("base.conf", "app.outbox.processor { batchSize = 1, maxRetries = 1 }");
    directory.write("both.json", r#"{"app":{"redis":{"streamPrefix":"json","connectTimeout":"1s"}}}"#);
    directory.write("both.conf", "app.redis.streamPrefix = conf");
    directory.write("inner.conf", "enabled = false");
    let root = directory.write(
        "application.conf",
        "app.outbox.processor.batchSize = 2\ninclude \"base.conf\"\napp.outbox.processor.maxRetries = 2\n\
         include required(file(\"both\"))\ninclude \"absent.conf\"\napp.outbox { include \"inner\" }",
    );
    let loaded = load_path(&root, &[], &[]).unwrap();
    assert_eq!(loaded.settings.outbox.processor.batch_size, 1);
    assert_eq!(loaded.settings.outbox.processor.max_retries, 2);
    assert_eq!(loaded.settings.redis.stream_prefix, "conf");
    assert_eq!(loaded.settings.redis.connect_timeout.as_secs(), 1);
    assert!(!loaded.settings.outbox.enabled);
    assert!(loaded.source("app.outbox.processor.batchSize").to_string().ends_with("base.conf:1"));
}

#[test]
fn includes_that_cannot_be_followed() {
    let cases = [
        ("\ninclude url(\"http://h/a.conf\")", "application.conf:2: include \"http://h/a.conf\": only files can be included"),
        ("include classpath(\"a\")", "only files can be included"),
        ("include \"https://h/a\"", "only files can be included"),
        ("include \"application.conf\"", "does the file include itself?"),
        ("include required(\"absent.conf\")", "cannot read the settings file"),
        ("include \"broken.conf\"", "broken.conf:1: this { is never closed"),
        ("include required(\"a\"", "expected a closing ) after include"),
        ("include file(a)", "expected a quoted file name after include"),
    ];
    for (text, message) in cases {
        let directory = Directory::new();
        directory.write("broken.conf", "a {");
        let error = load_path(&directory.write("application.conf", text), &[], &[]).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[test]
fn a_file_that_is_not_text_is_refused() {
    let directory = Directory::new();
    let path = directory.0.join("application.conf");
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert!(matches!(load_path(&path, &[], &[]), Err(ConfigError::Read { .. })));
}
