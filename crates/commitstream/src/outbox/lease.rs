use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{OutboxError, OutboxRepository, PARTITIONS};

/// A set of partitions, one bit each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Partitions(u64);

impl Partitions {
    /// Every partition.
    pub const ALL: Self = Self(u64::MAX);

    /// As PostgreSQL has them, in a `bigint`.
    pub(super) fn bits(self) -> i64 {
        self.0.cast_signed()
    }

    #[must_use]
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[must_use]
    pub fn contains(self, partition: usize) -> bool {
        partition < PARTITIONS && self.0 & (1 << partition) != 0
    }

    /// Adds one; what is no partition is left out.
    pub fn insert(&mut self, partition: usize) {
        if partition < PARTITIONS {
            self.0 |= 1 << partition;
        }
    }

    /// All but the `others`.
    #[must_use]
    pub fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// In ascending order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..PARTITIONS).filter(move |partition| self.contains(*partition))
    }
}

impl FromIterator<usize> for Partitions {
    fn from_iter<T: IntoIterator<Item = usize>>(partitions: T) -> Self {
        let mut set = Self::default();
        partitions.into_iter().for_each(|partition| set.insert(partition));
        set
    }
}

/// What a relay may claim, and under which takeover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub relay_id: Uuid,
    /// Changes whenever the relay takes partitions or gives some: a claim under an earlier one finds nothing.
    pub epoch: i64,
    pub partitions: Partitions,
}

/// Takes partitions whose owner is still the one that the relay saw, and gives all that it owns then one new epoch. The rows are
/// locked in order, so that relays which try at once take turns instead of deadlocking; `FOR UPDATE` waits for claims under way,
/// so the new owner finds every batch of the old one in the journal.
const TAKE: &str = "
WITH free AS (
    SELECT l.partition_no FROM {s}.outbox_lease l
    LEFT JOIN unnest($2::smallint[], $3::uuid[]) AS wanted(partition_no, owner) USING (partition_no)
    WHERE l.relay_id = $1 OR (wanted.partition_no IS NOT NULL AND l.relay_id IS NOT DISTINCT FROM wanted.owner)
    ORDER BY l.partition_no FOR UPDATE OF l
), changed AS (
    UPDATE {s}.outbox_lease l
    SET relay_id = $1, epoch = (SELECT max(epoch) + 1 FROM {s}.outbox_lease)
    FROM free WHERE l.partition_no = free.partition_no
    RETURNING l.partition_no, l.epoch, true AS is_owned
)
SELECT changed.*, (SELECT count(*) FROM free) AS meant FROM (SELECT) AS one LEFT JOIN changed ON true";

/// Gives partitions back, and gives the others that the relay owns a new epoch: the batches of one epoch are of the same partitions from first to
/// last. So whoever finds the last of them in Redis knows that all are there, and not only those of partitions that were kept.
const GIVE: &str = "
WITH mine AS (
    SELECT partition_no FROM {s}.outbox_lease WHERE relay_id = $1 ORDER BY partition_no FOR UPDATE
), changed AS (
    UPDATE {s}.outbox_lease l
    SET relay_id = CASE WHEN ($2::bigint >> l.partition_no::int) & 1 = 1 THEN NULL ELSE l.relay_id END,
        epoch = (SELECT max(epoch) + 1 FROM {s}.outbox_lease)
    FROM mine WHERE l.partition_no = mine.partition_no
    RETURNING l.partition_no, l.epoch, l.relay_id IS NOT NULL AS is_owned
)
SELECT changed.*, (SELECT count(*) FROM mine) AS meant FROM (SELECT) AS one LEFT JOIN changed ON true";

impl OutboxRepository {
    /// Takes the `wanted` partitions, each with the owner that it was seen with, unless somebody was quicker. Returns all that the
    /// relay owns now.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked. Part of nothing: all or none was taken.
    pub async fn take_partitions(
        &self,
        connection: &mut PgConnection,
        relay_id: Uuid,
        wanted: &[(usize, Option<Uuid>)],
    ) -> Result<Lease, OutboxError> {
        let doing = "taking partitions";
        let rows = sqlx::query(self.sql(TAKE))
            .bind(relay_id)
            .bind(wanted.iter().map(|(partition, _)| number(*partition)).collect::<Vec<_>>())
            .bind(wanted.iter().map(|(_, owner)| *owner).collect::<Vec<_>>())
            .fetch_all(connection)
            .await
            .map_err(self.error(doing))?;
        self.lease_of(doing, relay_id, &rows)
    }

    /// What the rows of a statement come to that has changed all leases that it locked.
    fn lease_of(&self, doing: &'static str, relay_id: Uuid, rows: &[PgRow]) -> Result<Lease, OutboxError> {
        let meant = |row: &PgRow| row.try_get::<i64, _>("meant").map_err(self.error(doing));
        let meant = rows.first().map_or(Ok(0), meant)?;
        let is_changed = |row: &&PgRow| row.try_get::<Option<bool>, _>("is_owned").is_ok_and(|is_owned| is_owned.is_some());
        let changed = rows.iter().filter(is_changed).count();
        OutboxError::unless_changed(doing, changed as u64, usize::try_from(meant).unwrap_or(usize::MAX))?;
        lease_of(relay_id, rows).map_err(self.error(doing))
    }

    /// Gives partitions of `relay_id` back. What it has claimed of them and not settled, the next owner resolves. Returns what the relay
    /// owns still.
    ///
    /// # Errors
    /// PostgreSQL cannot be asked.
    pub async fn give_partitions(
        &self,
        connection: &mut PgConnection,
        relay_id: Uuid,
        partitions: Partitions,
    ) -> Result<Lease, OutboxError> {
        let doing = "giving partitions back";
        let query = sqlx::query(self.sql(GIVE)).bind(relay_id).bind(partitions.bits());
        let rows = query.fetch_all(connection).await.map_err(self.error(doing))?;
        self.lease_of(doing, relay_id, &rows)
    }
}

fn lease_of(relay_id: Uuid, rows: &[PgRow]) -> Result<Lease, sqlx::Error> {
    let mut lease = Lease { relay_id, epoch: 0, partitions: Partitions::default() };
    for row in rows.iter() {
        if row.try_get::<Option<bool>, _>("is_owned")?.unwrap_or(false) {
            lease.epoch = row.try_get("epoch")?;
            lease.partitions.insert(usize::try_from(row.try_get::<i16, _>("partition_no")?).unwrap_or(usize::MAX));
        }
    }
    Ok(lease)
}

fn number(partition: usize) -> i16 {
    i16::try_from(partition).unwrap_or(i16::MAX)
}
