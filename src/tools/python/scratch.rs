//! Folders that untrusted code fills: how much is in them, and their removal.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// How long a call's slot waits for its folder to go before that is left to the background.
const AT_ONCE: Duration = Duration::from_millis(100);
/// Folders that may wait there. With more, slots wait: code that fills folders must not outrun their removal.
const WAITING: usize = 64;
/// How long the end of the pool waits for what is left.
const LAST: Duration = Duration::from_secs(10);

/// The removal of a folder and all in it as far as it can be done, a piece at a time. The tree may be deeper than any path
/// or stack allows, so subfolders are first moved up beside each other; links are removed and never followed. Nothing else
/// runs in there any more.
pub(super) struct Removal {
    folder: PathBuf,
    open: Vec<PathBuf>,
    moved: u64,
}

impl Removal {
    pub(super) fn new(folder: PathBuf) -> Self {
        Removal { open: vec![folder.clone()], folder, moved: 0 }
    }

    /// Goes on until `deadline` says stop; whether it is done.
    pub(super) fn go(&mut self, deadline: impl Fn() -> Option<Instant>) -> bool {
        while let Some(here) = self.open.pop() {
            // A folder may have been made unreadable; if that cannot be undone, what is in it stays.
            let _ = std::fs::set_permissions(&here, std::fs::Permissions::from_mode(0o700));
            for entry in std::fs::read_dir(&here).into_iter().flatten().flatten() {
                if deadline().is_some_and(|d| Instant::now() >= d) {
                    self.open.push(here);
                    return false;
                }
                let path = entry.path();
                if !entry.file_type().is_ok_and(|t| t.is_dir()) {
                    let _ = std::fs::remove_file(&path);
                } else if std::fs::remove_dir(&path).is_err() {
                    self.moved += 1;
                    let mut up = self.folder.as_os_str().to_owned();
                    up.push(format!(".{}", self.moved));
                    // Moving a folder changes its `..`, for which it must be writable.
                    let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700));
                    if std::fs::rename(&path, &up).is_ok() {
                        self.open.push(up.into());
                    }
                }
            }
            let _ = std::fs::remove_dir(&here);
        }
        true
    }
}

/// Removes a folder in at most [`LAST`].
pub(super) fn remove(folder: &Path) {
    let end = Instant::now() + LAST;
    Removal::new(folder.to_path_buf()).go(|| Some(end));
}

/// Removes in the background what takes long.
pub(super) struct Remover {
    queue: Option<SyncSender<Removal>>,
    thread: Option<JoinHandle<()>>,
    /// When the thread has to stop.
    end: Arc<Mutex<Option<Instant>>>,
}

impl Remover {
    pub(super) fn new() -> Result<Self> {
        let (queue, waiting) = sync_channel::<Removal>(WAITING);
        let end = Arc::<Mutex<Option<Instant>>>::default();
        let deadline = end.clone();
        let work = move || {
            for mut removal in waiting {
                removal.go(|| *deadline.lock().unwrap_or_else(PoisonError::into_inner));
            }
        };
        let thread = std::thread::Builder::new().name("varft-scratch".into()).spawn(work);
        let thread = thread.map_err(|e| Error::no_thread("a thread that removes the folders of calls", e))?;
        Ok(Remover { queue: Some(queue), thread: Some(thread), end })
    }

    /// Removes `folder`: at once if it is soon done, else in the background.
    pub(super) fn remove(&self, folder: PathBuf) {
        let (mut removal, soon) = (Removal::new(folder), Instant::now() + AT_ONCE);
        if let (false, Some(queue)) = (removal.go(|| Some(soon)), &self.queue) {
            // The thread ends only with the queue.
            let _ = queue.send(removal);
        }
    }

    /// Waits for what is under way, [`LAST`] at most.
    pub(super) fn finish(&mut self) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + LAST);
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Remover {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The bytes that files in `folder` take, or some number above `limit` as soon as it is clear that there are more. An entry
/// counts for 1 KiB at least: many empty ones fill a disk too.
pub(super) fn used(folder: &Path, limit: u64) -> u64 {
    let (mut open, mut sum) = (vec![folder.to_path_buf()], 0);
    while let Some(here) = open.pop() {
        for entry in std::fs::read_dir(&here).into_iter().flatten().flatten() {
            // Not that of what a link points to.
            let Ok(data) = entry.metadata() else { continue };
            sum += (data.blocks() * 512).max(1 << 10);
            if sum > limit {
                return sum;
            }
            if data.is_dir() {
                open.push(entry.path());
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::{Remover, remove, used};
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn deep_locked_and_linked_things_go_and_what_links_point_to_stays() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("keep"), "x").unwrap();
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("7");
        // Built from the inside out, as its path is longer than a path may be.
        fs::create_dir(&folder).unwrap();
        for _ in 0..300 {
            let next = root.path().join("next");
            fs::create_dir(&next).unwrap();
            fs::rename(&folder, next.join("d".repeat(30))).unwrap();
            fs::rename(&next, &folder).unwrap();
        }
        symlink(outside.path(), folder.join("link")).unwrap();
        fs::create_dir(folder.join("locked")).unwrap();
        fs::write(folder.join("locked/file"), "x").unwrap();
        fs::set_permissions(folder.join("locked"), fs::Permissions::from_mode(0o000)).unwrap();
        remove(&folder);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        assert!(outside.path().join("keep").exists());
    }

    #[test]
    fn a_long_removal_goes_on_in_the_background_and_is_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("7");
        for i in 0..100 {
            fs::create_dir_all(folder.join(format!("{i}/a/b"))).unwrap();
        }
        assert!(used(&folder, u64::MAX) >= 300 << 10);
        assert!(used(&folder, 5000) < 20_000, "it stops once there is too much");
        let mut remover = Remover::new().unwrap();
        let begun = std::time::Instant::now();
        remover.remove(folder.clone());
        let waited = begun.elapsed();
        remover.finish();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "{waited:?}");
    }
}
