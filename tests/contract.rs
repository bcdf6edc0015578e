//! The numerics contract: whatever the engine does with a sequence (chunks, batches, caches, preemption, forks, turns),
//! every token it samples comes with the log-probability that the packed trainer computes for it, to the bit.

#[cfg(emulator)]
mod setting;
mod tiny;

use std::sync::Arc;
use tiny::{Rng, image, kv_bytes, model, text};
use varft::device::Device;
use varft::engine::{Completion, Engine, EngineOptions, Finish, Generation, Request, Sampling, Session};
use varft::input::Prompt;
use varft::model::Model;
use varft::model::train::{self, Activations, Group, MemoryPlan, TrainBatch};
use varft::ops::loss::{self, LossRows, Objective, Outputs};
use varft::ops::softmax;

/// A sampled token: where it stands in its sequence, under which temperature it was drawn, what the engine said.
struct Scored {
    at: usize,
    temperature: f32,
    logprob: f32,
}

/// A sequence when it has ended.
struct Trajectory {
    tokens: Prompt,
    scored: Vec<Scored>,
    /// Length of a prompt that others share, and which one.
    shared: Option<(usize, usize)>,
}

impl Trajectory {
    fn extend(&mut self, c: &Completion, temperature: f32) {
        for (&token, &logprob) in c.tokens.iter().zip(&c.logprobs) {
            self.scored.push(Scored { at: self.tokens.len(), temperature, logprob });
            self.tokens.tokens.push(token);
        }
    }
}

fn random_prompt(rng: &mut Rng, m: &Model, longest: usize) -> Prompt {
    let mut p = Prompt::default();
    // Few beginnings and few images, so that prefixes and images recur.
    let kind = rng.below(3);
    for part in 0..1 + rng.below(3) {
        let n = [1, 5, 33, 64, 70][rng.below(5)];
        p.tokens.extend(text(kind * 10 + part, n));
        if rng.below(2) == 0 {
            let kind = rng.below(4);
            let (h, w) = [(1, 5), (2, 4), (5, 7), (4, 9)][kind];
            p.push_image(image(kind, h, w), m.config.tokens.image);
        }
    }
    p.truncate(longest - 1);
    p.tokens.push(rng.below(500) as u32);
    p
}

/// `long`: sequences outgrow the pages they were let in with.
fn random_sampling(rng: &mut Rng, long: bool) -> Sampling {
    Sampling {
        temperature: [0.0, 0.7, 1.0, 1.3][rng.below(4)],
        top_k: [0, 0, 5, 100][rng.below(4)] as u32,
        top_p: [1.0, 0.9][rng.below(2)],
        min_p: [0.0, 0.02][rng.below(2)],
        max_tokens: if long { 60 } else { rng.below(14) },
        stop_ids: (0..12).collect(),
        seed: rng.next(),
        ..Sampling::default()
    }
}

/// An engine with random budgets, from ample to room for a single sequence.
fn random_engine(rng: &mut Rng, m: &Arc<Model>, scarce: bool) -> Engine {
    let max_context = 160 + rng.below(200);
    let pages = max_context.div_ceil(32) + if scarce { 0 } else { [0, 1, 5, 100][rng.below(4)] };
    let options = EngineOptions {
        kv_bytes: kv_bytes(m, pages),
        vision_bytes: (64 + rng.below(100)) * m.config.hidden_size * 4,
        max_context,
        max_sequences: 1 + rng.below(12),
        step_tokens: [4, 16, 40, 64, 256][rng.below(5)],
        step_patches: 144 + rng.below(200),
        ..EngineOptions::default()
    };
    Engine::start(m.clone(), options).unwrap()
}

