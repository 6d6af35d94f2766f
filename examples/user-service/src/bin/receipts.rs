//! The consumer group `receipts`. Any number of processes share its work.
//!
//!     cargo run -p commitstream-examples --bin receipts      # DATABASE_URL, REDIS_URL

use anyhow::Result;
use commitstream::consumer::Consumer;
use commitstream_examples::process::{self, Signals};
use commitstream_examples::receipts::ReceiptConsumer;

fn main() -> Result<()> {
    process::run(run())
}

async fn run() -> Result<()> {
    process::start_log();
    let signals = Signals::catch()?;
    let settings = process::settings()?;
    let pool = process::database(&settings).await?;
    let consumer = Consumer::new("receipts", &settings)?.on_transaction(&pool, ReceiptConsumer).start()?;
    process::consume(consumer, signals).await
}
