//! Trajectories into micro-batches: whole groups while they fit, the prompt of a group once per micro-batch.

use crate::agent::{Author, Trajectory};
use crate::input::Prompt;
use crate::model::train::Group;

/// A trajectory with what the loss makes of its tokens.
#[derive(Clone, Copy)]
pub struct Sample<'a> {
    /// The episode.
    pub trajectory: &'a Trajectory,
    /// The advantage of all its tokens.
    pub advantage: f32,
    /// What each of its tokens weighs in the loss.
    pub weight: f32,
}

/// One token that is trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    /// Index of the group within its micro-batch, and of the completion within the group.
    pub group: usize,
    /// See `group`.
    pub completion: usize,
    /// Index of the token within the completion.
    pub index: usize,
    /// The token.
    pub target: u32,
    /// Temperature at which it was sampled.
    pub temperature: f32,
    /// Its log-probability when it was sampled.
    pub old_logp: f32,
    /// Its advantage.
    pub advantage: f32,
    /// Its weight in the loss.
    pub weight: f32,
}

/// What one forward and backward pass takes.
#[derive(Clone, Default)]
pub struct MicroBatch {
    /// Prompts with their completions.
    pub groups: Vec<Group>,
    /// The tokens of the loss, by group, completion and index.
    pub entries: Vec<Entry>,
    rows: usize,
}

impl MicroBatch {
    /// Rows of hidden states, shared prompts counted once.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// Packs groups (episodes that share a prompt) into micro-batches of at most `max_rows` rows. A group that is larger is
/// spread over several, its prompt in each; one episode is never cut, so a single long one may exceed `max_rows`.
///
/// Order is kept. Where the cuts fall changes how gradients are summed, never a log-probability.
pub fn micro_batches(groups: &[Vec<Sample>], max_rows: usize) -> Vec<MicroBatch> {
    let mut done = Vec::new();
    let mut open = MicroBatch::default();
    for samples in groups {
        let mut prompt: Option<usize> = None;
        for sample in samples {
            let completion = completion(sample.trajectory);
            let more = completion.len() + if prompt.is_some() { 0 } else { sample.trajectory.prompt_len };
            if open.rows + more > max_rows && open.rows > 0 {
                done.push(std::mem::take(&mut open));
                prompt = None;
            }
            let group = *prompt.get_or_insert_with(|| {
                let mut prompt = sample.trajectory.sequence.clone();
                prompt.truncate(sample.trajectory.prompt_len);
                open.rows += prompt.len();
                open.groups.push(Group { prompt, completions: Vec::new() });
                open.groups.len() - 1
            });
            open.rows += completion.len();
            let index = open.groups[group].completions.len();
            open.groups[group].completions.push(completion);
            open.entries.extend(entries(sample, group, index));
        }
    }
    if !open.groups.is_empty() {
        done.push(open);
    }
    done
}

/// What follows the prompt, up to the last token that predicts one of the model's: nothing after it enters the loss.
fn completion(t: &Trajectory) -> Prompt {
    let end = t.authors.iter().rposition(|a| *a == Author::Policy).unwrap_or(t.prompt_len).max(t.prompt_len);
    let mut rest = Prompt::from_tokens(t.sequence.tokens[t.prompt_len..end].to_vec());
    rest.images = t
        .sequence
        .images
        .iter()
        .filter(|s| s.offset >= t.prompt_len && s.offset + s.len <= end)
        .map(|s| crate::input::ImageSpan { offset: s.offset - t.prompt_len, ..s.clone() })
        .collect();
    rest
}

fn entries<'a>(s: &Sample<'a>, group: usize, completion: usize) -> impl Iterator<Item = Entry> + use<'a> {
    let Sample { trajectory: t, advantage, weight } = *s;
    (t.prompt_len..t.sequence.len()).filter(|&i| t.authors[i] == Author::Policy).map(move |i| Entry {
        group,
        completion,
        index: i - t.prompt_len,
        target: t.sequence.tokens[i],
        temperature: t.temperature,
        old_logp: t.logprobs[i],
        advantage,
        weight,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{Ending, Reward};

    fn episode(prompt: usize, authors: &str) -> Trajectory {
        let authors: Vec<Author> = std::iter::repeat_n(Author::Prompt, prompt)
            .chain(authors.chars().map(|c| if c == 'p' { Author::Policy } else { Author::Tool }))
            .collect();
        Trajectory {
            item: String::new(),
            kind: String::new(),
            question: String::new(),
            answers: vec![],
            group: 0,
            sample: 0,
            sequence: Prompt::from_tokens((0..authors.len() as u32).collect()),
            prompt_len: prompt,
            logprobs: (0..authors.len()).map(|i| -(i as f32)).collect(),
            authors,
            temperature: 1.0,
            steps: vec![],
            ending: Ending::OutOfTurns,
            reward: Reward::default(),
        }
    }

    #[test]
    fn only_the_models_tokens_enter_the_loss_and_no_row_is_computed_for_nothing() {
        let t = episode(3, "pptpptt");
        let groups = [vec![Sample { trajectory: &t, advantage: 2.0, weight: 0.5 }]];
        let [m] = micro_batches(&groups, 100).try_into().ok().unwrap();
        assert_eq!(m.groups[0].prompt.tokens, [0, 1, 2]);
        assert_eq!(m.groups[0].completions[0].tokens, [3, 4, 5, 6], "token 7 is the last that is predicted");
        let targets: Vec<_> = m.entries.iter().map(|e| (e.index, e.target, e.old_logp)).collect();
        assert_eq!(targets, [(0, 3, -3.0), (1, 4, -4.0), (3, 6, -6.0), (4, 7, -7.0)]);
        assert_eq!(m.rows(), 7);
    }

    #[test]
    fn groups_stay_together_while_they_fit() {
        let t = episode(10, "ppppp");
        let s = Sample { trajectory: &t, advantage: 1.0, weight: 1.0 };
        let shape = |groups: &[Vec<Sample>], max| -> Vec<Vec<usize>> {
            micro_batches(groups, max).iter().map(|m| m.groups.iter().map(|g| g.completions.len()).collect()).collect()
        };
        let groups = [vec![s; 4], vec![s; 2]];
        assert_eq!(shape(&groups, 1000), [vec![4, 2]]);
        assert_eq!(shape(&groups, 26), [vec![4], vec![2]]);
        assert_eq!(shape(&groups, 18), [vec![2], vec![2], vec![2]]);
        assert_eq!(shape(&groups, 1), vec![vec![1]; 6], "an episode is never cut");
        let entries: usize = micro_batches(&groups, 18).iter().map(|m| m.entries.len()).sum();
        assert_eq!(entries, 30);
    }
}
