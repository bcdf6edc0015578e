//! What the engine promises to its callers.

mod tiny;

use std::sync::Arc;
use tiny::{image, kv_bytes, model, text};
use varft::Error;
use varft::device::{Buffer, Device};
use varft::engine::{Completion, Engine, EngineOptions, Finish, Request, Sampling, Session};
use varft::input::{Prompt, Tokenizer};
use varft::model::{LoadOptions, Model, Preset};

/// Small budgets: a test engine starts at once.
fn options(model: &Model) -> EngineOptions {
    EngineOptions {
        kv_bytes: kv_bytes(model, 64),
        vision_bytes: 64 << 10,
        max_context: 1024,
        max_sequences: 8,
        step_tokens: 96,
        step_patches: 256,
        ..EngineOptions::default()
    }
}

/// Text, an image, text.
fn picture_prompt(model: &Model, kind: usize, before: usize, after: usize) -> Prompt {
    let t = &model.config.tokens;
    let mut p = Prompt::from_tokens(text(kind, before));
    p.tokens.push(t.vision_start);
    p.push_image(image(kind, 3, 4), t.image);
    p.tokens.push(t.vision_end);
    p.tokens.extend(text(kind + 50, after));
    p
}

fn start(model: &Arc<Model>) -> Engine {
    Engine::start(model.clone(), options(model)).unwrap()
}

fn sampling(seed: u64, max_tokens: usize) -> Sampling {
    Sampling { seed, max_tokens, ..Sampling::default() }
}

fn one(engine: &Engine, prompt: &Prompt, sampling: &Sampling) -> Completion {
    let request = Request { prompt: prompt.clone(), sampling: sampling.clone(), n: 1 };
    engine.generate(request).unwrap().remove(0).wait().unwrap()
}

fn bits(c: &Completion) -> (Vec<u32>, Vec<u32>, Finish) {
    (c.tokens.clone(), c.logprobs.iter().map(|l| l.to_bits()).collect(), c.finish.clone())
}

#[test]
fn a_seed_gives_the_same_tokens_alone_and_in_company() {
    let m = model(&Device::cpu(2));
    let s = Sampling { top_k: 200, top_p: 0.95, min_p: 0.01, temperature: 0.8, ..sampling(11, 24) };
    let p = picture_prompt(&m, 1, 20, 9);
    let alone = one(&start(&m), &p, &s);
    let crowd = start(&m);
    let request =
        |kind: usize, n| Request { prompt: picture_prompt(&m, kind, 10 * kind, 5), sampling: sampling(3, 30), n };
    let others: Vec<_> = (2..5).flat_map(|kind| crowd.generate(request(kind, 3)).unwrap()).collect();
    let same = one(&crowd, &p, &s);
    assert_eq!(bits(&alone), bits(&same));
    let other_seed = one(&crowd, &p, &Sampling { seed: 12, ..s.clone() });
    assert_ne!(alone.tokens, other_seed.tokens);
    assert!(others.into_iter().all(|g| g.wait().unwrap().tokens.len() == 30));
    assert_eq!((alone.finish, alone.tokens.len(), alone.logprobs.len()), (Finish::Length, 24, 24));
}

#[test]
fn samples_of_a_request_are_those_of_its_streams_and_share_the_prompt() {
    let m = model(&Device::cpu(2));
    let p = picture_prompt(&m, 1, 40, 9);
    let engine = start(&m);
    let request = Request { prompt: p.clone(), sampling: Sampling { stream: 5, ..sampling(3, 12) }, n: 4 };
    let all: Vec<Completion> = engine.generate(request).unwrap().into_iter().map(|g| g.wait().unwrap()).collect();
    let stats = engine.stats();
    assert_eq!(stats.prefill_tokens as usize, p.len() + 3, "the prompt, and its last token for each other sample");
    assert_eq!(stats.images_encoded, 1);
    for (i, c) in all.iter().enumerate() {
        let single = one(&start(&m), &p, &Sampling { stream: 5 + i as u64, ..sampling(3, 12) });
        assert_eq!(bits(c), bits(&single), "sample {i}");
    }
    assert!(all.windows(2).all(|w| w[0].tokens != w[1].tokens));
}

