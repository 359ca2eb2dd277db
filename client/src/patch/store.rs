//! What patches remember between runs: a table of texts by patch, scope and key in SQLite, and
//! beside it the contents of media that were stored. It knows nothing of what the texts mean.
//! Any number of patches use it at once.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

/// How long one patch waits while another writes.
const BUSY: Duration = Duration::from_secs(30);
/// A content that no value names is removed once it is so old: until then the value that will name
/// it may still be on its way.
const UNNAMED_AGE: Duration = Duration::from_secs(24 * 3600);
/// The longest key, in bytes.
pub const MAX_KEY: usize = 1024;
/// The longest value in its stored form, in bytes.
pub const MAX_VALUE: usize = 16 << 20;

/// Why something was not remembered, or not found again.
///
/// ```
/// use client::patch::StoreError;
/// assert!(StoreError::Key(2000).to_string().contains("the longest is 1024 bytes"));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory cannot be made or used.
    #[error("the patches' store {path}: {cause}")]
    Directory {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// SQLite refused.
    #[error("the patches' store {path}: {cause}")]
    Database {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        cause: rusqlite::Error,
    },
    /// A key is too long.
    #[error("a key of {0} bytes; the longest is {MAX_KEY} bytes")]
    Key(usize),
    /// A value is too large.
    #[error("a value of {0} bytes; the largest is {MAX_VALUE} bytes: keep large things in the VM")]
    Value(usize),
    /// A stored content's name is not one of ours.
    #[error("`{0}` names no stored content")]
    Content(String),
}

/// Who sees a value.
///
/// ```no_run
/// # fn example() -> Result<(), client::patch::StoreError> {
/// use client::patch::{Scope, Store};
/// let store = Store::open("/var/lib/patches".as_ref(), "/home/me/hello.js")?;
/// store.set(&Scope::Chat("one".into()), "count", "1")?;
/// assert_eq!(store.get(&Scope::Global, "count")?, None);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every run of the patch.
    Global,
    /// Runs in one chat.
    Chat(String),
    /// Runs of one user.
    User(String),
}

impl Scope {
    fn columns(&self) -> (&'static str, &str) {
        match self {
            Self::Global => ("global", ""),
            Self::Chat(id) => ("chat", id),
            Self::User(id) => ("user", id),
        }
    }
}

/// The open store, as one patch sees it.
///
/// ```no_run
/// # fn example() -> Result<(), client::patch::StoreError> {
/// use client::patch::{Scope, Store};
/// let store = Store::open("/var/lib/patches".as_ref(), "/home/me/hello.js")?;
/// store.set(&Scope::Global, "vm", "\"vm-0000abcd\"")?;
/// for key in store.keys(&Scope::Global)? {
///     println!("{key}: {:?}", store.get(&Scope::Global, &key)?);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Store {
    path: PathBuf,
    contents: PathBuf,
    patch: String,
    connection: Connection,
}

