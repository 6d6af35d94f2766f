//! A service that publishes inside its transactions, and two consumers of what it publishes. Made to be copied from.
//!
//! ```text
//!  POST /users ────┐  one transaction                                 ┌─► welcome-mail: one mail, by SMTP
//!  POST /payments ─┼─► data + event_outbox ─► commitstream relay ─► events:…
//!  POST /trainings ┘                                                  └─► receipts: one row, by the inbox
//!  POST /sessions ───────── straight to the stream ─────────────────► events:session
//! ```
//!
//! | program | what to look at |
//! |---|---|
//! | `user-service` | [`service`]: data and event commit together; [`error`]: what a client is told when they do not |
//! | `welcome-mail` | [`welcome`]: an effect outside the database that happens once |
//! | `receipts` | [`receipts`]: an effect in the database that happens exactly once |
//!
//! [`events`] is what producers and consumers share, [`schema`] the service's own tables, [`process`] what every program needs.

pub mod error;
pub mod events;
pub mod process;
pub mod receipts;
pub mod schema;
pub mod service;
pub mod welcome;
