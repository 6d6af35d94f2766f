//! A database for one test.

use std::path::PathBuf;

use crate::url::with_database;
use crate::{SandboxError, psql, random};

/// An empty database that only its creator knows; it is dropped, with all connections to it, when this value is.
#[derive(Debug)]
pub struct TestDatabase {
    psql: PathBuf,
    server_url: String,
    name: String,
    url: String,
}

impl TestDatabase {
    pub(crate) fn create(psql: PathBuf, server_url: &str) -> Result<TestDatabase, SandboxError> {
        Self::of_template(psql, server_url, "template0")
    }

    pub(crate) fn create_encoded(psql: PathBuf, server_url: &str, encoding: &str) -> Result<TestDatabase, SandboxError> {
        Self::of_template(psql, server_url, &format!("template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"))
    }

    /// Another database with all that is in this one, which nobody may be connected to for as long. Much faster than filling it again.
    pub fn copy(&self) -> Result<TestDatabase, SandboxError> {
        Self::of_template(self.psql.clone(), &self.server_url, &self.name)
    }

    fn of_template(psql: PathBuf, server_url: &str, template: &str) -> Result<TestDatabase, SandboxError> {
        let name = format!("t_{}", random::hex(8)?);
        let expected = "postgres://USER:PASSWORD@HOST:PORT/DATABASE";
        let invalid = SandboxError::InvalidUrl { variable: crate::POSTGRES_VARIABLE, expected };
        let url = with_database(server_url, &name).ok_or(invalid)?;
        psql::run(&psql, server_url, &format!("CREATE DATABASE {name} TEMPLATE {template};"))?;
        Ok(TestDatabase { psql, server_url: server_url.to_owned(), name, url })
    }

    /// The superuser's access to this database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The database's name, such as `t_0f3c…`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs SQL statements with `psql`, each in a transaction of its own unless the text says otherwise, up to the
    /// first error. Returns what they select: one row a line, columns parted by `|`.
    pub fn psql(&self, sql: &str) -> Result<String, SandboxError> {
        psql::run(&self.psql, &self.url, sql)
    }
}

impl Drop for TestDatabase {
    /// A failure is only reported: the test may have killed the server, and the database ends with the server anyway.
    fn drop(&mut self) {
        if let Err(error) = psql::run(&self.psql, &self.server_url, &format!("DROP DATABASE {} WITH (FORCE);", self.name)) {
            eprintln!("commitstream-sandbox: database {} stays behind: {error}", self.name);
        }
    }
}
