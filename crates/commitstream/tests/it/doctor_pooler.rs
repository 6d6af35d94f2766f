//! PgBouncer in front of the relay. These tests need it installed (Debian: `pgbouncer`) and say so when they are left out.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use commitstream::doctor::{self, Severity};

use crate::doctor_report::{found, only, passes};
use crate::support::{World, eventually};

struct PgBouncer {
    process: Child,
    directory: PathBuf,
    url: String,
}

impl PgBouncer {
    fn start(world: &World, settings: &str) -> Result<Option<Self>> {
        let Some(program) = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/opt/homebrew/bin/pgbouncer"]
            .into_iter()
            .find(|path| Path::new(path).exists())
        else {
            println!("left out: pgbouncer is not installed; on Debian scripts/install-servers.sh --tests installs it");
            return Ok(None);
        };
        let (login, place) = world.database.url().rsplit_once('@').context("a login")?;
        let password = login.rsplit_once(':').context("a password")?.1;
        let (server, database) = place.split_once('/').context("a database")?;
        let (host, port) = server.split_once(':').context("a port")?;
        let own = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let directory = std::env::temp_dir().join(format!("commitstream-{}", world.database.name()));
        std::fs::create_dir(&directory)?;
        std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o755))?;
        let file = directory.join("pgbouncer.ini");
        std::fs::write(
            &file,
            format!(
                "[databases]\n{database} = host={host} port={port} user=postgres password={password}\n\
                 [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {own}\nunix_socket_dir =\nauth_type = any\n{settings}\n"
            ),
        )?;
        let mut command = Command::new(program);
        // It refuses to run as root.
        command.args(["-q", "-u", "nobody"]).arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn()?;
        Ok(Some(Self { process, directory, url: format!("postgres://app@127.0.0.1:{own}/{database}") }))
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        std::fs::remove_dir_all(&self.directory).ok();
    }
}

async fn report(world: &World, pooler: &PgBouncer) -> Result<doctor::Report> {
    let mut settings = world.settings.clone();
    settings.database.url = Some(pooler.url.clone());
    let address = pooler.url.rsplit_once('@').and_then(|(_, place)| place.split('/').next()).context("an address")?;
    eventually("the pooler to listen", async || Ok(tokio::net::TcpStream::connect(address).await.is_ok())).await?;
    Ok(doctor::examine(&settings).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_shares_sessions_is_found_however_it_picks_them() -> Result<()> {
    for order in ["server_round_robin = 0", "server_round_robin = 1\nmin_pool_size = 3"] {
        let world = World::new().await?;
        let settings = format!("pool_mode = transaction\nignore_startup_parameters = extra_float_digits\n{order}");
        let Some(pooler) = PgBouncer::start(&world, &settings)? else { return Ok(()) };
        for _ in 0..3 {
            let report = report(&world, &pooler).await?;
            only(&report, "postgres-pooler", Severity::Error, "a pooler");
            assert!(found(&report, "migration").is_empty(), "nothing else is asked through it");
            passes(&report, "redis-reachable");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_refuses_the_driver_is_told_by_what_it_says() -> Result<()> {
    let world = World::new().await?;
    let Some(pooler) = PgBouncer::start(&world, "pool_mode = transaction")? else { return Ok(()) };
    only(&report(&world, &pooler).await?, "postgres-pooler", Severity::Error, "a pooler");
    Ok(())
}

/// It does no harm, and cannot be told from PostgreSQL.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_keeps_sessions_apart_is_no_finding() -> Result<()> {
    let world = World::new().await?;
    let settings = "pool_mode = session\nignore_startup_parameters = extra_float_digits";
    let Some(pooler) = PgBouncer::start(&world, settings)? else { return Ok(()) };
    let report = report(&world, &pooler).await?;
    passes(&report, "postgres-pooler");
    passes(&report, "migration");
    Ok(())
}