#[test]
fn tokens_can_be_read_as_they_come() {
    let m = model(&Device::cpu(1));
    let engine = start(&m);
    let p = Prompt::from_tokens(text(1, 30));
    let whole = one(&engine, &p, &sampling(1, 9));
    let request = Request { prompt: p, sampling: sampling(1, 9), n: 1 };
    let mut g = engine.generate(request).unwrap().remove(0);
    let first: Vec<_> = g.by_ref().take(4).map(|t| t.unwrap()).collect();
    assert_eq!(first.iter().map(|t| t.token).collect::<Vec<_>>(), whole.tokens[..4]);
    assert_eq!(bits(&g.wait().unwrap()), bits(&whole));
}

#[test]
fn sampling_stops_at_ids_and_at_the_token_that_completes_a_string() {
    let m = model(&Device::cpu(1));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/input/tokenizer_tiny.json");
    let tokenizer = Arc::new(Tokenizer::load(path).unwrap());
    let o = EngineOptions { tokenizer: Some(tokenizer.clone()), ..options(&m) };
    let engine = Engine::start(m.clone(), o).unwrap();
    let p = Prompt::from_tokens(text(1, 30));
    let free = one(&engine, &p, &sampling(1, 30));
    let id = free.tokens[20];
    let at = free.tokens.iter().position(|&t| t == id).unwrap();
    let stopped = one(&engine, &p, &Sampling { stop_ids: vec![id], ..sampling(1, 30) });
    assert_eq!((stopped.finish, &stopped.tokens[..]), (Finish::Stop(id), &free.tokens[..=at]));

    // A string that begins in one token and ends in a later one.
    let pieces: Vec<String> = free.tokens.iter().map(|&t| tokenizer.decode(&[t])).collect();
    let plain = |s: &String| !s.is_empty() && s.is_ascii();
    let at = (4..29).find(|&i| plain(&pieces[i]) && plain(&pieces[i + 1])).expect("two tokens of plain text");
    let stop = format!("{}{}", pieces[at].chars().last().unwrap(), pieces[at + 1].chars().next().unwrap());
    let until = (0..30).find(|&i| tokenizer.decode(&free.tokens[..=i]).contains(&stop)).unwrap();
    let stopped =
        one(&engine, &p, &Sampling { stop_strings: vec!["\u{1F980}".into(), stop.clone()], ..sampling(1, 30) });
    assert_eq!((stopped.finish, &stopped.tokens[..]), (Finish::StopString(stop.clone()), &free.tokens[..=until]));

    let without = start(&m);
    let request = Request { prompt: p, sampling: Sampling { stop_strings: vec![stop], ..sampling(1, 3) }, n: 1 };
    assert!(without.generate(request).err().unwrap().to_string().contains("tokenizer"));
}

#[test]
fn a_session_goes_on_as_if_it_had_been_one_prompt() {
    let m = model(&Device::cpu(2));
    let engine = start(&m);
    let mut s = engine.session();
    s.append(picture_prompt(&m, 1, 20, 9)).unwrap();
    let first = s.generate(sampling(1, 10)).unwrap().wait().unwrap();
    let before = engine.stats();
    let answer = picture_prompt(&m, 2, 3, 4);
    s.append(answer.clone()).unwrap();
    let second = s.generate(sampling(2, 10)).unwrap().wait().unwrap();
    let after = engine.stats();
    assert_eq!(after.prefill_tokens - before.prefill_tokens, answer.len() as u64 + 1, "only what is new");
    let mut whole = picture_prompt(&m, 1, 20, 9);
    whole.tokens.extend(&first.tokens);
    whole.append(&answer);
    assert_eq!(bits(&second), bits(&one(&start(&m), &whole, &sampling(2, 10))));
    whole.tokens.extend(&second.tokens);
    assert_eq!(s.tokens().unwrap(), whole.tokens);
    assert_eq!(s.images(), whole.images);
}

#[test]
fn forks_share_their_past_and_go_their_own_ways() {
    let m = model(&Device::cpu(1));
    let engine = start(&m);
    let mut base = engine.session();
    let p = picture_prompt(&m, 1, 50, 9);
    base.append(p.clone()).unwrap();
    base.prefill().unwrap();
    let before = engine.stats();
    let mut forks: Vec<Session> = (0..4).map(|_| base.fork().unwrap()).collect();
    let turns: Vec<_> = forks.iter_mut().zip(1..).map(|(f, seed)| f.generate(sampling(seed, 20)).unwrap()).collect();
    drop(base);
    for (g, seed) in turns.into_iter().zip(1..) {
        assert_eq!(bits(&g.wait().unwrap()), bits(&one(&start(&m), &p, &sampling(seed, 20))));
    }
    assert_eq!(engine.stats().prefill_tokens - before.prefill_tokens, 4, "the last prompt token of each");
    assert_eq!(engine.stats().images_encoded, 1);
}

