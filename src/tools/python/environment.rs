//! The Python environment of the `python` tool: found, or made on first use.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::{Error, Result};

/// What is installed, pinned, so that the same code gives the same pixels everywhere.
pub const REQUIREMENTS: [&str; 3] = ["numpy==2.4.6", "opencv-python-headless==5.0.0.93", "pillow==13.0.0"];

/// The package whose photographs are used, and those of them that its documentation says are CC0 or in the public domain.
const PHOTOGRAPHS: (&str, [&str; 10]) = (
    "scikit-image==0.26.0",
    [
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "clock_motion.png",
        "coffee.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "rocket.jpg",
    ],
);

/// The oldest Python for which all of [`REQUIREMENTS`] exist.
const OLDEST: (u32, u32) = (3, 11);

/// Where to look for a Python that has the modules, and whether to make one.
#[derive(Clone, Debug)]
pub struct Search {
    /// An interpreter to use as it is. Default: the environment variable `VARFT_PYTHON`.
    pub python: Option<PathBuf>,
    /// An active virtual environment, used if it has the modules. Default: `VIRTUAL_ENV`.
    pub venv: Option<PathBuf>,
    /// The folder under which environments are made. Default: `$XDG_CACHE_HOME/varft`, or `~/.cache/varft`.
    pub cache: Option<PathBuf>,
    /// Whether to make an environment (about 100 MB of downloads) where none is found. Default: yes, unless
    /// `VARFT_NO_INSTALL` is set to something other than `0`.
    pub install: bool,
}

impl Default for Search {
    fn default() -> Self {
        let path = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        Search {
            python: path("VARFT_PYTHON"),
            venv: path("VIRTUAL_ENV"),
            cache: path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|h| h.join(".cache"))).map(|c| c.join("varft")),
            install: path("VARFT_NO_INSTALL").is_none_or(|v| v.as_os_str() == "0"),
        }
    }
}

impl Search {
    /// The interpreter of the environment: `python` as given, else the active `venv` if it has the modules, else the one in the
    /// cache, which is made if it is not there yet. Making it is safe against other processes that do the same and against being
    /// killed: it happens in a temporary folder under a lock, and a rename ends it.
    ///
    /// # Errors
    /// [`Error::Input`] saying what to install where there is none and none may or can be made; [`Error::Io`] on the cache folder.
    pub fn find(&self) -> Result<PathBuf> {
        if let Some(python) = &self.python {
            return match python.is_file() {
                true => Ok(python.clone()),
                false => Err(Error::input(
                    format!("{}: there is no such Python interpreter", python.display()),
                    format!(
                        "set tools.python.interpreter or VARFT_PYTHON, whichever names it, to one that has {}, or unset it",
                        REQUIREMENTS.join(" ")
                    ),
                )),
            };
        }
        if let Some(python) = self.venv.as_deref().filter(|v| has_modules(v)).map(interpreter) {
            return Ok(python);
        }
        let cache = self.cache()?;
        let folder = cache.join(format!("python-{}", &blake3::hash(REQUIREMENTS.join(" ").as_bytes()).to_hex()[..12]));
        let python = interpreter(&folder);
        if folder.is_dir() {
            return Ok(python);
        }
        if !self.install {
            return Err(Error::input(
                "no Python with numpy, OpenCV and Pillow was found, and making one is turned off (VARFT_NO_INSTALL)",
                format!(
                    "run `python3 -m venv DIR && DIR/bin/pip install {}` and set VARFT_PYTHON=DIR/bin/python, or unset VARFT_NO_INSTALL",
                    REQUIREMENTS.join(" ")
                ),
            ));
        }
        make(&folder, "making the python tool's environment (once)", install)?;
        Ok(python)
    }

    /// A folder of photographs under free licences, from a package; downloaded on first use, under the same rules.
    ///
    /// # Errors
    /// Those of [`Search::find`].
    pub fn photographs(&self) -> Result<PathBuf> {
        let (package, names) = PHOTOGRAPHS;
        let folder = self.cache()?.join(format!("photographs-{package}"));
        if folder.is_dir() {
            return Ok(folder);
        }
        if !self.install {
            return Err(Error::input(
                format!(
                    "{}: there are no photographs, and downloading is turned off (VARFT_NO_INSTALL)",
                    folder.display()
                ),
                "unset VARFT_NO_INSTALL, or go without photographs",
            ));
        }
        let python = self.find()?;
        make(&folder, &format!("downloading the photographs of {package} (once)"), |part, bar| {
            let unpacked = part.join("package");
            let mut pip = Command::new(python);
            pip.args(PIP).arg("--no-deps").arg("--target").arg(&unpacked).arg(package);
            step(bar, &mut pip, "check the network and pip's settings (proxy, index), or go without photographs")?;
            for name in names {
                let (from, to) = (unpacked.join("skimage/data").join(name), part.join(name));
                std::fs::rename(&from, &to).map_err(|e| Error::io("take a photograph from", from, e))?;
            }
            std::fs::remove_dir_all(&unpacked).map_err(|e| Error::io("remove", unpacked, e))
        })?;
        Ok(folder)
    }

