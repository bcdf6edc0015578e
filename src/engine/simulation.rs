//! The scheduler against a model of the device: pages, an arena, and a "network" that folds every token, image row and
//! position into one number. Whatever is scheduled, every token drawn must be the one that the bare sequence gives.

use super::generation::{Feed, Link, Writer};
use super::plan::{Draw, Plan};
use super::sampling::{Completion, Finish, Sampling};
use super::scheduler::{Limits, Scheduler};
use crate::input::{Image, Prompt};
use crate::model::positions::{self, Positions, Span};
use crate::ops::embedding::NO_TOKEN;
use std::sync::Arc;

const BLOCK: usize = 4;
const PAD: u32 = 9;

fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0xD1B5_4A32_D192_ED03);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 27)
}

struct Rng(u64);
impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = mix(self.0, 1);
        (self.0 >> 20) as usize % n.max(1)
    }
}

/// Of the decoder, and of the vision tower.
#[derive(Clone, Copy, Default, PartialEq)]
struct Weights {
    text: u64,
    vision: u64,
}

fn image_row(image: &Image, i: usize, weights: Weights) -> u64 {
    mix(mix(u64::from_le_bytes(image.hash.0[..8].try_into().unwrap()), i as u64), weights.vision)
}

/// State after one more token.
fn fold(before: u64, what: u64, position: [u32; 3], weights: Weights) -> u64 {
    position.iter().fold(mix(mix(before, what), weights.text), |h, &p| mix(h, p as u64))
}

fn drawn(state: u64, sampling: &Sampling, position: usize) -> (u32, f32) {
    let h = mix(mix(mix(state, sampling.seed), sampling.stream), position as u64);
    (10 + (h % 50) as u32, (h % 1000) as f32)
}

/// What a sequence gives on its own.
fn reference(prompt: &Prompt, sampling: &Sampling, max_len: usize, weights: Weights) -> (Vec<u32>, Vec<f32>, Finish) {
    let spans: Vec<Span> = (prompt.images.iter())
        .map(|s| Span { offset: s.offset, grid_h: s.image.grid.h, grid_w: s.image.grid.w })
        .collect();
    let mut at = Positions::default();
    let mut next = positions::extend(0, prompt.len(), &spans, &mut at);
    let mut state = 0;
    for (i, &token) in prompt.tokens.iter().enumerate() {
        let what = match prompt.span_at(i) {
            Some(s) => image_row(&s.image, i - s.offset, weights),
            None => token as u64,
        };
        state = fold(state, what, [at[0][i], at[1][i], at[2][i]], weights);
    }
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    loop {
        if tokens.len() >= sampling.max_tokens {
            return (tokens, logprobs, Finish::Length);
        }
        if prompt.len() + tokens.len() >= max_len {
            return (tokens, logprobs, Finish::Context);
        }
        let (token, logprob) = drawn(state, sampling, prompt.len() + tokens.len());
        tokens.push(token);
        logprobs.push(logprob);
        if sampling.stop_ids.contains(&token) {
            return (tokens, logprobs, Finish::Stop(token));
        }
        state = fold(state, token as u64, [next; 3], weights);
        next += 1;
    }
}

struct Device {
    /// `None`: never written, or written under other weights.
    slots: Vec<Option<u64>>,
    arena: Vec<Option<u64>>,
    /// Block tables, and what the last step has drawn: they stay from step to step.
    tables: Vec<Vec<Option<u32>>>,
    drawn: Vec<u32>,
    weights: Weights,
    limits: Limits,
}

