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
    for document in ["README.md", "ARCHITECTURE.md", "docs/comparison.md", "docs/doctor.md"] {
        let text = read(&root().join(document))?;
        let tables = text.lines().filter(|line| line.starts_with('|')).flat_map(|line| line.split('`').skip(1).step_by(2));
        for name in tables.filter(|code| code.contains("::") && !code.contains(['(', ' '])) {
            let test = name.rsplit("::").next().unwrap_or(name);
            ensure!(sources.contains(&format!("fn {test}(")), "{document} names the test {name}, which does not exist");
        }
    }
    Ok(())
}

/// They are rows of the table that the benchmark wrote, without its last columns.
#[test]
fn the_figures_of_the_readme_are_those_that_were_measured() -> Result<()> {
    let (readme, measured) = (read(&root().join("README.md"))?, read(&root().join("docs/benchmarks.md"))?);
    let (_, section) = readme.split_once("\n## How fast it is\n").context("the section")?;
    let rows: Vec<_> = section.lines().take_while(|line| !line.starts_with("## ")).filter(|line| line.starts_with('|')).collect();
    ensure!(rows.len() > 2, "no figures");
    for row in rows {
        let row = row.trim_end_matches('|');
        ensure!(measured.lines().any(|line| line.starts_with(row)), "docs/benchmarks.md has no {row}");
    }
    Ok(())
}

/// The last table of docs/doctor.md; each test that it names looks for what the check finds.
#[test]
fn each_check_of_doctor_names_tests_that_provoke_it() -> Result<()> {
    let page = read(&root().join("docs/doctor.md"))?;
    let (_, table) = page.split_once("## How it is known").context("the section")?;
    for check in commitstream::doctor::CHECKS {
        let row = table.lines().find(|line| line.starts_with(&format!("| `{check}` |"))).with_context(|| check.to_owned())?;
        let mut tests = row.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::")).peekable();
        ensure!(tests.peek().is_some(), "no test provokes {check}");
        for (file, test) in tests {
            let source = read(&root().join(format!("crates/commitstream/tests/it/{file}.rs")))?;
            let (_, after) = source.split_once(&format!("fn {test}(")).with_context(|| format!("{file}.rs has no {test}"))?;
            let body = after.split("\n}\n").next().unwrap_or(after);
            ensure!(body.contains(&format!("\"{check}\"")), "{file}::{test} does not look for {check}");
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
