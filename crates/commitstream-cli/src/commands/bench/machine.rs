//! What the figures were measured on.

use anyhow::Context;

use super::stage::Stage;

#[derive(Debug, Clone)]
pub struct Machine {
    pub cores: usize,
    /// Where the system tells.
    pub cpu: Option<String>,
    pub memory_gib: Option<f64>,
    pub postgres: String,
    pub redis: String,
}

impl Machine {
    pub async fn look(stage: &Stage) -> anyhow::Result<Self> {
        let (cpu, memory) = (read("/proc/cpuinfo").await, read("/proc/meminfo").await);
        let kib = memory.as_deref().and_then(|text| field(text, "MemTotal")?.split(' ').next()?.parse::<f64>().ok());
        Ok(Self {
            cores: std::thread::available_parallelism()?.get(),
            cpu: cpu.as_deref().and_then(|text| field(text, "model name")).map(str::to_owned),
            memory_gib: kib.map(|kib| kib / f64::from(1 << 20)),
            postgres: postgres(stage).await?,
            redis: redis(stage).await?,
        })
    }

    /// On one line.
    pub fn describe(&self) -> String {
        let cpu = self.cpu.as_deref().map_or_else(String::new, |cpu| format!(" of {cpu}"));
        let memory = self.memory_gib.map_or_else(String::new, |gib| format!(", {gib:.0} GiB"));
        format!("{} cores{cpu}{memory}; {}; {}", self.cores, self.postgres, self.redis)
    }
}

/// Other systems have no such file.
async fn read(path: &str) -> Option<String> {
    tokio::fs::read_to_string(path).await.ok()
}

/// The value of the first line `name: value`.
pub fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.split_once(':').filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim());
    text.lines().find_map(value)
}

/// The version, and the settings that matter for speed.
async fn postgres(stage: &Stage) -> anyhow::Result<String> {
    let mut connection = stage.connect("machine").await?;
    let sql = "SELECT format('PostgreSQL %s with fsync %s, synchronous_commit %s, shared_buffers %s, max_wal_size %s',
        split_part(current_setting('server_version'), ' ', 1), current_setting('fsync'), current_setting('synchronous_commit'),
        current_setting('shared_buffers'), current_setting('max_wal_size'))";
    Ok(sqlx::query_scalar(sql).fetch_one(&mut connection).await?)
}

async fn redis(stage: &Stage) -> anyhow::Result<String> {
    let url = stage.settings.redis.url.as_deref().context("benchmarks have a Redis")?;
    if !url.starts_with("redis://") && !url.starts_with("rediss://") {
        return Ok("several Redis servers".to_owned());
    }
    let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let info: String = redis::cmd("INFO").query_async(&mut connection).await?;
    let value = |name| field(&info, name).unwrap_or("?");
    let file = if value("aof_enabled") == "1" { "an append-only file" } else { "no append-only file" };
    Ok(format!("Redis {} with {file}", value("redis_version")))
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn fields_are_found_in_what_linux_and_redis_write() {
        assert_eq!(field("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n", "model name"), Some("Some CPU @ 2 GHz"));
        assert_eq!(field("# Server\r\nredis_version:7.0.15\r\n", "redis_version"), Some("7.0.15"));
        assert_eq!(field("MemTotal:       24605140 kB\n", "MemFree"), None);
    }
}
