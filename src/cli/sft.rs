use super::dry;
use super::session::{RunArgs, Session, stop_on_signal};
use super::setup::{Folder, episode_options, python, see, training_examples};
use crate::agent::{CodingProtocol, Conversations, Job, Rollouts, ScriptedPolicy, Trajectory, demonstration};
use crate::engine::placeholders;
use crate::tasks::Examples;
use crate::train::RunConfig;
use crate::train::config::TaskKind;
use crate::train::order::item_at;
use crate::train::room::Work;
use crate::train::sft;
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Teach a model from conversations, or from the synthetic task's demonstrations (supervised fine-tuning)
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  varft sft --set run.name=warm --set model.path=models/tiny --set sft.data=talks.jsonl --set optim.lr=1e-5\n  \
                        varft sft runs/warm --resume\n\n\
                        talks.jsonl holds one conversation per line, as Hugging Face writes them; images are paths, relative to the file, and \
                        the loss is on what the assistant says:\n  \
                        [{\"role\": \"user\", \"content\": [{\"type\": \"image\", \"image\": \"a.png\"}, {\"type\": \"text\", \"text\": \
                        \"What is this?\"}]}, {\"role\": \"assistant\", \"content\": \"A cat.\"}]\n\n\
                        Without sft.data it teaches the steps of the synthetic task: whole episodes with real tool calls."
)]
pub(super) struct Args {
    #[command(flatten)]
    run: RunArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let config = args.run.config()?;
    if args.run.dry_run {
        return dry::sft(&config);
    }
    let session = Session::open(&config, "sft", args.run.resume)?;
    let stop = stop_on_signal()?;
    // What is wrong with the data should not wait for the weights.
    let source = match config.sft.data.as_str() {
        "" => None,
        path => Some(Conversations::open(Path::new(path))?),
    };
    source.as_ref().map_or(Ok(()), Conversations::check_images)?;
    let folder = Folder::open(&config)?;
    let most = folder.config.max_position_embeddings;
    let lengths = source.as_ref().map_or(Ok(Vec::new()), |talks| {
        talks.lengths(&folder.tokenizer, &folder.template, folder.preprocessor.processor(), most)
    })?;
    let longest = lengths.iter().map(|l| l.tokens).max().unwrap_or(0);
    let loaded = folder.load(&config, session.weights(), Work::Conversations { longest })?;
    let folder = &loaded.folder;
    let forbidden = placeholders(&folder.config, Some(&folder.tokenizer));
    let mut learner = loaded.learner(&config, &forbidden)?;
    session.restore(&mut learner)?;
    let seed = config.run.seed;
    let finished = match source {
        Some(talks) => {
            let mut keeper = session.keeper(&config, &loaded)?;
            sft::sft(&config, &mut learner, &mut keeper, &stop, |i| {
                let item = item_at(seed, talks.count() as u64, i) as usize;
                talks.trajectory(item, &folder.tokenizer, &folder.template, &folder.preprocessor, most)
            })
        }
        None => {
            let teacher = Teacher::new(&config, folder, &stop)?;
            let mut keeper = session.keeper(&config, &loaded)?;
            sft::sft(&config, &mut learner, &mut keeper, &stop, |i| teacher.episode(i, seed))
        }
    };
    session.end(finished)
}

/// Plays the synthetic task perfectly.
struct Teacher {
    examples: Arc<dyn Examples>,
    rollouts: Rollouts,
    script: ScriptedPolicy,
}

impl Teacher {
    fn new(config: &RunConfig, folder: &Folder, stop: &Arc<AtomicBool>) -> Result<Teacher> {
        if config.task.kind != TaskKind::Synthetic {
            return Err(Error::input(
                "`sft.data` is not set, and only the synthetic task has demonstrations of its own",
                "name a file of conversations: --set sft.data=FILE, or choose --set task.kind=synthetic",
            ));
        }
        let (tokenizer, template) = (folder.tokenizer.clone(), folder.template.clone());
        let script = ScriptedPolicy { tokenizer, template, lines: Vec::new() };
        Ok(Teacher {
            examples: training_examples(config)?,
            rollouts: Rollouts {
                policy: Arc::new(script.clone()),
                protocol: CodingProtocol { style: config.rollout.prompt },
                tool: python(config)?,
                see: see(folder.preprocessor.clone()),
                options: episode_options(config),
                concurrency: 1,
                stop: stop.clone(),
            },
            script,
        })
    }

    /// The `i`-th episode of the endless sequence.
    fn episode(&self, i: u64, seed: u64) -> Result<Trajectory> {
        let example = self.examples.get(item_at(seed, self.examples.len(), i))?;
        let policy = ScriptedPolicy { lines: demonstration(&example), ..self.script.clone() };
        let rollouts = Rollouts { policy: Arc::new(policy), ..self.rollouts.clone() };
        let episodes = rollouts.run(&[Job { example, group: i, samples: 1 }], seed, |_, _| ())?;
        match episodes.into_iter().flatten().next() {
            Some(Ok(t)) => Ok(t),
            Some(Err(void)) => Err(void.error),
            None => Err(Error::internal("a job without an episode")),
        }
    }
}
