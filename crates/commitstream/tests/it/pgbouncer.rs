//! A PgBouncer of a test's own. Tests that want it say so when it is not installed (Debian: `pgbouncer`).

use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use commitstream_sandbox::TestDatabase;

pub struct PgBouncer {
    process: Child,
    directory: PathBuf,
    pub url: String,
}

impl PgBouncer {
    /// Before a database of the sandbox. `None` where it is not installed.
    pub fn start(database: &TestDatabase, settings: &str) -> Result<Option<Self>> {
        let Some(program) = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/opt/homebrew/bin/pgbouncer"]
            .into_iter()
            .find(|path| Path::new(path).exists())
        else {
            println!("left out: pgbouncer is not installed; on Debian scripts/install-servers.sh --tests installs it");
            return Ok(None);
        };
        let (login, place) = database.url().rsplit_once('@').context("a login")?;
        let password = login.rsplit_once(':').context("a password")?.1;
        let (server, name) = place.split_once('/').context("a database")?;
        let (host, port) = server.split_once(':').context("a port")?;
        let own = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let directory = std::env::temp_dir().join(format!("commitstream-{}", database.name()));
        std::fs::create_dir(&directory)?;
        std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o755))?;
        let file = directory.join("pgbouncer.ini");
        std::fs::write(
            &file,
            format!(
                "[databases]\n{name} = host={host} port={port} user=postgres password={password}\n\
                 [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {own}\nunix_socket_dir =\nauth_type = any\n{settings}\n"
            ),
        )?;
        let mut command = Command::new(program);
        // It refuses to run as root.
        command.args(["-q", "-u", "nobody"]).arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn()?;
        Ok(Some(Self { process, directory, url: format!("postgres://app@127.0.0.1:{own}/{name}") }))
    }

    /// Waits until it does.
    pub fn listens(&self) -> Result<()> {
        let address = self.url.rsplit_once('@').and_then(|(_, place)| place.split('/').next()).context("an address")?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(address).is_err() {
            ensure!(Instant::now() < deadline, "the pooler does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        std::fs::remove_dir_all(&self.directory).ok();
    }
}
