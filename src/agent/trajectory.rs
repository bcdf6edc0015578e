use super::reward::Reward;
use crate::input::Image;
use crate::input::Prompt;
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Who wrote a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Author {
    /// The conversation before the model's first turn; shared by a group.
    Prompt,
    /// The model: these tokens are trained on.
    Policy,
    /// The tool, and the template around what it said: masked from the loss.
    Tool,
}

/// How an episode ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "detail")]
pub enum Ending {
    /// The model answered.
    Answered(String),
    /// It used up its turns without an answer.
    OutOfTurns,
    /// It used up its tokens in a turn, or the model's context.
    Truncated,
}

impl Ending {
    /// The name under which records and reports know it.
    pub fn name(&self) -> &'static str {
        match self {
            Ending::Answered(_) => "answered",
            Ending::OutOfTurns => "turn limit",
            Ending::Truncated => "length limit",
        }
    }
}

/// What a tool call did.
#[derive(Clone, Debug)]
pub struct ToolUse {
    /// The program.
    pub code: String,
    /// [`Outcome::kind`](crate::tools::Outcome::kind).
    pub status: &'static str,
    /// What it printed and, where it failed, why: all of it. The model is shown the end of either.
    pub output: String,
    /// Wall-clock milliseconds that it ran, without those in which it waited for a place to run.
    pub ms: f64,
}

/// One turn of the model and what it led to.
#[derive(Clone, Debug)]
pub struct Step {
    /// What the model wrote.
    pub text: String,
    /// Its tokens, as a range of [`Trajectory::sequence`].
    pub tokens: std::ops::Range<usize>,
    /// What `<problem>` named.
    pub problem: Vec<String>,
    /// Whether the turn kept the format.
    pub well_formed: bool,
    /// The call it led to, if any.
    pub tool: Option<ToolUse>,
    /// What the model was looking at.
    pub image_before: Arc<RgbImage>,
    /// What it was shown afterwards, if a tool ran.
    pub image_after: Option<Arc<RgbImage>>,
}

/// A whole episode: what the model read and wrote, token by token, and what it was worth.
///
/// `tokens`, `authors` and `logprobs` have one length. It can be trained on as it is: nothing is decoded and encoded again.
#[derive(Clone, Debug)]
pub struct Trajectory {
    /// The item it was about.
    pub item: String,
    /// Kind of the item: its degradations joined by `+`.
    pub kind: String,
    /// What was asked.
    pub question: String,
    /// The gold answers.
    pub answers: Vec<String>,
    /// Episodes of one group share an item and a prompt.
    pub group: u64,
    /// Index within the group.
    pub sample: u64,
    /// All token ids with the images that some of them stand for.
    pub sequence: Prompt,
    /// Tokens before the model's first turn.
    pub prompt_len: usize,
    /// Who wrote each token.
    pub authors: Vec<Author>,
    /// Log-probability of each token the model wrote, as [`Completion::logprobs`](crate::engine::Completion::logprobs)
    /// defines it; 0 elsewhere.
    pub logprobs: Vec<f32>,
    /// Temperature it was sampled at; its log-probabilities are at that temperature.
    pub temperature: f32,
    /// The turns, for people.
    pub steps: Vec<Step>,
    /// How it ended.
    pub ending: Ending,
    /// What it was worth.
    pub reward: Reward,
}

impl Trajectory {
    /// The answer, if the model gave one.
    pub fn answer(&self) -> Option<&str> {
        match &self.ending {
            Ending::Answered(a) => Some(a),
            _ => None,
        }
    }

    /// Tokens that the model wrote.
    pub fn sampled(&self) -> usize {
        self.authors.iter().filter(|a| **a == Author::Policy).count()
    }

    /// Images in the order in which the model saw them.
    pub fn images(&self) -> impl Iterator<Item = &Arc<Image>> {
        self.sequence.images.iter().map(|s| &s.image)
    }

    /// Adds tokens by somebody other than the model.
    pub(super) fn push_prompt(&mut self, prompt: &Prompt, author: Author) {
        self.sequence.append(prompt);
        self.authors.resize(self.sequence.len(), author);
        self.logprobs.resize(self.sequence.len(), 0.0);
    }

    /// Adds tokens that the model wrote, with their log-probabilities.
    pub(super) fn push_sampled(&mut self, tokens: &[u32], logprobs: &[f32]) -> std::ops::Range<usize> {
        let start = self.sequence.len();
        self.sequence.tokens.extend_from_slice(tokens);
        self.logprobs.extend_from_slice(logprobs);
        self.authors.resize(self.sequence.len(), Author::Policy);
        start..self.sequence.len()
    }
}
