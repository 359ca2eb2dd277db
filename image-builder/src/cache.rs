//! Keeps what takes minutes to build outside the checkout, under a name that holds a hash of all its
//! inputs. A finished entry is never changed, an unfinished one never carries a final name, and two
//! builds of the same thing at once build it once.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::files::{self, AtPath as _, FileError};

/// Why the cache could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    /// Neither XDG_CACHE_HOME nor HOME says where caches go.
    #[error("neither XDG_CACHE_HOME nor HOME is set to an absolute path; set one of them")]
    NoHome,
    /// A file in it could not be used.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The inputs of one artifact, hashed as they are named.
pub(crate) struct Inputs {
    hasher: blake3::Hasher,
}

/// The hash of all inputs of an artifact; part of its directory's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key(String);

impl Inputs {
    /// Starts with the recipe: a text that changes whenever the way of building does.
    pub(crate) fn new(recipe: &str) -> Self {
        let mut inputs = Self {
            hasher: blake3::Hasher::new(),
        };
        inputs.add("recipe", recipe.as_bytes());
        inputs
    }

    /// Adds one named input. Lengths are hashed too, so no two lists of inputs look alike.
    pub(crate) fn add(&mut self, name: &str, value: impl AsRef<[u8]>) -> &mut Self {
        for part in [name.as_bytes(), value.as_ref()] {
            self.hasher.update(&(part.len() as u64).to_le_bytes());
            self.hasher.update(part);
        }
        self
    }

    /// The key for what was added so far.
    pub(crate) fn key(&self) -> Key {
        let mut hex = self.hasher.finalize().to_hex().to_string();
        hex.truncate(16);
        Key(hex)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The directory that holds all entries.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The user's cache: `$XDG_CACHE_HOME/supvm`, else `~/.cache/supvm`.
    pub(crate) fn of_user() -> Result<Self, CacheError> {
        let absolute = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let base = absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .ok_or(CacheError::NoHome)?;
        Ok(Self::at(base.join("supvm")))
    }

    /// A cache in `root`.
    pub(crate) fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where the log of an artifact's build goes; it outlives a failed build.
    pub(crate) fn log_path(&self, artifact: &str) -> PathBuf {
        self.root.join("logs").join(format!("{artifact}.log"))
    }

    /// A directory beside the entries, for what is rebuilt in place (apt's lists).
    pub(crate) fn aside(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The directory of `artifact` for `key`. When it is not there yet, `build` fills an empty
    /// directory that then takes the final name; a build by another process is waited for.
    pub(crate) fn ensure<E: From<CacheError>>(
        &self,
        artifact: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let done = self.root.join(format!("{artifact}-{key}"));
        if done.is_dir() {
            return Ok(done);
        }
        // Held until the end of this function; the kernel lets it go with the process.
        let _lock = self.lock(artifact)?;
        if done.is_dir() {
            return Ok(done);
        }
        let prefix = format!(".staging-{artifact}-");
        self.remove_leftovers(&prefix)?;
        let staging = tempfile::Builder::new()
            .prefix(&prefix)
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir_in(&self.root)
            .at("make a directory in", &self.root)
            .map_err(CacheError::from)?;
        build(staging.path())?;
        self.publish(staging, &done)?;
        Ok(done)
    }

    fn lock(&self, artifact: &str) -> Result<File, CacheError> {
        files::make_dir(&self.root)?;
        let path = self.root.join(format!(".lock-{artifact}"));
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .at("open", &path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("{artifact}: another build is making it; waiting for that");
                lock.lock().at("lock", &path)?;
            }
            Err(TryLockError::Error(error)) => Err(error).at("lock", &path)?,
        }
        Ok(lock)
    }

    /// What a killed build left behind; the caller holds the artifact's lock, so nobody uses it.
    fn remove_leftovers(&self, prefix: &str) -> Result<(), CacheError> {
        for entry in fs::read_dir(&self.root).at("list", &self.root)? {
            let entry = entry.at("list", &self.root)?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                fs::remove_dir_all(entry.path()).at("remove", &entry.path())?;
            }
        }
        Ok(())
    }

    fn publish(&self, staging: tempfile::TempDir, done: &Path) -> Result<(), CacheError> {
        let dir = File::open(&self.root).at("open", &self.root)?;
        // Content reaches the disk before the name does: a power cut leaves no empty entry.
        nix::unistd::syncfs(&dir)
            .map_err(std::io::Error::from)
            .at("sync", &self.root)?;
        fs::rename(staging.path(), done).at("publish", done)?;
        // The directory has moved away: nothing is left for the guard to remove.
        let _gone = staging.keep();
        dir.sync_all().at("sync", &self.root)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn key_of(inputs: &[(&str, &str)]) -> Key {
        let mut all = Inputs::new("1");
        for (name, value) in inputs {
            all.add(name, value);
        }
        all.key()
    }

    #[test]
    fn any_changed_input_changes_the_key() {
        let base = key_of(&[("config", "A=y"), ("version", "6.12")]);
        assert_eq!(base, key_of(&[("config", "A=y"), ("version", "6.12")]));
        for other in [
            key_of(&[("config", "A=n"), ("version", "6.12")]),
            key_of(&[("config", "A=y"), ("version", "6.13")]),
            key_of(&[("config", "A=y")]),
            key_of(&[("config", "A=yv"), ("ersion", "6.12")]),
            Inputs::new("2")
                .add("config", "A=y")
                .add("version", "6.12")
                .key(),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn two_builders_at_once_build_once() {
        let dir = tempfile::tempdir().unwrap();
        let key = key_of(&[]);
        let builds = AtomicU32::new(0);
        let start = Barrier::new(4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    let cache = Cache::at(dir.path().to_owned());
                    let made = cache
                        .ensure::<CacheError>("thing", &key, |staging| {
                            builds.fetch_add(1, Ordering::SeqCst);
                            files::replace(&staging.join("out"), b"done")?;
                            Ok(())
                        })
                        .unwrap();
                    assert_eq!(fs::read(made.join("out")).unwrap(), b"done");
                });
            }
        });
        assert_eq!(builds.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_failed_build_leaves_nothing_under_the_final_name() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned());
        let key = key_of(&[]);
        let failed = cache.ensure::<CacheError>("thing", &key, |staging| {
            files::replace(&staging.join("half"), b"x")?;
            Err(CacheError::NoHome)
        });
        assert!(failed.is_err());
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, [".lock-thing"]);
    }

    #[test]
    fn a_killed_build_is_cleared_away_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned());
        let stale = dir.path().join(".staging-thing-abc");
        fs::create_dir_all(stale.join("deep")).unwrap();
        let other = dir.path().join(".staging-other-abc");
        fs::create_dir(&other).unwrap();
        let made = cache
            .ensure::<CacheError>("thing", &key_of(&[]), |_| Ok(()))
            .unwrap();
        assert!(made.is_dir());
        assert!(!stale.exists());
        assert!(other.exists(), "another artifact's build may be running");
    }
}
