//! Whether a member lives, what it has at work, and what becomes of it.

use std::time::Duration;

use redis::Value;

use super::scripts::{ACKNOWLEDGE, FAIL, HEARTBEAT, LEAVE, START};
use super::{EntryId, Member, TakenOver, common, numbers};
use crate::streams::append::millis;
use crate::streams::{Streams, StreamsError, group_key};

impl Streams {
    /// A connection of its own to the same servers for [`heartbeat`](Self::heartbeat): one that does not answer is replaced in time for
    /// another before the life of a member is over.
    #[must_use]
    pub(crate) fn for_heartbeats(&self, life: Duration) -> Self {
        self.within(life / 2, life / 4)
    }

    /// Moves the deadline of the member. `Err(TakenOver)` if it is none any more.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn heartbeat(&self, member: &Member) -> Result<Result<(), TakenOver>, StreamsError> {
        let mut call = HEARTBEAT.prepare_invoke();
        call.key(group_key(&member.stream, &member.group, "members")).arg(&member.name).arg(millis(member.life));
        let is_member: u8 = self.invoke("sending a heartbeat", &member.stream, &call).await?;
        Ok(if is_member == 1 { Ok(()) } else { Err(TakenOver) })
    }

    /// Notes that the member has these entries at work, and none that it named before: if it dies now, one of them may be the cause.
    ///
    /// # Errors
    /// Redis is not reachable or refuses.
    pub async fn note_started(&self, member: &Member, ids: &[EntryId]) -> Result<Result<(), TakenOver>, StreamsError> {
        let mut call = START.prepare_invoke();
        call.key(group_key(&member.stream, &member.group, "members")).key(started_key(member));
        call.arg(&member.name);
        for id in ids {
            call.arg(id.to_string());
        }
        let is_member: u8 = self.invoke("noting what is at work", &member.stream, &call).await?;
        Ok(if is_member == 1 { Ok(()) } else { Err(TakenOver) })
    }

    /// Notes a failed attempt, with all before it as a JSON array; the entry counts `deliveries` from here. `false`: the member does not
    /// have the entry in hand.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn note_failure(
        &self,
        member: &Member,
        id: EntryId,
        deliveries: u32,
        history: &str,
    ) -> Result<Result<bool, TakenOver>, StreamsError> {
        let mut call = common(&FAIL, member);
        call.arg(id.to_string()).arg(deliveries).arg(history);
        let reply: Vec<Value> = self.invoke("noting a failure", &member.stream, &call).await?;
        numbers(&reply).map(|n| n.map(|n| n[0] == 1)).map_err(|error| self.unreadable(&member.stream, error))
    }

    /// Acknowledges one entry now, with all that was noted of it. `false`: the member does not have the entry in hand.
    ///
    /// # Errors
    /// As for [`cycle`](Self::cycle).
    pub async fn acknowledge(&self, member: &Member, id: EntryId) -> Result<Result<bool, TakenOver>, StreamsError> {
        let mut call = common(&ACKNOWLEDGE, member);
        call.arg(id.to_string());
        let reply: Vec<Value> = self.invoke("acknowledging an entry", &member.stream, &call).await?;
        numbers(&reply).map(|n| n.map(|n| n[0] == 1)).map_err(|error| self.unreadable(&member.stream, error))
    }

    /// Leaves the group: others take what the member has in hand, at once. `started` is what it had noted as being at work, with its
    /// deliveries: if others have taken that as from a dead member, they counted one too many.
    ///
    /// # Errors
    /// Redis is not reachable or refuses; then others take it when the member's life is over.
    pub async fn leave_group(&self, member: &Member, started: &[(EntryId, u32)]) -> Result<(), StreamsError> {
        let mut call = LEAVE.prepare_invoke();
        call.key(group_key(&member.stream, &member.group, "members")).key(started_key(member)).key(&member.stream);
        call.arg(&member.name).arg(&member.group);
        for (id, deliveries) in started {
            call.arg(id.to_string()).arg(*deliveries);
        }
        self.invoke("leaving a consumer group", &member.stream, &call).await
    }
}

fn started_key(member: &Member) -> String {
    group_key(&member.stream, &member.group, &format!("started:{}", member.name))
}
