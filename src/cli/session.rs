//! The folder of a run, and one session of work on it: begun anew or gone on with, never two at once.

use super::device::{DeviceArgs, settle};
use super::setup::Loaded;
use crate::model::write_atomically;
use crate::train::checkpoint::{Checkpoint, Checkpoints, TrainState};
use crate::train::config::Place;
use crate::train::learner::Learner;
use crate::train::run::{Keeper, OPTIMIZER_FILE};
use crate::train::schedule::Decay;
use crate::train::{RunConfig, grpo::Finished};
use crate::{Error, Result};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where a run is described, for the commands that train.
#[derive(clap::Args)]
pub(super) struct RunArgs {
    /// The run file (TOML), or the folder of a run
    #[arg(value_name = "RUN")]
    pub file: Option<PathBuf>,
    /// Sets one key of the run file; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Goes on from the run's newest complete checkpoint
    #[arg(long)]
    pub resume: bool,
    /// Reads the data, says what the run would compute, hold in memory and take, and ends; writes nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

impl RunArgs {
    /// The configuration that the command line describes, on a device that is settled.
    ///
    /// # Errors
    /// As [`RunConfig::read`] and [`model_folder`].
    pub fn config(&self) -> Result<RunConfig> {
        let mut config = self.described()?;
        let file = config.run_dir().join(CONFIG_FILE);
        if self.resume && config.run.device == Place::Auto && file.is_file() {
            config.run.device = RunConfig::read(Some(&file), &[])?.run.device;
        }
        // None at all is another error, which says how to name one.
        if !config.model.path.is_empty() {
            config.model.path = self.model(&config)?.display().to_string();
        }
        settle(&mut config);
        Ok(config)
    }

    /// The folder of the model that `config` names. A run that goes on keeps the one that it began with, also where that was
    /// another run's newest checkpoint and is not any more.
    fn model(&self, config: &RunConfig) -> Result<PathBuf> {
        let (named, file) = (Path::new(&config.model.path), config.run_dir().join(CONFIG_FILE));
        if self.resume && file.is_file() {
            let began_with = PathBuf::from(RunConfig::read(Some(&file), &[])?.model.path);
            if began_with.starts_with(named.join(CHECKPOINTS)) && began_with.is_dir() {
                return Ok(began_with);
            }
        }
        model_folder(named)
    }

