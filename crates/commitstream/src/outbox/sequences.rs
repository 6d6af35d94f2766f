//! Sequences that stand below the numbers of their tables.
//!
//! Logical replication copies rows and no sequences, so after a switch to the copy they begin anew; a restore of data alone or
//! `TRUNCATE … RESTART IDENTITY` beside an import does the same. Newer events would get lower numbers and overtake older ones.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{OutboxError, OutboxRepository};

/// So far above the highest number that was found a sequence is set: for what the look did not see, since it reads only the newest rows, and
/// for what replication may still bring.
const HEADROOM: i64 = 1_000_000;

/// Unsent events are counted up to this; one more means "more".
const COUNTED: i64 = 10_000;

/// Table, column, and the highest number of its newest rows, by index: there is none on the number itself.
const NUMBERED: [(&str, &str, &str); 3] = [
    (
        "event_outbox",
        "seq",
        "SELECT GREATEST(
             (SELECT seq FROM {s}.event_outbox WHERE status IN ('PENDING', 'PROCESSING') ORDER BY seq DESC LIMIT 1),
             (SELECT max(seq) FROM (SELECT seq FROM {s}.event_outbox WHERE status = 'PUBLISHED' ORDER BY published_at DESC LIMIT 1000) AS a),
             (SELECT max(seq) FROM (SELECT seq FROM {s}.event_outbox WHERE status = 'FAILED' ORDER BY created_at DESC LIMIT 1000) AS b),
             (SELECT max(seq) FROM (SELECT seq FROM {s}.event_outbox ORDER BY id DESC LIMIT 1000) AS c))",
    ),
    (
        "outbox_batch",
        "batch_no",
        "SELECT GREATEST(
             (SELECT max(batch_no) FROM (SELECT batch_no FROM {s}.outbox_batch WHERE settled_at IS NULL
                                         ORDER BY claimed_at DESC LIMIT 1000) AS a),
             (SELECT max(batch_no) FROM (SELECT batch_no FROM {s}.outbox_batch WHERE settled_at IS NOT NULL
                                         ORDER BY settled_at DESC LIMIT 1000) AS b))",
    ),
    ("outbox_audit", "audit_id", "SELECT max(audit_id) FROM {s}.outbox_audit"),
];

/// What the order of events depends on.
const ORDER: &str = "event_outbox.seq";

/// For a user who may not read the sequence: the number is drawn, and the row is not kept.
const DRAW: &str = "INSERT INTO {s}.event_outbox (event_type, aggregate_type, aggregate_id, payload)
                    VALUES ('probe', 'probe', 'probe', '{}') RETURNING seq";

/// An identity column against its sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceFacts {
    /// Such as `event_outbox.seq`.
    pub column: String,
    /// As SQL has it, with the schema.
    pub sequence: String,
    /// The next number; `None` where this user may not read the sequence.
    pub next: Option<i64>,
    /// The highest of the newest rows; 0 without rows.
    pub highest: i64,
    /// This user may set the sequence.
    pub may_set: bool,
}

impl SequenceFacts {
    /// New rows will get lower numbers than older ones have.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.next.is_some_and(|next| next <= self.highest)
    }

    /// Where it may go on.
    fn goal(&self) -> i64 {
        self.highest.saturating_add(HEADROOM)
    }

    /// The statement that repairs it.
    #[must_use]
    pub fn statement(&self) -> String {
        format!("SELECT setval('{}', {})", self.sequence.replace('\'', "''"), self.goal())
    }
}

/// A sequence that was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continued {
    pub column: String,
    /// What would have been the next number.
    pub was: i64,
    pub highest: i64,
    pub now: i64,
    /// Unsent events with lower numbers than `was`, up to 10,001. Those that were written since the sequence began anew may be
    /// published before older ones of their aggregates.
    pub unsent_below: i64,
}

