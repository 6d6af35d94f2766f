//! A mail server that writes down what it is given, and answers as it is told.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use commitstream_examples::welcome::WelcomeEmailConsumer;
use lettre::{AsyncSmtpTransport, Tokio1Executor};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// What the server does with one mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Take,
    /// Answers its recipient with this.
    Refuse(&'static str),
    /// Takes it and never says so.
    TakeInSilence,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    pub recipient: String,
    pub message_id: String,
}

#[derive(Default)]
struct State {
    turns: VecDeque<Turn>,
    mails: Vec<Mail>,
}

/// Ends when it is dropped.
pub struct MailServer {
    pub url: String,
    state: Arc<Mutex<State>>,
    _accepting: JoinSet<()>,
}

impl MailServer {
    /// Does with the first mails as told, and takes all others.
    pub async fn start(turns: &[Turn]) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("smtp://{}", listener.local_addr()?);
        let state = Arc::new(Mutex::new(State { turns: turns.iter().copied().collect(), mails: Vec::new() }));
        let mut accepting = JoinSet::new();
        let shared = Arc::clone(&state);
        accepting.spawn(async move {
            let mut sessions = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                sessions.spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Ok(Self { url, state, _accepting: accepting })
    }

    /// What was taken, in order.
    pub fn mails(&self) -> Vec<Mail> {
        self.state.lock().unwrap().mails.clone()
    }

    /// The consumer that sends to this server.
    pub fn consumer(&self) -> Result<WelcomeEmailConsumer> {
        let mailer = AsyncSmtpTransport::<Tokio1Executor>::from_url(&self.url)?.build();
        Ok(WelcomeEmailConsumer::new(mailer, "welcome@example.org".parse()?))
    }
}

/// One session. It ends at QUIT, and when the client has gone away.
async fn serve(stream: TcpStream, state: Arc<Mutex<State>>) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let (mut turn, mut recipient) = (Turn::Take, String::new());
    writer.write_all(b"220 mail\r\n").await?;
    while let Some(line) = lines.next_line().await? {
        let reply = match line.split([' ', ':']).next().unwrap_or_default() {
            "RCPT" => {
                turn = state.lock().unwrap().turns.pop_front().unwrap_or(Turn::Take);
                recipient = line.chars().skip_while(|c| *c != '<').skip(1).take_while(|c| *c != '>').collect();
                if let Turn::Refuse(reply) = turn { reply } else { "250 ok" }
            }
            "DATA" => {
                writer.write_all(b"354 go on\r\n").await?;
                let mut message_id = None;
                while let Some(line) = lines.next_line().await?.filter(|line| line != ".") {
                    message_id = message_id.or(line.strip_prefix("Message-ID: ").map(str::to_owned));
                }
                let message_id = message_id.context("a mail without a Message-ID")?;
                state.lock().unwrap().mails.push(Mail { recipient: recipient.clone(), message_id });
                if turn == Turn::TakeInSilence {
                    std::future::pending::<()>().await;
                }
                "250 taken"
            }
            "QUIT" => "221 bye",
            _ => "250 ok",
        };
        writer.write_all(format!("{reply}\r\n").as_bytes()).await?;
    }
    Ok(())
}
