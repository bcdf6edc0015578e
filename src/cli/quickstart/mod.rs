//! The main job on an embedded default: a tiny model that can read and keeps the format, but repairs images at random, learns
//! by GRPO which repair an image needs.

mod warm;

use super::device::{DeviceArgs, settle};
use super::session::{LOCK_FILE, Session, hold, quoted, stop_on_signal};
use super::setup::Folder;
use crate::report::read_metrics;
use crate::train::RunConfig;
use crate::train::grpo::{self, Finished};
use crate::train::room::Work;
use crate::train::run::{Scores, evaluate};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What makes it short.
const SMOKE: [&str; 5] =
    ["optim.steps=3", "optim.warmup_steps=0", "rollout.prompts=4", "rollout.group_size=4", "task.eval_items=24"];

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
    #[command(flatten)]
    device: DeviceArgs,
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
    if let Some(steps) = chosen_steps(&args.overrides) {
        // A person who asks for fewer steps need not know of the warm-up.
        let warmup = RunConfig::read_text(RUN, "the quickstart's run file", &[])?.optim.warmup_steps;
        overrides.push(format!("optim.warmup_steps={}", warmup.min(steps)));
    }
    overrides.extend(args.device.with(&args.overrides));
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
    // Looked at before the lock too, which would be one more file in a folder that is someone else's.
    check_replaceable(&out)?;
    let lock = hold(&out)?;
    clear(&out)?;
    // The mark comes first: what is cut short from here on can be replaced.
    let mark = out.join(MARK);
    std::fs::write(&mark, "made by varft quickstart\n").map_err(|e| Error::io("write", &mark, e))?;
    warm::unpack(&model)?;
    settle(&mut config);
    let session = Session::anew(&config, "train", lock);

    let started = Instant::now();
    let stop = stop_on_signal()?;
    let loaded = Folder::open(&config)?.load(&config, None, Work::Episodes)?;
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
    let mut learner = loaded.learner(&config, setup.engine.forbidden())?;
    let withheld = || -> Result<Scores> {
        let mut rollouts = setup.held_out(&config);
        rollouts.options.withhold_images = true;
        Ok(evaluate(&rollouts, &setup.eval, config.run.seed, |_, _| ())?.complete()?.scores)
    };
    let blind_before = withheld()?;
    let mut keeper = session.keeper(&config, &loaded)?;
    let finished = grpo::train(&config, &setup, &mut learner, reference.as_ref(), &mut keeper);
    drop(keeper);
    let last = config.optim.steps;
    let checkpoint = out.join("checkpoints").join(format!("step-{last}"));
    let blind_after = match &finished {
        Ok(Finished::Complete) => withheld(),
        // Stopped in the last measurement: what is known is shown all the same.
        Ok(Finished::Stopped { at }) if *at == last && last > 0 => {
            print_table(&out, setup.eval.len(), last, [Some(&blind_before), None])?;
            say!("\nreport      {}", crate::report::write(&out)?.display());
            say!("talk to it  varft chat {}", quoted(&checkpoint));
            return session.end(finished);
        }
        _ => return session.end(finished),
    };
    print_table(&out, setup.eval.len(), last, [Some(&blind_before), blind_after.as_ref().ok()])?;
    let report = crate::report::write(&out)?;
    say!("\nin {:.0} s\nreport      {}", started.elapsed().as_secs_f64(), report.display());
    say!("talk to it  varft chat {}", quoted(&checkpoint));
    match blind_after {
        Ok(_) => Ok(()),
        Err(Error::Cancelled(_)) => Err(Error::Cancelled(format!(
            "stopped in the last measurement; the training is complete, and its model is {}",
            checkpoint.display()
        ))),
        Err(e) => Err(e),
    }
}

/// The value of `optim.steps` among `overrides`, if it is there and a number.
fn chosen_steps(overrides: &[String]) -> Option<u64> {
    let pairs = overrides.iter().rev().filter_map(|o| o.split_once('='));
    pairs.into_iter().find(|(key, _)| key.trim() == "optim.steps")?.1.trim().parse().ok()
}

/// Prints the scores before the first step and after step `last`, as far as they are known. `blind`: those with the tool's
/// images withheld.
fn print_table(run: &Path, questions: usize, last: u64, blind: [Option<&Scores>; 2]) -> Result<()> {
    say!("\n| {questions} held-out questions | F1 | exact match | format | F1 with the tool's images withheld |");
    say!("|---|---|---|---|---|");
    let records = read_metrics(run)?;
    for ((name, step), blind) in [("before", 0), ("after", last)].into_iter().zip(blind) {
        let measured =
            |figure: &str| records.iter().filter(|r| r.step == step).flat_map(|r| &r.values).find(|(n, _)| n == figure);
        let percent = |value: Option<f64>| value.map_or("not measured".to_owned(), |v| format!("{:.1}%", 100.0 * v));
        let figure = |name: &str| percent(measured(name).map(|(_, value)| *value));
        say!(
            "| {name} | {} | {} | {} | {} |",
            figure("eval/f1"),
            figure("eval/em"),
            figure("eval/format"),
            percent(blind.map(|b| b.f1))
        );
    }
    Ok(())
}

/// Checks that `dir` is a quickstart's, or holds nothing, or is not there.
fn check_replaceable(dir: &Path) -> Result<()> {
    if !dir.exists() || dir.join(MARK).is_file() {
        return Ok(());
    }
    let failed = |e| Error::io("replace the earlier run in", dir, e);
    for entry in dir.read_dir().map_err(failed)? {
        if entry.map_err(failed)?.file_name() != LOCK_FILE {
            return Err(Error::input(
                format!("{}: this folder holds something that is no quickstart", dir.display()),
                "give --out another folder",
            ));
        }
    }
    Ok(())
}

/// Removes what an earlier quickstart left in `dir`, and nothing that is not one. The lock stays, which is this process's, and
/// so does the mark: the rest can still be replaced if this is cut short.
fn clear(dir: &Path) -> Result<()> {
    check_replaceable(dir)?;
    let failed = |e| Error::io("replace the earlier run in", dir, e);
    for entry in dir.read_dir().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name() == LOCK_FILE || entry.file_name() == MARK {
            continue;
        }
        let folder = entry.file_type().map_err(failed)?.is_dir();
        if folder { std::fs::remove_dir_all(entry.path()) } else { std::fs::remove_file(entry.path()) }
            .map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_quickstart_is_replaced_and_its_lock_and_mark_stay() {
        let dir = tempfile::tempdir().unwrap();
        let names = || {
            let mut all: Vec<_> = dir.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
            all.sort();
            all
        };
        let lock = hold(dir.path()).unwrap();
        // Killed before its mark was there: nothing but the lock.
        clear(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join("warm-start")).unwrap();
        std::fs::write(dir.path().join("report.html"), "x").unwrap();
        assert!(clear(dir.path()).unwrap_err().to_string().contains("no quickstart"));
        assert_eq!(names(), [LOCK_FILE, "report.html", "warm-start"]);
        std::fs::write(dir.path().join(MARK), "").unwrap();
        clear(dir.path()).unwrap();
        assert_eq!(names(), [LOCK_FILE, MARK]);
        assert!(hold(dir.path()).unwrap_err().to_string().contains("another process"));
        drop(lock);
        hold(dir.path()).unwrap();
    }
}
