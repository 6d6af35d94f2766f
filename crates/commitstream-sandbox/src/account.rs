//! The account that servers run as.

use std::path::Path;
use std::process::Command;

use crate::SandboxError;

/// A user and its primary group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Account {
    /// Who servers must run as: an unprivileged account where we are root (PostgreSQL refuses root), else `None`: ourselves.
    pub(crate) fn for_servers() -> Result<Option<Account>, SandboxError> {
        let id = Command::new("id").arg("-u").output().map_err(SandboxError::io("run `id -u`"))?;
        if id.stdout.trim_ascii() != b"0" {
            return Ok(None);
        }
        let passwd = std::fs::read_to_string("/etc/passwd").map_err(SandboxError::io("read /etc/passwd"))?;
        let account = ["postgres", "nobody"].iter().find_map(|name| find(&passwd, name));
        account.map(Some).ok_or(SandboxError::NoUnprivilegedUser)
    }

    /// Makes this account the owner of a file.
    pub(crate) fn own(self, path: &Path) -> std::io::Result<()> {
        std::os::unix::fs::chown(path, Some(self.uid), Some(self.gid))
    }
}

fn find(passwd: &str, name: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != name {
            return None;
        }
        let mut ids = fields.skip(1);
        Some(Account { uid: ids.next()?.parse().ok()?, gid: ids.next()?.parse().ok()? })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_name() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65533::/:/bin/false\n";
        assert_eq!(find(passwd, "nobody"), Some(Account { uid: 65534, gid: 65533 }));
        assert_eq!(find(passwd, "postgres"), None);
    }
}
