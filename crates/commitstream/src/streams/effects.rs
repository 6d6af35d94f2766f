use std::time::Duration;

use uuid::Uuid;

use super::append::millis;
use super::node::Request;
use super::{Streams, StreamsError, group_key};
use crate::consumer::Known;

const BEGUN: &str = "begun";
const DONE: &str = "done";

impl Streams {
    /// Notes that an effect begins, unless a note is there already; says what was known before.
    pub(crate) async fn begin_effect(
        &self,
        stream: &str,
        group: &str,
        event_id: Uuid,
        life: Duration,
    ) -> Result<Known, StreamsError> {
        let key = effect_key(stream, group, event_id);
        let mut look = redis::pipe();
        look.atomic().cmd("GET").arg(&key);
        look.cmd("SET").arg(&key).arg(BEGUN).arg("NX").arg("PX").arg(millis(life)).ignore();
        let (before,): (Option<String>,) = self.send("noting an effect", stream, Request::Pipeline(&look)).await?;
        Ok(match before.as_deref() {
            None => Known::Nothing,
            Some(DONE) => Known::Done,
            Some(_) => Known::Begun,
        })
    }

    /// Notes what has become of it.
    pub(crate) async fn note_effect(
        &self,
        stream: &str,
        group: &str,
        event_id: Uuid,
        known: Known,
        life: Duration,
    ) -> Result<(), StreamsError> {
        let key = effect_key(stream, group, event_id);
        let text = match known {
            Known::Nothing => return self.query("noting an effect", stream, redis::cmd("DEL").arg(key)).await,
            Known::Begun => BEGUN,
            Known::Done => DONE,
        };
        let mut command = redis::cmd("SET");
        command.arg(key).arg(text).arg("PX").arg(millis(life));
        self.query("noting an effect", stream, &command).await
    }
}

fn effect_key(stream: &str, group: &str, event_id: Uuid) -> String {
    group_key(stream, group, &format!("effect:{event_id}"))
}