    fn cache(&self) -> Result<&Path> {
        self.cache.as_deref().ok_or_else(|| {
            Error::input(
                "no folder for the python tool's environment: neither HOME nor XDG_CACHE_HOME is set",
                format!("set one of them, or VARFT_PYTHON to an interpreter that has {}", REQUIREMENTS.join(" ")),
            )
        })
    }
}

const PIP: [&str; 6] =
    ["-m", "pip", "install", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off"];

/// A new environment with all of [`REQUIREMENTS`].
fn install(part: &Path, bar: &ProgressBar) -> Result<()> {
    let base = base_python()?;
    bar.set_message("python3 -m venv");
    let hint = "install Python's venv module (Debian, Ubuntu: apt install python3-venv), or set VARFT_PYTHON";
    step(bar, Command::new(base).args(["-m", "venv"]).arg(part), hint)?;
    let hint = "check the network and pip's settings (proxy, index), or install them yourself and set VARFT_PYTHON";
    step(bar, Command::new(interpreter(part)).args(PIP).args(REQUIREMENTS), hint)
}

/// Makes a folder whole or not at all: in a temporary one beside it, under a lock, ended by a rename. So it is safe against other
/// processes that make the same one, and against being killed.
fn make(folder: &Path, what: &str, fill: impl FnOnce(&Path, &ProgressBar) -> Result<()>) -> Result<()> {
    let parent = folder.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
    let bar = ProgressBar::new_spinner();
    let style = "{spinner} {msg} [{elapsed}]";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| Error::internal(e.to_string()))?);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar.set_message("waiting for another process that makes the same folder");
    let beside = |suffix: &str| {
        let mut name = folder.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let _lock = lock(&beside(".lock"))?;
    if folder.exists() {
        bar.finish_and_clear();
        return Ok(()); // the other process made it
    }
    // Under the lock nobody else works on it, so what lies here was left by one that was killed.
    let part = beside(".part");
    match std::fs::remove_dir_all(&part) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", part, e)),
        _ => {}
    }
    std::fs::create_dir(&part).map_err(|e| Error::io("create", &part, e))?;
    // Said on standard error in words as well: a spinner is only seen on a terminal.
    note!("{what}, in {}", folder.display());
    fill(&part, &bar)?;
    std::fs::rename(&part, folder).map_err(|e| Error::io("rename what was made to", folder, e))?;
    bar.finish_and_clear();
    Ok(())
}

fn interpreter(folder: &Path) -> PathBuf {
    folder.join("bin/python")
}

/// Looks at files only: importing would take a third of a second at every start.
fn has_modules(venv: &Path) -> bool {
    let Ok(versions) = std::fs::read_dir(venv.join("lib")) else { return false };
    versions.flatten().any(|v| {
        let packages = v.path().join("site-packages");
        ["numpy", "cv2", "PIL"].iter().all(|m| packages.join(m).is_dir())
    }) && interpreter(venv).exists()
}

/// The first of `python3` and its numbered names on PATH that is new enough.
fn base_python() -> Result<PathBuf> {
    let mut seen = Vec::new();
    for name in ["python3", "python3.14", "python3.13", "python3.12", "python3.11"] {
        let show = "import sys; print(*sys.version_info[:2])";
        let Ok(out) = Command::new(name).args(["-c", show]).stderr(Stdio::null()).output() else { continue };
        let text = String::from_utf8_lossy(&out.stdout);
        let mut parts = text.split_whitespace().filter_map(|p| p.parse::<u32>().ok());
        let (Some(major), Some(minor)) = (parts.next(), parts.next()) else { continue };
        if (major, minor) >= OLDEST {
            return Ok(name.into());
        }
        seen.push(format!("{name} is {major}.{minor}"));
    }
    let found = if seen.is_empty() { "there is no python3 on PATH".to_string() } else { seen.join(", ") };
    Err(Error::input(
        format!("the python tool needs Python {}.{} or newer: {found}", OLDEST.0, OLDEST.1),
        format!("install one, or set VARFT_PYTHON to an interpreter that has {}", REQUIREMENTS.join(" ")),
    ))
}

/// Holds the lock until it is dropped or this process ends, however it ends.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(|e| Error::io("create", path, e))?;
    // SAFETY: flock takes no pointers, and the descriptor is open.
    while unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
        let e = std::io::Error::last_os_error();
        if e.kind() != std::io::ErrorKind::Interrupted {
            return Err(Error::io("lock", path, e));
        }
    }
    Ok(file)
}