impl OutboxRepository {
    /// Compares the sequences of identity columns with the newest rows. Changes nothing. Tables that this user may not read are left out.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn sequences(&self, connection: &mut PgConnection) -> Result<Vec<SequenceFacts>, OutboxError> {
        let doing = "comparing sequences with their tables";
        let mut all = Vec::new();
        for (table, column, highest) in NUMBERED {
            let sql = "SELECT s, has_sequence_privilege(s, 'SELECT'), has_sequence_privilege(s, 'UPDATE')
                       FROM pg_get_serial_sequence($1, $2) AS s WHERE s IS NOT NULL AND has_table_privilege($1, 'SELECT')";
            let query = sqlx::query_as(sql).bind(format!("{}.{table}", self.quoted)).bind(column);
            let found: Option<(String, bool, bool)> = query.fetch_optional(&mut *connection).await.map_err(self.error(doing))?;
            let Some((sequence, may_read, may_set)) = found else { continue };
            // First, so that what is written meanwhile does not count.
            let highest: Option<i64> =
                sqlx::query_scalar(self.sql(highest)).fetch_one(&mut *connection).await.map_err(self.error(doing))?;
            let next = if may_read {
                let sql = format!("SELECT last_value + is_called::int FROM {sequence}");
                let next = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut *connection).await;
                Some(next.map_err(self.error(doing))?)
            } else {
                None
            };
            let column = format!("{table}.{column}");
            all.push(SequenceFacts { column, sequence, next, highest: highest.unwrap_or(0), may_set });
        }
        Ok(all)
    }

    /// Sets the sequences that are behind their tables above what these hold. Several may try at once.
    ///
    /// # Errors
    /// [`OutboxError::SequenceBehind`] when this user may not set that of `event_outbox`; or PostgreSQL cannot be asked.
    pub async fn continue_sequences(&self, connection: &mut PgConnection) -> Result<Vec<Continued>, OutboxError> {
        let mut facts = self.sequences(connection).await?;
        for facts in facts.iter_mut().filter(|facts| facts.column == ORDER && facts.next.is_none() && facts.highest > 0) {
            facts.next = Some(self.draw(connection).await?);
        }
        if let Some(facts) = facts.iter().find(|facts| facts.column == ORDER && facts.is_behind() && !facts.may_set) {
            return Err(OutboxError::SequenceBehind {
                next: facts.next.unwrap_or_default(),
                highest: facts.highest,
                statement: facts.statement(),
            });
        }
        if !facts.iter().any(|facts| facts.is_behind() && facts.may_set) {
            return Ok(Vec::new());
        }
        let doing = "setting sequences above what their tables hold";
        let mut tx = connection.begin().await.map_err(self.error(doing))?;
        // Another relay may have set them since; to set one back would give numbers twice.
        self.take_turns(&mut tx).await?;
        let mut continued = Vec::new();
        for facts in self.sequences(&mut tx).await?.into_iter().filter(|facts| facts.is_behind() && facts.may_set) {
            sqlx::query(AssertSqlSafe(facts.statement())).execute(&mut *tx).await.map_err(self.error(doing))?;
            let was = facts.next.unwrap_or_default();
            let unsent_below = if facts.column == ORDER { self.unsent_below(&mut tx, was).await? } else { 0 };
            let (now, highest, column) = (facts.goal(), facts.highest, facts.column);
            continued.push(Continued { column, was, highest, now, unsent_below });
        }
        tx.commit().await.map_err(self.error(doing))?;
        Ok(continued)
    }

    async fn draw(&self, connection: &mut PgConnection) -> Result<i64, OutboxError> {
        let doing = "looking which number the next event gets";
        let mut tx = connection.begin().await.map_err(self.error(doing))?;
        let next = sqlx::query_scalar(self.sql(DRAW)).fetch_one(&mut *tx).await.map_err(self.error(doing))?;
        tx.rollback().await.map_err(self.error(doing))?;
        Ok(next)
    }

    async fn unsent_below(&self, connection: &mut PgConnection, seq: i64) -> Result<i64, OutboxError> {
        let sql = "SELECT count(*) FROM (SELECT FROM {s}.event_outbox
                                         WHERE status IN ('PENDING', 'PROCESSING') AND seq < $1 LIMIT $2) AS below";
        let query = sqlx::query_scalar(self.sql(sql)).bind(seq).bind(COUNTED + 1);
        query.fetch_one(connection).await.map_err(self.error("counting events that were numbered anew"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_is_behind_when_its_next_number_was_given_before() {
        let of = |next, highest| SequenceFacts {
            column: ORDER.into(),
            sequence: "\"it's\".event_outbox_seq_seq".into(),
            next,
            highest,
            may_set: true,
        };
        assert!(of(Some(1), 1).is_behind() && of(Some(7), 100).is_behind());
        assert!(!of(Some(2), 1).is_behind() && !of(Some(1), 0).is_behind() && !of(None, 7).is_behind());
        assert_eq!(of(Some(1), 5).statement(), "SELECT setval('\"it''s\".event_outbox_seq_seq', 1000005)");
        assert_eq!(of(Some(1), i64::MAX).goal(), i64::MAX, "there is nothing above");
    }
}
