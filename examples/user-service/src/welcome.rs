//! A welcome mail for every new user: an effect that no transaction can hold.

use std::error::Error;
use std::time::Duration;

use commitstream::consumer::{Delivery, Handler, HandlerError, WhenUnknown};
use lettre::message::Mailbox;
use lettre::message::header::ContentType;
use lettre::transport::smtp::response::Category;
use lettre::{AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};
use uuid::Uuid;

use crate::events::UserCreated;

/// Longest time for one mail, from connecting to the last reply. Generous: a server that is left early may have taken the mail.
const SEND_LIMIT: Duration = Duration::from_secs(60);

/// How long to wait when the server is away or does not want to talk to us.
const SERVER_IS_AWAY: Duration = Duration::from_secs(10);

/// Sends each user one mail, however often the event is delivered.
///
/// One case is left, as SMTP knows no transaction: when the server takes a mail and its reply is lost, by a crash or a cut
/// connection, the mail is sent again. It has the same Message-ID then, and most mail programs show it once.
pub struct WelcomeEmailConsumer {
    mailer: AsyncSmtpTransport<Tokio1Executor>,
    from: Mailbox,
}

impl WelcomeEmailConsumer {
    #[must_use]
    pub fn new(mailer: AsyncSmtpTransport<Tokio1Executor>, from: Mailbox) -> Self {
        Self { mailer, from }
    }

    fn mail(&self, event: &UserCreated, event_id: Uuid) -> Result<Message, HandlerError> {
        // A mail that cannot be written now never can.
        let address = event.email.parse().map_err(HandlerError::give_up)?;
        Message::builder()
            .from(self.from.clone())
            .to(Mailbox::new(None, address))
            .message_id(Some(format!("<{event_id}@{}>", self.from.email.domain())))
            .subject("Welcome")
            .header(ContentType::TEXT_PLAIN)
            .body("Your account is ready.\n".to_owned())
            .map_err(HandlerError::give_up)
    }

    async fn send(&self, mail: Message) -> Result<(), HandlerError> {
        match tokio::time::timeout(SEND_LIMIT, self.mailer.send(mail)).await {
            Ok(Ok(_reply)) => Ok(()),
            Ok(Err(error)) => Err(verdict(error)),
            Err(_) => Err(HandlerError::outcome_unknown(SERVER_IS_AWAY, "the mail server did not answer in time")),
        }
    }
}

impl Handler<UserCreated> for WelcomeEmailConsumer {
    async fn handle(&self, event: UserCreated, delivery: &Delivery) -> Result<(), HandlerError> {
        let mail = self.mail(&event, delivery.event_id())?;
        if delivery.once("welcome mail", WhenUnknown::Repeat, || self.send(mail)).await? {
            tracing::info!(user = %event.user_id, "welcome mail sent");
        } else {
            tracing::info!(user = %event.user_id, "the welcome mail was sent already");
        }
        Ok(())
    }
}

/// Codes whose second digit is 5 speak of this mail and its recipient (RFC 5321, 4.2.1): a refusal for good is a dead letter, one
/// for now is tried `consumer.maxDeliveries` times. Everything else (no connection, a refused login) is no fault of the event: it
/// waits until the server or our settings are fixed. Where no answer came, the server may have taken the mail.
fn verdict(error: lettre::transport::smtp::Error) -> HandlerError {
    match error.status() {
        Some(code) if code.category == Category::MailSystem && error.is_permanent() => HandlerError::give_up(error),
        Some(code) if code.category == Category::MailSystem => error.into(),
        Some(_) => HandlerError::retry_later(SERVER_IS_AWAY, error),
        None if was_not_sent(&error) => HandlerError::retry_later(SERVER_IS_AWAY, error),
        None => HandlerError::outcome_unknown(SERVER_IS_AWAY, error),
    }
}

/// There was no connection, or no session on it, so that the server has no mail of ours.
fn was_not_sent(error: &lettre::transport::smtp::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
    let io = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
    let no_connection = io.is_some_and(|io| matches!(io.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable));
    no_connection || error.is_client() || error.is_tls()
}
