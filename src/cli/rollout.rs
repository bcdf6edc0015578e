use super::records::{ModelArgs, Records, ended_early};
use super::session::stop_on_signal;
use super::setup::{Loaded, held_out_examples, python, training_examples};
use crate::agent::{Author, Job, Partial, Trajectory};
use crate::report::view::Phase;
use crate::report::{Progress, TrajectoryStore};
use crate::train::run::{episode_metrics, views};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::Arc;

/// Run episodes and write them down, token by token
#[derive(clap::Args)]
#[command(after_help = "Example:\n  varft rollout --model models/tiny --out runs/look --items 8 --samples 4\n\n\
                        The folder gets episodes.jsonl, one episode per line: item, question, answers, tokens, logprobs (of the tokens that the \
                        model wrote, at `temperature`; 0 elsewhere), spans (who wrote which tokens: prompt, policy, tool), images (their place among the tokens, and \
                        a PNG of what the model saw in trajectories/images), steps (text, code, what the tool said), ending, reward. \
                        And report.html, to look at them. They are sampled as in training: see [rollout] in a run's config.toml. Ctrl-C ends it early and keeps what is complete.")]
pub(super) struct Args {
    #[command(flatten)]
    from: ModelArgs,
    /// Questions
    #[arg(long, default_value_t = 16)]
    items: u64,
    /// Episodes per question
    #[arg(long, default_value_t = 1)]
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
    let config = args.from.config()?;
    if args.items == 0 || args.samples == 0 {
        return Err(Error::input("no episode was asked for", "give --items and --samples at least 1"));
    }
    let records = Records::create(&args.from.out, FILE)?;
    let stop = stop_on_signal()?;
    let jobs: Vec<u64> = (0..args.items).collect();
    let example: Box<dyn Fn(u64) -> Result<_>> = if args.held_out {
        let all = held_out_examples(&config)?;
        Box::new(move |i| Ok(Arc::clone(&all[i as usize % all.len()])))
    } else {
        let all = training_examples(&config)?;
        Box::new(move |i| all.get(i % all.len()))
    };
    let tool = python(&config)?;
    let loaded = Loaded::new(&config, None)?;
    let engine = loaded.engine(&config)?;
    let rollouts = loaded.rollouts(&config, &engine, tool, &stop);

    let path = records.dir.join(FILE);
    let failed = |e| Error::io("write the episodes", &path, e);
    let mut out = BufWriter::new(File::create(&path).map_err(failed)?);
    let total = args.items * args.samples as u64;
    let mut progress = Progress::new("rollout", 0, total);
    let (mut finished, mut shown, mut sums) = (0, Vec::new(), Vec::<(&str, f64)>::new());
    let mut ended_by = None;
    for part in jobs.chunks((BATCH / args.samples).max(1)) {
        let job = |&i: &u64| Ok(Job { example: example(i)?, group: i, samples: args.samples });
        let jobs = match part.iter().map(job).collect::<Result<Vec<_>>>() {
            Ok(jobs) => jobs,
            Err(e) => {
                ended_by = Some(e);
                break;
            }
        };
        let before = finished;
        let Partial { episodes, ended_by: ended } =
            rollouts.run_as_far_as_it_goes(&jobs, config.run.seed, |done, _| progress.set(before + done as u64, &[]));
        finished += episodes.iter().flatten().count() as u64;
        let most = SHOWN - shown.len();
        shown.extend(views(&episodes, &jobs, 0, Phase::Train, most, &records.store, &loaded.tokenizer, |_| None)?);
        let done: Vec<&Trajectory> = episodes.iter().flatten().flatten().collect();
        for t in &done {
            serde_json::to_writer(&mut out, &row(t, &records.store)?).map_err(|e| failed(e.into()))?;
            out.write_all(b"\n").map_err(failed)?;
        }
        for void in episodes.iter().flatten().filter_map(|e| e.as_ref().err()) {
            progress.note(&format!("left out: episode {} of item {}: {}", void.sample, void.group, void.error));
        }
        let n = done.len() as f64;
        for (name, mean) in episode_metrics(&done, Phase::Train).into_iter().chain([("episodes/written", 1.0)]) {
            match sums.iter_mut().find(|(k, _)| *k == name) {
                Some((_, sum)) => *sum += mean * n,
                None => sums.push((name, mean * n)),
            }
        }
        ended_by = ended;
        if ended_by.is_some() {
            break;
        }
    }
    out.into_inner().map_err(|e| failed(e.into_error()))?;
    progress.finish();
    let written = sums.iter().find(|(k, _)| *k == "episodes/written").map_or(0.0, |(_, n)| *n);
    let ended_by = match ended_by {
        Some(e) if written == 0.0 => {
            // An empty file would keep the same command from being run again.
            std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            return Err(e);
        }
        ended_by => ended_by,
    };
    sums.iter_mut().filter(|(k, _)| *k != "episodes/written").for_each(|(_, v)| *v /= written.max(1.0));
    records.store.write(Phase::Train, 0, &shown)?;
    let report = records.finish(&config, &sums)?;
    say!("{written} episodes  {}\nreport  {}", path.display(), report.display());
    let counts = [written as usize, total as usize];
    ended_by.map_or(Ok(()), |e| Err(ended_early(e, counts, "episodes are complete and written")))
}

/// The episodes' file.
const FILE: &str = "episodes.jsonl";

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
