//! Opening what should be an ordinary file: a pipe, a device or a folder in its place is refused, not waited for.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file to read.
pub(crate) fn open(path: &Path) -> Result<File> {
    // Else opening a pipe would wait for its writer; a regular file does not care.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    match (found.is_file(), found.is_dir()) {
        (true, _) => Ok(file),
        // A kind of its own: errors say more about it.
        (_, true) => Err(Error::new(ErrorKind::IsADirectory, "it is a folder, not a regular file")),
        _ => Err(Error::new(ErrorKind::InvalidInput, "it is not a regular file, and one is needed")),
    }
}

/// Its bytes.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Its text.
pub(crate) fn read_to_string(path: &Path) -> Result<String> {
    let mut text = String::new();
    open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    #[test]
    fn pipes_devices_and_folders_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        std::fs::write(at("file"), "text").unwrap();
        for path in [at("pipe"), dir.path().to_path_buf(), "/dev/zero".into()] {
            let e = super::read(&path).unwrap_err().to_string();
            assert!(e.contains("not a regular file"), "{}: {e}", path.display());
        }
        assert_eq!(super::read_to_string(&at("file")).unwrap(), "text");
        assert_eq!(super::read(&at("none")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    }
}
