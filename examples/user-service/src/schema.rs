//! The service's own tables. Those of the outbox are made by `commitstream migrate`.

use sqlx::PgPool;

/// Creates what is missing. Programs that start at the same time wait for each other.
///
/// # Errors
/// PostgreSQL cannot be reached, or refuses.
pub async fn migrate(pool: &PgPool) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::raw_sql(
        "SELECT pg_advisory_xact_lock(hashtext('user-service schema'));
         CREATE TABLE IF NOT EXISTS users (
             user_id    uuid PRIMARY KEY,
             email      text NOT NULL UNIQUE,
             created_at timestamptz NOT NULL
         );
         CREATE TABLE IF NOT EXISTS payments (
             payment_id   uuid PRIMARY KEY,
             user_id      uuid NOT NULL REFERENCES users,
             amount_cents bigint NOT NULL CHECK (amount_cents > 0),
             paid_at      timestamptz NOT NULL
         );
         CREATE TABLE IF NOT EXISTS trainings (
             training_id uuid PRIMARY KEY,
             user_id     uuid NOT NULL REFERENCES users,
             model       text NOT NULL,
             started_at  timestamptz NOT NULL
         );
         -- Nothing here keeps a second receipt of a payment away: the inbox does.
         CREATE TABLE IF NOT EXISTS receipts (
             number       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
             payment_id   uuid NOT NULL,
             amount_cents bigint NOT NULL
         );",
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await
}
