//! Faults of the connections between relays and servers.

use std::time::Duration;

use anyhow::Result;
use commitstream_sandbox::FaultProxy;
use rand::Rng;
use rand::rngs::StdRng;
use tokio::time::sleep;

use crate::faults::choose;
use crate::world::blocking;

#[derive(Debug, Clone, Copy)]
pub enum LinkFault {
    Cut,
    Refuse,
    Stall,
    Slow,
    DropReply,
    HalfReply,
    /// The connections of now never say anything again; new ones work.
    Swallow,
}

const FAULTS: [(u32, LinkFault); 7] = [
    (2, LinkFault::Cut),
    (2, LinkFault::Refuse),
    (2, LinkFault::Stall),
    (1, LinkFault::Slow),
    (4, LinkFault::DropReply),
    (2, LinkFault::HalfReply),
    (2, LinkFault::Swallow),
];

impl LinkFault {
    pub fn draw(dice: &mut StdRng) -> Result<Self> {
        choose(&FAULTS, dice)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Refuse => "refused",
            Self::Stall => "stalled",
            Self::Slow => "slow",
            Self::DropReply => "reply lost",
            Self::HalfReply => "half a reply",
            Self::Swallow => "swallowed for ever",
        }
    }

    /// While it lasts, nothing gets through.
    pub fn is_outage(self) -> bool {
        matches!(self, Self::Refuse | Self::Stall)
    }

    /// Does it to all these links, and mends them.
    pub async fn strike(self, links: &[&FaultProxy], dice: &mut StdRng) -> Result<()> {
        let mut millis = |range| Duration::from_millis(dice.random_range(range));
        match self {
            Self::Cut => links.iter().for_each(|link| link.cut()),
            Self::DropReply => links.iter().for_each(|link| link.drop_reply()),
            Self::HalfReply => links.iter().for_each(|link| link.half_reply()),
            Self::Swallow => links.iter().for_each(|link| link.swallow()),
            Self::Refuse => {
                tokio::task::block_in_place(|| links.iter().for_each(|link| link.refuse()));
                sleep(millis(100..2_000)).await;
                for link in links {
                    blocking(|| link.accept())?;
                }
            }
            Self::Stall => {
                links.iter().for_each(|link| link.stall());
                sleep(millis(200..4_000)).await;
                links.iter().for_each(|link| link.flow());
            }
            Self::Slow => {
                let delay = millis(5..50);
                links.iter().for_each(|link| link.slow(delay));
                sleep(millis(500..3_000)).await;
                links.iter().for_each(|link| link.slow(Duration::ZERO));
            }
        }
        Ok(())
    }
}