impl Device {
    fn run(&mut self, p: &Plan) -> (Vec<u32>, Vec<f32>) {
        for &(from, to) in &p.copies {
            assert_ne!(from, to);
            for i in 0..BLOCK {
                self.slots[to as usize * BLOCK + i] = self.slots[from as usize * BLOCK + i];
            }
        }
        let mut rows = p.encode_rows.iter();
        assert!(p.encode.iter().map(|i| i.grid.patches()).sum::<usize>() <= self.limits.step_patches);
        for image in &p.encode {
            for i in 0..image.tokens() {
                self.arena[*rows.next().unwrap() as usize] = Some(image_row(image, i, self.weights));
            }
        }
        assert!(rows.next().is_none());
        let input = &p.input;
        assert!(input.ids.len() <= self.limits.step_tokens);
        assert!(input.kv_lens.len() <= self.limits.max_sequences && p.draws.len() <= self.limits.max_sequences);
        let mut images = input.image_rows.iter().zip(&input.image_sources).peekable();
        let mut states = vec![0; input.ids.len()];
        let mut written = std::collections::HashSet::new();
        let mut ids = input.ids.clone();
        for (&row, &draw) in p.patch_rows.iter().zip(&p.patch_draws) {
            ids[row as usize] = self.drawn[draw as usize];
        }
        for e in &input.table_changes {
            self.tables[e.row as usize][e.index as usize] = Some(e.page);
        }
        assert!((1..input.table_rows.len()).all(|i| !input.table_rows[..i].contains(&input.table_rows[i])));
        for (n, &table_row) in input.table_rows.iter().enumerate() {
            let table = &self.tables[table_row as usize];
            let (first, end) = (input.cu_seqlens_q[n] as usize, input.cu_seqlens_q[n + 1] as usize);
            let from = input.kv_lens[n] as usize - (end - first);
            let slot =
                |i: usize| table[i / BLOCK].expect("a page that the table was told") as usize * BLOCK + i % BLOCK;
            let mut state = if from == 0 { 0 } else { self.slots[slot(from - 1)].expect("a page that was written") };
            for (row, out) in states.iter_mut().enumerate().take(end).skip(first) {
                let what = match images.next_if(|(r, _)| **r as usize == row) {
                    Some((_, &source)) => {
                        assert_eq!(ids[row], NO_TOKEN);
                        self.arena[source as usize].expect("an image that was encoded")
                    }
                    None => ids[row] as u64,
                };
                let position = [input.positions[0][row], input.positions[1][row], input.positions[2][row]];
                state = fold(state, what, position, self.weights);
                assert_eq!(input.slots[row] as usize, slot(from + row - first));
                assert!(written.insert(input.slots[row]), "two rows of one step write one slot");
                self.slots[input.slots[row] as usize] = Some(state);
                *out = state;
            }
        }
        assert!(images.next().is_none());
        let draw = |d: &Draw| drawn(states[d.row as usize], &d.sampling, d.position as usize);
        let (drawn, logprobs) = p.draws.iter().map(draw).unzip();
        self.drawn = drawn;
        (self.drawn.clone(), logprobs)
    }
}

struct Simulation {
    scheduler: Scheduler,
    device: Device,
    running: Option<(Plan, Vec<u32>, Vec<f32>)>,
    link: Arc<Link>,
    stalls: usize,
    steps: u64,
}

impl Simulation {
    fn new(limits: Limits, pages: usize, vision_rows: usize) -> Simulation {
        let scheduler = Scheduler::new(limits, pages, vision_rows, None);
        let device = Device {
            slots: vec![None; pages * BLOCK],
            arena: vec![None; scheduler.vision.rows()],
            tables: vec![vec![None; limits.max_len.div_ceil(BLOCK)]; limits.max_sequences],
            drawn: Vec::new(),
            weights: Weights::default(),
            limits,
        };
        Simulation { scheduler, device, running: None, link: Arc::default(), stalls: 0, steps: 0 }
    }

    fn generate(&mut self, id: u64, sampling: &Sampling, ephemeral: bool, leader: Option<u64>) -> Arc<Feed> {
        let (writer, feed) = Writer::new(self.link.clone());
        self.scheduler.begin_turn(id, Arc::new(sampling.clone()), writer, ephemeral, leader);
        feed
    }

    fn settle(&mut self, step: Option<(Plan, Vec<u32>, Vec<f32>)>) -> bool {
        let settled = step.is_some();
        if let Some((plan, tokens, logprobs)) = step {
            self.scheduler.settle(&plan.draws, &tokens, &logprobs);
        }
        self.scheduler.announce();
        settled
    }

    /// One round of the engine's loop, in either of its orders.
    fn step(&mut self) {
        let mut plan = Plan::default();
        self.scheduler.plan(&mut plan);
        let mut before = self.running.take();
        if plan.is_empty() {
            let settled = self.settle(before);
            self.stalls = if settled || !self.scheduler.busy() { 0 } else { self.stalls + 1 };
            assert!(self.stalls <= 2, "nothing can go on");
            return;
        }
        self.stalls = 0;
        self.steps += 1;
        if mix(self.steps, 7).is_multiple_of(2) {
            self.settle(before.take());
        }
        let (tokens, logprobs) = self.device.run(&plan);
        self.running = Some((plan, tokens, logprobs));
        self.settle(before);
    }

    /// Others from now on; those of the vision tower only with `vision`.
    fn change_weights(&mut self, vision: bool) {
        let running = self.running.take();
        self.settle(running);
        self.device.weights.text += 1;
        self.scheduler.change_epoch(vision);
        self.device.slots.fill(None);
        if vision {
            self.device.weights.vision += 1;
            self.device.arena.fill(None);
        }
    }
}

