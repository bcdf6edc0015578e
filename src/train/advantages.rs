//! What each completion of a group is worth, and how much each of its tokens weighs in the loss.

use super::config::{AdvantageScale, LossKind};

/// Rewards of a group that differ by less than this are the same: 0.9 is not exact in binary, and a difference of
/// rounding divided by its own deviation would look like a real one.
pub const ZERO_VARIANCE: f64 = 1e-6;
/// Added to a group's standard deviation before dividing by it.
const STD_EPS: f64 = 1e-4;

/// The advantages of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One per completion; all 0 in a group without variance.
    pub values: Vec<f32>,
    /// Whether all rewards are the same, within [`ZERO_VARIANCE`]: such a group says nothing.
    pub zero_variance: bool,
}

/// Rewards of the completions of one prompt to advantages: `r - mean`, divided by the sample standard deviation (n - 1)
/// plus 1e-4 if `scale` is [`AdvantageScale::Group`]  (DeepSeekMath, arXiv 2402.03300, section 4.1.2; without the division
/// Dr. GRPO, arXiv 2503.20783). In f64.
pub fn group_advantages(rewards: &[f64], scale: AdvantageScale) -> Advantages {
    let n = rewards.len() as f64;
    let (low, high) = rewards.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &r| (l.min(r), h.max(r)));
    if rewards.is_empty() || high - low < ZERO_VARIANCE {
        return Advantages { values: vec![0.0; rewards.len()], zero_variance: true };
    }
    let mean = rewards.iter().sum::<f64>() / n;
    let by = match scale {
        AdvantageScale::Group => (rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt() + STD_EPS,
        AdvantageScale::None => 1.0,
    };
    Advantages { values: rewards.iter().map(|r| ((r - mean) / by) as f32).collect(), zero_variance: false }
}

/// The weight of each trained token of each completion, so that the loss of a batch is the weighted sum over its tokens.
///
/// `lengths` are the trained tokens of every completion in the update, however it is cut into micro-batches. `left_out`:
/// completions that are not in the loss and count as completions all the same; where a batch is split over several updates,
/// each one's share of them, which need not be whole. `max_length` is the constant of [`LossKind::DrGrpo`]: tokens that a
/// completion may have.
///
/// * [`LossKind::Grpo`]: 1 / (completions x its own length)
/// * [`LossKind::Dapo`]: 1 / (all tokens)
/// * [`LossKind::DrGrpo`]: 1 / (completions x `max_length`)
pub fn token_weights(kind: LossKind, lengths: &[usize], left_out: f64, max_length: usize) -> Vec<f32> {
    let n = lengths.len() as f64 + left_out;
    let all = lengths.iter().sum::<usize>().max(1) as f64;
    let weight = |&length: &usize| match (kind, length) {
        (_, 0) => 0.0,
        (LossKind::Grpo, l) => 1.0 / (n * l as f64),
        (LossKind::Dapo, _) => 1.0 / all,
        (LossKind::DrGrpo, _) => 1.0 / (n * max_length.max(1) as f64),
    };
    lengths.iter().map(|l| weight(l) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_group_by_hand() {
        // mean 0.5, sample deviation sqrt(1/3)
        let a = group_advantages(&[1.0, 0.0, 1.0, 0.0], AdvantageScale::Group);
        let want = 0.5 / ((1.0f64 / 3.0).sqrt() + 1e-4);
        assert_eq!(a.values, [want as f32, -want as f32, want as f32, -want as f32]);
        assert!(!a.zero_variance);
        assert_eq!(group_advantages(&[1.0, 0.5, 0.0], AdvantageScale::None).values, [0.5, 0.0, -0.5]);
    }

    #[test]
    fn rewards_that_only_rounding_tells_apart_are_the_same() {
        let rewards = [0.9, 0.1 + 0.8, f64::from(0.9f32)];
        assert!(rewards[0] != rewards[2]);
        let a = group_advantages(&rewards, AdvantageScale::Group);
        assert_eq!(a, Advantages { values: vec![0.0; 3], zero_variance: true });
        assert!(group_advantages(&[], AdvantageScale::Group).zero_variance);
        assert!(group_advantages(&[3.0], AdvantageScale::None).zero_variance);
        assert!(!group_advantages(&[0.0, 1e-5], AdvantageScale::Group).zero_variance);
    }

    #[test]
    fn weights_give_the_means_they_stand_for() {
        let lengths = [12, 9, 7];
        let total = |kind| {
            let w = token_weights(kind, &lengths, 1.0, 20);
            w.iter().zip(&lengths).map(|(&w, &l)| f64::from(w) * l as f64).collect::<Vec<_>>()
        };
        let close = |a: Vec<f64>, b: [f64; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-7);
        assert!(close(total(LossKind::Grpo), [0.25, 0.25, 0.25]));
        assert!(close(total(LossKind::Dapo), [12.0 / 28.0, 9.0 / 28.0, 0.25]));
        assert!(close(total(LossKind::DrGrpo), [0.15, 0.1125, 0.0875]));
        assert!(token_weights(LossKind::Dapo, &[0, 0], 0.0, 0).iter().all(|&w| w == 0.0));
    }

    proptest! {
        #[test]
        fn advantages_sum_to_nothing_and_keep_their_order(rewards in proptest::collection::vec(-3.0..3.0f64, 2..20), group: bool) {
            let scale = if group { AdvantageScale::Group } else { AdvantageScale::None };
            let a = group_advantages(&rewards, scale).values;
            prop_assert!(a.iter().sum::<f32>().abs() < 1e-3);
            for i in 1..a.len() {
                prop_assert!((rewards[i] > rewards[i - 1]) == (a[i] > a[i - 1]) || (rewards[i] - rewards[i - 1]).abs() < 1e-6);
            }
        }
    }
}
