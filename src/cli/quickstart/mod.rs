//! The main job on an embedded default: a tiny model that can read and keeps the format, but repairs images at random, learns
//! by GRPO which repair most damages need.

mod warm;

use super::device::{DeviceArgs, settle};
use super::session::{CONFIG_FILE, Held, LOCK_FILE, Session, hold, quoted, stop_on_signal};
use super::setup::{Folder, python};
use crate::agent::Trajectory;
use crate::report::{kinds, read_metrics};
use crate::train::RunConfig;
use crate::train::grpo::{self, Finished};
use crate::train::room::Work;
use crate::train::run::{Keeper, evaluate, kind_metrics};
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
    /// The run's folder; an earlier quickstart's is kept beside it, under a number
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    out: PathBuf,
    /// Decides what is sampled and the order of the questions; the same as --set run.seed
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = super::seed)]
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

/// Keys that this command sets itself, and what to do instead of setting them.
const ITS_OWN: [(&str, &str); 3] = [
    (
        "model.path",
        "quickstart trains the model that ships with it; train another with `varft train --set model.path=DIR`",
    ),
    ("run.dir", "name the folder with --out"),
    ("run.name", "name the folder with --out"),
];

pub(super) fn run(args: &Args) -> Result<()> {
    for (key, instead) in ITS_OWN {
        let sets = |o: &&String| o.split_once('=').is_some_and(|(k, _)| k.trim() == key);
        if let Some(o) = args.overrides.iter().find(sets) {
            return Err(Error::input(format!("--set {o}: `{key}` is quickstart's own"), instead));
        }
    }
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
    // Without its tool there is nothing to begin.
    python(&config)?;
    let held = make_room(&out)?;
    // The mark comes first: what is cut short from here on can be replaced.
    let mark = out.join(MARK);
    std::fs::write(&mark, "made by varft quickstart\n").map_err(|e| Error::io("write", &mark, e))?;
    warm::unpack(&model)?;
    settle(&mut config);
    let session = Session::anew(&config, "train", held);
    // Before the session goes, and with it the folder if that is empty.
    let _unpacked = Unpacked(&out);

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
    let withheld = |keeper: &mut Keeper, step: u64| -> Result<()> {
        let mut rollouts = setup.held_out(&config);
        rollouts.options.withhold_images = true;
        let all = evaluate(&rollouts, &setup.eval, config.run.seed, |_, _| ())?.complete()?;
        let done: Vec<&Trajectory> = all.episodes.iter().flatten().flatten().collect();
        let by_kind = kind_metrics(&done, "withheld");
        let mut metrics = vec![("withheld/f1", all.scores.f1)];
        metrics.extend(by_kind.iter().map(|(name, value)| (name.as_str(), *value)));
        keeper.measured(step, &metrics)
    };
    let mut keeper = session.keeper(&config, &loaded)?;
    withheld(&mut keeper, 0).map_err(|e| match e {
        Error::Cancelled(_) => Error::Cancelled(format!(
            "stopped in the first measurement: nothing was trained, and nothing is saved\n  to begin again: {}",
            again()
        )),
        e => e,
    })?;
    let finished = grpo::train(&config, &setup, &mut learner, reference.as_ref(), &mut keeper);
    let last = config.optim.steps;
    let blind_after = match &finished {
        Ok(Finished::Complete) => withheld(&mut keeper, last),
        // Stopped in the last measurement: what is known is shown all the same.
        Ok(Finished::Stopped { at }) if *at == last && last > 0 => {
            drop(keeper);
            print_table(&out, last)?;
            say!("\nreport      {}", crate::report::write(&out)?.display());
            say_how_to_talk(&out);
            return session.end(finished);
        }
        Ok(Finished::Stopped { at: 0 }) => {
            return Err(Error::Cancelled(format!(
                "stopped before the first step was complete: nothing is saved\n  to begin again: {}",
                again()
            )));
        }
        _ => return session.end(finished),
    };
    drop(keeper);
    print_table(&out, last)?;
    let report = crate::report::write(&out)?;
    say!("\nin {:.0} s\nreport      {}", started.elapsed().as_secs_f64(), report.display());
    say_how_to_talk(&out);
    match blind_after {
        Err(Error::Cancelled(_)) => Err(Error::Cancelled(format!(
            "stopped in the last measurement; the training is complete, and its model is {}",
            out.join("checkpoints").join(format!("step-{last}")).display()
        ))),
        done => done,
    }
}

/// The command that does the same again.
fn again() -> String {
    let rest = std::env::args_os().skip(1).map(|a| quoted(Path::new(&a)));
    std::iter::once(super::program()).chain(rest).collect::<Vec<_>>().join(" ")
}

fn say_how_to_talk(run: &Path) {
    say!("talk to it  {} chat {}   (say /example, and it is asked a held-out question)", super::program(), quoted(run));
}

/// The value of `optim.steps` among `overrides`, if it is there and a number.
fn chosen_steps(overrides: &[String]) -> Option<u64> {
    let pairs = overrides.iter().rev().filter_map(|o| o.split_once('='));
    pairs.into_iter().find(|(key, _)| key.trim() == "optim.steps")?.1.trim().parse().ok()
}

