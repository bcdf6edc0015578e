//! What runs next.
//!
//! Every step is planned from scratch over the sequences that have a turn, oldest first: one token for each that
//! decodes, and chunks of prompts in what is left of the step's tokens. There is no prefill phase. Sequences are served
//! in the order in which they were opened, so that episodes that have begun finish before new ones take their memory.
//!
//! A step is planned while the one before it runs. Then the newest token of a sequence is still under way: its row is
//! planned with the id left open, and patched in on the device, where the draw is. A sequence that turns out to have ended has had
//! one row too many, which in a session is the last token's, needed by its next turn.
//!
//! When pages run out, the latest page of a victim is taken and recomputed later: of the session that has been parked
//! longest, then of the youngest sequence that waits, then of the youngest that runs; never of one older than the asker.

use super::blocks::Blocks;
use super::generation::Writer;
use super::plan::{Draw, Plan};
use super::sampling::{Finish, Sampling, StopStrings};
use super::sequence::{Sequence, Turn};
use super::stats::Counters;
use super::vision::{Lookup, VisionCache};
use crate::input::{Prompt, Tokenizer};
use crate::ops::embedding::NO_TOKEN;
use crate::ops::sample::NO_SAMPLE;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// What bounds a step and a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Tokens of a page.
    pub block: usize,
    /// Tokens of the longest sequence.
    pub max_len: usize,
    pub step_tokens: usize,
    pub step_patches: usize,
    pub max_sequences: usize,
}

pub(super) struct Scheduler {
    limits: Limits,
    pub blocks: Blocks,
    pub vision: VisionCache,
    pub counters: Counters,
    /// Rises when the weights change.
    pub epoch: u64,
    tokenizer: Option<Arc<Tokenizer>>,
    /// Rows of the device's block tables that no sequence has. Those that run have one each.
    table_rows: Vec<u32>,
    /// By id; ids ascend in the order of opening.
    sequences: HashMap<u64, Box<Sequence>>,
    /// With a turn, and rows in every step.
    running: BTreeSet<u64>,
    /// With a turn, not yet let in.
    waiting: BTreeSet<u64>,
    /// Without a turn and with pages, by the time of parking.
    parked: BTreeMap<u64, u64>,
    /// Those with a leader.
    followers: Vec<u64>,
    /// Turns that have ended and whose readers are still to be told.
    ended: Vec<(Writer, Result<Finish, &'static str>)>,
    turns: u64,
    clock: u64,
}

impl Scheduler {
    pub fn new(limits: Limits, blocks: usize, vision_rows: usize, tokenizer: Option<Arc<Tokenizer>>) -> Scheduler {
        Scheduler {
            limits,
            blocks: Blocks::new(blocks),
            vision: VisionCache::new(vision_rows),
            counters: Counters::default(),
            epoch: 0,
            tokenizer,
            table_rows: (0..limits.max_sequences as u32).rev().collect(),
            sequences: HashMap::new(),
            running: BTreeSet::new(),
            waiting: BTreeSet::new(),
            parked: BTreeMap::new(),
            followers: Vec::new(),
            ended: Vec::new(),
            turns: 0,
            clock: 0,
        }
    }

    /// Whether any sequence has a turn.
    pub fn busy(&self) -> bool {
        !(self.running.is_empty() && self.waiting.is_empty())
    }

    /// Sequences that run, that wait for their turn to begin, and all there are.
    pub fn gauges(&self) -> (usize, usize, usize) {
        (self.running.len(), self.waiting.len(), self.sequences.len())
    }

    /// Appends to a sequence, which is made if there is none of this id.
    pub fn append(&mut self, id: u64, prompt: &Prompt) {
        self.sequences.entry(id).or_default().append(prompt);
    }

    /// Tells the readers of the turns that have ended: when everything else that they may ask about is up to date.
    pub fn announce(&mut self) {
        for (writer, end) in self.ended.drain(..) {
            writer.finish(end);
        }
    }

    /// Begins a turn. With a leader, the turn waits until that sequence has computed the prompt that both share.
    pub fn begin_turn(
        &mut self,
        id: u64,
        sampling: Arc<Sampling>,
        writer: Writer,
        ephemeral: bool,
        leader: Option<u64>,
    ) {
        let s = self.sequences.entry(id).or_default();
        if let Some(at) = s.parked.take() {
            self.parked.remove(&at);
        }
        s.rewind(&mut self.blocks, self.limits.block);
        self.turns += 1;
        let stop_strings = StopStrings::new(&sampling);
        s.turn = Some(Turn { id: self.turns, sampling, writer, start: s.tokens.len(), stop_strings });
        (s.ephemeral, s.leader) = (ephemeral, leader);
        if leader.is_some() {
            self.followers.push(id);
        }
        self.waiting.insert(id);
    }

