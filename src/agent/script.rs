use super::policy::{Conversation, Policy, Said};
use crate::engine::Sampling;
use crate::input::{ChatTemplate, Image, Message, Prompt, Tokenizer, build_prompt, continue_prompt};
use crate::tasks::{Example, synthetic};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::sync::Arc;

/// The turns of a perfect episode on an example of the synthetic task, in the form that [`CodingProtocol`](super::CodingProtocol)
/// asks for: the repair, where there is something to repair, then the answer.
pub fn demonstration(example: &Example) -> Vec<String> {
    let answer = format!("<problem> {{'none'}} </problem>\n<answer> {} </answer>", example.answers[0]);
    let code = synthetic::teacher(example);
    if code.is_empty() {
        return vec![answer];
    }
    let kinds = example.kinds.iter().map(|k| format!("'{k}'")).collect::<Vec<_>>().join(", ");
    vec![format!("<problem> {{{kinds}}} </problem>\n<code>\n```python\n{code}\n```\n</code>"), answer]
}

/// A policy that says what was written down for it: turns a teacher's episodes into trajectories, tool calls and all.
///
/// Its log-probabilities are zero: such trajectories are for supervised training, not for policy gradients.
#[derive(Clone)]
pub struct ScriptedPolicy {
    /// Encodes what is said.
    pub tokenizer: Arc<Tokenizer>,
    /// Wraps it in turns.
    pub template: Arc<ChatTemplate>,
    /// The turns, in order.
    pub lines: Vec<String>,
}

impl Policy for ScriptedPolicy {
    fn open(&self, messages: &[Message], images: &[Arc<Image>], n: usize) -> Result<Vec<Box<dyn Conversation>>> {
        let opening = build_prompt(&self.tokenizer, &self.template, messages, images)?;
        Ok((0..n)
            .map(|_| {
                Box::new(Scripted {
                    opening: opening.clone(),
                    lines: self.lines.clone().into(),
                    tokenizer: self.tokenizer.clone(),
                    template: self.template.clone(),
                }) as Box<dyn Conversation>
            })
            .collect())
    }
}

struct Scripted {
    opening: Prompt,
    lines: VecDeque<String>,
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
}

impl Conversation for Scripted {
    fn opening(&self) -> &Prompt {
        &self.opening
    }

    fn hear(&mut self, messages: &[Message], images: &[Arc<Image>]) -> Result<Prompt> {
        continue_prompt(&self.tokenizer, &self.template, messages, images, false)
    }

    fn speak(&mut self, _: &Sampling) -> Result<Said> {
        let text = self.lines.pop_front().ok_or_else(|| {
            Error::input("the script is over before its episode", "end the script with a turn that answers")
        })?;
        let tokens = self.tokenizer.encode_plain(&text)?;
        Ok(Said { logprobs: vec![0.0; tokens.len()], text, tokens, cut: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{Action, parse_turn};
    use crate::tasks::synthetic::{Config, Subset, Synthetic};

    #[test]
    fn demonstrations_keep_the_form_they_teach() {
        let task = Synthetic::new(Config::default(), 1).unwrap();
        for i in 0..40 {
            let example = task.example(Subset::Train, i);
            let turns: Vec<_> = demonstration(&example).iter().map(|t| parse_turn(t)).collect();
            assert!(turns.iter().all(|t| t.well_formed), "{turns:?}");
            let kinds: Vec<_> = example.kinds.iter().map(|k| k.name()).collect();
            assert_eq!(turns[0].problem, kinds);
            assert_eq!(turns.last().unwrap().action, Action::Answer(example.answers[0].clone()));
        }
    }
}
