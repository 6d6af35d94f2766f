//! What doctor finds of a Redis that is in trouble: of its disk, its memory, its replicas, its users, its age and its clock.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use commitstream::doctor::Severity;
use commitstream_sandbox::{FaultProxy, Redis, RedisCluster, Sandbox};

use crate::doctor_redis::{HEALTHY, run, world};
use crate::doctor_report::{eventually_found, eventually_passes, examine, found, mend, mend_for, only, passes};
use crate::support::World;

/// The URL of another user, whose password is `p`.
fn login(redis: &Redis, user: &str) -> Result<String> {
    Ok(format!("redis://{user}:p@{}", place(&redis.url())?))
}

fn place(url: &str) -> Result<String> {
    Ok(url.rsplit_once('@').context("a login")?.1.to_owned())
}

async fn info(world: &World, field: &str) -> Result<String> {
    let info: String = redis::cmd("INFO").arg("everything").query_async(&mut world.redis().await?).await?;
    let value = info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(value.with_context(|| field.to_owned())?.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_fails_is_found_and_mended() -> Result<()> {
    let redis = Redis::start_with(&[HEALTHY[0], ("save", "3600 1")])?;
    let world = world(&redis)?;
    run(&world, "SET other x").await?;
    let rights = |mode| std::fs::set_permissions(redis.directory(), PermissionsExt::from_mode(mode));
    rights(0o500)?;
    run(&world, "BGSAVE").await?;
    let report = eventually_found(&world, "redis-persistence").await?;
    let finding = only(&report, "redis-persistence", Severity::Error, "the last snapshot of Redis at ");
    only(&examine(&world).await, "redis-writable", Severity::Error, "refuses to write: MISCONF");
    rights(0o700)?;
    mend(&world.settings, finding)?;
    eventually_passes(&world, "redis-persistence").await?;
    passes(&examine(&world).await, "redis-writable");
    Ok(())
}

/// To Redis, files that may not grow are a disk that is full.
#[tokio::test(flavor = "multi_thread")]
async fn an_append_only_file_that_cannot_be_written_is_found_and_goes_on() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let world = world(&redis)?;
    // Only the owner of a process may always do that, whoever runs this test.
    let owner = redis.directory().metadata()?;
    let limit = |bytes: &str| {
        let mut command = Command::new("prlimit");
        command.args(["--pid", &redis.pid().to_string(), &format!("--fsize={bytes}")]);
        command.uid(owner.uid()).gid(owner.gid()).output()
    };
    let Ok(limited) = limit("1:unlimited") else {
        println!("left out: there is no prlimit; on Linux it comes with util-linux");
        return Ok(());
    };
    ensure!(limited.status.success(), "{}", String::from_utf8_lossy(&limited.stderr));
    run(&world, "SET other x").await?;
    let report = eventually_found(&world, "redis-persistence").await?;
    only(&report, "redis-persistence", Severity::Error, "cannot write its append-only file");
    only(&examine(&world).await, "redis-writable", Severity::Error, "refuses to write: MISCONF");
    ensure!(limit("unlimited:unlimited")?.status.success());
    eventually_passes(&world, "redis-persistence").await?;
    passes(&examine(&world).await, "redis-writable");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_waits_for_replicas_or_is_one_without_saying_so_is_found() -> Result<()> {
    let redis = Redis::start_with(&[("appendonly", "no")])?;
    let mut world = world(&redis)?;
    run(&world, "CONFIG SET min-replicas-to-write 1").await?;
    let report = examine(&world).await;
    let finding = only(&report, "redis-writable", Severity::Error, "refuses to write: NOREPLICAS");
    mend(&world.settings, finding)?;
    let replica = Redis::start_replica_of(&redis)?;
    eventually_passes(&world, "redis-writable").await?;
    let report = examine(&world).await;
    mend(&world.settings, only(&report, "redis-persistence", Severity::Warning, "keeps nothing on disk"))?;
    only(&examine(&world).await, "redis-persistence", Severity::Warning, "(appendfsync no)");

    run(&self::world(&replica)?, "ACL SETUSER app on >p ~* +@all -info").await?;
    world.settings.redis.url = Some(login(&replica, "app")?);
    let report = examine(&world).await;
    let finding = only(&report, "redis-writable", Severity::Error, "refuses to write: READONLY");
    assert!(finding.mend.starts_with("give the address of the master"), "{finding:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rights_that_doctor_names_are_those_that_were_missing() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let (own, mut app) = (world(&redis)?, world(&redis)?);
    run(&own, "ACL SETUSER relay on >p ~events:* ~{events:* +@all -xadd -script -xtrim -wait -@dangerous").await?;
    app.settings.redis.url = Some(login(&redis, "relay")?);
    app.settings.redis.wait_replicas = 1;
    let report = examine(&app).await;
    only(&report, "redis-permissions", Severity::Error, "may not run SCRIPT LOAD, XADD, XTRIM, WAIT on");
    for check in ["redis-permissions", "redis-information"] {
        found(&report, check).into_iter().try_for_each(|finding| mend_for(&own.settings, "relay", finding))?;
    }
    let report = examine(&app).await;
    ["redis-permissions", "redis-information"].into_iter().for_each(|check| passes(&report, check));

    // Only `doctor` itself walks over the keys.
    run(&own, "ACL SETUSER relay -scan").await?;
    let report = examine(&app).await;
    passes(&report, "redis-permissions");
    only(&report, "stream-keys", Severity::Warning, "this could not be examined: ");
    // Without the list of streams, nothing is known of them, and nothing is said of them.
    run(&own, "ACL SETUSER relay +scan -hgetall").await?;
    let report = examine(&app).await;
    only(&report, "redis-permissions", Severity::Error, "may not run HGETALL on");
    assert_eq!(found(&report, "consumer-groups").len(), 1, "could not be examined");
    run(&own, "ACL SETUSER relay +hgetall -xinfo").await?;
    run(&own, "HSET events:{streams} user nobody").await?;
    run(&own, "XADD events:user * id x").await?;
    only(&examine(&app).await, "consumer-groups", Severity::Warning, "this could not be examined: ");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_were_renamed_are_found() -> Result<()> {
    let redis = Redis::start_with(&[HEALTHY[0], ("rename-command", "XTRIM \"\"")])?;
    let world = world(&redis)?;
    let report = examine(&world).await;
    let finding = only(&report, "redis-permissions", Severity::Error, " does not know XTRIM");
    assert!(finding.mend.contains("rename-command"), "{finding:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn more_keys_than_can_be_looked_at_are_a_note() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let world = world(&redis)?;
    let many = "for i = 1, 3000 do redis.call('XADD', 'events:t' .. i, '*', 'id', 'x') end";
    redis::cmd("EVAL").arg(many).arg(0).exec_async(&mut world.redis().await?).await?;
    only(&examine(&world).await, "stream-keys", Severity::Note, "there are too many keys to look at all under events:");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_of_a_cluster_that_refuses_to_write_is_found_whichever_it_is() -> Result<()> {
    let cluster = RedisCluster::start()?;
    let world = World::on(Sandbox::shared().database()?, &cluster.url(), "events:".into())?;
    for node in &cluster.nodes()[..3] {
        let one = World::on(Sandbox::shared().database()?, &node.url(), "events:".into())?;
        run(&one, "CONFIG SET min-replicas-to-write 2").await?;
        let finding = format!("Redis at {} refuses to write: NOREPLICAS", place(&node.url())?);
        only(&examine(&world).await, "redis-writable", Severity::Error, &finding);
        run(&one, "CONFIG SET min-replicas-to-write 0").await?;
    }
    passes(&examine(&world).await, "redis-writable");
    Ok(())
}

/// What the server sends is changed on its way; what is asked of it and compared is not.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_redis_one_with_another_clock_and_one_that_fills_the_machine_are_found() -> Result<()> {
    let redis = Redis::start_with(&HEALTHY)?;
    let mut world = world(&redis)?;
    // So much that connections make no difference.
    run(&world, "SETRANGE other 20000000 x").await?;
    let (memory, used) = (info(&world, "total_system_memory").await?, info(&world, "used_memory").await?);
    let proxy = FaultProxy::start(place(&redis.url())?)?;
    world.settings.redis.url = Some(proxy.url(&redis.url()));
    let report = examine(&world).await;
    ["redis-version", "redis-memory", "clocks"].into_iter().for_each(|check| passes(&report, check));

    let version = info(&world, "redis_version").await?;
    let old = format!("5{}", &version[1..]);
    proxy.rewrite(format!("redis_version:{version}"), format!("redis_version:{old}"));
    only(&examine(&world).await, "redis-version", Severity::Error, &format!("has version {old}"));

    let total = |bytes: u64| format!("total_system_memory:{bytes:0width$}\r", width = memory.len());
    let used: u64 = used.parse()?;
    proxy.rewrite(total(memory.parse()?), total(used * 5 / 4));
    only(&examine(&world).await, "redis-memory", Severity::Warning, "% of the machine's memory, and no maxmemory)");
    proxy.rewrite(total(used * 5 / 4), total(used));
    let report = examine(&world).await;
    mend(&world.settings, only(&report, "redis-memory", Severity::Error, "% of the machine's memory, and no maxmemory)"))?;
    passes(&examine(&world).await, "redis-memory");

    // Seconds since 1970 have ten digits, of which the first is 1.
    proxy.rewrite("$10\r\n1", "$10\r\n2");
    let report = examine(&world).await;
    let told = found(&report, "clocks");
    assert_eq!(told.len(), 2, "{told:#?}");
    for (finding, other) in told.iter().zip(["this machine", "PostgreSQL"]) {
        let is_told =
            finding.seen.starts_with("the clock of Redis at ") && finding.seen.ends_with(&format!("ahead of that of {other}"));
        assert!(is_told && finding.severity == Severity::Warning, "{finding:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_url_that_is_missing_or_wrong_is_found() -> Result<()> {
    let mut world = World::unmigrated()?;
    world.settings.redis.url = None;
    only(&examine(&world).await, "redis-reachable", Severity::Error, "(REDIS_URL) is not set");
    world.settings.redis.url = Some("http://:hunter2@cache".into());
    let report = examine(&world).await;
    let finding = only(&report, "redis-reachable", Severity::Error, "the Redis URL is not usable");
    assert!(finding.mend.starts_with("export REDIS_URL=") && !format!("{finding:?}").contains("hunter2"), "{finding:?}");
    Ok(())
}
