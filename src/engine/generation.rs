//! The way of sampled tokens from the engine's thread to their reader.
//!
//! A reader that only wants the end is woken once: waking thirty threads for each token would cost more than the rest of
//! the engine's host work.

use super::sampling::{Completion, Finish};
use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};

/// What all handles of an engine share with its thread.
#[derive(Default)]
pub(super) struct Link {
    /// Why the thread ended, if it failed.
    pub failure: OnceLock<String>,
    /// Turns cancelled so far: the thread looks through its turns when this rises.
    pub cancels: AtomicUsize,
}

impl Link {
    /// The error of whoever asks an engine that has ended.
    pub fn stopped(&self) -> Error {
        match self.failure.get() {
            Some(why) => Error::internal(format!("the engine failed: {why}")),
            None => Error::Cancelled("the engine was shut down".into()),
        }
    }
}

#[derive(Default)]
struct State {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    epochs: Option<(u64, u64)>,
    /// `Err`: why it failed, or `None` if the engine is gone.
    end: Option<Result<Finish, Option<&'static str>>>,
    /// The reader wants every token as it comes.
    streaming: bool,
}

/// One turn's tokens, shared by the engine (through a [`Writer`]), a [`Generation`] and its session.
pub(super) struct Feed {
    state: Mutex<State>,
    changed: Condvar,
    /// Set by the reader: the engine drops the turn before its next step.
    cancelled: AtomicBool,
    link: Arc<Link>,
}

impl Feed {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn finished(&self) -> bool {
        self.lock().end.is_some()
    }

    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn cancel(&self) {
        if !self.finished() && !self.cancelled.swap(true, Ordering::Relaxed) {
            self.link.cancels.fetch_add(1, Ordering::Release);
        }
    }

    fn failed(&self, why: Option<&'static str>) -> Error {
        match why {
            Some(why) => Error::input(why, "look at the weights: load them again, or go back to an earlier checkpoint"),
            None => self.link.stopped(),
        }
    }

    /// Blocks until the turn has ended, and returns what was sampled by then.
    ///
    /// # Errors
    /// [`Error::Internal`](crate::Error::Internal) where the engine was lost, or what made it stop.
    pub fn wait(&self) -> Result<Completion> {
        let mut s = self.lock();
        loop {
            match &s.end {
                None => s = self.changed.wait(s).unwrap_or_else(|e| e.into_inner()),
                Some(Err(why)) => return Err(self.failed(*why)),
                Some(Ok(finish)) => {
                    return Ok(Completion {
                        tokens: s.tokens.clone(),
                        logprobs: s.logprobs.clone(),
                        finish: finish.clone(),
                        epochs: s.epochs.unwrap_or_default(),
                    });
                }
            }
        }
    }
}

/// The engine's end of a [`Feed`]. Dropped before [`Writer::finish`], it tells the reader that the engine is gone.
pub(super) struct Writer(Arc<Feed>);

impl Writer {
    pub fn new(link: Arc<Link>) -> (Writer, Arc<Feed>) {
        let feed = Arc::new(Feed {
            state: Mutex::default(),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            link,
        });
        (Writer(feed.clone()), feed)
    }

    pub fn push(&self, token: u32, logprob: f32, epoch: u64) {
        let mut s = self.0.lock();
        s.tokens.push(token);
        s.logprobs.push(logprob);
        s.epochs = Some((s.epochs.map_or(epoch, |e| e.0), epoch));
        if s.streaming {
            self.0.changed.notify_all();
        }
    }

    pub fn cancelled(&self) -> bool {
        self.0.cancelled()
    }

    /// Ends the turn; `Err` says why it failed.
    pub fn finish(self, end: Result<Finish, &'static str>) {
        self.end(end.map_err(Some));
    }

    fn end(&self, end: Result<Finish, Option<&'static str>>) {
        let mut s = self.0.lock();
        if s.end.is_none() {
            s.end = Some(end);
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end(Err(None));
    }
}

/// A token that was sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probability (see [`Sampling`](super::Sampling)).
    pub logprob: f32,
}

