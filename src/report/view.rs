//! What of an episode is written down for a person to look at: plain data, one JSON object per episode.
//!
//! Images are named by [`ImageRef`]; [`super::TrajectoryStore::image`] writes them and gives the name.

use serde::{Deserialize, Serialize};

/// The name of an image in a run's `trajectories/images/`: a hash of its pixels, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageRef(pub String);

/// Where an episode comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Held-out items.
    Eval,
    /// Rollouts that were trained on.
    Train,
}

impl Phase {
    /// As it stands in file names.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Eval => "eval",
            Phase::Train => "train",
        }
    }
}

/// One episode: a question, what the model did, what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpisodeView {
    /// Completed optimizer steps when it was rolled out.
    pub step: u64,
    /// Training or evaluation.
    pub phase: Phase,
    /// The item's id in its data set.
    pub item: String,
    /// What was done to the image (`rotation90+blur`), or another label of the item; may be empty.
    pub kind: String,
    /// Episodes of one group answer the same question with the same image.
    pub group: u64,
    /// Which of its group this is.
    pub sample: u64,
    /// How many its group has, written down or not; 0 in files of before this was noted.
    #[serde(default)]
    pub of: u64,
    /// What was asked.
    pub question: String,
    /// The answers that count as right.
    pub answers: Vec<String>,
    /// The model's answer, if it gave one.
    pub prediction: Option<String>,
    /// How it ended: `answered`, `turn limit`, `length limit`, `tool failed`, ...
    pub finish: String,
    /// The conversation in order.
    pub steps: Vec<StepView>,
    /// F1 of the answer, 0 to 1.
    pub f1: f64,
    /// Exact match of the answer, 0 or 1.
    pub em: f64,
    /// The sum that the trainer saw.
    pub reward: f64,
    /// What it is the sum of.
    pub reward_parts: Vec<RewardPart>,
    /// The advantage within its group; none in evaluation or when its group was dropped.
    pub advantage: Option<f64>,
}

/// A summand of the reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RewardPart {
    /// `answer`, `format`, ...
    pub name: String,
    /// Its contribution, weight included.
    pub value: f64,
}

/// One turn of the conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepView {
    /// `system`, `user`, `assistant` or `tool`.
    pub who: String,
    /// What was said, as text.
    pub text: String,
    /// The sampled tokens of an assistant's turn with their log-probabilities; empty where nobody kept them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<TokenView>,
    /// The program that was run, if the turn called for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What the tool printed or how it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_output: Option<String>,
    /// How the call ended: `ok`, `exception`, `cpu limit`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_status: Option<String>,
    /// Wall time of the call in milliseconds, without waiting for a place to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_ms: Option<f64>,
    /// The image the model saw when it spoke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_before: Option<ImageRef>,
    /// The image it sees next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_after: Option<ImageRef>,
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenView {
    /// Its text. Empty where its bytes belong to a character that began in a token before it, which then has the text of
    /// both; bytes that are no character at all are replaced.
    #[serde(rename = "t")]
    pub text: String,
    /// Its log-probability when it was sampled (natural logarithm).
    #[serde(rename = "lp")]
    pub logp: f32,
}
