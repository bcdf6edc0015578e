//! The learning rate over the steps of a run.

use super::config::Optim;
use serde::{Deserialize, Serialize};

/// How the rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// It stays at its peak.
    Constant,
    /// It falls in a line to its final value.
    Linear,
    /// It falls along half a cosine to its final value (SGDR, arXiv 1608.03983, equation 5, without restarts).
    Cosine,
}

/// A warm-up in a line, then a [`Decay`].
///
/// Step 0 is the first. The warm-up's last step has the peak rate, so no step is wasted at rate 0; the decay would reach
/// its final value at the step after the last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The highest rate.
    pub peak: f64,
    /// What the decay ends at.
    pub floor: f64,
    /// Steps of rising.
    pub warmup: u64,
    /// All steps.
    pub total: u64,
    /// What follows the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// The schedule that a run file asks for.
    pub fn new(o: &Optim) -> Schedule {
        Schedule { peak: o.lr, floor: o.lr * o.final_lr, warmup: o.warmup_steps, total: o.steps, decay: o.schedule }
    }

    /// The rate of `step`, counted from 0. Past the end it stays at its last value.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let length = self.total.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / length).min(1.0);
        let share = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - done,
            Decay::Cosine => 0.5 + 0.5 * (std::f64::consts::PI * done).cos(),
        };
        self.floor + (self.peak - self.floor) * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn schedule(decay: Decay) -> Schedule {
        Schedule { peak: 1.0, floor: 0.2, warmup: 4, total: 12, decay }
    }

    #[test]
    fn by_hand() {
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            let s = schedule(decay);
            assert_eq!([0, 1, 2, 3, 4].map(|i| s.lr(i)), [0.25, 0.5, 0.75, 1.0, 1.0]);
        }
        assert_eq!(
            [8, 11, 12, 99].map(|i| schedule(Decay::Linear).lr(i)).map(|x| (x * 1e9).round() / 1e9),
            [0.6, 0.3, 0.2, 0.2]
        );
        assert!((schedule(Decay::Cosine).lr(8) - 0.6).abs() < 1e-12);
        assert_eq!(schedule(Decay::Constant).lr(11), 1.0);
        // No warm-up, and a run of one step.
        assert_eq!(Schedule { warmup: 0, total: 1, ..schedule(Decay::Linear) }.lr(0), 1.0);
        assert_eq!(Schedule { warmup: 0, total: 0, ..schedule(Decay::Cosine) }.lr(0), 1.0);
    }

    proptest! {
        #[test]
        fn rises_then_falls_between_its_bounds(warmup in 0u64..50, rest in 1u64..50, floor in 0.0..1.0f64, cosine: bool) {
            let decay = if cosine { Decay::Cosine } else { Decay::Linear };
            let s = Schedule { peak: 1.0, floor, warmup, total: warmup + rest, decay };
            for i in 1..s.total + 3 {
                let (a, b) = (s.lr(i - 1), s.lr(i));
                prop_assert!((i < warmup) == (a < b), "{} then {}", a, b);
                prop_assert!(b <= 1.0 && (i < warmup || b >= floor - 1e-12));
            }
        }
    }
}
