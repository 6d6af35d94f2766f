//! PgBouncer in front of the relay. These tests need it installed (Debian: `pgbouncer`) and say so when they are left out.

use anyhow::Result;
use commitstream::doctor::{self, Severity};

use crate::doctor_report::{found, only, passes};
use crate::pgbouncer::PgBouncer;
use crate::support::World;

async fn report(world: &World, pooler: &PgBouncer) -> Result<doctor::Report> {
    let mut settings = world.settings.clone();
    settings.database.url = Some(pooler.url.clone());
    pooler.listens()?;
    Ok(doctor::examine(&settings).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_shares_sessions_is_found_however_it_picks_them() -> Result<()> {
    for order in ["server_round_robin = 0", "server_round_robin = 1\nmin_pool_size = 3"] {
        let world = World::new().await?;
        let settings = format!("pool_mode = transaction\nignore_startup_parameters = extra_float_digits\n{order}");
        let Some(pooler) = PgBouncer::start(&world.database, &settings)? else { return Ok(()) };
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
    let Some(pooler) = PgBouncer::start(&world.database, "pool_mode = transaction")? else { return Ok(()) };
    only(&report(&world, &pooler).await?, "postgres-pooler", Severity::Error, "a pooler");
    Ok(())
}

/// It does no harm, and cannot be told from PostgreSQL.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_keeps_sessions_apart_is_no_finding() -> Result<()> {
    let world = World::new().await?;
    let settings = "pool_mode = session\nignore_startup_parameters = extra_float_digits";
    let Some(pooler) = PgBouncer::start(&world.database, settings)? else { return Ok(()) };
    let report = report(&world, &pooler).await?;
    passes(&report, "postgres-pooler");
    passes(&report, "migration");
    Ok(())
}
