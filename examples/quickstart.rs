//! The smallest program that publishes an event inside a transaction.
//!
//!     commitstream migrate                  # creates the outbox tables in DATABASE_URL
//!     cargo run --example quickstart
//!     commitstream relay                    # in another terminal, with REDIS_URL
//!     commitstream tail user

use commitstream::DomainEvent;
use commitstream::config::Settings;
use commitstream::publisher::{DomainEventPublisher, PostgresOutboxPublisher};
use sqlx::{Connection, PgConnection};

#[derive(serde::Serialize, DomainEvent)]
#[event(aggregate = "user")]
struct UserCreated {
    #[event(key)]
    user_id: uuid::Uuid,
    email: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let publisher = PostgresOutboxPublisher::new(&Settings::default());
    let mut connection = PgConnection::connect(&std::env::var("DATABASE_URL")?).await?;
    sqlx::raw_sql("CREATE TABLE IF NOT EXISTS users (id uuid PRIMARY KEY, email text)").execute(&mut connection).await?;

    let event = UserCreated { user_id: uuid::Uuid::now_v7(), email: "ada@example.org".into() };
    let mut transaction = connection.begin().await?;
    sqlx::query("INSERT INTO users (id, email) VALUES ($1, $2)")
        .bind(event.user_id)
        .bind(&event.email)
        .execute(&mut *transaction)
        .await?;
    let id = publisher.publish(&mut transaction, &event).await?;
    transaction.commit().await?; // the user and the event, or neither

    println!("published {id}");
    Ok(())
}