/// Runs sessions of several turns, forks, requests of several samples and cancellations through one engine.
fn random_schedule(rng: &mut Rng, engine: &Engine, m: &Model, long: bool) -> Vec<Trajectory> {
    let longest = if long { 40 } else { engine.max_context() - 20 };
    let mut done: Vec<Trajectory> = Vec::new();
    let mut sessions: Vec<(Session, Trajectory)> = Vec::new();
    let mut requests: Vec<(Generation, Trajectory, f32)> = Vec::new();
    for turn in 0..3 {
        for _ in 0..rng.below(3) {
            let (prompt, sampling) = (random_prompt(rng, m, longest), random_sampling(rng, long));
            let (temperature, shared) = (sampling.temperature, Some((prompt.len(), done.len() + requests.len())));
            let request = Request { prompt: prompt.clone(), sampling, n: 1 + rng.below(4) };
            for g in engine.generate(request).unwrap() {
                requests.push((g, Trajectory { tokens: prompt.clone(), scored: Vec::new(), shared }, temperature));
            }
        }
        for _ in 0..if turn == 0 { 1 + rng.below(4) } else { rng.below(2) } {
            let tokens = Prompt::default();
            sessions.push((engine.session(), Trajectory { tokens, scored: Vec::new(), shared: None }));
        }
        let mut turns: Vec<(usize, Generation, f32)> = Vec::new();
        for i in 0..sessions.len() {
            let (s, t) = &mut sessions[i];
            let room = longest.saturating_sub(t.tokens.len());
            if room > 2 {
                let p = random_prompt(rng, m, room.min(if turn == 0 { 200 } else { 40 }));
                s.append(p.clone()).unwrap();
                t.tokens.append(&p);
            }
            if rng.below(3) == 0 {
                if t.tokens.len() < engine.max_context() && rng.below(2) == 0 {
                    s.prefill().unwrap();
                }
                let (tokens, shared) = (t.tokens.clone(), None);
                let scored = t.scored.iter().map(|s| Scored { ..*s }).collect();
                let fork = (s.fork().unwrap(), Trajectory { tokens, scored, shared });
                sessions.push(fork);
            }
        }
        for (i, (s, t)) in sessions.iter_mut().enumerate() {
            let sampling = random_sampling(rng, long);
            if t.tokens.len() < engine.max_context() && rng.below(8) > 0 {
                let temperature = sampling.temperature;
                turns.push((i, s.generate(sampling).unwrap(), temperature));
            }
        }
        for (i, mut g, temperature) in turns {
            if rng.below(6) == 0 {
                for token in g.by_ref().take(rng.below(4)) {
                    token.unwrap();
                }
                g.cancel();
            }
            let c = g.wait().unwrap();
            sessions[i].1.extend(&c, temperature);
        }
        if rng.below(3) == 0 && !sessions.is_empty() {
            let (_, t) = sessions.swap_remove(rng.below(sessions.len()));
            done.push(t);
        }
        while !requests.is_empty() && (turn == 2 || rng.below(3) > 0) {
            let (g, mut t, temperature) = requests.swap_remove(rng.below(requests.len()));
            if rng.below(8) == 0 {
                g.cancel();
            }
            let c = g.wait().unwrap();
            assert!(c.finish != Finish::Context || t.tokens.len() + c.tokens.len() == engine.max_context());
            t.extend(&c, temperature);
            done.push(t);
        }
    }
    done.extend(sessions.into_iter().map(|(_, t)| t));
    done.retain(|t| !t.scored.is_empty());
    done
}

/// Buffers of the trainer's passes, used again from batch to batch, as a run does.
#[derive(Default)]
struct Buffers {
    /// Of a pass without a backward one.
    scoring: Option<Activations>,
    learning: Option<Activations>,
}

