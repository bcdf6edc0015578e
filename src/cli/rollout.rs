use super::fit;
use super::records::{ModelArgs, Records, ended_early};
use super::session::stop_on_signal;
use super::setup::{Folder, held_out_examples, python, training_examples};
use crate::agent::{Author, Job, Partial, Trajectory};
use crate::model::write_atomically;
use crate::report::view::Phase;
use crate::report::{Progress, TrajectoryStore};
use crate::tasks::{Example, Examples};
use crate::train::room::Work;
use crate::train::run::{episode_metrics, views};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Run episodes and write them down, token by token
#[derive(clap::Args)]
#[command(after_help = "Example:\n  varft rollout --model models/tiny --out runs/look --items 8 --samples 4\n\n\
                        The folder gets episodes.jsonl, one episode per line: item, question, answers, tokens, logprobs (of the tokens that the \
                        model wrote, at `temperature`; 0 elsewhere), spans (who wrote which tokens: prompt, policy, tool), images (their place among the tokens, and \
                        a PNG of what the model saw in trajectories/images), steps (text, code, what the tool said), ending, reward. \
                        And report.html, to look at them. They are sampled as in training: see [rollout] in a run's config.toml. Each episode is \
                        written when it is complete, and all are put in order at the end. Ctrl-C ends it early and keeps what is complete.")]
pub(super) struct Args {
    #[command(flatten)]
    from: ModelArgs,
    /// Questions
    #[arg(long, default_value_t = 16, allow_negative_numbers = true, value_parser = super::whole::<u64>(1..=1 << 32))]
    items: u64,
    /// Episodes per question
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = super::whole::<usize>(1..=1 << 16))]
    samples: usize,
    /// Ask the held-out questions, not those of training
    #[arg(long)]
    held_out: bool,
}

/// Episodes that are held in memory at once, about.
const BATCH: usize = 256;
/// Episodes that the report shows.
const SHOWN: usize = 160;

pub(super) fn run(args: &Args) -> Result<()> {
    let config = args.from.config(&[])?;
    Records::check(&args.from.out, FILE)?;
    let stop = stop_on_signal()?;
    let all: Arc<dyn Examples> = match args.held_out {
        true => Arc::new(HeldOut(held_out_examples(&config, &stop)?)),
        false => training_examples(&config)?,
    };
    let tool = python(&config)?;
    let loaded = Folder::open(&config)?.load(&config, None, Work::Rollouts)?;
    fit::check(&config, &loaded.folder, fit::first(&*all, args.items))?;
    let engine = loaded.engine(&config)?;
    let rollouts = loaded.rollouts(&config, &engine, tool, &stop);
    let records = Records::create(&args.from.out)?;

    let path = records.dir.join(FILE);
    let failed = |e| Error::io("write the episodes", &path, e);
    let mut out = Episodes { file: File::create(&path).map_err(failed)?, end: 0, lines: Vec::new() };
    let total = args.items * args.samples as u64;
    let mut progress = Progress::new("rollout", 0, total);
    let (mut finished, mut shown, mut sums, mut complete) = (0, Vec::new(), Vec::<(&str, f64)>::new(), 0.0);
    let mut ended_by = None;
    let part = (BATCH / args.samples).max(1);
    for first in (0..args.items).step_by(part) {
        let job = |i: u64| Ok(Job { example: all.get(i % all.len())?, group: i, samples: args.samples });
        let jobs = match (first..args.items.min(first + part as u64)).map(job).collect::<Result<Vec<_>>>() {
            Ok(jobs) => jobs,
            Err(e) => {
                ended_by = Some(e);
                break;
            }
        };
        let before = finished;
        let mut unwritten = None;
        let Partial { episodes, ended_by: ended } =
            rollouts.run_as_far_as_it_goes(&jobs, config.run.seed, |done, episode| {
                if let (Ok(t), None) = (episode, &unwritten)
                    && let Err(e) = row(t, &records.store).and_then(|row| out.append(t, &row).map_err(failed))
                {
                    unwritten = Some(e);
                    stop.store(true, Ordering::SeqCst);
                }
                // Counted when it is written, not before.
                progress.set(before + done as u64, &[]);
            });
        finished += episodes.iter().flatten().count() as u64;
        let most = SHOWN - shown.len();
        match views(&episodes, &jobs, 0, Phase::Train, most, &records.store, &loaded.folder.tokenizer, |_| None) {
            Ok(more) => shown.extend(more),
            Err(e) => unwritten = unwritten.or(Some(e)),
        }
        let done: Vec<&Trajectory> = episodes.iter().flatten().flatten().collect();
        for void in episodes.iter().flatten().filter_map(|e| e.as_ref().err()) {
            progress.note(&format!("left out: episode {} of item {}: {}", void.sample, void.group, void.error));
        }
        let n = done.len() as f64;
        complete += n;
        for (name, mean) in episode_metrics(&done, Phase::Train) {
            match sums.iter_mut().find(|(k, _)| *k == name) {
                Some((_, sum)) => *sum += mean * n,
                None => sums.push((name, mean * n)),
            }
        }
        // What could not be written is why the rest was stopped.
        ended_by = unwritten.or(ended);
        if ended_by.is_some() {
            break;
        }
    }
    progress.finish();
    let written = out.lines.len();
    let ended_by = match ended_by {
        Some(e) if written == 0 => {
            // An empty file would keep the same command from being run again.
            std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            return Err(e);
        }
        ended_by => ended_by,
    };
    sums.iter_mut().for_each(|(_, sum)| *sum /= f64::max(complete, 1.0));
    sums.push(("episodes/written", written as f64));
    say!("{written} episodes  {}", path.display());
    let report = out
        .sort(&path)
        .and_then(|()| records.store.write(Phase::Train, 0, &shown))
        .and_then(|()| records.finish(&config, &sums));
    match report {
        Ok(report) => say!("report  {}", report.display()),
        // The first failure is the one to report; here it is most likely the same again.
        Err(e) => return Err(records.kept(&path, ended_by.filter(|e| !matches!(e, Error::Cancelled(_))).unwrap_or(e))),
    }
    let counts = [written, total as usize];
    ended_by.map_or(Ok(()), |e| Err(ended_early(e, counts, "episodes are complete and written")))
}

