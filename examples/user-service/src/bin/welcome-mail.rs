//! The consumer group `welcome-mail`. Any number of processes share its work.
//!
//!     SMTP_URL=smtp://localhost:1025 cargo run -p commitstream-examples --bin welcome-mail      # REDIS_URL, MAIL_FROM

use anyhow::{Context, Result};
use commitstream::consumer::Consumer;
use commitstream_examples::process::{self, Signals};
use commitstream_examples::welcome::WelcomeEmailConsumer;
use lettre::{AsyncSmtpTransport, Tokio1Executor};

fn main() -> Result<()> {
    process::run(run())
}

async fn run() -> Result<()> {
    process::start_log();
    let signals = Signals::catch()?;
    let settings = process::settings()?;
    let url = std::env::var("SMTP_URL").context("set SMTP_URL=smtps://user:password@host, or smtp://host:port without TLS")?;
    let mailer = AsyncSmtpTransport::<Tokio1Executor>::from_url(&url).context("SMTP_URL is not usable")?.build();
    let from = process::variable("MAIL_FROM", "Example <welcome@example.org>").parse().context("MAIL_FROM is no mailbox")?;
    let consumer = Consumer::new("welcome-mail", &settings)?.on(WelcomeEmailConsumer::new(mailer, from)).start()?;
    process::consume(consumer, signals).await
}
