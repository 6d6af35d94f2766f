//! Registration to mail, payment to receipt, through all the programs.

use anyhow::{Context, Result};
use serde_json::json;

use crate::mail_server::{MailServer, Turn};
use crate::support::{World, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn each_registration_is_mailed_once_and_one_that_fails_never() -> Result<()> {
    let world = World::new().await?;
    let (server, service) = (MailServer::start(&[]).await?, world.service().await?);
    let welcome = world.welcome_mail(&server.url)?;
    service.create("/users", &json!({ "email": "ada@example.org" })).await?;
    let taken = service.post("/users", &json!({ "email": "ada@example.org" })).await?;
    assert_eq!(taken, (409, json!({ "error": "this e-mail address is registered already" })));
    assert_eq!(service.post("/users", &json!({ "email": "nowhere" })).await?.0, 422);
    service.create("/users", &json!({ "email": "grace@example.org" })).await?;

    eventually("both mails", async || Ok(server.mails().len() == 2)).await?;
    // The consumer finishes what it has in hand: a third mail would be there after it.
    assert!(welcome.terminate().await?.success());
    assert!(service.program.terminate().await?.success());
    let mut expected = Vec::new();
    for entry in world.entries("user").await? {
        let event = entry.envelope()?;
        let payload: serde_json::Value = serde_json::from_str(event.payload.get())?;
        expected.push((payload["email"].as_str().unwrap_or_default().to_owned(), format!("<{}@example.org>", event.id)));
    }
    let mut mails: Vec<_> = server.mails().into_iter().map(|mail| (mail.recipient, mail.message_id)).collect();
    expected.sort();
    mails.sort();
    assert_eq!(mails, expected);
    assert_eq!(world.sql("SELECT count(*)::text FROM event_outbox").await?, "2");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deferred_mail_is_sent_once_and_a_refused_one_is_a_dead_letter() -> Result<()> {
    let world = World::new().await?;
    let server = MailServer::start(&[Turn::Refuse("451 later"), Turn::Take, Turn::Refuse("550 nobody of this name")]).await?;
    let (service, _welcome) = (world.service().await?, world.welcome_mail(&server.url)?);
    service.create("/users", &json!({ "email": "ada@example.org" })).await?;
    eventually("the deferred mail", async || Ok(server.mails().len() == 1)).await?;

    let nobody = service.create("/users", &json!({ "email": "nobody@example.org" })).await?;
    eventually("the dead letter", async || Ok(world.entries("user:dead").await?.len() == 1)).await?;
    let dead = world.entries("user:dead").await?.pop().context("no dead letter")?;
    assert_eq!((dead.field("aggregate_id"), dead.field("group")), (Some(nobody.as_str()), Some("welcome-mail")));
    assert!(dead.field("reason").is_some_and(|reason| reason.contains("nobody of this name")), "{dead:?}");
    assert_eq!(server.mails().len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mail_whose_reply_a_crash_lost_comes_again_under_its_message_id() -> Result<()> {
    let world = World::new().await?;
    let server = MailServer::start(&[Turn::TakeInSilence]).await?;
    let (service, mut crashing) = (world.service().await?, world.welcome_mail(&server.url)?);
    service.create("/users", &json!({ "email": "ada@example.org" })).await?;
    eventually("the mail to be taken", async || Ok(server.mails().len() == 1)).await?;
    crashing.child.kill().await?;

    let mut other = world.welcome_mail(&server.url)?;
    other.logs("welcome mail sent").await?;
    let mails = server.mails();
    assert_eq!((mails.len(), &mails[0]), (2, &mails[1]));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn payments_trainings_and_sessions_reach_their_streams_and_a_payment_its_receipt() -> Result<()> {
    let world = World::new().await?;
    let service = world.service().await?;
    let mut receipts = world.start(env!("CARGO_BIN_EXE_receipts"), &[])?;
    let user = service.create("/users", &json!({ "email": "ada@example.org" })).await?;
    let payment = service.create("/payments", &json!({ "user_id": user, "amount_cents": 4_200 })).await?;
    let training = service.create("/trainings", &json!({ "user_id": user, "model": "small" })).await?;
    let session = service.create("/sessions", &json!({ "user_id": user })).await?;

    let nobody = uuid::Uuid::now_v7();
    assert_eq!(service.post("/payments", &json!({ "user_id": nobody, "amount_cents": 4_200 })).await?.0, 404);
    assert_eq!(service.post("/trainings", &json!({ "user_id": nobody, "model": "small" })).await?.0, 404);
    assert_eq!(service.post("/payments", &json!({ "user_id": user, "amount_cents": 0 })).await?.0, 422);

    receipts.logs("receipt written").await?;
    assert!(receipts.terminate().await?.success());
    assert_eq!(world.sql("SELECT string_agg(payment_id::text, ' ') FROM receipts").await?, payment);
    for (aggregate_type, id) in [("payment", payment), ("training", training), ("session", session)] {
        eventually(aggregate_type, async || Ok(!world.entries(aggregate_type).await?.is_empty())).await?;
        let ids: Vec<_> =
            world.entries(aggregate_type).await?.iter().map(|e| e.field("aggregate_id").map(str::to_owned)).collect();
        assert_eq!(ids, [Some(id)], "{aggregate_type}");
    }
    // A session takes the short way.
    assert_eq!(world.sql("SELECT count(*)::text FROM event_outbox WHERE aggregate_type = 'session'").await?, "0");
    Ok(())
}