/// Held-out questions, which are in memory.
struct HeldOut(Vec<Arc<Example>>);

impl Examples for HeldOut {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }
    fn get(&self, i: u64) -> Result<Arc<Example>> {
        Ok(self.0[i as usize].clone())
    }
}

/// The episodes' file.
const FILE: &str = "episodes.jsonl";

/// The file under way: a line is in it, whole, as soon as its episode is complete, so that a process that is killed loses no
/// more than the episodes under way.
struct Episodes {
    file: File,
    end: u64,
    /// Of each line: the group and the sample, where it begins, how long it is.
    lines: Vec<(u64, u64, u64, u64)>,
}

impl Episodes {
    fn append(&mut self, t: &Trajectory, row: &Value) -> std::io::Result<()> {
        let line = format!("{row}\n");
        if let Err(e) = self.file.write_all(line.as_bytes()) {
            // A part of a line would spoil the file for who reads it.
            let _ = self.file.set_len(self.end);
            return Err(e);
        }
        self.lines.push((t.group, t.sample, self.end, line.len() as u64));
        self.end += line.len() as u64;
        Ok(())
    }

    /// Puts the episodes in the order of questions and samples, so that the same command writes the same file. The file
    /// is replaced as a whole.
    fn sort(&mut self, path: &Path) -> Result<()> {
        if self.lines.is_sorted() {
            return Ok(());
        }
        self.lines.sort_unstable();
        let failed = |e| Error::io("put the episodes in order in", path, e);
        let mut from = File::open(path).map_err(failed)?;
        write_atomically(path, |out| {
            self.lines.iter().try_for_each(|&(.., start, len)| {
                from.seek(SeekFrom::Start(start)).map_err(failed)?;
                std::io::copy(&mut (&from).take(len), out).map(|_| ()).map_err(failed)
            })
        })
    }
}

fn row(t: &Trajectory, store: &TrajectoryStore) -> Result<Value> {
    let mut spans: Vec<(Author, usize, usize)> = Vec::new();
    for (i, &author) in t.authors.iter().enumerate() {
        match spans.last_mut() {
            Some((last, _, end)) if *last == author => *end = i + 1,
            _ => spans.push((author, i, i + 1)),
        }
    }
    let images = t
        .sequence
        .images
        .iter()
        .map(|s| {
            let file = store.image(s.image.width as u32, s.image.height as u32, &s.image.pixels)?;
            let grid = [s.image.grid.t, s.image.grid.h, s.image.grid.w];
            Ok(json!({ "offset": s.offset, "len": s.len, "grid_thw": grid, "file": format!("trajectories/images/{}.png", file.0) }))
        })
        .collect::<Result<Vec<_>>>()?;
    let steps: Vec<Value> = t
        .steps
        .iter()
        .map(|s| {
            json!({
                "text": s.text,
                "tokens": [s.tokens.start, s.tokens.end],
                "problem": s.problem,
                "well_formed": s.well_formed,
                "code": s.tool.as_ref().map(|c| &c.code),
                "tool_status": s.tool.as_ref().map(|c| c.status),
                "tool_output": s.tool.as_ref().map(|c| &c.output),
            })
        })
        .collect();
    Ok(json!({
        "item": t.item, "kind": t.kind, "question": t.question, "answers": t.answers, "group": t.group, "sample": t.sample,
        "tokens": t.sequence.tokens, "logprobs": t.logprobs, "temperature": t.temperature,
        "spans": spans.iter().map(|(a, from, to)| json!([a, from, to])).collect::<Vec<_>>(),
        "images": images, "steps": steps, "ending": t.ending.name(), "answer": t.answer(), "reward": t.reward,
    }))
}
