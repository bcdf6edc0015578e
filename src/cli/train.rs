use super::dry;
use super::session::{RunArgs, Session, stop_on_signal};
use super::setup::Folder;
use crate::Result;
use crate::train::grpo;
use crate::train::room::Work;

/// Train a model by reinforcement learning (GRPO) on its own episodes
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  varft train run.toml --set optim.steps=100\n  varft train run.toml --dry-run\n  varft train runs/mine --resume\n\n\
                        run.toml needs little; every other key has a default, and the run's folder gets a config.toml with all of them:\n  \
                        [run]\n  name = \"mine\"\n  [model]\n  path = \"models/Qwen2.5-VL-3B-Instruct\"\n\n\
                        Ctrl-C saves a checkpoint and ends (a step of several updates may be finished first); a second one ends at once. A run that was stopped, or killed, goes on with \
                        --resume to the same weights, bit for bit."
)]
pub(super) struct Args {
    #[command(flatten)]
    run: RunArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let config = args.run.config()?;
    if args.run.dry_run {
        return dry::train(&config);
    }
    let session = Session::open(&config, "train", args.run.resume)?;
    let stop = stop_on_signal()?;
    let loaded = Folder::open(&config)?.load(&config, session.weights(), Work::Episodes)?;
    let setup = loaded.setup(&config, &stop)?;
    let reference = loaded.reference(&config)?;
    let mut learner = loaded.learner(&config, setup.engine.forbidden())?;
    session.restore(&mut learner)?;
    let mut keeper = session.keeper(&config, &loaded)?;
    session.end(grpo::train(&config, &setup, &mut learner, reference.as_ref(), &mut keeper))
}
