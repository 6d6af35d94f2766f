use super::read::escape_glob;
use super::{Streams, StreamsError};

/// Keys looked at by one step, and so the most that are removed at a time.
const KEYS_PER_STEP: usize = 500;

impl Streams {
    /// Removes every stream under the prefix and every marker of one, for good. Meant for demonstrations and tests, which
    /// have a prefix of their own.
    ///
    /// # Errors
    /// Redis is not reachable or refuses; what was removed until then is gone.
    pub async fn remove_all(&self) -> Result<(), StreamsError> {
        let prefix = escape_glob(&self.prefix);
        self.remove_matching(&format!("{prefix}*")).await?;
        self.remove_matching(&format!("{{{prefix}*")).await
    }

    async fn remove_matching(&self, pattern: &str) -> Result<(), StreamsError> {
        let doing = "removing streams and markers";
        let mut cursor = 0_u64;
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(KEYS_PER_STEP);
            let (next, keys): (u64, Vec<String>) = self.query(doing, &scan).await?;
            if !keys.is_empty() {
                let mut unlink = redis::pipe();
                for key in &keys {
                    unlink.cmd("UNLINK").arg(key).ignore();
                }
                self.query_pipeline::<()>(doing, &unlink).await?;
            }
            cursor = next;
            if cursor == 0 {
                return Ok(());
            }
        }
    }
}