/// A turn on its way: an iterator over its tokens as they are sampled, or one blocking [`Generation::wait`].
///
/// Dropping it before its end cancels the turn; what a session had sampled by then stays part of the session.
pub struct Generation {
    pub(super) feed: Arc<Feed>,
    pub(super) read: usize,
}

impl Generation {
    /// Blocks until sampling ends; the completion has all tokens, those already iterated over too.
    ///
    /// # Errors
    /// [`Error::Internal`](crate::Error::Internal) where the engine was lost, or what made it stop.
    pub fn wait(self) -> Result<Completion> {
        self.feed.wait()
    }

    /// Ends the turn before the engine's next step, with [`Finish::Cancelled`].
    pub fn cancel(&self) {
        self.feed.cancel();
    }

    /// A handle by which another thread can end the turn while this one waits for it.
    pub fn canceller(&self) -> Canceller {
        Canceller(Arc::downgrade(&self.feed))
    }

    /// Whether sampling has ended: [`Generation::wait`] would not block.
    pub fn finished(&self) -> bool {
        self.feed.finished()
    }
}

/// Ends a turn from another thread than the one that waits for it; see [`Generation::canceller`].
#[derive(Clone)]
pub struct Canceller(Weak<Feed>);

impl Canceller {
    /// As [`Generation::cancel`]; nothing where the turn has ended.
    pub fn cancel(&self) {
        if let Some(feed) = self.0.upgrade() {
            feed.cancel();
        }
    }
}

impl Iterator for Generation {
    type Item = Result<Sampled>;

    /// Blocks for the next token; `None` after the last. An engine that fails ends the iteration with its error.
    fn next(&mut self) -> Option<Result<Sampled>> {
        let mut s = self.feed.lock();
        s.streaming = true;
        loop {
            if let (Some(&token), Some(&logprob)) = (s.tokens.get(self.read), s.logprobs.get(self.read)) {
                self.read += 1;
                return Some(Ok(Sampled { token, logprob }));
            }
            match s.end {
                Some(Ok(_)) => return None,
                Some(Err(_)) if self.read == usize::MAX => return None,
                Some(Err(why)) => {
                    self.read = usize::MAX;
                    return Some(Err(self.feed.failed(why)));
                }
                None => s = self.feed.changed.wait(s).unwrap_or_else(|e| e.into_inner()),
            }
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_arrive_in_order_and_a_lost_engine_is_an_error() {
        let link = Arc::new(Link::default());
        let (w, feed) = Writer::new(link.clone());
        let reader = std::thread::spawn(move || Generation { feed, read: 0 }.collect::<Vec<_>>());
        w.push(3, -0.5, 1);
        w.push(4, -0.25, 2);
        link.failure.set("planted".into()).unwrap();
        drop(w);
        let got = reader.join().unwrap();
        assert_eq!(got.len(), 3);
        assert_eq!(got[1].as_ref().unwrap(), &Sampled { token: 4, logprob: -0.25 });
        assert!(got[2].as_ref().unwrap_err().to_string().contains("planted"));
    }

    #[test]
    fn a_completion_has_what_was_iterated_over_too() {
        let (w, feed) = Writer::new(Arc::default());
        w.push(3, -0.5, 1);
        w.push(4, -0.25, 2);
        let mut g = Generation { feed, read: 0 };
        assert_eq!(g.next().unwrap().unwrap().token, 3);
        assert!(!g.finished());
        w.finish(Ok(Finish::Length));
        let c = g.wait().unwrap();
        assert_eq!((c.tokens, c.logprobs, c.finish, c.epochs), (vec![3, 4], vec![-0.5, -0.25], Finish::Length, (1, 2)));
    }

    #[test]
    fn another_thread_can_cancel() {
        let (w, feed) = Writer::new(Arc::default());
        let g = Generation { feed, read: 0 };
        let canceller = g.canceller();
        canceller.cancel();
        assert!(w.cancelled());
        drop((g, w));
        canceller.cancel();
    }

    #[test]
    fn dropping_the_handle_cancels() {
        let (w, feed) = Writer::new(Arc::default());
        drop(Generation { feed, read: 0 });
        assert!(w.cancelled());
    }
}