    /// Opens `child` with the tokens of `parent`, sharing its pages.
    pub fn fork(&mut self, parent: u64, child: u64) {
        if let Some(p) = self.sequences.get(&parent) {
            let forked = p.fork(&mut self.blocks, self.limits.block);
            self.sequences.insert(child, Box::new(forked));
            self.park(child);
        }
    }

    /// Forgets a sequence; a turn it has is cancelled.
    pub fn close(&mut self, id: u64) {
        self.end_turn(id, Ok(Finish::Cancelled));
        self.remove(id);
    }

    /// Ends the turns whose readers are gone.
    pub fn drop_cancelled(&mut self) {
        let gone: Vec<u64> = (self.running.iter().chain(&self.waiting).copied())
            .filter(|id| self.sequences[id].turn.as_ref().is_some_and(|t| t.writer.cancelled()))
            .collect();
        for id in gone {
            self.end_turn(id, Ok(Finish::Cancelled));
        }
    }

    /// The weights changed: no keys and values computed so far are valid, and, if those of the vision tower changed too
    /// (`vision`), no encoded images.
    pub fn change_epoch(&mut self, vision: bool) {
        self.epoch += 1;
        for s in self.sequences.values_mut() {
            s.change_epoch(&mut self.blocks);
            s.parked = None;
            self.table_rows.extend(s.blocks.leave());
        }
        self.parked.clear();
        self.waiting.append(&mut self.running);
        self.blocks.withdraw_all();
        if vision {
            self.vision.change_epoch();
        }
    }

    /// Takes in what a step has drawn.
    pub fn settle(&mut self, draws: &[Draw], tokens: &[u32], logprobs: &[f32]) {
        for ((d, &token), &logprob) in draws.iter().zip(tokens).zip(logprobs) {
            let Some(s) = self.sequences.get_mut(&d.sequence) else { continue };
            let Some(t) = s.turn.as_mut().filter(|t| t.id == d.turn) else { continue };
            if token == NO_SAMPLE {
                self.end_turn(d.sequence, Err("the model's logits are NaN or infinite: nothing can be sampled"));
                continue;
            }
            t.writer.push(token, logprob, self.epoch);
            self.counters.sampled_tokens += 1;
            let mut finish = t.sampling.stop_ids.contains(&token).then_some(Finish::Stop(token));
            if finish.is_none()
                && let Some(tokenizer) = self.tokenizer.as_ref().filter(|_| !t.sampling.stop_strings.is_empty())
            {
                let found = t.stop_strings.push(tokenizer.token_bytes(token), &t.sampling.stop_strings);
                finish = found.map(|s| Finish::StopString(s.to_string()));
            }
            let (start, most) = (t.start, t.sampling.max_tokens);
            s.push(token);
            s.unsettled -= 1;
            s.publish(&mut self.blocks, self.limits.block, self.epoch);
            if finish.is_none() && s.tokens.len() - start >= most {
                finish = Some(Finish::Length);
            }
            if finish.is_none() && s.tokens.len() >= self.limits.max_len {
                finish = Some(Finish::Context);
            }
            if let Some(f) = finish {
                self.end_turn(d.sequence, Ok(f));
            }
        }
    }

    /// Plans a step. It is empty if nothing can run before results under way are settled.
    pub fn plan(&mut self, plan: &mut Plan) {
        plan.clear();
        self.vision.begin_step();
        self.share_prompts();
        self.pass(plan, false);
        if plan.rows() == 0 && self.busy() && self.sequences.values().all(|s| s.unsettled == 0) {
            // Sequences hold pages and wait for each other: the oldest takes what it needs.
            self.pass(plan, true);
        }
    }

    /// Lets followers go whose leader has computed the prompt, or is gone.
    fn share_prompts(&mut self) {
        let (block, sequences, blocks) = (self.limits.block, &mut self.sequences, &mut self.blocks);
        self.followers.retain(|id| {
            let Some(leader) = sequences.get(id).and_then(|s| s.leader) else { return false };
            let Some(mut s) = sequences.remove(id) else { return false };
            let shared = s.tokens.len().saturating_sub(1);
            let l = sequences.get(&leader).filter(|l| l.turn.is_some());
            if let Some(l) = l.filter(|l| l.computed >= shared) {
                s.share(l, shared, blocks, block);
                self.counters.prefix_hit_tokens += shared as u64;
            }
            let wait = l.is_some_and(|l| l.computed < shared);
            s.leader = wait.then_some(leader);
            sequences.insert(*id, s);
            wait
        });
    }

