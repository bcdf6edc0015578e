use super::fit;
use super::records::{ModelArgs, Records, ended_early};
use super::session::stop_on_signal;
use super::setup::{Folder, held_out_examples, python};
use crate::agent::{Rollouts, Trajectory};
use crate::model::write_atomically;
use crate::report::view::Phase;
use crate::report::{Progress, TABLE};
use crate::tasks::scorer::{Score, Scorer};
use crate::tasks::{Outline, Split};
use crate::train::room::Work;
use crate::train::run::{Evaluation, episode_metrics, eval_options, evaluate, kind_metrics, views};
use crate::{Error, Result};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Ask a model the held-out questions and score its answers
#[derive(clap::Args)]
#[command(after_help = "Example:\n  varft eval --model models/tiny --out runs/eval --set task.eval_items=100\n  \
                        varft eval runs/mine --mat MAT-Coding.json --images MAT-Coding-images --out runs/mine-mat\n\n\
                        Prints F1 and exact match by half and by kind of damage, with the usual scorer (SQuAD's) and with the published one \
                        of Visual-ARFT. The folder gets results.json (rows as the published evaluation writes them: id, pred_answer, gt, query), \
                        the episodes, and report.html; Ctrl-C ends it early and scores what is answered by then. To see what its tool's images are worth to a model, withhold them: \
                        --set tools.python.show_image=false")]
pub(super) struct Args {
    #[command(flatten)]
    from: ModelArgs,
    /// Rows in MAT-Coding's format, in place of the run file's task
    #[arg(long, value_name = "FILE")]
    mat: Option<PathBuf>,
    /// The folder that image paths of --mat start from [default: that of the file]
    #[arg(long, value_name = "DIR", requires = "mat")]
    images: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    // Among the overrides, so that the keys are checked for the task that they are of.
    let rows: Vec<String> = args.mat.iter().flat_map(|file| of_file(file, args.images.as_deref())).collect();
    let config = args.from.config(&rows)?;
    Records::check(&args.from.out, RESULTS)?;
    let stop = stop_on_signal()?;
    let examples = held_out_examples(&config, &stop)?;
    let tool = python(&config)?;
    let loaded = Folder::open(&config)?.load(&config, None, Work::Rollouts)?;
    fit::check(&config, &loaded.folder, examples.iter().map(|e| Ok(Outline::of(e))))?;
    let engine = loaded.engine(&config)?;
    let rollouts = loaded.rollouts(&config, &engine, tool, &stop);
    let rollouts = Rollouts { options: eval_options(&rollouts.options, &config), ..rollouts };
    let records = Records::create(&args.from.out)?;

    let mut progress = Progress::new("eval", 0, examples.len() as u64);
    let (mut f1, mut scored) = (0.0, 0);
    let evaluation = evaluate(&rollouts, &examples, config.run.seed, |done, episode| {
        if let Ok(t) = episode {
            (f1, scored) = (f1 + t.reward.f1, scored + 1);
        }
        progress.set(done as u64, &[("f1", format!("{:.3}", f1 / f64::from(scored.max(1))))]);
    })?;
    progress.finish();

    // Also when it ended early: what is complete has cost its time, and says something.
    let Evaluation { scores, jobs, episodes, ended_by } = evaluation;
    let done: Vec<&Trajectory> = episodes.iter().flatten().flatten().collect();
    // Shown before anything is written: a full disk must not cost the scores.
    let all: Vec<Answered> = jobs
        .iter()
        .zip(&episodes)
        .flat_map(|(job, group)| group.iter().flatten().map(move |t| (job, t)))
        .map(|(job, t)| Answered {
            split: job.example.split,
            kind: t.kind.clone(),
            format: t.reward.format,
            squad: Scorer::Squad.score(t.answer(), &job.example.answers),
            reference: Scorer::Reference.score(t.answer(), &job.example.answers),
        })
        .collect();
    let table = table(&all);
    say!("{}", table.trim_end());
    if scores.void > 0 {
        say!("{} episodes failed for reasons that are not the model's, and are not counted", scores.void);
    }
    let rows: Vec<_> = jobs
        .iter()
        .zip(&episodes)
        .flat_map(|(job, group)| group.iter().flatten().map(move |t| (job, t)))
        .map(|(job, t)| {
            json!({ "id": job.example.id, "pred_answer": t.answer(), "gt": job.example.answers, "query": job.example.question })
        })
        .collect();
    let text = serde_json::to_vec_pretty(&rows).map_err(|e| Error::internal(format!("results as JSON: {e}")))?;
    let path = records.dir.join(RESULTS);
    write_atomically(&path, |out| out.write_all(&text).map_err(|e| Error::io("write", &path, e)))?;
    say!("results {}", path.display());
    let table_path = records.dir.join(TABLE);
    write_atomically(&table_path, |out| {
        out.write_all(table.as_bytes()).map_err(|e| Error::io("write", &table_path, e))
    })
    .map_err(|e| records.kept(&path, e))?;
    let mut metrics = episode_metrics(&done, Phase::Eval);
    metrics.push(("eval/void", scores.void as f64));
    let by_kind = kind_metrics(&done, "eval");
    metrics.extend(by_kind.iter().map(|(name, value)| (name.as_str(), *value)));
    let report =
        views(&episodes, &jobs, 0, Phase::Eval, usize::MAX, &records.store, &loaded.folder.tokenizer, |_| None)
            .and_then(|shown| records.store.write(Phase::Eval, 0, &shown))
            .and_then(|()| records.finish(&config, &metrics))
            .map_err(|e| records.kept(&path, e))?;
    say!("report  {}", report.display());
    let counts = [scores.episodes, jobs.len()];
    ended_by.map_or(Ok(()), |e| Err(ended_early(e, counts, "questions are answered, scored and written")))
}

/// The answers' file.
const RESULTS: &str = "results.json";

/// The keys of a task that asks the rows of `file`, whose images start from `images`.
fn of_file(file: &Path, images: Option<&Path>) -> [String; 3] {
    let text = |path: &Path| toml::Value::from(path.display().to_string());
    [
        "task.kind=mat".into(),
        format!("task.eval={}", text(file)),
        format!("task.images={}", images.map_or_else(|| "\"\"".into(), |dir| text(dir).to_string())),
    ]
}

/// One scored episode.
struct Answered {
    split: Split,
    kind: String,
    format: f64,
    squad: Score,
    reference: Score,
}

/// Figures in percent: of all, of each half, of each kind.
fn table(all: &[Answered]) -> String {
    let mut out = format!(
        "{:24} {:>5}  {:>6} {:>6}  {:>6} {:>6}  {:>6}\n{:24} {:>5}  {:>13}  {:>13}\n",
        "", "n", "F1", "EM", "F1", "EM", "format", "", "", "(squad)", "(reference)"
    );
    let mut kinds: Vec<&str> = all.iter().map(|a| a.kind.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let mut row = |name: &str, of: &dyn Fn(&Answered) -> bool| {
        let some: Vec<&Answered> = all.iter().filter(|a| of(a)).collect();
        if some.is_empty() {
            return;
        }
        let mean = |f: &dyn Fn(&Answered) -> f64| 100.0 * some.iter().map(|a| f(a)).sum::<f64>() / some.len() as f64;
        out += &format!(
            "{name:24} {:>5}  {:>6.1} {:>6.1}  {:>6.1} {:>6.1}  {:>6.1}\n",
            some.len(),
            mean(&|a| a.squad.f1),
            mean(&|a| a.squad.em),
            mean(&|a| a.reference.f1),
            mean(&|a| a.reference.em),
            mean(&|a| a.format)
        );
    };
    row("all", &|_| true);
    row("simple", &|a| a.split == Split::Simple);
    row("hard", &|a| a.split == Split::Hard);
    for kind in kinds {
        row(&format!("  {kind}"), &|a| a.kind == kind);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_means_by_half_and_kind() {
        let one = |split, kind: &str, f1| Answered {
            split,
            kind: kind.into(),
            format: 1.0,
            squad: Score { f1, em: 0.0 },
            reference: Score { f1: f1 / 2.0, em: 1.0 },
        };
        let t =
            table(&[one(Split::Simple, "dark", 1.0), one(Split::Simple, "blur", 0.0), one(Split::Simple, "dark", 0.5)]);
        let row = |name: &str| -> Vec<f64> {
            let line = t.lines().find(|l| l.trim_start().starts_with(name)).unwrap();
            line.split_whitespace().skip(1).map(|w| w.parse().unwrap()).collect()
        };
        assert_eq!(row("all"), [3.0, 50.0, 0.0, 25.0, 100.0, 100.0]);
        assert_eq!(row("dark"), [2.0, 75.0, 0.0, 37.5, 100.0, 100.0]);
        assert!(!t.contains("hard"));
    }
}
