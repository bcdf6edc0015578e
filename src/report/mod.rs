//! A run shows itself: metrics, TensorBoard events, a progress bar, trajectories, and one HTML page of it all.
//!
//! What a run writes while it goes (all under its folder `runs/NAME/`):
//!
//! | file | written by | what it holds |
//! |---|---|---|
//! | `metrics.jsonl` | [`MetricsLog`] | one JSON object per line: `step`, `wall_s`, and named figures |
//! | `tensorboard/` | [`MetricsLog`] | the same figures as TensorBoard events |
//! | `trajectories/PHASE-STEP.jsonl` | [`TrajectoryStore`] | one [`view::EpisodeView`] per line |
//! | `table.txt` | `varft eval` | the table that it printed |
//! | `trajectories/images/HASH.png` | [`TrajectoryStore`] | every image once, named by its content |
//!
//! [`write()`] makes `report.html` from that folder alone, at any time, also after a crash or on another machine: one
//! file that opens offline. Nothing in it is trusted: model output, tool output and questions are escaped, control
//! characters are made visible, and a content security policy forbids any script but the page's own.

mod charts;
mod episodes;
mod escape;
mod metrics;
mod page;
mod progress;
mod store;
mod tables;
mod tensorboard;
pub mod view;

pub use metrics::{MetricsLog, Record, kinds, read_metrics};
pub use page::{Limits, TABLE, write, write_with};
pub use progress::Progress;
pub use store::{TrajectoryFile, TrajectoryStore};
pub use tensorboard::EventWriter;
