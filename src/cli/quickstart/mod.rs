//! The main job on an embedded default: a tiny model that can read and keeps the format, but repairs images at random, learns
//! by GRPO which repair an image needs.

mod warm;

use super::session::{Session, stop_on_signal};
use super::setup::Loaded;
use crate::model::write_atomically;
use crate::report::{Record, read_metrics};
use crate::train::RunConfig;
use crate::train::grpo::{self, Finished};
use crate::train::learner::Learner;
use crate::train::run::{Scores, evaluate};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What makes it short.
const SMOKE: [&str; 5] =
    ["optim.steps=3", "optim.warmup_steps=1", "rollout.prompts=4", "rollout.group_size=4", "task.eval_items=24"];

/// Marks a folder as one that quickstart made and may replace.
const MARK: &str = ".quickstart";

/// The run file of the quickstart.
const RUN: &str = include_str!("run.toml");

/// Run the main job on a tiny model: measure, train by GRPO with real tools, measure again, show
#[derive(clap::Args)]
#[command(after_help = "Example:\n  varft quickstart\n  varft quickstart --seed 1 --out runs/second\n\n\
                        It takes a tiny Qwen2.5-VL that ships with this program, asks it 300 questions about damaged images, trains it \
                        while it repairs such images with real Python/OpenCV, asks again, and asks once more with the repaired images \
                        withheld. Everything lies in the run's folder; open report.html there.\n\n\
                        The same by hand: varft train RUN/config.toml --set run.name=mine")]
pub(super) struct Args {
    /// The run's folder; what an earlier quickstart wrote there is replaced
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    out: PathBuf,
    /// Decides what is sampled and the order of the questions; the same as --set run.seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A shortened one, to see that everything works: it learns next to nothing
    #[arg(long)]
    smoke: bool,
    /// Sets one key of the run file; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Makes the tiny model anew by supervised training, and writes it to this folder; nothing else
    #[arg(long, value_name = "DIR")]
    remake_warm_start: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    // What the user sets comes last, and so holds.
    let mut overrides = vec![format!("run.seed={}", args.seed)];
    if args.smoke {
        overrides.extend(SMOKE.map(String::from));
    }
    overrides.extend(args.overrides.iter().cloned());
    let mut config = RunConfig::read_text(RUN, "the quickstart's run file", &overrides)?;
    if config.log.eval_every == 0 {
        // Before and after is what this command is about.
        config.log.eval_every = config.optim.steps.max(1);
    }
    if let Some(dir) = &args.remake_warm_start {
        return warm::remake(&config, dir);
    }
    let out = std::path::absolute(&args.out).map_err(|e| Error::io("find", &args.out, e))?;
    let (Some(parent), Some(name)) = (out.parent(), out.file_name()) else {
        return Err(Error::input(format!("{}: not a folder's name", args.out.display()), "give --out another name"));
    };
    config.run.dir = parent.display().to_string();
    config.run.name = name.to_string_lossy().into_owned();
    let model = out.join("warm-start");
    config.model.path = model.display().to_string();
    config.check()?;
    clear(&out)?;
    warm::unpack(&model)?;
    let session = Session::open(&config, "train", false)?;
    let mark = out.join(MARK);
    write_atomically(&mark, |f| f.write_all(b"made by varft quickstart\n").map_err(|e| Error::io("write", &mark, e)))?;

    let started = Instant::now();
    let stop = stop_on_signal()?;
    let loaded = Loaded::new(&config, None)?;
    let setup = loaded.setup(&config, &stop)?;
    say!(
        "a Qwen2.5-VL of {:.1} M parameters, {} held-out questions, {} steps of {} x {} episodes",
        loaded.model.params.count() as f64 / 1e6,
        setup.eval.len(),
        config.optim.steps,
        config.rollout.prompts,
        config.rollout.group_size
    );
    let reference = loaded.reference(&config)?;
    let withheld = || -> Result<Scores> {
        let mut rollouts = setup.held_out(&config);
        rollouts.options.withhold_images = true;
        Ok(evaluate(&rollouts, &setup.eval, config.run.seed, |_, _| ())?.complete()?.scores)
    };
    let blind_before = withheld()?;
    let mut learner = Learner::new(loaded.model.clone(), &config.optim, setup.engine.forbidden());
    let mut keeper = session.keeper(&config, &loaded)?;
    let finished = grpo::train(&config, &setup, &mut learner, reference.as_ref(), &mut keeper);
    drop(keeper);
    if !matches!(finished, Ok(Finished::Complete)) {
        return session.end(finished);
    }
    let blind_after = withheld()?;
    let report = crate::report::write(&out)?;
    say!(
        "\n| {} held-out questions | F1 | exact match | format | F1 with the tool's images withheld |",
        setup.eval.len()
    );
    say!("|---|---|---|---|---|");
    let measured: Vec<Record> =
        read_metrics(&out)?.into_iter().filter(|r| r.values.iter().any(|(name, _)| name == "eval/f1")).collect();
    for (name, record, blind) in [("before", measured.first(), &blind_before), ("after", measured.last(), &blind_after)]
    {
        let percent = |figure: &str| {
            let value = record.and_then(|r| r.values.iter().find(|(name, _)| name == figure)).map_or(f64::NAN, |v| v.1);
            format!("{:.1}%", 100.0 * value)
        };
        say!(
            "| {name} | {} | {} | {} | {:.1}% |",
            percent("eval/f1"),
            percent("eval/em"),
            percent("eval/format"),
            100.0 * blind.f1
        );
    }
    say!("\nin {:.0} s\nreport      {}", started.elapsed().as_secs_f64(), report.display());
    say!("talk to it  varft chat {}", out.join("checkpoints").join(format!("step-{}", config.optim.steps)).display());
    Ok(())
}

/// Removes what an earlier quickstart left in `dir`, and nothing that is not one.
fn clear(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let failed = |e| Error::io("replace the earlier run in", dir, e);
    let empty = dir.read_dir().map_err(failed)?.next().is_none();
    if !empty && !dir.join(MARK).is_file() {
        return Err(Error::input(
            format!("{}: this folder holds something that is no quickstart", dir.display()),
            "give --out another folder",
        ));
    }
    std::fs::remove_dir_all(dir).map_err(failed)
}
