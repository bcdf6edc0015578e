use std::time::Duration;

/// What the scheduler counts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    pub sampled_tokens: u64,
    pub prefix_hit_tokens: u64,
    pub vision_hits: u64,
    pub vision_misses: u64,
    pub preemptions: u64,
    pub retracted_tokens: u64,
    pub turns: u64,
}

/// The engine's figures at one moment; totals count from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Steps run.
    pub steps: u64,
    /// Those of them that a GPU replayed from a graph.
    pub graph_steps: u64,
    /// Tokens sampled.
    pub sampled_tokens: u64,
    /// Prompt tokens that went through the decoder, those computed again after preemption included.
    pub prefill_tokens: u64,
    /// Prompt tokens that did not have to, because another sequence had computed them.
    pub prefix_hit_tokens: u64,
    /// Images encoded.
    pub images_encoded: u64,
    /// Times an image was found encoded.
    pub image_hits: u64,
    /// Turns that have ended.
    pub turns: u64,
    /// Times a running sequence had to give pages to an older one.
    pub preemptions: u64,
    /// Tokens whose keys and values were given up to make room, and computed again where they were needed again.
    pub retracted_tokens: u64,
    /// Time in steps, from planning to reading the results.
    pub busy: Duration,
    /// The part of `busy` in which the host planned and took in results.
    pub host: Duration,
    /// Prompt tokens a second, over the last seconds of work.
    pub prefill_per_second: f64,
    /// Sampled tokens a second, over the last seconds of work.
    pub decode_per_second: f64,
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait to run.
    pub waiting: usize,
    /// Sequences in all, parked sessions included.
    pub sequences: usize,
    /// Pages of the KV cache.
    pub pages: usize,
    /// Pages held by sequences.
    pub pages_held: usize,
    /// Pages held by nobody that a later prompt could still use.
    pub pages_cached: usize,
    /// Bytes of the KV cache.
    pub kv_bytes: usize,
    /// Images whose encoding is kept.
    pub images_cached: usize,
    /// Bytes taken by them.
    pub vision_bytes_used: usize,
    /// Bytes there are for them.
    pub vision_bytes: usize,
    /// Rises when the weights change.
    pub epoch: u64,
}

/// Seconds of work over which rates are averaged.
const WINDOW: f64 = 5.0;

impl Stats {
    /// Takes in one step's tokens and time.
    pub(super) fn record(&mut self, prefill: usize, sampled: usize, took: Duration, host: Duration) {
        self.steps += 1;
        self.prefill_tokens += prefill as u64;
        self.busy += took;
        self.host += host;
        let seconds = took.as_secs_f64().max(1e-9);
        // The first seconds average over what there is.
        let keep = (-seconds / WINDOW.min(self.busy.as_secs_f64())).exp();
        for (rate, n) in [(&mut self.prefill_per_second, prefill), (&mut self.decode_per_second, sampled)] {
            *rate = *rate * keep + n as f64 / seconds * (1.0 - keep);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_settle_at_what_goes_through() {
        let mut s = Stats::default();
        for _ in 0..4000 {
            s.record(10, 32, Duration::from_millis(10), Duration::from_micros(50));
        }
        assert!((s.decode_per_second - 3200.0).abs() < 32.0, "{}", s.decode_per_second);
        assert!((s.prefill_per_second - 1000.0).abs() < 10.0, "{}", s.prefill_per_second);
        assert_eq!((s.steps, s.busy), (4000, Duration::from_secs(40)));
    }
}
