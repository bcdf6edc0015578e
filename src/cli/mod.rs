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

/// Reads a whole number within `range`.
fn whole<T: TryFrom<u64>>(
    range: std::ops::RangeInclusive<u64>,
) -> impl Fn(&str) -> std::result::Result<T, String> + Clone + Send + Sync {
    move |text| {
        let within = text.parse().ok().filter(|n| range.contains(n)).and_then(|n| T::try_from(n).ok());
        within.ok_or_else(|| format!("a whole number from {} to {} is needed", range.start(), range.end()))
    }
}

/// Reads `--seed`.
fn seed(text: &str) -> std::result::Result<u64, String> {
    text.parse().map_err(|_| format!("a whole number from 0 to {} is needed", u64::MAX))
}

/// Reads a temperature.
fn temperature(text: &str) -> std::result::Result<f32, String> {
    let within = text.parse().ok().filter(|t: &f32| *t == 0.0 || (*t > 0.0 && t.is_finite() && t.recip().is_finite()));
    within.ok_or_else(|| "a number of at least 0 is needed (0 takes the likeliest token each time)".into())
}

/// Reads a probability that is not 0.
fn probability(text: &str) -> std::result::Result<f32, String> {
    let within = text.parse().ok().filter(|p: &f32| *p > 0.0 && *p <= 1.0);
    within.ok_or_else(|| "a number above 0 and at most 1 is needed".into())
}

/// Checks that `dir` is a model's folder at all, before one of its files is missed.
///
/// # Errors
/// [`Error::Input`] that says what it looks like instead.
fn check_model_folder(dir: &Path) -> Result<()> {
    if dir.join("config.json").is_file() {
        return Ok(());
    }
    let shown = dir.display();
    let (what, mend) = match dir.is_dir() {
        false if dir.exists() => (format!("{shown}: this is a file, not a model's folder"), A_MODEL.to_owned()),
        false => (format!("{shown}: there is no such folder"), A_MODEL.to_owned()),
        true => {
            let (looks, mend) = looks_like(dir);
            (format!("there is no model in {shown}: {looks}"), mend)
        }
    };
    Err(Error::input(what, mend))
}

/// What names a model.
const A_MODEL: &str = "name a model's folder (config.json, model*.safetensors, tokenizer.json) or a run's; `varft init tiny DIR` \
                       makes a small model";

/// What a folder without a model's `config.json` looks like, and what to name instead.
fn looks_like(dir: &Path) -> (String, String) {
    let mut names: Vec<_> = dir.read_dir().into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    names.sort();
    let with = |file: &str| names.iter().find(|n| dir.join(n).join(file).is_file()).map(|n| dir.join(n));
    let ends = |end: &str| names.iter().any(|n| n.to_string_lossy().ends_with(end));
    if let Some(run) = with(session::CONFIG_FILE) {
        return ("it looks like a folder of runs".into(), format!("name one of them, such as {}", run.display()));
    }
    if let Some(model) = with("config.json") {
        return ("it looks like a folder of models".into(), format!("name one of them, such as {}", model.display()));
    }
    if ends(".safetensors") {
        return (
            "it has weights, but no config.json".into(),
            "put the model's config.json and tokenizer.json beside them".into(),
        );
    }
    let looks = match names.first() {
        None => "the folder is empty".into(),
        Some(first) => format!("it has no config.json, but such as {}", first.to_string_lossy()),
    };
    (looks, A_MODEL.into())
}

/// This program as a shell finds it again: as it was called.
fn program() -> String {
    let called = std::env::args_os().next().filter(|name| !name.is_empty());
    session::quoted(Path::new(&called.unwrap_or_else(|| "varft".into())))
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