    fn pass(&mut self, plan: &mut Plan, force: bool) {
        let mut decoders =
            self.running.iter().filter(|id| self.sequences[id].remaining() == 1).count().min(self.limits.step_tokens);
        let mut budget = self.limits.step_tokens;
        let mut next = 0;
        let mut open = true;
        while budget > 0 {
            let running = self.running.range(next..).next().copied();
            let waiting = if open { self.waiting.range(next..).next().copied() } else { None };
            let Some(id) = running.into_iter().chain(waiting).min() else { break };
            next = id + 1;
            if self.ends_before_it_runs(id) {
                continue;
            }
            if waiting == Some(id) {
                if self.sequences[&id].leader.is_some() {
                    continue;
                }
                if !self.admit(id, force && plan.rows() == 0) {
                    open = false;
                    continue;
                }
            } else if self.sequences[&id].remaining() == 1 {
                decoders = decoders.saturating_sub(1);
            }
            // Those that decode and are still to come keep their token each.
            budget -= self.schedule(id, budget.saturating_sub(decoders).max(1), plan);
        }
    }

    /// A turn that draws nothing ends once its tokens are computed.
    fn ends_before_it_runs(&mut self, id: u64) -> bool {
        let s = &self.sequences[&id];
        let draws_nothing = s.turn.as_ref().is_some_and(|t| t.sampling.max_tokens == 0);
        if draws_nothing && s.leader.is_none() && s.remaining() == 0 {
            self.end_turn(id, Ok(Finish::Length));
            return true;
        }
        false
    }

    /// Lets a waiting sequence in if its tokens fit.
    fn admit(&mut self, id: u64, force: bool) -> bool {
        if self.running.len() >= self.limits.max_sequences {
            match self.running.last().copied().filter(|&youngest| force && youngest > id) {
                Some(youngest) => self.demote(youngest),
                None => return false,
            }
        }
        let Some(mut s) = self.sequences.remove(&id) else { return false };
        let block = self.limits.block;
        let hit = s.find_prefix(&mut self.blocks, block, self.epoch);
        self.counters.prefix_hit_tokens += hit as u64;
        // A partial page that is shared is copied before it is written.
        let copy = !s.computed.is_multiple_of(block) && self.blocks.shared(s.blocks[s.computed / block]);
        let need = s.target().div_ceil(block) - s.blocks.len() + usize::from(copy);
        self.sequences.insert(id, s);
        loop {
            // One page each for those that run, which will ask soon.
            if self.running.is_empty() || self.blocks.free() >= need + self.running.len() {
                break;
            }
            if force && self.blocks.free() >= need {
                break;
            }
            if !self.reclaim(id, force) {
                return false;
            }
        }
        // There is a row: whoever stops running gives its own back.
        let Some(row) = self.table_rows.pop() else { return false };
        self.sequences.get_mut(&id).into_iter().for_each(|s| s.blocks.enter(row));
        self.waiting.remove(&id);
        self.running.insert(id);
        true
    }

    /// Plans up to `limit` tokens of a running sequence; returns how many.
    fn schedule(&mut self, id: u64, limit: usize, plan: &mut Plan) -> usize {
        let Some(mut s) = self.sequences.remove(&id) else { return 0 };
        let n = self.schedule_sequence(id, &mut s, limit, plan);
        self.sequences.insert(id, s);
        n
    }

    fn schedule_sequence(&mut self, id: u64, s: &mut Sequence, limit: usize, plan: &mut Plan) -> usize {
        let Limits { block, max_len, .. } = self.limits;
        let Some(t) = &s.turn else { return 0 };
        let most = t.sampling.max_tokens;
        if most > 0 && (s.drawn() >= most || s.total() >= max_len) {
            return 0; // ends when what is under way is read
        }
        let from = s.computed;
        let mut to = from + s.remaining().min(limit);
        to = self.place_images(s, from, to, plan);
        to = self.place_pages(id, s, from, to, plan);
        if to <= from {
            return 0;
        }
        for span in s.spans(from, to) {
            let (a, b) = (from.max(span.offset), to.min(span.offset + span.len));
            let rows = self.vision.rows_of(&span.image.hash, a - span.offset, b - span.offset);
            plan.input.image_sources.extend(rows);
        }
        plan.push_rows(s, from, to, block, NO_TOKEN);
        s.computed = to;
        if s.drawn() == 0 || to - from > 1 {
            plan.prefill_tokens += to - from;
        }
        // Published before it has run: whoever finds these pages reads them in this step or a later one, and in each
        // layer all rows' keys and values are written before any row attends.
        s.publish(&mut self.blocks, block, self.epoch);
        if let Some(t) = &s.turn
            && most > 0
            && to == s.total()
        {
            plan.draws.push(Draw {
                sequence: id,
                turn: t.id,
                row: plan.rows() as u32 - 1,
                position: to as u32,
                sampling: t.sampling.clone(),
            });
            s.draw = plan.draws.len() - 1;
            s.unsettled += 1;
        }
        to - from
    }

