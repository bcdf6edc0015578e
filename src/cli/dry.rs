//! `--dry-run` of the commands that train: what a run would compute, hold and take, without a weight being read or a file written.

use super::fit::{Measure, first};
use super::rate::{self, Rate};
use super::setup::{Folder, training_examples};
use crate::agent::{Conversations, demonstration};
use crate::input::{Message, Part, continue_prompt};
use crate::train::RunConfig;
use crate::train::config::TaskKind;
use crate::train::flops::{self, Batch, Flops};
use crate::train::memory::{Plan, Target};
use crate::train::room::Work;
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;

/// Rows of the product that stands for prompts and updates.
const ROWS: usize = 512;
/// Demonstrations that are looked at.
const SHOWN: u64 = 64;

/// Mean and most of some figures.
#[derive(Default)]
struct Figures {
    n: usize,
    sum: usize,
    most: usize,
}

impl Figures {
    fn add(&mut self, value: usize) {
        (self.n, self.sum, self.most) = (self.n + 1, self.sum + value, self.most.max(value));
    }
    fn mean(&self) -> f64 {
        self.sum as f64 / self.n.max(1) as f64
    }
    fn told(&self) -> String {
        format!("{:.0} on average, {} at most", self.mean(), self.most)
    }
}

/// Opens the folder of a run that is not begun.
fn folder(config: &RunConfig) -> Result<Folder> {
    say!("dry run: no weight is read, and nothing is written");
    Folder::open(config)
}

/// Questions as a dry run reads them: what is behind them has no size of its own.
fn without_photographs(config: &RunConfig) -> RunConfig {
    let mut config = config.clone();
    config.task.photographs = false;
    config
}

/// `varft train --dry-run`.
///
/// # Errors
/// What is wrong with the model's folder or the data; [`Error::Limit`] where the run does not fit the memory.
pub(super) fn train(config: &RunConfig) -> Result<()> {
    let folder = folder(config)?;
    let examples = training_examples(&without_photographs(config))?;
    super::fit::check(config, &folder, first(&*examples, u64::MAX))?;
    let mut measure = Measure::new(config, &folder);
    let (mut prompts, mut images) = (Figures::default(), Figures::default());
    for item in first(&*examples, u64::MAX) {
        let (text, image) = measure.of(&item?)?;
        prompts.add(text + image);
        images.add(image);
    }
    let r = &config.rollout;
    let context = r.context.min(folder.config.max_position_embeddings);
    // After each turn but the last an image is shown, and what was printed is told, in a token a character at most.
    let patch = folder.preprocessor.processor().patch;
    let (turns, shown) = (r.max_turns as f64, (config.model.max_pixels / (4 * patch * patch)) as f64);
    let room = context as f64 - prompts.mean();
    let said = (turns * r.max_new_tokens as f64).min(room);
    let heard = ((turns - 1.0) * (shown + r.output_chars as f64)).min(room - said);
    let batch = Batch {
        groups: r.prompts as f64,
        samples: r.group_size as f64,
        prompt: prompts.mean(),
        prompt_image: images.mean(),
        completion: said + heard,
        completion_image: ((turns - 1.0) * shown).min(heard),
        said,
    };
    say!("\ntokens of {} questions", prompts.n);
    say!("  prompt        {}", prompts.told());
    say!("  of it, image  {}", images.told());
    say!("  completion    {:.0} at most: {said:.0} that are sampled, {heard:.0} of images and output", said + heard);
    let episodes = r.prompts * r.group_size;
    say!("  a step        {} questions of {} episodes: {:.0} at most", r.prompts, r.group_size, {
        batch.groups * batch.prompt + episodes as f64 * batch.completion
    });
    let updates = config.algo.iterations;
    finish(config, &folder, Work::Episodes, &batch, updates, episodes.min(r.concurrency))
}

/// `varft sft --dry-run`.
///
/// # Errors
/// As [`train`].
pub(super) fn sft(config: &RunConfig) -> Result<()> {
    let source = match config.sft.data.as_str() {
        "" => None,
        path => Some(Conversations::open(Path::new(path))?),
    };
    source.as_ref().map_or(Ok(()), Conversations::check_images)?;
    let folder = folder(config)?;
    let (mut tokens, mut images, mut said) = (Figures::default(), Figures::default(), Figures::default());
    let mut add = |[all, image, own]: [usize; 3]| {
        tokens.add(all);
        images.add(image);
        said.add(own);
    };
    match &source {
        Some(talks) => {
            let most = folder.config.max_position_embeddings;
            let processor = folder.preprocessor.processor();
            let lengths = talks.lengths(&folder.tokenizer, &folder.template, processor, most)?;
            lengths.iter().for_each(|l| add([l.tokens, l.image, l.said]));
        }
        None => demonstrations(config, &folder)?.into_iter().for_each(add),
    }
    let batch = Batch {
        groups: config.sft.batch_size as f64,
        samples: 1.0,
        completion: tokens.mean(),
        completion_image: images.mean(),
        said: said.mean(),
        ..Batch::default()
    };
    let kind =
        if source.is_some() { "conversations" } else { "demonstrations, as they are when every repair keeps the size" };
    say!("\ntokens of {} {kind}", tokens.n);
    say!("  all           {}", tokens.told());
    say!("  of it, image  {}", images.told());
    say!("  learned from  {}", said.told());
    say!("  a step        {} of them: {:.0}", config.sft.batch_size, batch.groups * batch.completion);
    finish(config, &folder, Work::Conversations { longest: tokens.most }, &batch, 1, 0)
}

