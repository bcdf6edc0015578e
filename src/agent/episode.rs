use super::coding::CodingProtocol;
use super::policy::Conversation;
use super::reward::{Reward, RewardRule};
use super::trajectory::{Author, Ending, Step, ToolUse, Trajectory};
use super::turn::{Action, parse_turn};
use crate::engine::Sampling;
use crate::input::{Image, Message};
use crate::tasks::Example;
use crate::tools::{Limits, Tool, ToolCall};
use crate::{Error, Result};
use image::RgbImage;
use std::sync::Arc;

/// How episodes are run.
#[derive(Clone, Debug)]
pub struct EpisodeOptions {
    /// Turns of the model at most; the last one should be its answer.
    pub max_turns: usize,
    /// How each turn is sampled; `max_tokens` is per turn. Stop strings, seed and stream are set per episode.
    pub sampling: Sampling,
    /// Characters of a program's output that the model is shown.
    pub max_output_chars: usize,
    /// Limits of one tool call.
    pub limits: Limits,
    /// Show the original image after every call in place of what the code made of it: an ablation that tells whether
    /// answers come from what the tool showed.
    pub withhold_images: bool,
    /// How episodes are rewarded.
    pub reward: RewardRule,
}

impl Default for EpisodeOptions {
    fn default() -> Self {
        EpisodeOptions {
            max_turns: 4,
            sampling: Sampling { max_tokens: 512, ..Sampling::default() },
            max_output_chars: 2000,
            limits: Limits::default(),
            withhold_images: false,
            reward: RewardRule::default(),
        }
    }
}

/// Which episode this is: names it in records and keys its randomness.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub group: u64,
    pub sample: u64,
    pub seed: u64,
}

/// Runs one episode of the coding protocol to its end.
///
/// `see` turns pixels into what the model reads (resized, hashed). The image that code leaves behind becomes the current
/// one; where code fails or leaves none, the current image stays and is shown again.
///
/// # Errors
/// Failures of the machinery (engine, tool): the episode is then void, not wrong.
pub(super) fn run_episode(
    conversation: &mut dyn Conversation,
    protocol: &CodingProtocol,
    tool: &dyn Tool,
    see: &dyn Fn(&Arc<RgbImage>) -> Result<Arc<Image>>,
    example: &Example,
    options: &EpisodeOptions,
    key: Key,
) -> Result<Trajectory> {
    let mut t = Trajectory {
        item: example.id.to_string(),
        kind: example.kinds.iter().map(|k| k.name()).collect::<Vec<_>>().join("+"),
        question: example.question.clone(),
        answers: example.answers.clone(),
        group: key.group,
        sample: key.sample,
        sequence: Default::default(),
        prompt_len: conversation.opening().len(),
        authors: Vec::new(),
        logprobs: Vec::new(),
        temperature: options.sampling.temperature,
        steps: Vec::new(),
        ending: Ending::OutOfTurns,
        reward: Reward::default(),
    };
    t.push_prompt(conversation.opening(), Author::Prompt);
    let sampling = Sampling {
        stop_strings: protocol.stop_strings(),
        seed: key.seed,
        stream: key.group.wrapping_mul(1 << 20).wrapping_add(key.sample),
        ..options.sampling.clone()
    };
    let mut image = example.input().clone();
    for turn_index in 0..options.max_turns {
        let said = conversation.speak(&sampling)?;
        let tokens = t.push_sampled(&said.tokens, &said.logprobs);
        let turn = parse_turn(&said.text);
        let mut step = Step {
            text: said.text,
            tokens,
            problem: turn.problem,
            well_formed: turn.well_formed,
            tool: None,
            image_before: image.clone(),
            image_after: None,
        };
        let last = turn_index + 1 == options.max_turns;
        let mut observation: Option<(Message, Vec<Arc<Image>>)> = None;
        let mut ending = None;
        match turn.action {
            _ if said.cut => ending = Some(Ending::Truncated),
            Action::Answer(answer) => ending = Some(Ending::Answered(answer)),
            // Nobody would see what the code of the last turn made.
            Action::Code(_) | Action::Nothing if last => ending = Some(Ending::OutOfTurns),
            Action::Code(code) => {
                let result = tool.run(ToolCall {
                    input: code.clone(),
                    images: vec![image.clone()],
                    seed: key.seed ^ key.sample,
                    limits: options.limits.clone(),
                })?;
                if let Some(made) = &result.image {
                    image = Arc::new(made.clone());
                }
                let shown = if options.withhold_images { example.input() } else { &image };
                let (shown, seen) = match see(shown) {
                    Ok(seen) => (shown.clone(), seen),
                    // Code may leave an image that no model can be shown (a strip one pixel high): it sees the one before.
                    Err(_) => {
                        image = step.image_before.clone();
                        (image.clone(), see(&image)?)
                    }
                };
                let message = protocol.observation(&result, options.max_output_chars);
                step.tool = Some(ToolUse {
                    code,
                    status: result.outcome.kind(),
                    output: [result.stdout.as_str(), &result.outcome.message()].join("\n").trim().to_owned(),
                    ms: result.usage.wall.as_secs_f64() * 1e3,
                });
                step.image_after = Some(shown);
                observation = Some((message, vec![seen]));
            }
            Action::Nothing => observation = Some((protocol.nudge(), Vec::new())),
        }
        t.steps.push(step);
        if let Some(ending) = ending {
            t.ending = ending;
            break;
        }
        if let Some((message, images)) = observation {
            match conversation.hear(&[message], &images) {
                Ok(heard) => t.push_prompt(&heard, Author::Tool),
                // What the tool had to say does not fit the context: the model's doing, not the machinery's.
                Err(Error::Limit { .. }) => {
                    t.ending = Ending::Truncated;
                    break;
                }
                Err(e) => return Err(e),
            }
        }
    }
    t.reward = options.reward.score(t.answer(), &t.answers, t.steps.iter().all(|s| s.well_formed));
    Ok(t)
}