    /// The configuration with the names of model and device as they were given.
    fn described(&self) -> Result<RunConfig> {
        let overrides = self.device.with(&self.overrides);
        match &self.file {
            Some(dir) if dir.is_dir() => {
                let mut config = RunConfig::read(Some(&config_file(dir)?), &overrides)?;
                // The folder may have been moved or renamed since.
                let full = dir.canonicalize().map_err(|e| Error::io("find", dir, e))?;
                if let (Some(parent), Some(name)) = (full.parent(), full.file_name()) {
                    config.run.dir = parent.display().to_string();
                    config.run.name = name.to_string_lossy().into_owned();
                }
                Ok(config)
            }
            file => RunConfig::read(file.as_deref(), &overrides),
        }
    }
}

/// The folder of a run's checkpoints.
const CHECKPOINTS: &str = "checkpoints";

/// The configuration, complete, in a run's folder.
pub(super) const CONFIG_FILE: &str = "config.toml";

/// The configuration of the run in `dir`.
///
/// # Errors
/// [`Error::Input`] where there is none.
pub(super) fn config_file(dir: &Path) -> Result<PathBuf> {
    let file = dir.join(CONFIG_FILE);
    if file.is_file() {
        return Ok(file);
    }
    Err(Error::input(
        format!("{}: there is no run in this folder", dir.display()),
        "name a run file, or the folder of a run (one that holds a config.toml)",
    ))
}

/// The configuration of the run in `dir`; its `model.path` is the newest checkpoint, or, where there is none yet, the model
/// that the run began with.
///
/// # Errors
/// As [`config_file`] and [`RunConfig::read`]; [`Error::Io`] where the checkpoints cannot be listed.
pub(super) fn trained(dir: &Path, overrides: &[String]) -> Result<RunConfig> {
    let mut config = RunConfig::read(Some(&config_file(dir)?), overrides)?;
    let (newest, notes) = Checkpoints::new(dir, 0).latest_listed()?;
    notes.iter().for_each(|n| note!("{n}"));
    if let Some(c) = newest {
        config.model.path = c.path.display().to_string();
    }
    Ok(config)
}

/// The folder of the model that `named` stands for: itself, or, where it is a run's, that of its newest checkpoint or, before
/// there is one, of the model that the run began with.
///
/// # Errors
/// As [`trained`], and where there is no model.
pub(super) fn model_folder(named: &Path) -> Result<PathBuf> {
    let (described, weights) = (named.join(CONFIG_FILE).is_file(), named.join(CHECKPOINTS));
    // Other trainers leave such a folder within a model's.
    if !described && weights.is_dir() && !named.join("config.json").is_file() {
        return Err(Error::input(
            format!("{}: the folder of a run, without its {CONFIG_FILE}", named.display()),
            format!("put that file back, or name one of the models in {}", weights.display()),
        ));
    }
    let folder = match described {
        true => PathBuf::from(trained(named, &[])?.model.path),
        false => named.to_path_buf(),
    };
    super::check_model_folder(&folder)?;
    Ok(folder)
}

/// A model of a run.
pub(super) struct OfRun {
    /// That of the run; its `model.path` is the model's folder.
    pub config: RunConfig,
    /// The command that trains it, `train` or `sft`, where it has a checkpoint.
    pub kind: Option<String>,
}

/// The run of the model that `dir` stands for as [`model_folder`] has it: the one whose folder `dir` is, or whose checkpoint. None
/// for a model of no run.
///
/// # Errors
/// As [`trained`], and where there is no model.
pub(super) fn run_of(dir: &Path) -> Result<Option<OfRun>> {
    let folder = model_folder(dir)?;
    let full = dir.canonicalize().map_err(|e| Error::io("find", dir, e))?;
    let checkpoints = full.parent().filter(|p| p.file_name().is_some_and(|n| n == CHECKPOINTS));
    let run = match dir.join(CONFIG_FILE).is_file() {
        true => Some(dir),
        false => checkpoints.and_then(Path::parent).filter(|run| run.join(CONFIG_FILE).is_file()),
    };
    let Some(run) = run else { return Ok(None) };
    let mut config = RunConfig::read(Some(&config_file(run)?), &[])?;
    config.model.path = folder.display().to_string();
    let kind = Checkpoints::new(run, 0).latest_listed()?.0.map(|c| c.state.kind);
    Ok(Some(OfRun { config, kind }))
}

/// A run's folder, held by this process.
pub(super) struct Session {
    /// The folder.
    pub dir: PathBuf,
    /// Where the run stands.
    pub state: TrainState,
    /// The command that goes on with the run.
    pub resume_command: String,
    checkpoint: Option<Checkpoint>,
    held: Held,
}

impl Session {
    /// Begins the run of `config` in its folder, or goes on with it. `kind`: the command, `train` or `sft`.
    ///
    /// # Errors
    /// [`Error::Input`] where a new run would overwrite one, where there is none to go on with, or where `config` would make
    /// another run of it, or its model is not there; [`Error::Io`] on the folder.
    pub fn open(config: &RunConfig, kind: &str, resume: bool) -> Result<Session> {
        let dir = config.run_dir();
        let resume_command = resume_command(kind, &dir);
        let config_file = dir.join(CONFIG_FILE);
        let there = config_file.exists() || dir.join("checkpoints").exists();
        if there && !resume {
            return Err(Error::input(
                format!("{}: there is a run in this folder already", dir.display()),
                format!("go on with it: {resume_command}; or give the new one another name: --set run.name=NAME"),
            ));
        }
        if !config_file.exists() && resume {
            return Err(Error::input(
                format!("{}: there is no run to go on with", dir.display()),
                "check run.dir and run.name, or begin the run without --resume",
            ));
        }
        let held = hold(&dir)?;
        let mut checkpoint = None;
        if resume {
            let earlier = RunConfig::read(Some(&config_file), &[])?;
            let conflicts = config.conflicts(&earlier)?;
            if !conflicts.is_empty() {
                return Err(Error::input(
                    format!("{}: this would be another run:\n  {}", dir.display(), conflicts.join("\n  ")),
                    "set these keys back, or begin a new run: another --set run.name=NAME, without --resume",
                ));
            }
            let (found, notes) = Checkpoints::new(&dir, 0).latest()?;
            notes.iter().for_each(|n| note!("{n}"));
            checkpoint = found;
        }
        if let Some(c) = checkpoint.as_ref().filter(|c| c.state.kind != kind) {
            return Err(Error::input(
                format!("{}: a run of `varft {}`, not of `varft {kind}`", dir.display(), c.state.kind),
                format!("go on with `{}`, or begin a new run", self::resume_command(&c.state.kind, &dir)),
            ));
        }
        let state = match &checkpoint {
            Some(c) => c.state.clone(),
            None => begun(kind),
        };
        if resume {
            note!("{}: {}", dir.display(), goes_on(config, &state, &resume_command));
        }
        Ok(Session { dir, state, resume_command, checkpoint, held })
    }

