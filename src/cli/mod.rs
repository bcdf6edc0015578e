//! The commands of the `varft` binary, one file each.
//!
//! A command prints what it made on standard output, progress on standard error, and an error as one message that says
//! what to do. Exit status: 0, or 1 after an error, or 2 for a command line that cannot be read.

/// `println!`, except that a reader who has gone (`varft ... | head`) ends neither the work nor, with a panic, the process.
macro_rules! say {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($what)*);
    }};
}

mod chat;
mod device;
mod doctor;
mod dry;
mod eval;
mod fit;
mod init;
mod inspect;
mod memory;
mod quickstart;
mod rate;
mod records;
mod report;
mod rollout;
mod session;
mod setup;
mod sft;
mod train;

use crate::{Error, Result};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "varft",
    version,
    about = "Fine-tunes Qwen2.5-VL into an agent that uses tools, and runs it",
    after_help = "Examples:\n  varft quickstart              the main job on a tiny model, in minutes\n  varft doctor                  is this machine ready?\n  varft init tiny models/tiny   a small random model\n  \
                  varft report runs/mine        one page of a run, to open in a browser\n\nEach command explains itself: varft COMMAND --help"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Quickstart(quickstart::Args),
    Init(init::Args),
    Sft(sft::Args),
    Train(train::Args),
    Rollout(rollout::Args),
    Eval(eval::Args),
    Chat(chat::Args),
    Inspect(inspect::Args),
    Report(report::Args),
    Doctor(doctor::Args),
}

/// Reads `--threads`, within the bounds of `run.threads`: each costs memory, and the system has only so many.
fn threads(text: &str) -> std::result::Result<usize, String> {
    let within = text.parse().ok().filter(|n| *n <= 1024);
    within.ok_or_else(|| "a whole number up to 1024 is needed (0 for all cores)".into())
}

/// Checks that a model's folder is there at all, before one of its files is missed.
fn check_model_folder(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let what = if dir.exists() { "this is a file, not a model's folder" } else { "there is no such folder" };
    Err(Error::input(
        format!("{}: {what}", dir.display()),
        "name a model's folder (config.json, model*.safetensors, tokenizer.json) or a run's; `varft init tiny DIR` makes a small \
         model",
    ))
}

/// Reads the command line, runs the command, prints its error if it has one.
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Quickstart(args) => quickstart::run(&args),
        Command::Init(args) => init::run(&args),
        Command::Sft(args) => sft::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Rollout(args) => rollout::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Nobody may be there to read it; the exit status tells too.
            let _ = writeln!(std::io::stderr(), "error: {e}");
            ExitCode::FAILURE
        }
    }
}
