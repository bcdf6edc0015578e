//! Scoring of short answers: F1 and exact match (EM) against several right answers.
//!
//! Two scorers, which agree on most answers and differ where the published one is odd:
//!
//! | | [`reference()`] | [`squad`] |
//! |---|---|---|
//! | overlap | of sets, over the lengths of the lists: a repeated word costs credit even in a right answer | of multisets |
//! | EM overrides F1 | yes (its set F1 of a right answer can be below 1) | not needed |
//! | an answer that normalises to nothing (gold "A") | EM 1 with any other such answer ("the", "") | articles are kept where nothing else is left |
//! | Chinese | per character, spaces removed, for the whole answer if any character is Chinese | per character, other words stay whole |

use std::collections::{HashMap, HashSet};

/// Which of the two scores an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scorer {
    /// [`squad`]
    #[default]
    Squad,
    /// [`reference()`], for comparison with published figures.
    Reference,
}

impl Scorer {
    /// Scores `answer` (`None`: there was none) against the right ones.
    pub fn score(self, answer: Option<&str>, golds: &[impl AsRef<str>]) -> Score {
        match self {
            Scorer::Squad => squad(answer, golds),
            Scorer::Reference => reference(answer, golds),
        }
    }
}

/// What an answer is worth: both from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Score {
    /// Harmonic mean of precision and recall over words; the best over all right answers.
    pub f1: f64,
    /// 1 if the answer equals a right one after normalisation.
    pub em: f64,
}

impl Score {
    /// The mean of both figures; zero of nothing.
    pub fn mean(scores: &[Score]) -> Score {
        let n = scores.len().max(1) as f64;
        Score { f1: scores.iter().map(|s| s.f1).sum::<f64>() / n, em: scores.iter().map(|s| s.em).sum::<f64>() / n }
    }
}

/// What the scorers take for a Chinese character: the CJK Unified Ideographs block.
fn is_chinese(c: char) -> bool {
    ('\u{4e00}'..='\u{9fff}').contains(&c)
}

const CHINESE_PUNCTUATION: &str = "！？｡＂＃＄％＆＇（）＊＋，－．／：；＜＝＞＠［＼］＾＿｀｛｜｝～“”‘’、。：《》【】";

fn without_punctuation(lower: &str) -> String {
    lower.chars().filter(|c| !c.is_ascii_punctuation() && !CHINESE_PUNCTUATION.contains(*c)).collect()
}

fn is_article(word: &str) -> bool {
    matches!(word, "a" | "an" | "the")
}

/// Scores as the published evaluation notebooks do (Visual-ARFT, `evaluation_coding/evaluation.ipynb`), oddities included, so that
/// published figures can be compared. `None` is an episode that never answered.
pub fn reference(answer: Option<&str>, golds: &[impl AsRef<str>]) -> Score {
    let mut best = best(answer, golds, normalize_reference, |a, gold| (set_f1(a, gold), a == gold));
    if best.em == 1.0 {
        best.f1 = 1.0;
    }
    best
}

/// The best of each figure over all right answers; `compare` gives both figures of two texts in the form that `normalize` gives.
fn best<T>(
    answer: Option<&str>,
    golds: &[impl AsRef<str>],
    normalize: impl Fn(&str) -> T,
    compare: impl Fn(&T, &T) -> (f64, bool),
) -> Score {
    let Some(answer) = answer.map(&normalize) else { return Score::default() };
    golds.iter().fold(Score::default(), |best, gold| {
        let (f1, equal) = compare(&answer, &normalize(gold.as_ref()));
        Score { f1: best.f1.max(f1), em: best.em.max(f64::from(u8::from(equal))) }
    })
}

