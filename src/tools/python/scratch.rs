//! Removal of folders that untrusted code has filled.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Removes `folder` and all in it as far as it can. The tree may be deeper than any path or stack allows, so subfolders are
/// first moved up beside each other; links are removed and never followed. Nothing else runs in there any more.
pub(super) fn remove(folder: &Path) {
    let mut open = vec![folder.to_path_buf()];
    let mut moved = 0u64;
    while let Some(here) = open.pop() {
        // A folder may have been made unreadable; if that cannot be undone, what is in it stays.
        let _ = std::fs::set_permissions(&here, std::fs::Permissions::from_mode(0o700));
        for entry in std::fs::read_dir(&here).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                moved += 1;
                let mut up = folder.as_os_str().to_owned();
                up.push(format!(".{moved}"));
                // Moving a folder changes its `..`, for which it must be writable.
                let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700));
                if std::fs::rename(&path, &up).is_ok() {
                    open.push(up.into());
                }
            } else {
                let _ = std::fs::remove_file(&path);
            }
        }
        let _ = std::fs::remove_dir(&here);
    }
}

#[cfg(test)]
mod tests {
    use super::remove;
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
}