/// Runs a command, shows its last line, and keeps the end of what it said for the error.
fn step(bar: &ProgressBar, command: &mut Command, hint: &str) -> Result<()> {
    let shown = format!("{command:?}").replace('"', "");
    let fail = |what: String| Error::input(format!("`{shown}` {what}"), hint);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| fail(format!("could not be started: {e}")))?;
    let stderr = child.stderr.take();
    let errors = std::thread::Builder::new().spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.map(|mut s| s.read_to_end(&mut text));
        text
    });
    let errors = match errors {
        Ok(thread) => thread,
        Err(e) => {
            // Nobody would read what it says, and it could wait for that for ever.
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::no_thread("the thread that reads what a command says", e));
        }
    };
    let mut last = VecDeque::new();
    for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(|out| out.lines()).map_while(|l| l.ok()) {
        bar.set_message(line.chars().take(90).collect::<String>());
        last.push_back(line);
        if last.len() > 5 {
            last.pop_front();
        }
    }
    let status = child.wait().map_err(|e| fail(format!("could not be waited for: {e}")))?;
    if status.success() {
        return Ok(());
    }
    let errors = errors.join().unwrap_or_default();
    let said = crate::tools::clean(&errors);
    let said: Vec<&str> = said.lines().rev().take(8).collect();
    let said = said.into_iter().rev().map(str::to_owned);
    Err(fail(format!("failed ({status}):\n{}", last.into_iter().chain(said).collect::<Vec<_>>().join("\n"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nowhere() -> Search {
        Search { python: None, venv: None, cache: None, install: false }
    }

    #[test]
    fn what_is_named_must_exist() {
        let e = Search { python: Some("/no/such/python".into()), ..nowhere() }.find().unwrap_err().to_string();
        assert!(
            e.contains("/no/such/python")
                && e.contains("tools.python.interpreter or VARFT_PYTHON")
                && e.contains("numpy=="),
            "{e}"
        );
    }

    #[test]
    fn making_can_be_turned_off() {
        let dir = tempfile::tempdir().unwrap();
        let e = Search { cache: Some(dir.path().into()), ..nowhere() }.find().unwrap_err().to_string();
        assert!(e.contains("VARFT_NO_INSTALL") && e.contains("pip install numpy=="), "{e}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is made");
        let e = nowhere().find().unwrap_err().to_string();
        assert!(e.contains("HOME"), "{e}");
    }

    #[test]
    fn an_active_environment_counts_only_with_the_modules() {
        let venv = tempfile::tempdir().unwrap();
        let packages = venv.path().join("lib/python3.11/site-packages");
        std::fs::create_dir_all(venv.path().join("bin")).unwrap();
        std::fs::write(interpreter(venv.path()), "").unwrap();
        for module in ["numpy", "cv2"] {
            std::fs::create_dir_all(packages.join(module)).unwrap();
        }
        let search = Search { venv: Some(venv.path().into()), ..nowhere() };
        assert!(search.find().is_err());
        std::fs::create_dir_all(packages.join("PIL")).unwrap();
        assert_eq!(search.find().unwrap(), interpreter(venv.path()));
    }

    #[test]
    fn a_folder_is_made_once_however_many_want_it() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("made-1.0");
        let made = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let fill = |part: &Path, _: &ProgressBar| {
                        made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(30));
                        std::fs::write(part.join("file"), "whole").map_err(|e| Error::io("write", part, e))
                    };
                    make(&folder, "making it", fill).unwrap();
                    assert_eq!(std::fs::read_to_string(folder.join("file")).unwrap(), "whole");
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn what_a_killed_or_failed_attempt_left_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("made-1.0");
        let part = dir.path().join("made-1.0.part");
        std::fs::create_dir(&part).unwrap();
        std::fs::write(part.join("half"), "").unwrap();
        assert!(make(&folder, "making it", |_, _| Err(Error::internal("fails"))).is_err());
        assert!(!folder.exists());
        make(&folder, "making it", |_, _| Ok(())).unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "nothing half-made is in it");
        assert!(!part.exists());
    }

    #[test]
    fn a_failing_step_shows_what_the_command_said() {
        let bar = ProgressBar::hidden();
        let e = step(&bar, Command::new("sh").args(["-c", "echo one; echo two >&2; exit 3"]), "the mend").unwrap_err();
        let e = e.to_string();
        assert!(e.contains("exit status: 3") && e.contains("one\ntwo") && e.contains("the mend"), "{e}");
        step(&bar, Command::new("sh").args(["-c", "exit 0"]), "").unwrap();
    }
}