/// Tokens, those of images, and those that are learned from, of demonstrations of the synthetic task; none is played.
fn demonstrations(config: &RunConfig, folder: &Folder) -> Result<Vec<[usize; 3]>> {
    if config.task.kind != TaskKind::Synthetic {
        return Err(Error::input(
            "`sft.data` is not set, and only the synthetic task has demonstrations of its own",
            "name a file of conversations: --set sft.data=FILE, or choose --set task.kind=synthetic",
        ));
    }
    let examples = training_examples(&without_photographs(config))?;
    let (f, mut measure) = (folder, Measure::new(config, folder));
    let shown = vec![Message::parts("user", vec![Part::Image { image: None }])];
    (0..examples.len().min(SHOWN))
        .map(|i| {
            let (text, image) = measure.of(&examples.outline(i)?)?;
            let lines = demonstration(&*examples.get(i)?);
            let said: Vec<usize> =
                lines.iter().map(|l| Ok(f.tokenizer.encode_plain(l)?.len() + 1)).collect::<Result<_>>()?;
            let said: usize = said.iter().sum();
            let any = Arc::new(f.preprocessor.processor().outline((1, 1), "an image")?);
            let between = continue_prompt(&f.tokenizer, &f.template, &shown, std::slice::from_ref(&any), true)?;
            let again = lines.len() - 1;
            let told = again * (between.len() - any.tokens());
            Ok([text + image * (1 + again) + told + said, image * (1 + again), said])
        })
        .collect()
}

/// Memory, arithmetic and time of a run that learns from `batch` in every step, `iterations` times; `in_flight`: episodes that are
/// sampled at once, 0 where none are.
fn finish(
    config: &RunConfig,
    folder: &Folder,
    work: Work,
    batch: &Batch,
    iterations: usize,
    in_flight: usize,
) -> Result<()> {
    let c = &folder.config;
    let plan = Plan::compute(c, config, Target::of(&folder.device), work);
    say!("\nmemory on {:?}", folder.device);
    plan.table().lines().for_each(|l| say!("  {l}"));
    // What does not fit needs no time.
    folder.plan(config, work)?;
    let rolls_out = work == Work::Episodes;
    let reference = rolls_out && config.algo.beta != 0.0;
    let f = flops::step(c, &plan, batch, iterations, config.optim.micro_batch_tokens, rolls_out, reference);
    let most = if rolls_out { ", where every episode is as long as it may be" } else { "" };
    say!("\narithmetic of a step, in GFLOP{most}");
    for (name, flops) in parts(&f) {
        say!("  {name:<26} {:>14.3}", flops / 1e9);
    }
    // The widest product of a layer.
    let product = |rows: usize| rate::product(&folder.device, rows, c.hidden_size, 2 * c.intermediate_size);
    let many = product(ROWS)?;
    let few = if rolls_out { Some(product(in_flight)?) } else { None };
    say!("\nmeasured now on {:?}, by products as a layer has them", folder.device);
    [Some(&many), few.as_ref()].into_iter().flatten().for_each(|r: &Rate| say!("  {}", r.told()));
    let update = f.update() / many.flops;
    let rollouts = few.as_ref().map_or(0.0, |few| f.prefill / many.flops + f.decode / few.flops);
    say!("\ntime at these rates{most}; tools, images on their way and evaluations are not in it");
    let steps = config.optim.steps;
    let mut all = vec![("updates of a step".to_owned(), update)];
    if rolls_out {
        all.insert(0, ("rollouts of a step".to_owned(), rollouts));
    }
    all.push((format!("{steps} steps"), (update + rollouts) * steps as f64));
    all.iter().for_each(|(what, seconds)| say!("  {what:<26} {:>12}", time(*seconds)));
    Ok(())
}

fn parts(f: &Flops) -> Vec<(&'static str, f64)> {
    let all = [
        ("rollouts: prompts, images", f.prefill),
        ("rollouts: sampled tokens", f.decode),
        ("reference", f.reference),
        ("forward", f.forward),
        ("backward", f.backward),
        ("computed again", f.again),
    ];
    all.into_iter().filter(|(_, flops)| *flops > 0.0).collect()
}

/// Seconds for a person.
fn time(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_unit_that_a_person_would_use() {
        assert_eq!([1.5, 300.0, 9000.0, 1e6].map(time), ["1.5 s", "5 min", "2.5 h", "11.6 days"]);
    }
}