fn picture(kind: usize) -> Arc<Image> {
    let (h, w) = [(1, 2), (2, 3), (3, 3), (1, 1)][kind % 4];
    Arc::new(Image::from_resized(vec![kind as u8; h * w * 784 * 3], h * 28, w * 28, 14, (1, 1)).unwrap())
}

fn random_prompt(rng: &mut Rng, longest: usize) -> Prompt {
    let mut p = Prompt::default();
    // Few beginnings and few images, so that prefixes are found.
    let kind = rng.below(3) as u32;
    let parts = 1 + rng.below(4);
    for part in 0..parts {
        let text = 1 + rng.below(6);
        p.tokens.extend((0..text as u32).map(|i| 10 + kind + i % 3 + part as u32));
        if rng.below(2) == 0 {
            p.push_image(picture(rng.below(6)), PAD);
        }
    }
    p.tokens.push(10 + rng.below(4) as u32);
    p.truncate(longest);
    p
}

struct Live {
    id: u64,
    history: Prompt,
    turn: Option<(Arc<Feed>, Sampling, Weights)>,
}

fn check(completion: Completion, history: &Prompt, sampling: &Sampling, max_len: usize, weights: Option<Weights>) {
    let Completion { tokens, logprobs, finish, .. } = completion;
    let Some(weights) = weights else { return };
    let (t, l, f) = reference(history, sampling, max_len, weights);
    if finish == Finish::Cancelled {
        assert_eq!((&tokens[..], &logprobs[..]), (&t[..tokens.len()], &l[..tokens.len()]));
    } else {
        assert_eq!((tokens, logprobs, finish), (t, l, f));
    }
}

/// One random schedule; returns (tokens preempted or retracted, prefix hits, image hits).
fn random_schedule(seed: u64) -> (u64, u64, u64) {
    let mut rng = Rng(seed);
    let max_len = 24 + rng.below(40);
    let limits = Limits {
        block: BLOCK,
        max_len,
        step_tokens: 1 + rng.below(24),
        step_patches: 36 + rng.below(40),
        max_sequences: 1 + rng.below(5),
    };
    // From room for everybody down to room for one.
    let pages = max_len.div_ceil(BLOCK) + [0, 1, 4, 60][rng.below(4)];
    let mut sim = Simulation::new(limits, pages, 40 + rng.below(100));
    let mut live: Vec<Live> = Vec::new();
    let mut requests: Vec<(Arc<Feed>, Prompt, Sampling, Weights)> = Vec::new();
    let mut ids = 0..;
    for round in 0..150 {
        let weights = sim.device.weights;
        let action = if round < 110 { rng.below(12) } else { 99 };
        let sampling = Sampling {
            max_tokens: rng.below(12),
            stop_ids: vec![10 + rng.below(50) as u32, 17],
            seed: rng.below(3) as u64,
            stream: rng.below(3) as u64,
            ..Sampling::default()
        };
        match action {
            0 => live.push(Live { id: ids.next().unwrap(), history: Prompt::default(), turn: None }),
            1..=4 if !live.is_empty() => {
                let i = rng.below(live.len());
                let l = &mut live[i];
                if l.turn.is_none() {
                    let room = max_len.saturating_sub(l.history.len() + 2);
                    let p = random_prompt(&mut rng, room);
                    if !p.is_empty() && l.history.len() + p.len() < max_len {
                        sim.scheduler.append(l.id, &p);
                        l.history.append(&p);
                    }
                    if !l.history.is_empty() && l.history.len() < max_len {
                        let feed = sim.generate(l.id, &sampling, false, None);
                        l.turn = Some((feed, sampling, weights));
                    }
                }
            }
            5 if !live.is_empty() => {
                let parent = &live[rng.below(live.len())];
                if parent.turn.is_none() && !parent.history.is_empty() {
                    let child = Live { id: ids.next().unwrap(), history: parent.history.clone(), turn: None };
                    sim.scheduler.fork(parent.id, child.id);
                    live.push(child);
                }
            }
            6 if !live.is_empty() => {
                let l = live.swap_remove(rng.below(live.len()));
                sim.scheduler.close(l.id);
            }
            7 | 8 => {
                let prompt = random_prompt(&mut rng, max_len - 1);
                let mut leader = None;
                for stream in 0..1 + rng.below(4) as u64 {
                    let (id, s) = (ids.next().unwrap(), Sampling { stream, ..sampling.clone() });
                    sim.scheduler.append(id, &prompt);
                    let feed = sim.generate(id, &s, true, leader);
                    leader = leader.or(Some(id));
                    requests.push((feed, prompt.clone(), s, weights));
                }
            }
            9 if rng.below(8) == 0 => {
                let vision = rng.below(2) == 0;
                sim.change_weights(vision);
            }
            10 if !requests.is_empty() => {
                let r = &requests[rng.below(requests.len())];
                drop(super::Generation { feed: r.0.clone(), read: 0 });
                sim.scheduler.drop_cancelled();
            }
            11 if !live.is_empty() => {
                if let Some((feed, ..)) = &live[rng.below(live.len())].turn {
                    drop(super::Generation { feed: feed.clone(), read: 0 });
                    sim.scheduler.drop_cancelled();
                }
            }
            _ => {}
        }
        for _ in 0..if round == 149 { 3000 } else { rng.below(4) } {
            sim.step();
        }
        let weights = sim.device.weights;
        for l in live.iter_mut().filter(|l| l.turn.as_ref().is_some_and(|t| t.0.finished())) {
            let (feed, sampling, since) = l.turn.take().unwrap();
            let completion = feed.wait().unwrap();
            let tokens = completion.tokens.clone();
            check(completion, &l.history, &sampling, max_len, (since == weights).then_some(weights));
            l.history.tokens.extend(tokens);
        }
        requests.retain(|(feed, prompt, sampling, since)| {
            if feed.finished() {
                check(feed.wait().unwrap(), prompt, sampling, max_len, (*since == weights).then_some(weights));
            }
            !feed.finished()
        });
    }
    assert!(requests.is_empty() && live.iter().all(|l| l.turn.is_none()), "everything ends");
    live.iter().for_each(|l| sim.scheduler.close(l.id));
    assert_eq!(sim.scheduler.blocks.free(), pages, "every page comes back");
    assert_eq!(sim.scheduler.gauges(), (0, 0, 0));
    let c = sim.scheduler.counters;
    (c.retracted_tokens, c.prefix_hit_tokens, c.vision_hits)
}

