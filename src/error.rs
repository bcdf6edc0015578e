use std::path::{Path, PathBuf};

/// Everything in this crate that can fail returns this.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error for a person: what happened, where (file, field, row), and what to do.
///
/// The variants exist for programs that act on the kind of a failure; the text is complete in itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: cannot {action}: {source}{}", path.display(), io_hint(source))]
    Io {
        /// What was being done, as a verb phrase: `read`, `write the checkpoint`.
        action: String,
        /// The file or folder.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// Something a person wrote (a file, a field, an argument) cannot be used as it is.
    #[error("{what}\n  to mend it: {mend}")]
    Input {
        /// What is wrong, naming the file and the field or row.
        what: String,
        /// What to change.
        mend: String,
    },
    /// A request does not fit what this machine or configuration offers (memory, context length).
    #[error("{what}\n  to mend it: {mend}")]
    Limit {
        /// What did not fit, with both figures.
        what: String,
        /// What to change.
        mend: String,
    },
    /// A tool's machinery failed (not the model's use of it): never to be scored as a wrong answer.
    #[error("the {tool} tool failed: {what}")]
    Tool {
        /// The tool's name.
        tool: String,
        /// What happened.
        what: String,
    },
    /// The work was cancelled by its owner (Ctrl-C, a dropped handle).
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// A broken promise inside this crate: please report it.
    #[error("internal error (please report it): {0}")]
    Internal(String),
}

/// What a panic said, if that was text.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it did not say why")
}

fn io_hint(e: &std::io::Error) -> &'static str {
    match e.kind() {
        std::io::ErrorKind::StorageFull => "; free some space on that disk and run the same command again",
        std::io::ErrorKind::NotFound => "; check the path",
        std::io::ErrorKind::NotADirectory => "; what it says is a folder on the way there is a file: check the path",
        std::io::ErrorKind::IsADirectory => "; name a file, not a folder",
        std::io::ErrorKind::InvalidFilename => "; choose a shorter name",
        std::io::ErrorKind::ReadOnlyFilesystem => "; choose a folder on a disk that can be written to",
        // Of what is read as text.
        std::io::ErrorKind::InvalidData => "; save it as UTF-8",
        std::io::ErrorKind::PermissionDenied => "; check who owns it and its permissions",
        std::io::ErrorKind::QuotaExceeded | std::io::ErrorKind::FileTooLarge => {
            "; make room under the limit on your files (quota, ulimit -f) and run the same command again"
        }
        _ => "",
    }
}

impl Error {
    /// An [`Error::Io`]; `action` is a verb phrase (`read`, `create`).
    pub fn io(action: impl Into<String>, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { action: action.into(), path: path.as_ref().to_path_buf(), source }
    }
    /// An [`Error::Input`]: what is wrong and where, and what to change.
    pub fn input(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Error::Input { what: what.into(), mend: mend.into() }
    }
    /// An [`Error::Limit`]: what did not fit, and what to change.
    pub fn limit(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Error::Limit { what: what.into(), mend: mend.into() }
    }
    /// The [`Error::Limit`] of a thread that the system refused; `what`: whose thread, as in `the engine's thread`.
    pub fn no_thread(what: &str, source: std::io::Error) -> Self {
        let mend = "free some memory, or raise the limit on this user's processes (ulimit -u)";
        Error::limit(format!("cannot start {what}: {source}"), mend)
    }
    /// The [`Error::Internal`] of a panic that was caught; `what`: what was going on.
    pub(crate) fn panicked(what: &str, panic: &(dyn std::any::Any + Send)) -> Self {
        Error::Internal(format!("{what} panicked: {}", panic_message(panic)))
    }
    /// An [`Error::Internal`].
    pub fn internal(what: impl Into<String>) -> Self {
        Error::Internal(what.into())
    }
}