/// Lower case, no punctuation; then, with a Chinese character in it, no spaces, otherwise no articles and single spaces.
fn normalize_reference(text: &str) -> String {
    let text = without_punctuation(&text.to_lowercase());
    if text.chars().any(is_chinese) {
        text.replace(' ', "")
    } else {
        remove_article_words(&text).split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// Replaces `\b(a|an|the)\b` by a space, where a word is made of letters, digits and underscores.
fn remove_article_words(text: &str) -> String {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::with_capacity(text.len());
    let mut word = String::new();
    for c in text.chars().chain([' ']) {
        if is_word(c) {
            word.push(c);
            continue;
        }
        out.push_str(if is_article(&word) { " " } else { &word });
        word.clear();
        out.push(c);
    }
    out
}

fn set_f1(answer: &str, gold: &str) -> f64 {
    let tokens = |s: &str| -> Vec<String> {
        if answer.chars().chain(gold.chars()).any(is_chinese) {
            s.chars().map(String::from).collect()
        } else {
            s.split_whitespace().map(str::to_owned).collect()
        }
    };
    let (answer, gold) = (tokens(answer), tokens(gold));
    let known: HashSet<&String> = gold.iter().collect();
    let same = answer.iter().collect::<HashSet<_>>().intersection(&known).count();
    f1(same, answer.len(), gold.len())
}

/// Scores as SQuAD's evaluation does (Rajpurkar et al. 2016: lower case, no punctuation, no articles, multiset overlap), with each
/// Chinese character a word of its own, and articles kept where nothing else is left. `None` is an episode that never answered.
pub fn squad(answer: Option<&str>, golds: &[impl AsRef<str>]) -> Score {
    best(answer, golds, squad_words, |a, gold| (multiset_f1(a, gold), !gold.is_empty() && a == gold))
}

fn squad_words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    for part in without_punctuation(&text.to_lowercase()).split_whitespace() {
        let mut word = String::new();
        for c in part.chars() {
            if is_chinese(c) {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                words.push(c.to_string());
            } else {
                word.push(c);
            }
        }
        if !word.is_empty() {
            words.push(word);
        }
    }
    if words.iter().all(|w| is_article(w)) {
        return words;
    }
    words.retain(|w| !is_article(w));
    words
}

fn multiset_f1(answer: &[String], gold: &[String]) -> f64 {
    let mut left: HashMap<&String, usize> = HashMap::new();
    for word in gold {
        *left.entry(word).or_default() += 1;
    }
    let mut same = 0;
    for word in answer {
        if let Some(n) = left.get_mut(word).filter(|n| **n > 0) {
            *n -= 1;
            same += 1;
        }
    }
    f1(same, answer.len(), gold.len())
}

fn f1(same: usize, answer: usize, gold: usize) -> f64 {
    if same == 0 {
        return 0.0;
    }
    let (precision, recall) = (same as f64 / answer as f64, same as f64 / gold as f64);
    2.0 * precision * recall / (precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn near(score: Score, f1: f64, em: f64) {
        assert!((score.f1 - f1).abs() < 1e-12 && score.em == em, "{score:?}, wanted {f1} {em}");
    }

    // The figures in this test were computed by hand from the definitions of the published notebook.
    #[test]
    fn reference_as_published() {
        near(reference(Some("The  Uncommon, valor!"), &["Uncommon Valor"]), 1.0, 1.0);
        near(reference(Some("The selected date is March 14, 2017."), &["x", "March 14, 2017"]), 2.0 / 3.0, 0.0);
        // Set overlap over list lengths: 2 of 3 and 2 of 3 although all words agree; EM then overrides it.
        near(reference(Some("new york york new"), &["new york new york"]), 0.5, 0.0);
        near(reference(Some("new york new york"), &["New York New York"]), 1.0, 1.0);
        near(reference(Some("the"), &["A"]), 1.0, 1.0);
        near(reference(Some("b"), &["A"]), 0.0, 0.0);
        near(reference(Some("软件 工程"), &["软件工程"]), 1.0, 1.0);
        near(reference(Some("软件"), &["软件工程"]), 2.0 / 3.0, 0.0);
        near(reference(Some("软件 ab"), &["b"]), 2.0 / (4.0 + 1.0), 0.0);
        near(reference(None, &["x"]), 0.0, 0.0);
        // Articles end at word boundaries, and an underscore is punctuation here.
        near(reference(Some("theory a_b"), &["theory ab"]), 1.0, 1.0);
    }

    #[test]
    fn squad_counts_repeats_and_keeps_lone_articles() {
        near(squad(Some("new york york new"), &["new york new york"]), 1.0, 0.0);
        near(squad(Some("york york"), &["york"]), 2.0 / 3.0, 0.0);
        near(squad(Some("the"), &["A"]), 0.0, 0.0);
        near(squad(Some("a."), &["A"]), 1.0, 1.0);
        near(squad(Some(""), &["A"]), 0.0, 0.0);
        near(squad(Some(""), &[""]), 0.0, 0.0);
        near(squad(Some("The answer is 42"), &["42"]), 0.5, 0.0);
        near(squad(Some("软件abc"), &["软件 ABC"]), 1.0, 1.0);
        near(squad(Some("x"), &["y", "X!"]), 1.0, 1.0);
        near(squad(None, &["x"]), 0.0, 0.0);
    }

    #[test]
    fn mean_of_scores() {
        let all = [Score { f1: 1.0, em: 1.0 }, Score { f1: 0.5, em: 0.0 }];
        assert_eq!(Score::mean(&all), Score { f1: 0.75, em: 0.5 });
        assert_eq!(Score::mean(&[]), Score::default());
    }

    proptest! {
        #[test]
        fn an_answer_equal_to_gold_scores_one_and_all_scores_are_in_range(a in "\\PC{0,20}", b in "[a-z 软件.]{0,20}") {
            for score in [reference(Some(&a), &[&b]), squad(Some(&a), &[&b])] {
                prop_assert!((0.0..=1.0).contains(&score.f1) && (score.em == 0.0 || score.em == 1.0));
                prop_assert!(score.em <= score.f1);
            }
            prop_assert_eq!(reference(Some(&b), &[&b]), Score { f1: 1.0, em: 1.0 });
            if !squad_words(&a).is_empty() {
                prop_assert_eq!(squad(Some(&a), &[&a]), Score { f1: 1.0, em: 1.0 });
            }
            prop_assert_eq!(squad(Some(&a), &[&b]).f1, squad(Some(&b), &[&a]).f1);
        }
    }
}