impl Store {
    /// Opens the store in a directory, and makes both when they are missing.
    pub fn open(directory: &Path, patch: &str) -> Result<Self, StoreError> {
        let contents = directory.join("media");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&contents)
            .map_err(|cause| StoreError::Directory {
                path: contents.clone(),
                cause,
            })?;
        let path = directory.join("patches.db");
        let connection = connect(&path).map_err(|cause| StoreError::Database {
            path: path.clone(),
            cause,
        })?;
        let store = Self {
            path,
            contents,
            patch: patch.to_owned(),
            connection,
        };
        store.sweep();
        Ok(store)
    }

    /// The value of a key.
    pub fn get(&self, scope: &Scope, key: &str) -> Result<Option<String>, StoreError> {
        let (scope, owner) = scope.columns();
        self.connection
            .prepare(
                "SELECT value FROM kept WHERE patch = ?1 AND scope = ?2 AND owner = ?3 AND key = ?4",
            )
            .and_then(|mut query| {
                query
                    .query_row(params![self.patch, scope, owner, key], |row| row.get(0))
                    .optional()
            })
            .map_err(|cause| self.refused(cause))
    }

    /// Remembers a value; durable when this returns.
    pub fn set(&self, scope: &Scope, key: &str, value: &str) -> Result<(), StoreError> {
        if key.len() > MAX_KEY {
            return Err(StoreError::Key(key.len()));
        }
        if value.len() > MAX_VALUE {
            return Err(StoreError::Value(value.len()));
        }
        let (scope, owner) = scope.columns();
        self.connection
            .execute(
                "INSERT INTO kept (patch, scope, owner, key, value) VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (patch, scope, owner, key) DO UPDATE SET value = excluded.value",
                params![self.patch, scope, owner, key, value],
            )
            .map(|_| ())
            .map_err(|cause| self.refused(cause))
    }

    /// Forgets a value; one that is not there is quiet.
    pub fn remove(&self, scope: &Scope, key: &str) -> Result<(), StoreError> {
        let (scope, owner) = scope.columns();
        self.connection
            .execute(
                "DELETE FROM kept WHERE patch = ?1 AND scope = ?2 AND owner = ?3 AND key = ?4",
                params![self.patch, scope, owner, key],
            )
            .map(|_| ())
            .map_err(|cause| self.refused(cause))
    }

    /// All keys of a scope in order.
    pub fn keys(&self, scope: &Scope) -> Result<Vec<String>, StoreError> {
        let (scope, owner) = scope.columns();
        self.connection
            .prepare(
                "SELECT key FROM kept WHERE patch = ?1 AND scope = ?2 AND owner = ?3 ORDER BY key",
            )
            .and_then(|mut query| {
                query
                    .query_map(params![self.patch, scope, owner], |row| row.get(0))?
                    .collect()
            })
            .map_err(|cause| self.refused(cause))
    }

    /// Keeps a file's content beside the values and gives it a name: equal contents have one.
    pub fn keep(&self, file: &Path) -> Result<String, StoreError> {
        self.copy(file).map_err(|cause| StoreError::Directory {
            path: self.contents.clone(),
            cause,
        })
    }

    /// Where a kept content is.
    pub fn kept(&self, name: &str) -> Result<PathBuf, StoreError> {
        if name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            Ok(self.contents.join(name))
        } else {
            Err(StoreError::Content(name.chars().take(80).collect()))
        }
    }

    fn copy(&self, file: &Path) -> io::Result<String> {
        let mut from = fs::File::open(file)?;
        let mut to = tempfile::NamedTempFile::new_in(&self.contents)?;
        let mut hash = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 17];
        loop {
            let count = from.read(&mut buffer)?;
            let Some(part @ [_, ..]) = buffer.get(..count) else {
                break;
            };
            hash.update(part);
            io::Write::write_all(&mut to, part)?;
        }
        let name = hash.finalize().to_hex().to_string();
        to.as_file().sync_all()?;
        // A rename over an equal content also makes it young again, so no sweep takes it.
        to.persist(self.contents.join(&name))
            .map_err(|refused| refused.error)?;
        fs::File::open(&self.contents)?.sync_all()?;
        Ok(name)
    }

    /// Removes contents that no value names. What cannot be removed now is found the next time.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.contents) else {
            return;
        };
        let now = SystemTime::now();
        for entry in entries.flatten() {
            let old = entry
                .metadata()
                .and_then(|facts| facts.modified())
                .is_ok_and(|time| now.duration_since(time).is_ok_and(|age| age > UNNAMED_AGE));
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|_| old) else {
                continue;
            };
            let named: rusqlite::Result<bool> = self.connection.query_row(
                "SELECT EXISTS (SELECT 1 FROM kept WHERE instr(value, ?1) > 0)",
                [name],
                |row| row.get(0),
            );
            if matches!(named, Ok(false)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn refused(&self, cause: rusqlite::Error) -> StoreError {
        StoreError::Database {
            path: self.path.clone(),
            cause,
        }
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    // Changing to WAL takes the file for itself and does not wait for others by the busy timeout
    // in every case; who finds it changed already has nothing to do.
    let mode: String = connection.query_row("PRAGMA journal_mode", [], |row| row.get(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        let mut tries = 0_u32;
        loop {
            let changed: rusqlite::Result<String> =
                connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0));
            match changed {
                Ok(_) => break,
                Err(error)
                    if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy)
                        && tries < 100 =>
                {
                    tries = tries.saturating_add(1);
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(error),
            }
        }
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(
        "CREATE TABLE IF NOT EXISTS kept (
             patch TEXT NOT NULL, scope TEXT NOT NULL, owner TEXT NOT NULL, key TEXT NOT NULL,
             value TEXT NOT NULL, PRIMARY KEY (patch, scope, owner, key)
         ) WITHOUT ROWID",
    )?;
    transaction.commit()?;
    Ok(connection)
}
