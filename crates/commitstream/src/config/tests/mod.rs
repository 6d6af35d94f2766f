mod debugging;
mod files;
mod loading;
mod redaction;
mod refusals;
mod syntax;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{ConfigError, Loaded, Settings};

/// A directory of its own for each test, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("commitstream-config-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Loads with this text as the file, these environment variables and these flags.
fn load(text: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let directory = Directory::new();
    load_path(&directory.write("application.conf", text), env, flags)
}

fn load_path(path: &Path, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let look_up = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    let flags: Vec<(String, String)> = flags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Settings::load(Some(path), look_up, &flags)
}

fn settings(text: &str) -> Settings {
    load(text, &[], &[]).unwrap().settings
}

/// The message of the refusal, with the directory of the test cut off.
fn refusal(text: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> String {
    let directory = Directory::new();
    let path = directory.write("application.conf", text);
    let error = load_path(&path, env, flags).expect_err("must be refused");
    error.to_string().replace(&format!("{}/", directory.0.display()), "")
}
