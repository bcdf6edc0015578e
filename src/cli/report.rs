use crate::Result;
use std::path::PathBuf;

/// Make report.html of a run: curves, and episodes with their images
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  varft report runs/mine\n\nThe page is one file that opens offline. It can be made while the run goes on."
)]
pub(super) struct Args {
    /// The folder of the run
    run: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<()> {
    say!("{}", crate::report::write(&args.run)?.display());
    Ok(())
}