#[test]
fn every_schedule_gives_each_sequence_its_own_tokens() {
    let mut all = (0, 0, 0);
    for seed in 0..400 {
        let got = std::panic::catch_unwind(|| random_schedule(seed))
            .unwrap_or_else(|_| panic!("schedule {seed} failed; see above"));
        all = (all.0 + got.0, all.1 + got.1, all.2 + got.2);
    }
    assert!(all.0 > 1000 && all.1 > 1000 && all.2 > 1000, "the schedules exercise too little: {all:?}");
}

fn limits(max_len: usize) -> Limits {
    Limits { block: BLOCK, max_len, step_tokens: 8, step_patches: 100, max_sequences: 8 }
}

fn run_until(sim: &mut Simulation, feeds: &[&Arc<Feed>]) {
    for _ in 0..1000 {
        if feeds.iter().all(|f| f.finished()) {
            return;
        }
        sim.step();
    }
    panic!("not finished");
}

#[test]
fn a_second_turn_computes_only_what_is_new() {
    let mut sim = Simulation::new(limits(100), 50, 64);
    let p = Prompt::from_tokens((10..30).collect());
    sim.scheduler.append(0, &p);
    let sampling = Sampling { max_tokens: 6, ..Sampling::default() };
    let feed = sim.generate(0, &sampling, false, None);
    run_until(&mut sim, &[&feed]);
    sim.scheduler.append(0, &Prompt::from_tokens(vec![40, 41]));
    sim.generate(0, &sampling, false, None);
    let mut plan = Plan::default();
    sim.scheduler.plan(&mut plan);
    // The last sampled token, whose keys and values were not needed before, and the two new ones.
    assert_eq!((plan.rows(), plan.prefill_tokens, plan.input.kv_lens[0]), (3, 3, 28));
}

#[test]
fn samples_of_one_prompt_compute_it_once() {
    let mut sim = Simulation::new(limits(100), 80, 64);
    let mut p = random_prompt(&mut Rng(5), 60);
    p.push_image(picture(2), PAD);
    p.tokens.extend([20; 11]);
    let mut feeds = Vec::new();
    for stream in 0..5 {
        sim.scheduler.append(stream, &p);
        let sampling = Sampling { stream, max_tokens: 3, ..Sampling::default() };
        feeds.push(sim.generate(stream, &sampling, true, (stream > 0).then_some(0)));
    }
    let mut rows = 0;
    while !feeds.iter().all(|f| f.finished()) {
        sim.step();
        rows += sim.running.as_ref().map_or(0, |(plan, ..)| plan.prefill_tokens);
    }
    assert_eq!(rows, p.len() + 4, "the prompt, and its last token once more for each other sample");
}

