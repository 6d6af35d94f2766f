//! What the documents say is there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

#[test]
fn the_readme_shows_the_quickstart_example_as_it_is() -> Result<()> {
    let example = read(&root().join("examples/quickstart.rs"))?;
    let code = &example[example.find("use commitstream").context("the example uses the crate")?..];
    ensure!(read(&root().join("README.md"))?.contains(code.trim_end()), "copy examples/quickstart.rs into README.md");
    Ok(())
}

#[test]
fn every_promise_names_a_test_that_exists() -> Result<()> {
    let mut sources = String::new();
    collect(&root().join("crates"), &mut sources)?;
    collect(&root().join("examples"), &mut sources)?;
    for document in ["README.md", "ARCHITECTURE.md", "docs/comparison.md"] {
        let text = read(&root().join(document))?;
        let tables = text.lines().filter(|line| line.starts_with('|')).flat_map(|line| line.split('`').skip(1).step_by(2));
        for name in tables.filter(|code| code.contains("::") && !code.contains(['(', ' '])) {
            let test = name.rsplit("::").next().unwrap_or(name);
            ensure!(sources.contains(&format!("fn {test}(")), "{document} names the test {name}, which does not exist");
        }
    }
    Ok(())
}

fn collect(folder: &Path, sources: &mut String) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&read(&path)?);
        }
    }
    Ok(())
}