    /// Sees to it that the images of tokens `from..to` are encoded; returns the end of the tokens whose images are.
    fn place_images(&mut self, s: &Sequence, from: usize, to: usize, plan: &mut Plan) -> usize {
        let mut patches: usize = plan.encode.iter().map(|i| i.grid.patches()).sum();
        for span in s.spans(from, to) {
            let fits = patches + span.image.grid.patches() <= self.limits.step_patches;
            match self.vision.lookup(&span.image.hash, span.len, fits) {
                Lookup::Ready => self.counters.vision_hits += 1,
                Lookup::Encode => {
                    self.counters.vision_misses += 1;
                    patches += span.image.grid.patches();
                    plan.encode_rows.extend(self.vision.rows_of(&span.image.hash, 0, span.len));
                    plan.encode.push(span.image.clone());
                }
                Lookup::Full => return span.offset.max(from),
            }
        }
        to
    }

    /// Gets pages for tokens `from..to`; returns the end of the tokens that have one.
    fn place_pages(&mut self, id: u64, s: &mut Sequence, from: usize, to: usize, plan: &mut Plan) -> usize {
        let block = self.limits.block;
        if to > from && !from.is_multiple_of(block) {
            let i = from / block;
            loop {
                if !self.blocks.shared(s.blocks[i]) {
                    s.unpublish_last(&mut self.blocks, block);
                    break;
                }
                if let Some(copy) = self.blocks.alloc() {
                    plan.copies.push((s.blocks[i], copy));
                    self.blocks.release(s.blocks.replace(i, copy));
                    break;
                }
                if !self.reclaim(id, true) {
                    return from;
                }
            }
        }
        while s.blocks.len() * block < to {
            match self.blocks.alloc() {
                Some(b) => s.blocks.push(b),
                None if self.reclaim(id, true) => {}
                None => break,
            }
        }
        to.min(s.blocks.len() * block).max(from)
    }

    /// Takes the last page of the sequence that minds least, on behalf of sequence `id`. `false`: there is none.
    /// Sequences that run give theirs only with `running`.
    fn reclaim(&mut self, id: u64, running: bool) -> bool {
        if let Some((&at, &victim)) = self.parked.first_key_value() {
            if !self.take_page(victim) {
                self.parked.remove(&at);
                self.sequences.get_mut(&victim).into_iter().for_each(|s| s.parked = None);
            }
            return true;
        }
        let holds = |v: &&u64| self.sequences.get(v).is_some_and(|s| !s.blocks.is_empty());
        if let Some(victim) = self.waiting.range(id + 1..).rev().find(holds).copied() {
            return self.take_page(victim);
        }
        if !running {
            return false;
        }
        let Some(victim) = self.running.range(id + 1..).next_back().copied() else { return false };
        self.demote(victim);
        self.take_page(victim);
        true
    }

    /// Takes the last page of a sequence; `false` if it has none.
    fn take_page(&mut self, id: u64) -> bool {
        let Some(s) = self.sequences.get_mut(&id).filter(|s| !s.blocks.is_empty()) else { return false };
        let before = s.computed;
        s.drop_last_page(&mut self.blocks, self.limits.block);
        self.counters.retracted_tokens += (before - s.computed) as u64;
        true
    }

    fn demote(&mut self, id: u64) {
        if self.running.remove(&id) {
            self.counters.preemptions += 1;
            self.waiting.insert(id);
            self.table_rows.extend(self.sequences.get_mut(&id).and_then(|s| s.blocks.leave()));
        }
    }

    fn end_turn(&mut self, id: u64, end: Result<Finish, &'static str>) {
        self.running.remove(&id);
        self.waiting.remove(&id);
        let Some(s) = self.sequences.get_mut(&id) else { return };
        self.table_rows.extend(s.blocks.leave());
        let Some(turn) = s.turn.take() else { return };
        if s.unsettled > 0 {
            // A draw that is still under way is not part of the sequence, nor is its row, if one is planned.
            s.unsettled = 0;
            if s.computed > s.tokens.len() {
                s.computed = s.tokens.len();
            }
        }
        s.leader = None;
        if s.ephemeral {
            self.remove(id);
        } else {
            self.park(id);
        }
        self.counters.turns += 1;
        self.ended.push((turn.writer, end));
    }

    fn park(&mut self, id: u64) {
        if let Some(s) = self.sequences.get_mut(&id).filter(|s| !s.blocks.is_empty()) {
            self.clock += 1;
            s.parked = Some(self.clock);
            self.parked.insert(self.clock, id);
        }
    }

    fn remove(&mut self, id: u64) {
        if let Some(mut s) = self.sequences.remove(&id) {
            if let Some(at) = s.parked {
                self.parked.remove(&at);
            }
            s.drop_pages(&mut self.blocks);
        }
    }
}
