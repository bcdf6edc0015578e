use super::generation::{Feed, Generation, Writer};
use super::sampling::Sampling;
use super::worker::Command;
use super::{Client, Result};
use crate::Error;
use crate::input::{ImageSpan, Prompt};
use std::sync::Arc;

/// A sequence of tokens and images that keeps its place in the KV cache from turn to turn.
///
/// [`append`](Session::append) a prompt, [`generate`](Session::generate), read the completion, append what a tool
/// answered, generate again: the second turn computes only what is new. What was sampled is part of the session, the stop
/// token included. While nobody generates, the session costs nothing but its pages, and those are the first to be taken
/// when others need memory; what was taken is computed again when the session goes on. Dropping the session frees it.
pub struct Session {
    pub(super) client: Arc<Client>,
    pub(super) id: u64,
    /// All tokens and images up to the last turn, which is added when it has ended.
    pub(super) history: Prompt,
    pub(super) last: Option<Arc<Feed>>,
}

impl Session {
    /// Adds tokens and images at the end.
    ///
    /// # Errors
    /// [`Error::Input`] if the prompt contradicts itself or a turn is still running; [`Error::Limit`] if it does not fit the
    /// context, or an image is too large for this engine. The session is as before then.
    pub fn append(&mut self, prompt: Prompt) -> Result<()> {
        self.finish_turn()?;
        self.client.check_prompt(&prompt, self.history.len())?;
        self.history.append(&prompt);
        self.client.send(Command::Append { id: self.id, prompt })
    }

    /// Samples on from the last token.
    ///
    /// # Errors
    /// If the session is empty, `sampling` makes no sense, or a turn is still running.
    pub fn generate(&mut self, sampling: Sampling) -> Result<Generation> {
        self.finish_turn()?;
        if self.history.is_empty() {
            return Err(Error::input("a session without tokens cannot generate", "append a prompt first"));
        }
        if self.history.len() >= self.client.max_context {
            return Err(self.client.too_long(self.history.len(), 1));
        }
        sampling.check(self.client.has_tokenizer)?;
        let (writer, feed) = Writer::new(self.client.link.clone());
        self.last = Some(feed.clone());
        self.client.send(Command::Generate { id: self.id, sampling: Arc::new(sampling), writer })?;
        Ok(Generation { feed, read: 0 })
    }

    /// Computes what was appended, but for the last token, and waits for it; forks made after it share the work.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn prefill(&mut self) -> Result<()> {
        self.generate(Sampling { max_tokens: 0, ..Sampling::default() })?.wait().map(drop)
    }

    /// A second session with the same past, which shares its pages; each goes its own way from here.
    ///
    /// # Errors
    /// If a turn is still running.
    pub fn fork(&mut self) -> Result<Session> {
        self.finish_turn()?;
        let id = self.client.next_id();
        self.client.send(Command::Fork { parent: self.id, child: id })?;
        Ok(Session { client: self.client.clone(), id, history: self.history.clone(), last: None })
    }

    /// All tokens so far: prompts and what was sampled.
    ///
    /// # Errors
    /// If a turn is still running.
    pub fn tokens(&mut self) -> Result<&[u32]> {
        self.finish_turn()?;
        Ok(&self.history.tokens)
    }

    /// The images so far, their offsets counted from the session's first token.
    pub fn images(&self) -> &[ImageSpan] {
        &self.history.images
    }

    /// Adds the last turn's tokens to the history.
    fn finish_turn(&mut self) -> Result<()> {
        let Some(feed) = &self.last else { return Ok(()) };
        if !feed.finished() && !feed.cancelled() {
            return Err(Error::input(
                "this session is still generating",
                "wait for its completion, or cancel it, before the session goes on",
            ));
        }
        // A cancelled turn ends before the engine's next step.
        let completion = feed.wait()?;
        self.last = None;
        self.history.tokens.extend(completion.tokens);
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // An engine that has ended has forgotten the session already.
        let _ = self.client.send(Command::Close { id: self.id });
    }
}

/// One prompt to sample from, without a session.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to go on from.
    pub prompt: Prompt,
    /// How; sample `i` takes the noise of `sampling.stream + i`.
    pub sampling: Sampling,
    /// How many completions. The prompt is computed once for all.
    pub n: usize,
}
