use crate::engine::{Canceller, Engine, Finish, Sampling, Session};
use crate::input::{ChatTemplate, Image, Message, Prompt, Tokenizer, build_prompt, continue_prompt};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// What the model said in one turn.
#[derive(Clone, Debug)]
pub struct Said {
    /// The text, without control tokens.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The log-probability of each.
    pub logprobs: Vec<f32>,
    /// Whether it was cut off by a limit on tokens or by the context.
    pub cut: bool,
}

/// Who answers: something that can hold conversations.
pub trait Policy: Send + Sync {
    /// Starts `n` conversations with the same opening (a group); its work is shared between them where possible.
    fn open(&self, messages: &[Message], images: &[Arc<Image>], n: usize) -> Result<Vec<Box<dyn Conversation>>>;
    /// Ends the turns that are under way; they fail with [`Error::Cancelled`]. Turns that begin later are not affected.
    fn interrupt(&self) {}
}

/// One conversation with a [`Policy`], which keeps its state between turns.
pub trait Conversation: Send {
    /// The tokens of the opening.
    fn opening(&self) -> &Prompt;
    /// Adds turns of others; returns the tokens they became, the end of the model's own turn included.
    fn hear(&mut self, messages: &[Message], images: &[Arc<Image>]) -> Result<Prompt>;
    /// Lets the model take its turn.
    fn speak(&mut self, sampling: &Sampling) -> Result<Said>;
}

/// Our engine as a [`Policy`].
pub struct EnginePolicy {
    engine: Arc<Engine>,
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
    turns: Arc<Turns>,
}

/// The turns under way, by a number of their own.
#[derive(Default)]
struct Turns(Mutex<(u64, HashMap<u64, Canceller>)>);

impl Turns {
    fn lock(&self) -> MutexGuard<'_, (u64, HashMap<u64, Canceller>)> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl EnginePolicy {
    /// A policy that speaks through `engine`, with a model folder's tokenizer and template.
    pub fn new(engine: Arc<Engine>, tokenizer: Arc<Tokenizer>, template: Arc<ChatTemplate>) -> Self {
        EnginePolicy { engine, tokenizer, template, turns: Arc::default() }
    }
}

impl Policy for EnginePolicy {
    fn open(&self, messages: &[Message], images: &[Arc<Image>], n: usize) -> Result<Vec<Box<dyn Conversation>>> {
        let prompt = build_prompt(&self.tokenizer, &self.template, messages, images)?;
        let mut first = self.engine.session();
        first.append(prompt.clone())?;
        if n > 1 {
            first.prefill()?;
        }
        let mut sessions = Vec::with_capacity(n);
        for _ in 1..n {
            sessions.push(first.fork()?);
        }
        sessions.push(first);
        Ok(sessions
            .into_iter()
            .map(|session| {
                Box::new(EngineConversation {
                    session,
                    opening: prompt.clone(),
                    ended: false,
                    tokenizer: self.tokenizer.clone(),
                    template: self.template.clone(),
                    turns: self.turns.clone(),
                }) as Box<dyn Conversation>
            })
            .collect())
    }

    fn interrupt(&self) {
        self.turns.lock().1.values().for_each(Canceller::cancel);
    }
}

struct EngineConversation {
    session: Session,
    opening: Prompt,
    /// The model itself ended its last turn with `<|im_end|>`.
    ended: bool,
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
    turns: Arc<Turns>,
}

impl Conversation for EngineConversation {
    fn opening(&self) -> &Prompt {
        &self.opening
    }

    fn hear(&mut self, messages: &[Message], images: &[Arc<Image>]) -> Result<Prompt> {
        let prompt = continue_prompt(&self.tokenizer, &self.template, messages, images, self.ended)?;
        self.session.append(prompt.clone())?;
        Ok(prompt)
    }

    fn speak(&mut self, sampling: &Sampling) -> Result<Said> {
        let mut sampling = sampling.clone();
        let special = self.tokenizer.special();
        sampling.stop_ids.extend([special.im_end, special.endoftext]);
        let generation = self.session.generate(sampling)?;
        let turn = {
            let mut turns = self.turns.lock();
            turns.0 += 1;
            let number = turns.0;
            turns.1.insert(number, generation.canceller());
            number
        };
        let completion = generation.wait();
        self.turns.lock().1.remove(&turn);
        let c = completion?;
        let cut = match &c.finish {
            Finish::Cancelled => return Err(Error::Cancelled("the engine was asked to stop this conversation".into())),
            Finish::Length | Finish::Context => true,
            Finish::Stop(_) | Finish::StopString(_) => false,
        };
        self.ended = c.tokens.last() == Some(&special.im_end);
        Ok(Said { text: self.tokenizer.decode_text(&c.tokens), tokens: c.tokens, logprobs: c.logprobs, cut })
    }
}