/// Log-probabilities of all sampled tokens by the packed trainer: samples of one request as one group behind their
/// prompt, other sequences whole, or cut anywhere into a prompt and one completion. Half of the time by the pass that
/// scores (a reference policy's), half of the time by the one that learns, under any memory plan.
fn trainer_logprobs(
    rng: &mut Rng,
    m: &Model,
    forbidden: &[u32],
    all: &[Trajectory],
    buffers: &mut Buffers,
) -> Vec<Vec<u32>> {
    let mut groups: Vec<Group> = Vec::new();
    // For each trajectory: its group, its completion there, and the length of the prompt.
    let mut places: Vec<(usize, usize, usize)> = Vec::new();
    let mut shared: Vec<(usize, usize)> = Vec::new();
    for t in all {
        let cut = match t.shared {
            Some((len, _)) => len,
            None => {
                let mut p = t.tokens.clone();
                match p.truncate(1 + rng.below(t.tokens.len())) {
                    // Within an image at the front: a prompt is not empty, so it is that image.
                    0 => t.tokens.images[0].len,
                    len => len,
                }
            }
        };
        let mut prompt = t.tokens.clone();
        prompt.truncate(cut);
        let mut rest = Prompt::from_tokens(t.tokens.tokens[cut..].to_vec());
        rest.images = (t.tokens.images.iter().filter(|s| s.offset >= cut)).cloned().collect();
        rest.images.iter_mut().for_each(|s| s.offset -= cut);
        let group = match t.shared.and_then(|(_, key)| shared.iter().find(|s| s.0 == key)) {
            Some(&(_, group)) => group,
            None => {
                shared.extend(t.shared.map(|(_, key)| (key, groups.len())));
                groups.push(Group { prompt, completions: Vec::new() });
                groups.len() - 1
            }
        };
        groups[group].completions.push(rest);
        places.push((group, groups[group].completions.len() - 1, cut));
    }
    let (d, s) = (m.device(), m.device().stream());
    let batch = TrainBatch::pack(&m.config, d, &s, &groups).unwrap();
    let learns = rng.below(2) == 1;
    let buffers = if learns { &mut buffers.learning } else { &mut buffers.scoring };
    if rng.below(8) == 0 {
        *buffers = None;
    }
    let acts = buffers.get_or_insert_with(|| {
        let plan = MemoryPlan { text: rng.below(m.config.layers + 1), vision: rng.below(m.config.vision.depth + 1) };
        if learns { Activations::new(m, plan, &batch) } else { Activations::forward_only(m, &batch) }
    });
    let hidden = train::forward(m, &s, &batch, acts).unwrap();
    let (mut rows, mut targets, mut temperatures) = (Vec::new(), Vec::new(), Vec::new());
    for (t, &(group, completion, cut)) in all.iter().zip(&places) {
        for scored in &t.scored {
            let row = match scored.at.checked_sub(cut) {
                Some(i) => batch.completion_row(group, completion, i),
                None => batch.prompt_row(group, scored.at),
            };
            rows.push(row as u32);
            targets.push(t.tokens.tokens[scored.at]);
            temperatures.push(scored.temperature);
        }
    }
    let mut words = vec![0u32; softmax::forbidden_words(m.config.vocab_size)];
    forbidden.iter().for_each(|&id| words[id as usize / 32] |= 1 << (id % 32));
    let (c, n) = (&m.config, rows.len());
    let ws = loss::Workspace::new(d, c.vocab_size, c.hidden_size, n, (1 + rng.below(200)) * 4 * c.vocab_size);
    let out = Outputs::new(d, n);
    let entries = LossRows::new(&s, &rows, &targets, &temperatures);
    let words = d.upload(&words);
    if learns {
        let (weight, dhidden) = (d.upload(&vec![1.0f32; n]), d.zeros(d.float(), hidden.len()));
        let head = &m.text.head;
        loss::forward_backward(&s, &hidden, head, &entries, Objective::Nll, &weight, &words, &ws, &out, &dhidden, None);
    } else {
        loss::logprobs(&s, &hidden, &m.text.head, &entries, &words, &ws, &out.logp, None);
    }
    let out = out.logp;
    let mut values = s.read::<f32>(&out).wait().unwrap().into_iter().map(f32::to_bits);
    all.iter().map(|t| values.by_ref().take(t.scored.len()).collect()).collect()
}

/// What the schedules had to do with.
#[derive(Default)]
struct Seen {
    schedules: usize,
    tokens: u64,
    hits: u64,
    encoded_hits: u64,
    preemptions: u64,
    retracted: u64,
    graph_steps: u64,
}