#[test]
fn prompts_that_begin_alike_are_found_in_the_cache_but_not_with_another_image() {
    let m = model(&Device::cpu(1));
    let engine = start(&m);
    let with = |kind: usize| {
        let mut p = Prompt::from_tokens(text(1, 40));
        p.push_image(image(kind, 3, 4), m.config.tokens.image);
        p.tokens.extend(text(2, 80));
        p
    };
    let fresh = |kind| bits(&one(&start(&m), &with(kind), &sampling(1, 8)));
    assert_eq!(bits(&one(&engine, &with(1), &sampling(1, 8))), fresh(1));
    let first = engine.stats();
    assert_eq!(bits(&one(&engine, &with(1), &sampling(1, 8))), fresh(1));
    let second = engine.stats();
    assert_eq!((second.prefix_hit_tokens - first.prefix_hit_tokens, second.images_encoded), (128, 1));
    assert_eq!(bits(&one(&engine, &with(3), &sampling(1, 8))), fresh(3));
    let third = engine.stats();
    assert_eq!((third.prefix_hit_tokens - second.prefix_hit_tokens, third.images_encoded), (32, 2));
    assert_ne!(fresh(1), fresh(3), "the image matters");
}

#[test]
fn an_image_is_encoded_once_for_a_group_and_all_its_turns() {
    let m = model(&Device::cpu(2));
    let engine = start(&m);
    let mut sessions: Vec<Session> = (0..6).map(|_| engine.session()).collect();
    let shown = picture_prompt(&m, 1, 4, 4);
    for turn in 0..3 {
        for (i, s) in sessions.iter_mut().enumerate() {
            s.append(Prompt::from_tokens(text(turn * 10 + i, 5))).unwrap();
            s.append(shown.clone()).unwrap();
        }
        let turns: Vec<_> = sessions.iter_mut().map(|s| s.generate(sampling(1, 5)).unwrap()).collect();
        turns.into_iter().for_each(|g| drop(g.wait().unwrap()));
    }
    assert_eq!(engine.stats().images_encoded, 1);
}

#[test]
fn scarce_pages_change_nothing_but_the_time() {
    let m = model(&Device::cpu(2));
    // Nine pages of 32 tokens; each of six sequences comes to need five and then more.
    let o = EngineOptions { kv_bytes: kv_bytes(&m, 9), max_context: 280, ..options(&m) };
    let engine = Engine::start(m.clone(), o).unwrap();
    let prompt = |i: usize| picture_prompt(&m, i, 4 + i, 3);
    let mut sessions: Vec<Session> = (0..6).map(|_| engine.session()).collect();
    let mut history: Vec<Prompt> = vec![Prompt::default(); 6];
    for turn in 0..2 {
        let mut turns = Vec::new();
        for (i, s) in sessions.iter_mut().enumerate() {
            let p = if turn == 0 { prompt(i) } else { Prompt::from_tokens(text(i, 7)) };
            history[i].append(&p);
            s.append(p).unwrap();
            turns.push(s.generate(sampling(i as u64, 110)).unwrap());
        }
        for (i, g) in turns.into_iter().enumerate() {
            let c = g.wait().unwrap();
            assert_eq!(bits(&c), bits(&one(&start(&m), &history[i], &sampling(i as u64, 110))), "turn {turn} of {i}");
            history[i].tokens.extend(c.tokens);
        }
    }
    let stats = engine.stats();
    assert!(stats.preemptions > 0 && stats.retracted_tokens > 0, "{stats:?}");
}

