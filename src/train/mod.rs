//! Training: what a run is (its file), how large a step, what each completion is worth, and how a run survives.
//!
//! | file | what it holds |
//! |---|---|
//! | [`config`] | the run file: every key, its meaning, its default |
//! | [`schedule`] | the learning rate over the steps |
//! | [`advantages`] | what each completion of a group is worth, and each of its tokens in the loss |
//! | [`optimizer`] | AdamW over the flat parameters, clipping, steps that are not taken |
//! | [`batch`] | trajectories into micro-batches |
//! | [`learner`] | a model, its gradients, its updates |
//! | [`room`] | the largest batches that a run file allows |
//! | [`memory`] | what a run holds in memory, and what would make it fit |
//! | [`flops`] | how much arithmetic a step is |
//! | [`sft`], [`grpo`] | the two loops |
//! | [`run`] | what a run works with and writes down |
//! | [`order`] | the order of the data |
//! | [`checkpoint`] | folders that are whole or not there, found again after a crash |

pub mod advantages;
pub mod batch;
pub mod checkpoint;
pub mod config;
mod config_file;
pub mod flops;
pub mod grpo;
pub mod learner;
pub mod memory;
pub mod optimizer;
pub mod order;
pub mod room;
pub mod run;
pub mod schedule;
pub mod sft;

pub use checkpoint::{Checkpoint, Checkpoints, TrainState};
pub use config::RunConfig;
pub use optimizer::Optimizer;
pub use schedule::Schedule;
