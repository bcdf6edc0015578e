//! What a command computes on.

use crate::device::{Device, Injected, has_card, usable_card};
use crate::model::Config;
use crate::train::RunConfig;
use crate::train::config::{Place, Run};
use crate::{Error, Result};
use std::path::Path;

/// `--device`, for every command that runs a model.
#[derive(clap::Args)]
pub(super) struct DeviceArgs {
    /// What to compute on; the same as --set run.device. auto: a card, where there is one that can be used, else the processor
    #[arg(long, value_name = "DEVICE", value_parser = ["auto", "cpu", "cuda", "emulated"])]
    device: Option<String>,
}

impl DeviceArgs {
    /// `overrides`, with the device after them, so that it holds.
    pub fn with(&self, overrides: &[String]) -> Vec<String> {
        let device = self.device.iter().map(|d| format!("run.device={d}"));
        overrides.iter().cloned().chain(device).collect()
    }
}

/// Settles what `auto` is on this machine, for the model of `config`, and says so in a line.
pub(super) fn settle(config: &mut RunConfig) {
    if config.run.device != Place::Auto {
        return;
    }
    let card = usable_card(0).and_then(|card| {
        // A model that cannot be read is another error, which comes when it is.
        let model = Config::load(Path::new(&config.model.path)).ok();
        model.map_or(Ok(()), |m| m.check_heads())?;
        Ok(card.name)
    });
    config.run.device = if card.is_ok() { Place::Cuda } else { Place::Cpu };
    match card {
        Ok(name) => note!("device: {name} (cuda; the processor: --device cpu)"),
        Err(e) if has_card() => note!("device: the processor (cpu); the card is not used: {}", reason(&e)),
        Err(_) => note!("device: the processor (cpu)"),
    }
}

/// What an error says, without what would mend it.
pub(super) fn reason(e: &Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_owned()
}

/// The device that a run file names.
///
/// # Errors
/// As [`Device::cuda`] and [`Device::emulated`].
pub(super) fn open(run: &Run) -> Result<Device> {
    match run.device {
        Place::Cuda => Device::cuda(0),
        Place::Emulated => Device::emulated_failing(run.seed, 90, Injected::asked()?),
        // What it is here has been settled before.
        Place::Cpu | Place::Auto => Ok(Device::cpu(run.threads)),
    }
}
