use super::node::{Node, Request};
use super::read::escape_glob;
use super::{Streams, StreamsError};

/// Keys looked at by one step, and so the most that are removed at a time.
const KEYS_PER_STEP: usize = 500;

const DOING: &str = "removing streams and markers";

impl Streams {
    /// Removes every key under the prefix and every marker, for good: also those of others whose prefix begins with it. For demonstrations
    /// and tests, which have a prefix of their own.
    ///
    /// # Errors
    /// Redis is not reachable or refuses; what was removed until then is gone.
    pub async fn remove_all(&self) -> Result<(), StreamsError> {
        let prefix = escape_glob(&self.prefix);
        for master in self.masters(DOING).await? {
            remove_matching(&master, &format!("{prefix}*")).await?;
            remove_matching(&master, &format!("{{{prefix}*")).await?;
        }
        Ok(())
    }
}

async fn remove_matching(server: &Node, pattern: &str) -> Result<(), StreamsError> {
    let mut cursor = 0_u64;
    loop {
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(KEYS_PER_STEP);
        let (next, keys): (u64, Vec<String>) = server.query(DOING, &scan).await?;
        if !keys.is_empty() {
            let mut unlink = redis::pipe();
            for key in &keys {
                // One by one: those of a cluster's node are in different slots.
                unlink.cmd("UNLINK").arg(key).ignore();
            }
            server.send::<()>(DOING, Request::Pipeline(&unlink)).await?;
        }
        cursor = next;
        if cursor == 0 {
            return Ok(());
        }
    }
}
