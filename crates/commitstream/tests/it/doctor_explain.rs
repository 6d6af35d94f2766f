//! What `doctor` asks of the outbox goes by index, on both forms of the table and with any statistics, and stops at a limit.

use anyhow::{Result, ensure};

use crate::explain::{CASES, FAILED, KEY, PENDING, PUBLISHED, TABLE, assert_indexes, assert_only_indexes, plans, populated};

#[tokio::test(flavor = "multi_thread")]
async fn what_doctor_asks_goes_by_index_and_stops() -> Result<()> {
    for case in CASES {
        let (world, mut connection) = populated(case).await?;
        let facts = world.outbox.examine_by(&mut connection).await;
        let outbox = facts.outbox.expect("an outbox");
        ensure!(outbox.backlog?.events == 1_972 && outbox.failed?.events == 28);

        let backlog = plans(&mut connection, "WITH backlog AS", "10001").await?;
        assert_indexes(&backlog, TABLE, &[(PENDING, "")]);
        let failed = plans(&mut connection, "WITH newest_failed AS", "10001").await?;
        assert_indexes(&failed, TABLE, &[(FAILED, "")]);
        let history = plans(&mut connection, "AS ever_written", "'public.event_outbox'").await?;
        assert_only_indexes(&history, TABLE, &[(KEY, ""), (PUBLISHED, "published_at > ")]);
        assert_indexes(&history, "outbox_batch", &[("idx_outbox_batch_settled", "")]);
        let open = plans(&mut connection, "AS orphaned", "10000").await?;
        assert_indexes(&open, "outbox_batch", &[("idx_outbox_batch_open", "")]);
        for part in ["'column', relname", "x.indisready", "'schema: USAGE'", "pg_stat_get_dead_tuples", "i.reltuples"] {
            let values = if part.contains("tuples") || part.contains("ready") { "'a', 'b', 'c'" } else { "'public'" };
            assert_indexes(&plans(&mut connection, part, values).await?, TABLE, &[]);
        }
    }
    Ok(())
}
