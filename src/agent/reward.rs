use crate::tasks::scorer::{Score, Scorer};
use serde::{Deserialize, Serialize};

/// Which score of the answer is rewarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accuracy {
    /// Token F1: partial credit (Visual-ARFT's choice; its table 3 shows EM to learn less).
    #[default]
    F1,
    /// Exact match after normalisation.
    Em,
}

/// How an episode is rewarded: `accuracy_weight * accuracy + format_weight * format`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardRule {
    /// What counts as accuracy.
    pub accuracy: Accuracy,
    /// How an answer is compared with the right ones.
    pub scorer: Scorer,
    /// Weight of accuracy, which lies in 0..=1.
    pub accuracy_weight: f64,
    /// Weight of format, which is 1 where every turn was well formed and the last one answered, else 0.
    pub format_weight: f64,
}

impl Default for RewardRule {
    fn default() -> Self {
        RewardRule { accuracy: Accuracy::F1, scorer: Scorer::Squad, accuracy_weight: 1.0, format_weight: 0.2 }
    }
}

/// The parts of an episode's reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reward {
    /// F1 of the answer against the best of the gold answers; 0 without an answer.
    pub f1: f64,
    /// Exact match, 0 or 1.
    pub em: f64,
    /// 1 where every turn was well formed and the last one answered.
    pub format: f64,
    /// What format contributes to the total.
    pub format_part: f64,
    /// The weighted sum that training uses.
    pub total: f64,
}

impl RewardRule {
    /// Scores an answer (`None`: the episode ended without one) against gold answers.
    pub fn score(&self, answer: Option<&str>, gold: &[String], well_formed: bool) -> Reward {
        let Score { f1, em } = self.scorer.score(answer, gold);
        let format = f64::from(well_formed && answer.is_some());
        let accuracy = match self.accuracy {
            Accuracy::F1 => f1,
            Accuracy::Em => em,
        };
        let format_part = self.format_weight * format;
        Reward { f1, em, format, format_part, total: self.accuracy_weight * accuracy + format_part }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up() {
        let rule = RewardRule { accuracy_weight: 2.0, format_weight: 0.5, ..Default::default() };
        let gold = ["4 7".to_owned()];
        assert_eq!(
            rule.score(Some("4 7"), &gold, true),
            Reward { f1: 1.0, em: 1.0, format: 1.0, format_part: 0.5, total: 2.5 }
        );
        let half = rule.score(Some("4 8"), &gold, false);
        assert_eq!((half.f1, half.em, half.format, half.total), (0.5, 0.0, 0.0, 1.0));
        assert_eq!(rule.score(None, &gold, true), Reward::default());
        let gold = ["go go".to_owned()];
        let published = RewardRule { scorer: Scorer::Reference, ..rule.clone() };
        assert!(published.score(Some("go go go"), &gold, true).f1 < rule.score(Some("go go go"), &gold, true).f1);
        let gold = ["4 7".to_owned()];
        let em = RewardRule { accuracy: Accuracy::Em, ..rule };
        assert_eq!(em.score(Some("4 8"), &gold, true).total, 0.5);
    }
}
