use crate::{Error, Result};

/// How to choose tokens, and when to stop.
///
/// # Log-probabilities
/// The log-probability that comes with a sampled token is
/// `logit / temperature - logsumexp(logits / temperature)` over all ids that may be sampled at all (every id outside
/// [`EngineOptions::forbidden`](super::EngineOptions::forbidden)), **after** temperature and **before** `top_k`, `top_p`
/// and `min_p` cut anything. At temperature 0 it is the one at temperature 1. The trainer computes the same figure with
/// the same bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probabilities reach this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Most tokens to sample in this turn.
    pub max_tokens: usize,
    /// Sampling ends with one of these; it is part of what was sampled.
    pub stop_ids: Vec<u32>,
    /// Sampling ends with the token that completes one of these, counted in the bytes sampled in this turn. That token
    /// stays whole, even where it goes on past the string.
    pub stop_strings: Vec<String>,
    /// With `stream` it decides every draw: the same prompt, seed and stream give the same tokens, whatever else is in
    /// the batch.
    pub seed: u64,
    /// Which of the sequences that share a seed this is. Sample `i` of a [`Request`](super::Request) has `stream + i`.
    pub stream: u64,
}

impl Default for Sampling {
    /// Temperature 1, nothing cut off, 256 tokens, no stop, seed 0.
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_tokens: 256,
            stop_ids: Vec::new(),
            stop_strings: Vec::new(),
            seed: 0,
            stream: 0,
        }
    }
}

impl Sampling {
    /// The most likely token each time.
    pub fn greedy(max_tokens: usize) -> Sampling {
        Sampling { temperature: 0.0, max_tokens, ..Sampling::default() }
    }

    pub(super) fn check(&self, has_tokenizer: bool) -> Result<()> {
        let bad = |field: &str, value: f32, range: &str| {
            Err(Error::input(format!("sampling: {field} is {value}"), format!("choose a {field} {range}")))
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad("temperature", self.temperature, "of at least 0");
        }
        if self.temperature > 0.0 && !self.temperature.recip().is_finite() {
            return bad("temperature", self.temperature, "of 0, or one that something can be divided by");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", self.min_p, "from 0 to 1");
        }
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(Error::input("sampling: a stop string is empty", "leave it out"));
        }
        if !self.stop_strings.is_empty() && !has_tokenizer {
            return Err(Error::input(
                "sampling: stop strings need to know the text of each token, and this engine was started without",
                "set EngineOptions::tokenizer, or use stop ids",
            ));
        }
        Ok(())
    }
}

/// Why sampling ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// With this stop id, which is the last token.
    Stop(u32),
    /// With the token that completed this stop string.
    StopString(String),
    /// After `max_tokens`.
    Length,
    /// The sequence filled the context (or all of the KV cache).
    Context,
    /// The handle was dropped or cancelled.
    Cancelled,
}

/// What was sampled in one turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The tokens, the stop token included.
    pub tokens: Vec<u32>,
    /// The log-probability of each (see [`Sampling`]).
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
    /// The weight epochs under which the first and the last token were sampled. They differ where weights changed in
    /// the middle; such a completion has no single policy.
    pub epochs: (u64, u64),
}

/// Finds stop strings in a growing text.
pub(super) struct StopStrings {
    /// The end of the text, long enough for the longest string to begin in it.
    tail: Vec<u8>,
    longest: usize,
}

impl StopStrings {
    pub fn new(sampling: &Sampling) -> StopStrings {
        StopStrings { tail: Vec::new(), longest: sampling.stop_strings.iter().map(String::len).max().unwrap_or(0) }
    }

    /// Appends a token's bytes; returns the first of `strings` that now occurs and did not before.
    pub fn push<'a>(&mut self, bytes: &[u8], strings: &'a [String]) -> Option<&'a str> {
        self.tail.extend_from_slice(bytes);
        let found = strings
            .iter()
            .filter(|s| s.len() <= self.tail.len())
            .find(|s| self.tail.windows(s.len()).any(|w| w == s.as_bytes()));
        // What was searched can only begin a match in its last `longest - 1` bytes.
        let keep = self.tail.len().min(self.longest.saturating_sub(1));
        self.tail.drain(..self.tail.len() - keep);
        found.map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_stop_string_may_span_tokens_and_end_within_one() {
        let strings = vec!["</code>".to_string(), "END".to_string()];
        let mut m = StopStrings::new(&Sampling { stop_strings: strings.clone(), ..Sampling::default() });
        for piece in ["x</", "co", "de"] {
            assert_eq!(m.push(piece.as_bytes(), &strings), None);
        }
        assert_eq!(m.push(b">\n\n", &strings), Some("</code>"));
    }

    #[test]
    fn unusable_settings_are_named() {
        let ok = Sampling::default();
        assert!(ok.check(false).is_ok());
        for (bad, word) in [
            (Sampling { temperature: f32::NAN, ..ok.clone() }, "temperature"),
            (Sampling { temperature: -1.0, ..ok.clone() }, "temperature"),
            (Sampling { temperature: f32::INFINITY, ..ok.clone() }, "temperature"),
            (Sampling { temperature: 1e-40, ..ok.clone() }, "temperature"),
            (Sampling { top_p: 0.0, ..ok.clone() }, "top_p"),
            (Sampling { min_p: 1.5, ..ok.clone() }, "min_p"),
            (Sampling { stop_strings: vec!["x".into()], ..ok.clone() }, "EngineOptions::tokenizer"),
            (Sampling { stop_strings: vec!["".into()], ..ok.clone() }, "empty"),
        ] {
            let e = bad.check(false).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        }
        assert!(Sampling { stop_strings: vec!["x".into()], ..ok }.check(true).is_ok());
    }

    proptest! {
        /// Against a search of the whole text after every piece.
        #[test]
        fn finds_what_a_search_of_the_whole_text_finds(
            pieces in proptest::collection::vec("[ab]{0,3}", 0..12),
            strings in proptest::collection::vec("[ab]{1,5}", 1..4),
        ) {
            let mut m = StopStrings::new(&Sampling { stop_strings: strings.clone(), ..Sampling::default() });
            let mut text = String::new();
            for p in pieces {
                text.push_str(&p);
                let expected = strings.iter().find(|s| text.contains(s.as_str()));
                prop_assert_eq!(m.push(p.as_bytes(), &strings), expected.map(String::as_str));
                if expected.is_some() {
                    break;
                }
            }
        }
    }
}
