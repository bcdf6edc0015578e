//! The agent: what the model may say and what it gets back, whole episodes with real tools, and their rewards.
//!
//! | file | what it holds |
//! |---|---|
//! | `turn` | reads one assistant turn: diagnosis, code, answer |
//! | `coding` | the coding protocol of Visual-ARFT: problem, code, answer; its prompts |
//! | `policy` | who answers: our engine, behind a trait |
//! | `episode` | runs one episode: turns, tool calls, observations |
//! | `trajectory` | what came of it: tokens, who wrote each, log-probabilities, images, reward parts |
//! | `reward` | outcome and format |
//! | `rollouts` | many episodes at once |
//! | `script` | a policy that says what a teacher wrote, for warm starts |
//! | `recorded` | conversations from a file, to learn from |

mod coding;
mod episode;
mod policy;
mod recorded;
mod reward;
mod rollouts;
mod script;
mod trajectory;
mod turn;

pub use coding::{CodingProtocol, PromptStyle};
pub use episode::EpisodeOptions;
pub use policy::{Conversation, EnginePolicy, Policy, Said};
pub use recorded::{Conversations, Length};
pub use reward::{Accuracy, Reward, RewardRule};
pub use rollouts::{Episodes, Job, Partial, Rollouts, See, Void};
pub use script::{ScriptedPolicy, demonstration};
pub use trajectory::{Author, Ending, Step, ToolUse, Trajectory};
pub use turn::{Action, Turn, parse_turn};
