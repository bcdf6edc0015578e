//! The folder that `eval` and `rollout` fill: episodes with their images, figures, a report.

use super::device::{DeviceArgs, settle};
use super::session::{CONFIG_FILE, model_folder, quoted, trained};
use crate::model::write_atomically;
use crate::report::{MetricsLog, TrajectoryStore};
use crate::train::RunConfig;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Which model, and where results go.
#[derive(clap::Args)]
pub(super) struct ModelArgs {
    /// A run file (TOML), or the folder of a run, whose newest checkpoint is then the model
    #[arg(value_name = "RUN")]
    file: Option<PathBuf>,
    /// The model's folder [default: what the run says]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Sets one key of the run file; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

impl ModelArgs {
    /// The configuration that the command line describes, and after it `more` overrides; its `model.path` is the folder of the
    /// model to use, its device is settled.
    ///
    /// # Errors
    /// As [`RunConfig::read`]; and where the folder is not a run's, or the model's is not there.
    pub fn config(&self, more: &[String]) -> Result<RunConfig> {
        let overrides = self.device.with(&[&self.overrides[..], more].concat());
        let mut config = match &self.file {
            Some(dir) if dir.is_dir() => trained(dir, &overrides)?,
            file => RunConfig::read(file.as_deref(), &overrides)?,
        };
        if let Some(dir) = &self.model {
            config.model.path = dir.display().to_string();
        }
        // None at all is another error, which says how to name one.
        if !config.model.path.is_empty() {
            config.model.path = model_folder(Path::new(&config.model.path))?.display().to_string();
        }
        settle(&mut config);
        Ok(config)
    }
}

/// The error of a command whose episodes ended early with `e`: `done` of `all` are complete, which are the ones that
/// `what` says were saved.
pub(super) fn ended_early(e: Error, [done, all]: [usize; 2], what: &str) -> Error {
    match e {
        Error::Cancelled(_) => Error::Cancelled(format!("stopped: {done} of {all} {what}")),
        failure => {
            note!("ended early by a failure: {done} of {all} {what}");
            failure
        }
    }
}

/// The folder, and what writes into it.
pub(super) struct Records {
    pub dir: PathBuf,
    pub store: TrajectoryStore,
}

impl Records {
    /// That there is nothing in the folder that would be overwritten. `result`: the file by which it is known that there are
    /// results in it.
    ///
    /// # Errors
    /// [`Error::Input`] where there is.
    pub fn check(dir: &Path, result: &str) -> Result<()> {
        if dir.exists() && !dir.is_dir() {
            return Err(Error::input(
                format!("{}: this is a file, and a folder is to be made", dir.display()),
                "name another one with --out",
            ));
        }
        // What was killed early, or found the disk full, leaves files of nothing.
        let holds = |f: &&str| dir.join(f).metadata().is_ok_and(|m| m.len() > 0);
        if [result, "metrics.jsonl", CONFIG_FILE].iter().any(holds) {
            return Err(Error::input(
                format!("{}: there are results in this folder already", dir.display()),
                "name another one with --out, or remove it",
            ));
        }
        Ok(())
    }

    /// Makes the folder, which [`check`](Self::check) found free: when everything that is read has been.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be made.
    pub fn create(dir: &Path) -> Result<Records> {
        Ok(Records { dir: dir.to_path_buf(), store: TrajectoryStore::open(dir)? })
    }

    /// The failure `e` to write more than `result`, having said what there is.
    pub fn kept(&self, result: &Path, e: Error) -> Error {
        let dir = quoted(&self.dir);
        let result = result.display();
        note!(
            "{result} is kept; `varft report {dir}` shows what else was written; to run this again, name another --out"
        );
        e
    }

    /// Writes figures, the configuration and the report; returns the report's path.
    ///
    /// # Errors
    /// [`Error::Io`] when something cannot be written.
    pub fn finish(&self, config: &RunConfig, metrics: &[(&str, f64)]) -> Result<PathBuf> {
        MetricsLog::open(&self.dir, 0, false)?.log(0, metrics)?;
        let (text, file) = (config.to_toml()?, self.dir.join(CONFIG_FILE));
        write_atomically(&file, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("write", &file, e)))?;
        crate::report::write(&self.dir)
    }
}