#[test]
fn parked_sessions_are_the_first_victims_and_come_back_right() {
    let mut sim = Simulation::new(limits(40), 10, 64);
    let parked = Prompt::from_tokens((10..34).collect());
    sim.scheduler.append(0, &parked);
    let sampling = Sampling { max_tokens: 4, ..Sampling::default() };
    let first = sim.generate(0, &sampling, false, None);
    run_until(&mut sim, &[&first]);
    let other = Prompt::from_tokens((50..80).collect());
    sim.scheduler.append(1, &other);
    let second = sim.generate(1, &sampling, false, None);
    run_until(&mut sim, &[&second]);
    assert!(sim.scheduler.counters.retracted_tokens > 0);
    assert_eq!(sim.scheduler.counters.preemptions, 0, "nobody who ran was stopped");
    let mut history = parked;
    history.tokens.extend(first.wait().unwrap().tokens);
    let again = sim.generate(0, &sampling, false, None);
    run_until(&mut sim, &[&again]);
    check(again.wait().unwrap(), &history, &sampling, 40, Some(Weights::default()));
}

#[test]
fn a_long_prompt_does_not_hold_up_those_who_decode() {
    let mut sim = Simulation::new(limits(200), 100, 64);
    sim.scheduler.append(0, &Prompt::from_tokens(vec![10; 150]));
    for id in 1..4 {
        sim.scheduler.append(id, &Prompt::from_tokens(vec![20; id as usize]));
    }
    let sampling = Sampling { max_tokens: 20, ..Sampling::default() };
    let short: Vec<_> = (1..4).map(|id| sim.generate(id, &sampling, false, None)).collect();
    (0..3).for_each(|_| sim.step());
    // The older sequence comes first, and still leaves each of the others its token.
    let long = sim.generate(0, &sampling, false, None);
    for _ in 0..10 {
        sim.step();
        let plan = &sim.running.as_ref().unwrap().0;
        assert_eq!((plan.draws.len(), plan.rows()), (3, 8));
    }
    assert!(!long.finished());
    run_until(&mut sim, &short.iter().chain([&long]).collect::<Vec<_>>());
}

#[test]
fn a_prompt_found_up_to_the_middle_of_an_image_goes_on_there() {
    let mut sim = Simulation::new(limits(100), 50, 64);
    let sampling = Sampling { max_tokens: 3, ..Sampling::default() };
    let mut prompt = Prompt::from_tokens(vec![10, 11]);
    prompt.push_image(picture(2), PAD); // 9 tokens: two pages and three tokens with the text before it
    let mut rows = Vec::new();
    for (id, last) in [(0, 20), (1, 21)] {
        let mut p = prompt.clone();
        p.tokens.push(last);
        sim.scheduler.append(id, &p);
        let before = sim.scheduler.counters.prefix_hit_tokens;
        let feed = sim.generate(id, &sampling, true, None);
        run_until(&mut sim, &[&feed]);
        check(feed.wait().unwrap(), &p, &sampling, 100, Some(Weights::default()));
        rows.push((sim.scheduler.counters.prefix_hit_tokens - before, sim.scheduler.counters.vision_misses));
    }
    assert_eq!(rows, [(0, 1), (8, 1)]);
}

#[test]
fn images_are_encoded_again_only_where_the_vision_tower_has_moved() {
    let mut sim = Simulation::new(limits(100), 50, 64);
    let sampling = Sampling { max_tokens: 3, ..Sampling::default() };
    let mut prompt = Prompt::from_tokens(vec![10, 11]);
    prompt.push_image(picture(2), PAD);
    prompt.tokens.push(20);
    let mut encoded = Vec::new();
    for (id, moved) in [None, Some(false), Some(true), Some(false)].into_iter().enumerate() {
        moved.into_iter().for_each(|vision| sim.change_weights(vision));
        sim.scheduler.append(id as u64, &prompt);
        let feed = sim.generate(id as u64, &sampling, true, None);
        run_until(&mut sim, &[&feed]);
        check(feed.wait().unwrap(), &prompt, &sampling, 100, Some(sim.device.weights));
        encoded.push((sim.scheduler.counters.vision_misses, sim.scheduler.vision.images()));
    }
    assert_eq!(encoded, [(1, 1), (1, 1), (2, 1), (2, 1)]);
}
