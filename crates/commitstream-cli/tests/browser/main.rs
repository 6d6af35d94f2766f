//! The web console as people see it: in a headless Chromium, served by a relay daemon, on a real PostgreSQL and Redis.
//!
//! | file | what |
//! |---|---|
//! | `driver` | chromedriver, one for this program |
//! | `browser` | a browser for each test |
//! | `stage` | a relay daemon with its console, and the browser at its door |
//! | `screenshots` | the pictures in `docs/console`, by `make screenshots` |
//! | the others | the tests |

mod access;
mod browser;
mod deeds;
mod driver;
mod events;
mod layout;
mod live;
mod screenshots;
mod stage;
#[allow(dead_code)] // the tests of the command line ask for more
#[path = "../cli/support.rs"]
mod support;
