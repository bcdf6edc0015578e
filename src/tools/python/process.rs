//! The warm process seen from outside: starting it, handing it calls, noticing its death.

use std::io::Read;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sys;

const PROGRAM: &str = include_str!("zygote.py");

/// How long importing everything may take; on an idle machine it is half a second.
const START: Duration = Duration::from_secs(120);
/// So many deaths without a successful call in between, and calls fail at once for a while instead of starting it again.
const DEATHS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(10);

/// One warm process, started at need and again when it has died.
pub(super) struct Zygote {
    python: PathBuf,
    /// Its own folder; calls get theirs beneath it.
    folder: PathBuf,
    state: Mutex<State>,
    /// Calls under way, for choosing the least busy of several processes.
    pub(super) in_flight: AtomicUsize,
}

#[derive(Default)]
struct State {
    process: Option<Process>,
    /// Counts starts; tells a report of an old process's death from one of the present.
    generation: u64,
    deaths: u32,
    last_death: Option<(Instant, String)>,
    versions: Option<super::Versions>,
}

struct Process {
    child: Child,
    control: OwnedFd,
}

impl Zygote {
    pub(super) fn new(python: PathBuf, folder: PathBuf) -> Self {
        Zygote { python, folder, state: Mutex::default(), in_flight: AtomicUsize::new(0) }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if one did, the state is still a process or none.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts it if it does not run, and says what it has imported.
    pub(super) fn ensure(&self) -> Result<super::Versions, String> {
        let mut state = self.state();
        self.start(&mut state)?;
        state.versions.clone().ok_or_else(|| "the warm process did not say what it imported".into())
    }

    /// Hands over a call by its descriptors; the result names the process that has it, for [`Zygote::died`].
    pub(super) fn submit(&self, fds: [BorrowedFd<'_>; 5]) -> Result<u64, String> {
        let mut state = self.state();
        for attempt in 0.. {
            self.start(&mut state)?;
            let Some(process) = &state.process else { break };
            match sys::send_fds(&process.control, b"call", &fds) {
                Ok(()) => break,
                Err(e) if attempt == 1 => return Err(format!("a call could not be handed to the warm process: {e}")),
                Err(e) => self.bury(&mut state, format!("its control socket broke: {e}")),
            }
        }
        Ok(state.generation)
    }

    /// To be called when the process `generation` closed a call without an answer or does not react.
    pub(super) fn died(&self, generation: u64, how: &str) {
        let mut state = self.state();
        if state.generation == generation && state.process.is_some() {
            self.bury(&mut state, how.to_string());
        }
    }

    /// To be called when a call has been answered.
    pub(super) fn worked(&self) {
        self.state().deaths = 0;
    }

    /// The process id, where it runs.
    pub(super) fn pid(&self) -> Option<u32> {
        self.state().process.as_ref().map(|p| p.child.id())
    }

    fn bury(&self, state: &mut State, how: String) {
        if let Some(mut process) = state.process.take() {
            let _ = process.child.kill();
            let status = process.child.wait();
            let said = process.last_words();
            let how = format!("{how}{}", status.map(|s| format!(" ({s})")).unwrap_or_default());
            state.deaths += 1;
            state.last_death = Some((Instant::now(), if said.is_empty() { how } else { format!("{how}: {said}") }));
        }
    }

    fn start(&self, state: &mut State) -> Result<(), String> {
        if let Some(process) = &mut state.process {
            match process.child.try_wait() {
                Ok(None) => return Ok(()),
                _ => self.bury(state, "it ended by itself".into()),
            }
        }
        match &state.last_death {
            Some((when, how)) if state.deaths >= DEATHS && when.elapsed() < PAUSE => {
                return Err(format!("the warm process died {} times in a row; the last time: {how}", state.deaths));
            }
            _ => {}
        }
        match self.spawn() {
            Ok((process, versions)) => {
                state.generation += 1;
                state.process = Some(process);
                state.versions = Some(versions);
                Ok(())
            }
            Err(what) => {
                state.deaths += 1;
                state.last_death = Some((Instant::now(), what.clone()));
                Err(format!("the warm process could not be started with {}: {what}", self.python.display()))
            }
        }
    }

    fn spawn(&self) -> Result<(Process, super::Versions), String> {
        std::fs::create_dir_all(&self.folder).map_err(|e| format!("cannot create {}: {e}", self.folder.display()))?;
        let (ours, theirs) = sys::socket_pair().map_err(|e| format!("socketpair: {e}"))?;
        let child = Command::new(&self.python)
            .args(["-s", "-B", "-c", PROGRAM])
            .current_dir(&self.folder)
            .env_clear()
            // One thread each; a fixed hash seed, so that the order of sets is the same from run to run.
            .envs([
                ("LANG", "C.UTF-8"),
                ("OPENBLAS_NUM_THREADS", "1"),
                ("OMP_NUM_THREADS", "1"),
                ("PYTHONHASHSEED", "0"),
            ])
            // A group of its own: Ctrl-C is for varft, which then ends or saves and may still need its tool.
            .process_group(0)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        let mut process = Process { child, control: ours };
        let mut buffer = [0; 4096];
        let what = match sys::receive_within(&process.control, &mut buffer, START) {
            Ok(0) => "it ended at once".to_string(),
            Ok(n) => match serde_json::from_slice::<Greeting>(&buffer[..n]) {
                Ok(Greeting::Ready(versions)) => return Ok((process, versions)),
                Ok(Greeting::Failed { error }) => {
                    format!("{error}; it needs {}", super::environment::REQUIREMENTS.join(" "))
                }
                Err(e) => format!("it greeted with something else: {e}"),
            },
            Err(e) if e.kind() == std::io::ErrorKind::TimedOut => format!("it was not ready after {START:?}"),
            Err(e) => e.to_string(),
        };
        let _ = process.child.kill();
        let _ = process.child.wait();
        let said = process.last_words();
        Err(if said.is_empty() { what } else { format!("{what}: {said}") })
    }
}

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Greeting {
    Failed { error: String },
    Ready(super::Versions),
}

impl Process {
    /// The end of what a dead process wrote to standard error. Calls have their own, so this is little.
    fn last_words(&mut self) -> String {
        let Some(stderr) = self.child.stderr.take() else { return String::new() };
        // A child that outlived it may still hold the pipe: take what is there and do not wait.
        let _ = sys::set_nonblocking(&stderr);
        let mut bytes = Vec::new();
        let _ = stderr.take(1 << 16).read_to_end(&mut bytes);
        let text = crate::tools::clean(&bytes);
        text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default().to_string()
    }
}

impl Drop for Zygote {
    /// Closing the control socket ends the process, which kills its calls and removes its folder; one that does not is killed.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(Process { mut child, control }) = state.process.take() {
            drop(control);
            let patience = Instant::now() + Duration::from_secs(2);
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(2));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        super::scratch::remove(&self.folder);
        debug_assert_eq!(self.in_flight.load(Ordering::Relaxed), 0, "calls borrow the pool, so none can be left");
    }
}