    /// Begins the run of `config` in its folder, which is `held` and where there is none.
    pub fn anew(config: &RunConfig, kind: &str, held: Held) -> Session {
        let dir = config.run_dir();
        Session { resume_command: resume_command(kind, &dir), dir, state: begun(kind), checkpoint: None, held }
    }

    /// The folder of the weights to go on from; none for those that the run begins with.
    pub fn weights(&self) -> Option<&Path> {
        self.checkpoint.as_ref().map(|c| c.path.as_path())
    }

    /// Gives `learner` the moments that belong to [`weights`](Self::weights).
    ///
    /// # Errors
    /// When the checkpoint's file cannot be read, or is of another model.
    pub fn restore(&self, learner: &mut Learner) -> Result<()> {
        let Some(c) = &self.checkpoint else { return Ok(()) };
        let (model, stream) = (learner.model().clone(), learner.stream().clone());
        learner.optimizer().load(&stream, &model.params, &c.path.join(OPTIMIZER_FILE))
    }

    /// Writes the resolved configuration and opens the run's records. Only from here on the folder is a run's: what went
    /// wrong before (a model that does not load) leaves a name that can be used again.
    ///
    /// # Errors
    /// [`Error::Io`] on the folder.
    pub fn keeper(&self, config: &RunConfig, loaded: &Loaded) -> Result<Keeper> {
        self.held.keep();
        let (text, file) = (config.to_toml()?, self.dir.join(CONFIG_FILE));
        write_atomically(&file, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("write", &file, e)))?;
        let (tokenizer, companions) = (loaded.folder.tokenizer.clone(), loaded.folder.companions.clone());
        Keeper::open(&self.dir, config, self.state.clone(), tokenizer, companions)
    }

    /// Ends the session: the report is written whatever happened, and what to do next is said.
    ///
    /// # Errors
    /// What `finished` holds, and that the run was stopped, which is not the same as being done.
    pub fn end(&self, finished: Result<Finished>) -> Result<()> {
        let report = crate::report::write(&self.dir);
        match finished {
            Ok(Finished::Complete) => {
                let newest = Checkpoints::new(&self.dir, 0).latest_listed()?.0;
                if let Some(c) = newest {
                    say!("model   {}", c.path.display());
                }
                say!("report  {}", report?.display());
                Ok(())
            }
            Ok(Finished::Stopped { at: 0 }) => Err(Error::Cancelled(format!(
                "stopped before the first step was complete: nothing is saved\n  to begin again: {}",
                self.resume_command
            ))),
            Ok(Finished::Stopped { at }) => Err(Error::Cancelled(format!(
                "stopped after step {at}, which is saved\n  to go on: {}",
                self.resume_command
            ))),
            // What is no longer there cannot be gone on with.
            Err(e) if !self.dir.join(CONFIG_FILE).exists() => Err(e),
            Err(e) => {
                // A folder that cannot be listed must not hide the error that ended the run.
                let saved = match Checkpoints::new(&self.dir, 0).latest_listed().ok().and_then(|(newest, _)| newest) {
                    Some(c) => format!("the run is saved as it was after step {}; to go on", c.state.step),
                    None => "no step of the run is saved; to begin again".to_owned(),
                };
                note!("{saved}: {}", self.resume_command);
                Err(e)
            }
        }
    }
}

/// What is left of a run that is gone on with.
fn goes_on(config: &RunConfig, state: &TrainState, resume_command: &str) -> String {
    let (step, steps) = (state.step, config.optim.steps);
    if step < steps {
        return format!("going on after step {step} of {steps}");
    }
    match config.optim.schedule {
        Decay::Constant => {
            format!(
                "complete: all {steps} steps are taken; for more of them: {resume_command} --set optim.steps=NUMBER"
            )
        }
        // It has brought the learning rate to its end.
        _ => format!(
            "complete: all {steps} steps are taken, and optim.schedule ends with them; for more, begin another run with this one as \
             its model: --set model.path={} --set run.name=NAME",
            quoted(&config.run_dir())
        ),
    }
}