#[test]
fn a_dropped_handle_ends_its_turn_and_frees_what_it_held() {
    let m = model(&Device::cpu(1));
    let engine = start(&m);
    let p = Prompt::from_tokens(text(1, 60));
    let long = Request { prompt: p.clone(), sampling: sampling(1, 900), n: 3 };
    let mut handles = engine.generate(long).unwrap();
    handles.iter_mut().for_each(|g| drop(g.next()));
    drop(handles);
    let mut s = engine.session();
    s.append(p.clone()).unwrap();
    let mut g = s.generate(sampling(1, 900)).unwrap();
    let seen: Vec<u32> = g.by_ref().take(5).map(|t| t.unwrap().token).collect();
    assert!(s.append(p.clone()).is_err(), "the turn is still running");
    g.cancel();
    let c = g.wait().unwrap();
    assert_eq!((c.finish, &c.tokens[..5]), (Finish::Cancelled, &seen[..]));
    // What was sampled stays, and the session goes on from there.
    let mut whole = p.clone();
    whole.tokens.extend(&c.tokens);
    assert_eq!(s.tokens().unwrap(), whole.tokens);
    let next = s.generate(sampling(4, 6)).unwrap().wait().unwrap();
    assert_eq!(bits(&next), bits(&one(&start(&m), &whole, &sampling(4, 6))));
    drop(s);
    one(&engine, &p, &sampling(1, 1));
    let stats = engine.stats();
    assert_eq!((stats.sequences, stats.pages_held), (0, 0));
}

#[test]
fn what_does_not_fit_is_refused_and_disturbs_nobody() {
    let m = model(&Device::cpu(1));
    let o = EngineOptions { max_context: 100, step_patches: 64, ..options(&m) };
    let engine = Engine::start(m.clone(), o).unwrap();
    let request = |tokens: Vec<u32>| Request { prompt: Prompt::from_tokens(tokens), sampling: sampling(1, 500), n: 1 };
    let running = engine.generate(request(text(1, 90))).unwrap().remove(0);
    let refused = engine.generate(request(text(1, 100))).err().unwrap();
    assert!(matches!(refused, Error::Limit { .. }) && refused.to_string().contains("100"), "{refused}");
    assert!(engine.generate(request(vec![544])).err().unwrap().to_string().contains("544"));
    assert!(engine.generate(request(vec![])).is_err());
    let mut large = Prompt::default();
    large.push_image(image(1, 5, 5), m.config.tokens.image);
    let mut s = engine.session();
    assert!(s.generate(sampling(1, 1)).is_err(), "an empty session");
    let refused = s.append(large).err().unwrap();
    assert!(refused.to_string().contains("step_patches"), "{refused}");
    s.append(Prompt::from_tokens(text(1, 70))).unwrap();
    assert!(s.append(Prompt::from_tokens(text(1, 40))).is_err());
    assert_eq!(s.tokens().unwrap().len(), 70, "as before");
    assert_eq!(s.generate(sampling(1, 2)).unwrap().wait().unwrap().tokens.len(), 2);
    let full = running.wait().unwrap();
    assert_eq!((full.finish, full.tokens.len()), (Finish::Context, 10));
    assert!(Engine::start(m.clone(), EngineOptions { kv_bytes: 10, ..options(&m) }).is_err());
    assert!(Engine::start(m.clone(), EngineOptions { forbidden: Some(vec![600]), ..options(&m) }).is_err());
}

#[test]
fn forbidden_ids_are_never_sampled() {
    let m = model(&Device::cpu(1));
    let t = &m.config.tokens;
    let mut expected = vec![t.image, t.video, t.vision_start, t.vision_end];
    expected.sort();
    assert_eq!(start(&m).forbidden(), expected);
    let allowed = [3u32, 70, 411];
    let forbidden = (0..m.config.vocab_size as u32).filter(|id| !allowed.contains(id)).collect();
    let engine = Engine::start(m.clone(), EngineOptions { forbidden: Some(forbidden), ..options(&m) }).unwrap();
    let c = one(&engine, &Prompt::from_tokens(text(1, 20)), &sampling(1, 60));
    assert!(c.tokens.iter().all(|t| allowed.contains(t)));
    // Over three ids of a random model the probabilities are far from those over 544.
    assert!(c.logprobs.iter().all(|&l| l > -4.0 && l < 0.0), "{:?}", c.logprobs);
}

#[test]
fn truncation_narrows_the_choice_and_not_the_log_probability() {
    let m = model(&Device::cpu(1));
    let p = Prompt::from_tokens(text(1, 20));
    let engine = start(&m);
    let greedy = one(&engine, &p, &Sampling::greedy(6));
    let only = one(&engine, &p, &Sampling { top_k: 1, ..sampling(9, 6) });
    assert_eq!(bits(&greedy), bits(&only), "at temperature 1 both are log-probabilities over all ids");
    assert!(only.logprobs.iter().all(|&l| l < -0.5), "a random model is not sure of anything: {:?}", only.logprobs);
}

