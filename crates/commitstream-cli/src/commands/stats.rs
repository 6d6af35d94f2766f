//! `commitstream stats`

use std::process::ExitCode;
use std::time::Duration;

use chrono::Utc;
use commitstream::config::Settings;
use commitstream::doctor::Verdict;
use commitstream::outbox::{self, FailedEvent, OutboxStats};
use sqlx::PgConnection;

use super::doctor;
use crate::context::{self, Context};
use crate::failure::on_one_line;
use crate::flow;
use crate::output::{Output, Style, Table, age, count, printable};

/// Show how many events wait, are on their way, are published or failed
///
/// PENDING events wait to be published, or for a retry; PROCESSING ones are in a batch that is on its way to Redis.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream stats
  commitstream stats --watch              refresh every 2 seconds
  commitstream stats --json | jq .pending")]
pub struct Args {
    /// Show the figures again every SECONDS, until stopped
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", conflicts_with = "json")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    if let Some(seconds) = args.watch {
        return watch(context, &settings, Duration::from_secs(seconds)).await;
    }
    let mut connection = context::migrated(&settings, "stats").await?;
    let stats = read(&settings, &mut connection).await?;
    if context.output.json {
        context.output.json(&stats)?;
    } else {
        let verdict = judge(&settings, &mut connection).await?;
        context.output.write(&describe(&stats, &verdict, &context.output))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Figures again and again. An outage after the first is told in their place, and the next try connects anew.
async fn watch(context: &Context, settings: &Settings, pause: Duration) -> anyhow::Result<ExitCode> {
    let output = &context.output;
    let mut session = Some(context::migrated(settings, "stats").await?);
    loop {
        let figures = match look(settings, &mut session).await {
            Ok((stats, verdict)) => describe(&stats, &verdict, output),
            Err(error) => format!("{} {}\n", output.paint(Style::Warning, "no figures:"), on_one_line(&error)),
        };
        // On a terminal each picture replaces the last one; in a file they follow each other.
        let start = if output.width.is_some() { "\x1b[H\x1b[2J" } else { "" };
        let time = Utc::now().format("%Y-%m-%d %H:%M:%S UTC").to_string();
        output.write(&format!("{start}{}\n\n{figures}\n", output.paint(Style::Quiet, &time)))?;
        tokio::time::sleep(pause).await;
    }
}

async fn look(settings: &Settings, session: &mut Option<PgConnection>) -> anyhow::Result<(OutboxStats, Verdict)> {
    let mut connection = match session.take() {
        Some(connection) => connection,
        None => context::migrated(settings, "stats").await?,
    };
    let stats = read(settings, &mut connection).await?;
    let verdict = judge(settings, &mut connection).await?;
    *session = Some(connection);
    Ok((stats, verdict))
}

async fn read(settings: &Settings, connection: &mut PgConnection) -> anyhow::Result<OutboxStats> {
    let mut transaction = outbox::begin_reading(connection).await?;
    let stats = context::repository(settings).stats(&mut transaction).await?;
    transaction.commit().await?;
    Ok(stats)
}

async fn judge(settings: &Settings, connection: &mut PgConnection) -> anyhow::Result<Verdict> {
    let mut transaction = outbox::begin_reading(connection).await?;
    let verdict = flow::verdict(settings, &context::repository(settings), &mut transaction).await?;
    transaction.commit().await?;
    Ok(verdict)
}

fn describe(stats: &OutboxStats, verdict: &Verdict, output: &Output) -> String {
    let figures =
        [("pending", stats.pending), ("processing", stats.processing), ("published", stats.published), ("failed", stats.failed)];
    let figures = figures.map(|(name, events)| (name, count(u64::try_from(events).unwrap_or(0))));
    let width = figures.iter().map(|(_, figure)| figure.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, figure) in &figures {
        let figure = format!("{figure:>width$}");
        let figure = if *name == "failed" && stats.failed > 0 { output.paint(Style::Error, &figure) } else { figure };
        text += &format!("{name:<10}  {figure}");
        text += &match (*name, stats.oldest_pending_age_ms) {
            ("pending", Some(millis)) => {
                format!("   the oldest waits for {}\n", age(Duration::from_millis(millis.unsigned_abs())))
            }
            _ => "\n".to_owned(),
        };
    }
    let style = verdict.severity.map_or(Style::Good, |severity| doctor::look(severity).0);
    text += &format!("\n{}\n", output.paint(style, &printable(&verdict.sentence)));
    if stats.pending + stats.processing + stats.published + stats.failed == 0 {
        text += "\nThe outbox is empty. An INSERT INTO event_outbox, or `commitstream publish`, puts the first event in.\n";
    }
    if !stats.recent_failures.is_empty() {
        text += &format!("\n{}\n{}", output.paint(Style::Label, "Recent failures"), failures(&stats.recent_failures, output));
        text += "\nWhen the cause is mended: `commitstream failed retry --all`.\n";
    }
    text
}

/// Failed events as a table.
pub fn failures(events: &[FailedEvent], output: &Output) -> String {
    let mut table = Table::new(&["ID", "TYPE", "AGGREGATE", "RETRIES", "CREATED (UTC)", "ERROR"]);
    for event in events {
        table.row([
            event.id.to_string(),
            event.event_type.clone(),
            format!("{} {}", event.aggregate_type, event.aggregate_id),
            event.retry_count.to_string(),
            event.created_at.format("%Y-%m-%d %H:%M:%S").to_string(),
            event.last_error.clone().unwrap_or_default(),
        ]);
    }
    table.render(output)
}