/// Where a run of the command `kind` begins.
fn begun(kind: &str) -> TrainState {
    TrainState { kind: kind.to_owned(), step: 0, updates: 0 }
}

fn resume_command(kind: &str, dir: &Path) -> String {
    format!("{} {kind} {} --resume", super::program(), quoted(dir))
}

/// A path as a POSIX shell reads it.
pub(super) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The file whose lock holds a run's folder.
pub(super) const LOCK_FILE: &str = ".lock";

/// A run's folder that no other process works on. Until it is [kept](Held::keep) it leaves as little as there was: what could not
/// begin drops it, and with it its lock and the folders that were made for it.
#[derive(Debug)]
pub(super) struct Held {
    dir: PathBuf,
    /// Its lock, held as long as it is open.
    _lock: File,
    /// Folders that were not there, the innermost first.
    made: Vec<PathBuf>,
    kept: Cell<bool>,
}

impl Held {
    /// From here on there is something in the folder.
    pub fn keep(&self) {
        self.kept.set(true);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.kept.get() {
            // While the lock is held, which nobody else's can be. What is not empty stays.
            let _ = std::fs::remove_file(self.dir.join(LOCK_FILE));
            let _ = self.made.iter().try_for_each(std::fs::remove_dir);
        }
    }
}

/// Takes the folder for this process, and makes it where there is none. The system lets go of it when the process ends,
/// however it ends.
///
/// # Errors
/// [`Error::Input`] where another process has it, [`Error::Io`] on the folder.
pub(super) fn hold(dir: &Path) -> Result<Held> {
    let missing = |d: &&Path| !d.as_os_str().is_empty() && !d.exists();
    let made = dir.ancestors().take_while(missing).map(Path::to_path_buf).collect();
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create the run's folder", dir, e))?;
    let path = dir.join(LOCK_FILE);
    let file = File::create(&path).map_err(|e| Error::io("write", &path, e))?;
    // SAFETY: the descriptor is open.
    let locked = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0;
    let id = |m: std::fs::Metadata| (m.dev(), m.ino());
    // Who dropped it meanwhile has removed the file that was opened here.
    let there = || file.metadata().map(id).ok() == path.metadata().map(id).ok();
    if !locked || !there() {
        return Err(Error::input(
            format!("{}: another process is at work on this run", dir.display()),
            "wait until it has ended, or end it",
        ));
    }
    Ok(Held { dir: dir.to_path_buf(), _lock: file, made, kept: Cell::new(false) })
}

/// A flag that Ctrl-C (or a request to terminate) raises; the second time, the process ends at once.
///
/// # Errors
/// When the system refuses the handler.
pub(super) fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let raised = stop.clone();
    ctrlc::set_handler(move || {
        if raised.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        note!("\nstopping as soon as that can be done (again to end at once)");
    })
    .map_err(|e| Error::internal(format!("cannot watch for Ctrl-C: {e}")))?;
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_complete_says_how_to_have_more_of_it() {
        let mut config = RunConfig::default();
        let at = |step| TrainState { step, ..begun("train") };
        let told = |config: &RunConfig, step| goes_on(config, &at(step), "varft train runs/run --resume");
        let steps = config.optim.steps;
        assert_eq!(told(&config, steps - 1), format!("going on after step {} of {steps}", steps - 1));
        let constant = told(&config, steps);
        assert!(
            constant.contains("complete") && constant.contains("runs/run --resume --set optim.steps="),
            "{constant}"
        );
        config.optim.schedule = Decay::Linear;
        let linear = told(&config, steps);
        assert!(linear.contains("complete") && linear.contains("--set model.path=runs/run"), "{linear}");
    }

    #[test]
    fn a_shell_reads_a_quoted_path_as_it_is() {
        for path in ["runs/mine-2.1", "a b", "it's", "", "$HOME/~", "-x;y", "größe", "a\nb"] {
            let echo = format!("printf %s {}", quoted(Path::new(path)));
            let out = std::process::Command::new("sh").args(["-c", &echo]).output().unwrap();
            assert_eq!(String::from_utf8(out.stdout).unwrap(), path);
        }
        assert_eq!(quoted(Path::new("runs/mine-2.1")), "runs/mine-2.1");
    }
}
