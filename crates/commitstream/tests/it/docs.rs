//! What the documents say is there.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_readme_shows_the_quickstart_example_as_it_is() {
    let example = read(&root().join("examples/quickstart.rs"));
    let code = &example[example.find("use commitstream").expect("the example uses the crate")..];
    assert!(read(&root().join("README.md")).contains(code.trim_end()), "copy examples/quickstart.rs into README.md");
}

#[test]
fn every_promise_names_a_test_that_exists() {
    let mut sources = String::new();
    collect(&root().join("crates"), &mut sources);
    for document in ["README.md", "ARCHITECTURE.md"] {
        let text = read(&root().join(document));
        let tables = text.lines().filter(|line| line.starts_with('|')).flat_map(|line| line.split('`').skip(1).step_by(2));
        for name in tables.filter(|code| code.contains("::") && !code.contains(' ')) {
            let test = name.rsplit("::").next().unwrap_or(name);
            assert!(sources.contains(&format!("fn {test}(")), "{document} names the test {name}, which does not exist");
        }
    }
}

fn collect(folder: &Path, sources: &mut String) {
    for entry in std::fs::read_dir(folder).expect("the folder is readable") {
        let path = entry.expect("the entry is readable").path();
        if path.is_dir() {
            collect(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&read(&path));
        }
    }
}