/// Prints the scores before the first step and after step `last`, as far as they are known: of all questions, and by damage.
fn print_table(run: &Path, last: u64) -> Result<()> {
    let records = read_metrics(run)?;
    let measured = |step: u64, figure: &str| {
        records.iter().filter(|r| r.step == step).flat_map(|r| &r.values).find(|(n, _)| n == figure).map(|(_, v)| *v)
    };
    let percent = |step: u64, figure: &str| {
        measured(step, figure).map_or("not measured".to_owned(), |v| format!("{:.1}%", 100.0 * v))
    };
    let kinds = kinds(&records);
    let asked: f64 = kinds.iter().filter_map(|kind| measured(0, &format!("eval/n/{kind}"))).sum();
    say!("\n| {asked} held-out questions | F1 | exact match | format | F1 with the tool's images withheld |");
    say!("|---|---|---|---|---|");
    for (name, step) in [("before", 0), ("after", last)] {
        let [f1, em, format, blind] =
            ["eval/f1", "eval/em", "eval/format", "withheld/f1"].map(|figure| percent(step, figure));
        say!("| {name} | {f1} | {em} | {format} | {blind} |");
    }
    say!("\n| F1 by damage | questions | before | after | after, images withheld |");
    say!("|---|---|---|---|---|");
    for kind in &kinds {
        let (f1, blind) = (format!("eval/f1/{kind}"), format!("withheld/f1/{kind}"));
        say!(
            "| {kind} | {} | {} | {} | {} |",
            measured(0, &format!("eval/n/{kind}")).unwrap_or(0.0),
            percent(0, &f1),
            percent(last, &f1),
            percent(last, &blind)
        );
    }
    Ok(())
}

/// Checks that `dir` is a quickstart's, or holds nothing, or is not there.
fn check_replaceable(dir: &Path) -> Result<()> {
    if !dir.exists() || dir.join(MARK).is_file() {
        return Ok(());
    }
    let refused = |what: &str| Error::input(format!("{}: {what}", dir.display()), "give --out another folder");
    if !dir.is_dir() {
        return Err(refused("this is a file"));
    }
    let failed = |e| Error::io("look for an earlier run in", dir, e);
    for entry in dir.read_dir().map_err(failed)? {
        if entry.map_err(failed)?.file_name() != LOCK_FILE {
            return Err(refused("this folder holds something that is no quickstart"));
        }
    }
    Ok(())
}

/// What lies ready for a run: when one did not begin, it goes.
struct Unpacked<'a>(&'a Path);

impl Drop for Unpacked<'_> {
    fn drop(&mut self) {
        if !self.0.join(CONFIG_FILE).is_file() {
            // What failed before is the error to report.
            let _ = clear(self.0)
                .and_then(|()| std::fs::remove_file(self.0.join(MARK)).map_err(|e| Error::io("remove", self.0, e)));
        }
    }
}

/// Whether a run in `dir` has taken a step, or may have.
fn has_trained(dir: &Path) -> bool {
    dir.join("checkpoints").exists() || read_metrics(dir).map_or(true, |records| records.iter().any(|r| r.step > 0))
}

/// Takes `dir` for a new run. An earlier one that has trained is kept under the next number that is free; another is removed.
fn make_room(dir: &Path) -> Result<Held> {
    let held = hold(dir)?;
    if !has_trained(dir) {
        clear(dir)?;
        return Ok(held);
    }
    held.keep();
    let numbered = |i: u32| {
        let mut name = dir.file_name().unwrap_or_default().to_os_string();
        name.push(format!("-{i}"));
        dir.with_file_name(name)
    };
    let free = (1..).map(numbered).find(|path| !path.exists());
    let kept = free.ok_or_else(|| Error::internal("no number is free"))?;
    std::fs::rename(dir, &kept).map_err(|e| Error::io("rename the earlier run in", dir, e))?;
    say!("the earlier run is kept as {}", kept.display());
    // Only now, under its new name, may somebody else have it.
    drop(held);
    hold(dir)
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
    fn an_earlier_run_is_kept_under_a_number_and_what_never_began_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for earlier in 0..3 {
            let held = make_room(&at("run")).unwrap();
            held.keep();
            std::fs::write(at("run").join(MARK), "").unwrap();
            std::fs::write(at("run").join(CONFIG_FILE), earlier.to_string()).unwrap();
            std::fs::create_dir(at("run").join("checkpoints")).unwrap();
            assert!(make_room(&at("run")).err().unwrap().to_string().contains("another process"));
        }
        let kept = |name: &str| std::fs::read_to_string(at(name).join(CONFIG_FILE)).unwrap();
        assert_eq!(["run-1", "run-2", "run"].map(kept), ["0", "1", "2"]);
        std::fs::remove_dir(at("run").join("checkpoints")).unwrap();
        drop(make_room(&at("run")).unwrap());
        assert!(!at("run-3").exists() && at("run").read_dir().unwrap().count() == 1);
    }

    #[test]
    fn only_a_quickstart_is_replaced_and_its_lock_and_mark_stay() {
        let dir = tempfile::tempdir().unwrap();
        let names = || {
            let mut all: Vec<_> = dir.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
            all.sort();
            all
        };
        let held = hold(dir.path()).unwrap();
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
        drop(held);
        assert_eq!(names(), [MARK]);
        hold(dir.path()).unwrap();
    }
}