#[test]
fn the_deferred_device_gives_the_same() {
    let run = |device: Device| {
        let m = model(&device);
        let engine = start(&m);
        let mut s = engine.session();
        s.append(picture_prompt(&m, 1, 100, 30)).unwrap();
        let mut all = vec![bits(&s.generate(sampling(1, 9)).unwrap().wait().unwrap())];
        s.append(picture_prompt(&m, 2, 3, 3)).unwrap();
        let request = Request { prompt: picture_prompt(&m, 1, 100, 30), sampling: sampling(5, 12), n: 3 };
        let samples = engine.generate(request).unwrap();
        all.push(bits(&s.generate(sampling(1, 9)).unwrap().wait().unwrap()));
        all.extend(samples.into_iter().map(|g| bits(&g.wait().unwrap())));
        all
    };
    assert_eq!(run(Device::cpu(2)), run(Device::cpu_deferred(2)));
}

#[test]
fn changed_weights_invalidate_everything_and_sessions_go_on() {
    let device = Device::cpu(2);
    let (m, changed) = (model(&device), model(&device));
    let scale = |m: &Model| {
        let (s, w) = (device.stream(), m.text.norm.clone());
        // SAFETY: the engine is paused or not started, and this is the only launch on the stream.
        s.launch(move |_| {
            unsafe { w.get_mut::<f32>() }.iter_mut().enumerate().for_each(|(i, x)| *x *= 1.0 + i as f32 / 40.0)
        });
        s.synchronize().unwrap();
    };
    scale(&changed);
    let engine = start(&m);
    let p = picture_prompt(&m, 1, 60, 9);
    let mut s = engine.session();
    s.append(p.clone()).unwrap();
    let first = s.generate(sampling(1, 8)).unwrap().wait().unwrap();
    assert_eq!((first.epochs, engine.stats().epoch), ((0, 0), 0));
    let request = Request { prompt: p.clone(), sampling: sampling(6, 600), n: 1 };
    let mut across = engine.generate(request).unwrap().remove(0);
    let before: Vec<u32> = across.by_ref().take(5).map(|t| t.unwrap().token).collect();
    {
        assert!(m.take_weights().is_err(), "the engine is at work on them");
        let _paused = engine.pause().unwrap();
        let _taken = m.take_weights().unwrap();
        scale(&m);
    }
    let mut whole = p.clone();
    whole.tokens.extend(&first.tokens);
    let second = s.generate(sampling(2, 8)).unwrap().wait().unwrap();
    assert_eq!(bits(&second), bits(&one(&start(&changed), &whole, &sampling(2, 8))), "the new weights, from the start");
    assert_eq!((second.epochs, engine.stats().epoch), ((1, 1), 1));
    assert_eq!(engine.stats().images_encoded, 2, "once under each epoch");
    let across = across.wait().unwrap();
    assert_eq!((across.epochs, &across.tokens[..5], across.tokens.len()), ((0, 1), &before[..], 600));
    // A pause alone keeps everything.
    drop(engine.pause().unwrap());
    let kept = engine.stats();
    s.generate(sampling(2, 1)).unwrap().wait().unwrap();
    assert_eq!((engine.stats().epoch, engine.stats().prefill_tokens - kept.prefill_tokens), (1, 1));
}

#[test]
fn images_outlast_updates_that_leave_the_vision_tower_alone() {
    let device = Device::cpu(2);
    for (freeze_vision, encoded) in [(true, 1), (false, 2)] {
        let load = || {
            let config = Preset::Tiny.config();
            Arc::new(Model::random(config, 3, &device, &LoadOptions { freeze_vision, progress: false }).unwrap())
        };
        let (m, changed) = (load(), load());
        let scale = |w: &Buffer| {
            let (s, w) = (device.stream(), w.clone());
            // SAFETY: the engine is paused or not started, and this is the only launch on the stream.
            s.launch(move |_| {
                unsafe { w.get_mut::<f32>() }.iter_mut().enumerate().for_each(|(i, x)| *x *= 1.0 + i as f32 / 40.0)
            });
            s.synchronize().unwrap();
        };
        scale(&changed.text.norm);
        let engine = start(&m);
        let p = picture_prompt(&m, 1, 60, 9);
        one(&engine, &p, &sampling(1, 4));
        {
            let _paused = engine.pause().unwrap();
            let _taken = m.take_trainable().unwrap();
            scale(&m.text.norm);
        }
        assert_eq!(bits(&one(&engine, &p, &sampling(1, 4))), bits(&one(&start(&changed), &p, &sampling(1, 4))));
        assert_eq!((engine.stats().images_encoded, engine.stats().epoch), (encoded, 1), "frozen: {freeze_vision}");
        // Whoever takes all weights may have moved the tower too, frozen or not.
        {
            let _paused = engine.pause().unwrap();
            let _taken = m.take_weights().unwrap();
            [&m, &changed].into_iter().for_each(|m| scale(&m.vision.ln_q));
        }
        assert_eq!(bits(&one(&engine, &p, &sampling(1, 4))), bits(&one(&start(&changed), &p, &sampling(1, 4))));
        assert_eq!((engine.stats().images_encoded, engine.stats().epoch), (encoded + 1, 2));
    }
}

