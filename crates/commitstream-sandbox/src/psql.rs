//! Speaking SQL through `psql`, so that this crate needs no database driver and no async runtime.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::SandboxError;
use crate::guard::forget_postgres_variables;
use crate::url::without_password;

/// Runs SQL and returns what it selected: one row a line, columns parted by `|`. The first error ends it.
pub(crate) fn run(psql: &Path, url: &str, sql: &str) -> Result<String, SandboxError> {
    let (url, password) = without_password(url);
    let mut command = Command::new(psql);
    command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d"]).arg(url);
    forget_postgres_variables(&mut command);
    if let Some(password) = password {
        command.env("PGPASSWORD", password); // arguments can be read by every user of the machine
    }
    command.env("PGCLIENTENCODING", "UTF8").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(SandboxError::io(format!("start {}", psql.display())))?;

    // The input is written on the side: psql may print more than a pipe holds before it has read everything.
    let input = child.stdin.take();
    let output = std::thread::scope(|scope| {
        let writer = scope.spawn(move || input.map_or(Ok(()), |mut input| input.write_all(sql.as_bytes())));
        let output = child.wait_with_output();
        // Not being read to the end is what happens to the input of a psql that stopped at an error.
        let written = writer.join().unwrap_or(Ok(()));
        output.map(|output| (output, written))
    });
    let (output, written) = output.map_err(SandboxError::io("wait for psql"))?;
    if !output.status.success() {
        return Err(SandboxError::Psql { message: String::from_utf8_lossy(&output.stderr).trim_end().to_owned() });
    }
    written.map_err(SandboxError::io("write to psql"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