/// Runs `count` random schedules, from the seed `first` on, on the models, each an engine's and the trainer's in turn, and compares the
/// bits of every token. A schedule that samples nothing is none.
fn every_token_agrees(models: &[Arc<Model>], first: u64, count: usize) -> Seen {
    let mut buffers: Vec<Buffers> = models.iter().map(|_| Buffers::default()).collect();
    let (mut seen, mut seed) = (Seen::default(), first.wrapping_sub(1));
    while seen.schedules < count {
        seed = seed.wrapping_add(1);
        let tried = seed.wrapping_sub(first);
        assert!(tried < 4 * count as u64, "of {tried} schedules {} sampled anything", seen.schedules);
        let mut rng = Rng(seed);
        let m = &models[rng.below(models.len())];
        let engine = random_engine(&mut rng, m, seed % 5 == 0);
        let all = random_schedule(&mut rng, &engine, m, seed % 5 == 0);
        let stats = engine.stats();
        let forbidden = engine.forbidden().to_vec();
        drop(engine);
        if all.is_empty() {
            continue;
        }
        seen.schedules += 1;
        // The trainer may run on another number of threads than the engine did.
        let at = (seed / 7) as usize % models.len();
        let trained = trainer_logprobs(&mut rng, &models[at], &forbidden, &all, &mut buffers[at]);
        for (t, trained) in all.iter().zip(trained) {
            for (i, (scored, trained)) in t.scored.iter().zip(trained).enumerate() {
                assert_eq!(
                    scored.logprob.to_bits(),
                    trained,
                    "schedule {seed}: sampled token {i}, at {} of {}: {} and {}",
                    scored.at,
                    t.tokens.len(),
                    scored.logprob,
                    f32::from_bits(trained)
                );
                seen.tokens += 1;
            }
        }
        seen.hits += stats.prefix_hit_tokens;
        seen.encoded_hits += stats.image_hits;
        seen.preemptions += stats.preemptions;
        seen.retracted += stats.retracted_tokens;
        seen.graph_steps += stats.graph_steps;
    }
    let Seen { schedules, tokens, hits, encoded_hits, preemptions, retracted, graph_steps } = &seen;
    println!(
        "{schedules} schedules, {tokens} tokens; {hits} prompt tokens and {encoded_hits} images from caches; {preemptions} preemptions, {retracted} tokens computed again; {graph_steps} steps from graphs"
    );
    seen
}

#[test]
fn every_sampled_token_has_the_trainers_log_probability() {
    let models = [model(&Device::cpu(1)), model(&Device::cpu(2))];
    let Seen { tokens, hits, encoded_hits, preemptions, retracted, .. } = every_token_agrees(&models, 0, 200);
    assert!(tokens > 5000 && hits > 5000 && encoded_hits > 200, "{tokens} {hits} {encoded_hits}");
    assert!(preemptions > 15 && retracted > 1000, "{preemptions} {retracted}");
}

/// A schedule that has everything.
#[cfg(emulator)]
const RICH: u64 = 85;

/// The same for the CUDA kernels, as both architectures, with the orders of warps that fresh seeds give, and on a card where
/// there is one.
#[cfg(emulator)]
#[test]
fn every_sampled_token_has_the_trainers_log_probability_with_the_cuda_kernels() {
    use std::hash::{BuildHasher, RandomState};
    let fresh = || RandomState::new().hash_one("seed");
    for sm in [80, 90].into_iter().filter(|_| setting::emulates()) {
        let (warps, first) = (fresh(), fresh());
        println!("sm_{sm}: warps {warps}, schedules from {first} on");
        let devices = [warps, warps.wrapping_add(1)].map(|seed| Device::emulated_as(seed, sm).unwrap());
        let models = devices.map(|d| model(&d));
        // One in which images are shown again, prompts are found in the cache, pages run out and graphs are replayed; one at random.
        let Seen { hits, encoded_hits, retracted, graph_steps, .. } = every_token_agrees(&models, RICH, 1);
        assert!([hits, encoded_hits, retracted, graph_steps].iter().all(|&n| n > 0), "not as rich as it was");
        assert!(every_token_agrees(&models, first, 1).tokens > 0);
    }
    if let Some(card) = setting::card() {
        let Seen { tokens, graph_steps, .. } = every_token_agrees(&[model(&card)], 0, 200);
        assert!(tokens > 5000 && graph_steps > 1000, "{tokens} {graph_steps}");
    }
}