#[test]
fn weights_that_give_no_distribution_are_an_error_of_the_turn() {
    let device = Device::cpu(1);
    let m = model(&device);
    let (s, w) = (device.stream(), m.text.norm.clone());
    // SAFETY: no engine runs yet.
    s.launch(move |_| unsafe { w.get_mut::<f32>() }[0] = f32::NAN);
    s.synchronize().unwrap();
    let engine = start(&m);
    let request = Request { prompt: Prompt::from_tokens(text(1, 20)), sampling: sampling(1, 5), n: 1 };
    let e = engine.generate(request).unwrap().remove(0).wait().unwrap_err();
    assert!(e.to_string().contains("NaN"), "{e}");
}

#[test]
fn hundreds_of_images_leave_nothing_behind() {
    let device = Device::cpu(2);
    let m = model(&device);
    let o = EngineOptions { vision_bytes: 8 * 32 * 64 * 4, ..options(&m) };
    let engine = Engine::start(m.clone(), o).unwrap();
    let planned = device.allocated_bytes();
    for batch in 0..30 {
        let mut handles = Vec::new();
        for i in 0..10 {
            let mut p = Prompt::from_tokens(text(i, 4));
            p.push_image(image(1000 + batch * 10 + i, 2, 2), m.config.tokens.image);
            p.tokens.push(5);
            handles.extend(engine.generate(Request { prompt: p, sampling: sampling(1, 2), n: 2 }).unwrap());
        }
        handles.into_iter().for_each(|g| drop(g.wait().unwrap()));
        assert_eq!(device.allocated_bytes(), planned, "no step allocates device memory");
        let s = engine.stats();
        assert!(s.images_cached <= 8 && s.vision_bytes_used <= s.vision_bytes, "{s:?}");
        assert!(s.pages_cached + s.pages_held <= s.pages);
    }
    one(&engine, &Prompt::from_tokens(vec![1]), &sampling(1, 1));
    let s = engine.stats();
    assert_eq!((s.images_encoded, s.sequences, s.pages_held), (300, 0, 0));
    drop(engine);
    let weights = model(&Device::cpu(2)).device().allocated_bytes();
    assert_eq!(device.allocated_bytes(), weights, "the engine gives everything back");
}

#[test]
fn many_callers_at_once_get_what_each_would_get_alone() {
    let m = model(&Device::cpu(2));
    let engine = start(&m);
    let episode = |engine: &Engine, i: usize| {
        let mut s = engine.session();
        let mut all = Vec::new();
        for turn in 0..3 {
            s.append(if turn == 1 { picture_prompt(&m, i % 3, 5, 5) } else { Prompt::from_tokens(text(i, 12)) })
                .unwrap();
            all.push(bits(&s.generate(sampling(i as u64, 6 + i)).unwrap().wait().unwrap()));
        }
        all
    };
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..12)
            .map(|i| {
                scope.spawn({
                    let engine = &engine;
                    move || episode(engine, i)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for (i, got) in together.iter().enumerate() {
        assert_eq!(got, &episode(&start(&m), i), "caller {i}");
    }
}

#[test]
fn an_engine_that_goes_away_tells_those_who_wait() {
    let m = model(&Device::cpu(1));
    let engine = start(&m);
    let mut s = engine.session();
    s.append(Prompt::from_tokens(text(1, 10))).unwrap();
    let g = s.generate(sampling(1, 1000)).unwrap();
    let waiting = std::thread::spawn(move || g.wait());
    drop(engine);
    assert!(matches!(waiting.join().unwrap(), Err(Error::Cancelled(_))));
    assert!(s.append(Prompt::from_tokens(vec![1])).is_err());
}
