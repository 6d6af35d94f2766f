//! How handlers are tested: the test kit delivers, without Redis, and delivers again as after a crash.

use anyhow::Result;
use chrono::Utc;
use commitstream::config::Settings;
use commitstream::consumer::Consumer;
use commitstream_examples::events::{PaymentProcessed, UserCreated};
use commitstream_examples::receipts::ReceiptConsumer;
use commitstream_examples::{process, welcome::WelcomeEmailConsumer};
use lettre::{AsyncSmtpTransport, Tokio1Executor};
use uuid::Uuid;

use crate::mail_server::{Mail, MailServer, Turn};
use crate::support::World;

fn user(email: &str) -> UserCreated {
    UserCreated { user_id: Uuid::now_v7(), email: email.to_owned(), occurred_at: Utc::now() }
}

#[tokio::test]
async fn a_registration_that_is_delivered_again_is_mailed_once() -> Result<()> {
    let server = MailServer::start(&[]).await?;
    let mut consumer = Consumer::new("welcome-mail", &Settings::default())?.on(server.consumer()?).in_memory()?;
    let id = consumer.publish(&user("ada@example.org"))?;
    consumer.run().await;
    consumer.deliver_again(id);
    consumer.run().await;
    assert_eq!(consumer.handled(), [id, id]);
    let expected = Mail { recipient: "ada@example.org".to_owned(), message_id: format!("<{id}@example.org>") };
    assert_eq!(server.mails(), [expected]);
    Ok(())
}

#[tokio::test]
async fn a_recipient_who_is_refused_now_is_tried_again_and_one_refused_for_good_is_given_up() -> Result<()> {
    let server = MailServer::start(&[Turn::Refuse("451 later"), Turn::Take, Turn::Refuse("550 nobody of this name")]).await?;
    let mut consumer = Consumer::new("welcome-mail", &Settings::default())?.on(server.consumer()?).in_memory()?;
    consumer.publish(&user("ada@example.org"))?;
    let refused = consumer.publish(&user("nobody@example.org"))?;
    let unreadable = consumer.publish(&user("no address"))?;
    consumer.run().await;
    let dead = consumer.dead_letters();
    assert_eq!(dead.iter().map(|dead| dead.event_id).collect::<Vec<_>>(), [refused, unreadable]);
    assert!(dead[0].reason.contains("nobody of this name"), "{dead:?}");
    assert_eq!((dead[0].attempts, server.mails().len()), (1, 1));
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_away_or_refuses_our_login_costs_no_event() -> Result<()> {
    let server = MailServer::start(&[Turn::Refuse("530 log in first")]).await?;
    let mut consumer = Consumer::new("welcome-mail", &Settings::default())?.on(server.consumer()?).in_memory()?;
    consumer.publish(&user("ada@example.org"))?;
    consumer.run().await;
    assert_eq!((consumer.waiting(), consumer.dead_letters().len()), (1, 0));
    consumer.run().await;
    assert_eq!((consumer.waiting(), server.mails().len()), (0, 1));

    let nobody = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous("127.0.0.1").port(1).build();
    let welcome = WelcomeEmailConsumer::new(nobody, "welcome@example.org".parse()?);
    let mut consumer = Consumer::new("welcome-mail", &Settings::default())?.on(welcome).in_memory()?;
    consumer.publish(&user("ada@example.org"))?;
    consumer.run().await;
    assert_eq!((consumer.waiting(), consumer.dead_letters().len()), (1, 0));
    Ok(())
}

#[tokio::test]
async fn a_payment_that_is_delivered_again_has_one_receipt() -> Result<()> {
    let world = World::new().await?;
    let pool = process::database(&world.settings).await?;
    let mut consumer = Consumer::new("receipts", &world.settings)?.on_transaction(&pool, ReceiptConsumer).in_memory()?;
    let (payment_id, user_id) = (Uuid::now_v7(), Uuid::now_v7());
    let id = consumer.publish(&PaymentProcessed { payment_id, user_id, amount_cents: 4_200, occurred_at: Utc::now() })?;
    consumer.run().await;
    consumer.deliver_again(id);
    consumer.run().await;
    assert_eq!(consumer.handled(), [id, id]);
    assert_eq!(world.sql("SELECT string_agg(amount_cents::text, ' ') FROM receipts").await?, "4200");
    Ok(())
}
