//! `commitstream console`

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context as _;
use tokio::net::TcpListener;

use crate::commands::interrupt::Interrupt;
use crate::console;
use crate::context::{self, Context};
use crate::http::HttpServer;

/// Serve the web console without a relay: see what flows and what is stuck, and act on it
///
/// `commitstream relay` serves the same under its own address. Pages show events, failures, dead letters, streams, relays, and what operators did. Whoever logs in gives a name, which the
/// audit writes down, and a password: CONSOLE_PASSWORD, or a generated one that is printed at the start.
/// CONSOLE_READ_ONLY_PASSWORD is for those who may look and not act. Ctrl-C ends it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  commitstream console
  CONSOLE_PASSWORD=... commitstream console --listen 127.0.0.1:8080")]
pub struct Args {
    /// Address and port. Beyond this host it needs CONSOLE_PASSWORD, and HTTPS by a proxy in front of it
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9465")]
    listen: SocketAddr,
}

pub async fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let settings = context.settings()?;
    console::check(&settings, args.listen)?;
    drop(context::own_migrated(&settings, "console").await?);
    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    let (routes, generated) = console::routes(&settings, address)?;
    if let Some(password) = generated {
        context.output.line(&format!("password: {password}\n(generated for this run; CONSOLE_PASSWORD sets one)"))?;
    }
    context.output.line(&format!("console on http://{address}/console"))?;
    let interrupt = Interrupt::listen()?;
    let server = HttpServer::serve(listener, routes);
    interrupt.first().await;
    server.stop().await;
    Ok(ExitCode::SUCCESS)
}
