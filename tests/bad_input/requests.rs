//! Engines, requests and prompts with settings that make no sense.

use super::tiny::{image, kv_bytes, model, text};
use super::{options, says};
use std::sync::Arc;
use varft::Error;
use varft::device::Device;
use varft::engine::{Engine, EngineOptions, Finish, Request, Sampling};
use varft::input::{Image, Prompt, Tokenizer};
use varft::model::train::{Group, TrainBatch};

#[test]
fn an_engine_with_impossible_budgets_does_not_start() {
    let m = model(&Device::cpu(1));
    let with = |edit: &dyn Fn(&mut EngineOptions)| {
        let mut o = options(&m);
        edit(&mut o);
        Engine::start(m.clone(), o)
    };
    let page = kv_bytes(&m, 1);
    let refused: [&dyn Fn(&mut EngineOptions); 15] = [
        &|o| o.kv_bytes = 0,
        &|o| o.kv_bytes = page - 1,
        &|o| o.kv_bytes = usize::MAX,
        &|o| o.vision_bytes = usize::MAX,
        &|o| o.max_context = 0,
        &|o| o.max_context = 1,
        &|o| o.max_sequences = 0,
        &|o| o.max_sequences = usize::MAX,
        &|o| o.step_tokens = 0,
        &|o| o.step_tokens = usize::MAX,
        &|o| o.step_patches = usize::MAX,
        &|o| o.step_patches = usize::MAX / 4,
        &|o| (o.kv_bytes, o.vision_bytes) = (usize::MAX, usize::MAX),
        &|o| o.forbidden = Some(vec![u32::MAX]),
        &|o| o.forbidden = Some((0..544).collect()),
    ];
    for (i, edit) in refused.iter().enumerate() {
        let Err(e) = with(edit) else { panic!("engine {i} starts") };
        says(e, &[]);
    }
    // What is small but enough works; what only pictures need does not keep text out.
    let accepted: [&dyn Fn(&mut EngineOptions); 5] = [
        &|o| o.kv_bytes = page,
        &|o| (o.vision_bytes, o.step_patches) = (0, 0),
        &|o| (o.max_sequences, o.step_tokens) = (1, 1),
        &|o| o.max_context = usize::MAX,
        &|o| o.forbidden = Some(vec![]),
    ];
    for edit in accepted {
        let engine = with(edit).unwrap();
        let request = Request { prompt: Prompt::from_tokens(text(1, 9)), sampling: Sampling::greedy(usize::MAX), n: 2 };
        for g in engine.generate(request).unwrap() {
            let c = g.wait().unwrap();
            assert_eq!((c.finish, 9 + c.tokens.len()), (Finish::Context, engine.max_context()));
        }
    }
    let engine = with(&|o| o.vision_bytes = 0).unwrap();
    let mut prompt = Prompt::default();
    prompt.push_image(image(1, 1, 1), m.config.tokens.image);
    let request = Request { prompt, sampling: Sampling::default(), n: 1 };
    says(engine.generate(request).err().unwrap(), &["vision_bytes"]);
}

#[test]
fn wild_requests_are_answered_or_refused() {
    let m = model(&Device::cpu(1));
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/input/tokenizer_tiny.json");
    let tokenizer = Some(Arc::new(Tokenizer::load(fixture).unwrap()));
    let engine = Engine::start(m.clone(), EngineOptions { tokenizer, ..options(&m) }).unwrap();
    let ask = |sampling: Sampling, n| engine.generate(Request { prompt: Prompt::from_tokens(text(1, 9)), sampling, n });
    let base = Sampling { max_tokens: 4, ..Sampling::default() };

    for (bad, word) in [
        (Sampling { temperature: f32::NAN, ..base.clone() }, "temperature"),
        (Sampling { temperature: f32::INFINITY, ..base.clone() }, "temperature"),
        (Sampling { temperature: -0.5, ..base.clone() }, "temperature"),
        (Sampling { temperature: f32::from_bits(1), ..base.clone() }, "temperature"),
        (Sampling { top_p: 0.0, ..base.clone() }, "top_p"),
        (Sampling { top_p: f32::NAN, ..base.clone() }, "top_p"),
        (Sampling { min_p: -0.1, ..base.clone() }, "min_p"),
        (Sampling { min_p: f32::NAN, ..base.clone() }, "min_p"),
        (Sampling { stop_strings: vec!["a".into(), String::new()], ..base.clone() }, "stop string"),
    ] {
        says(ask(bad, 1).err().unwrap(), &[word]);
    }
    for n in [usize::MAX, 1 << 40] {
        says(ask(base.clone(), n).err().unwrap(), &["samples", "65536"]);
    }
    assert!(ask(base.clone(), 0).unwrap().is_empty(), "no samples are no samples");
    for good in [
        Sampling { temperature: f32::MIN_POSITIVE, ..base.clone() },
        Sampling { temperature: f32::MAX, ..base.clone() },
        Sampling { temperature: 1e-30, top_p: 0.5, ..base.clone() },
        Sampling { top_k: u32::MAX, ..base.clone() },
        Sampling { top_p: f32::MIN_POSITIVE, ..base.clone() },
        Sampling { min_p: 1.0, ..base.clone() },
        Sampling { top_k: 1, top_p: f32::MIN_POSITIVE, min_p: 1.0, temperature: f32::MAX, ..base.clone() },
        Sampling { seed: u64::MAX, stream: u64::MAX, ..base.clone() },
        Sampling { stop_ids: vec![u32::MAX; 1000], ..base.clone() },
        Sampling { stop_strings: vec!["x".repeat(10 << 20)], ..base.clone() },
        Sampling { stop_strings: vec!["\u{1F980}".into(); 500], ..base.clone() },
    ] {
        let what = format!("{:?}", Sampling { stop_strings: vec![], stop_ids: vec![], ..good.clone() });
        for g in ask(good, 2).unwrap() {
            let c = g.wait().unwrap();
            assert_eq!((c.tokens.len(), c.finish), (4, Finish::Length), "{what}");
            assert!(c.logprobs.iter().all(|l| *l <= 0.0 && !l.is_nan()), "{what}: {:?}", c.logprobs);
        }
    }
    let none = ask(Sampling { max_tokens: 0, ..base.clone() }, 3).unwrap();
    assert!(none.into_iter().all(|g| g.wait().unwrap().tokens.is_empty()));
    let single = Request { prompt: Prompt::from_tokens(vec![0]), sampling: base, n: 1 };
    assert_eq!(engine.generate(single).unwrap().remove(0).wait().unwrap().tokens.len(), 4);
}

#[test]
fn prompts_that_contradict_themselves_are_refused_by_engine_and_trainer() {
    let m = model(&Device::cpu(1));
    let engine = Engine::start(m.clone(), options(&m)).unwrap();
    let pad = m.config.tokens.image;
    let mut good = Prompt::from_tokens(vec![1]);
    good.push_image(image(1, 2, 2), pad);
    good.tokens.push(2);
    let s = m.device().stream();
    let edits: [&dyn Fn(&mut Prompt); 10] = [
        &|p| p.tokens[0] = pad,
        &|p| p.tokens[2] = 7,
        &|p| p.tokens[0] = 544,
        &|p| p.tokens.truncate(3),
        &|p| p.images[0].offset = usize::MAX,
        &|p| p.images[0].len = usize::MAX,
        &|p| p.images.clear(),
        &|p| p.images.push(p.images[0].clone()),
        // Pixels and grid are fields that anybody may set.
        &|p| Arc::make_mut(&mut p.images[0].image).pixels.truncate(10),
        &|p| {
            let mut one = Image::clone(&p.images[0].image);
            (one.grid.t, one.grid.h) = (4, 1);
            p.images[0].image = Arc::new(one);
        },
    ];
    for (i, edit) in edits.iter().enumerate() {
        let mut bad = good.clone();
        edit(&mut bad);
        let request = Request { prompt: bad.clone(), sampling: Sampling::greedy(1), n: 1 };
        let Err(e) = engine.generate(request) else { panic!("the engine takes prompt {i}") };
        says(e, &[]);
        let mut session = engine.session();
        assert!(session.append(bad.clone()).is_err() && session.tokens().unwrap().is_empty());
        let group = Group { prompt: good.clone(), completions: vec![bad] };
        let Err(e) = TrainBatch::pack(&m.config, m.device(), &s, &[group]) else { panic!("the trainer takes {i}") };
        says(e, &["group 0"]);
    }
    // Nobody was disturbed.
    let request = Request { prompt: good, sampling: Sampling::greedy(3), n: 1 };
    assert_eq!(engine.generate(request).unwrap().remove(0).wait().unwrap().tokens.len(), 3);
}

#[test]
fn two_engines_share_a_model_and_each_may_go_first() {
    let m = model(&Device::cpu(2));
    let start = || Engine::start(m.clone(), options(&m)).unwrap();
    let request = || {
        let mut prompt = Prompt::from_tokens(text(2, 20));
        prompt.push_image(image(1, 2, 2), m.config.tokens.image);
        prompt.tokens.push(3);
        Request { prompt, sampling: Sampling { max_tokens: 30, ..Sampling::default() }, n: 3 }
    };
    let (a, b) = (start(), start());
    let (from_a, from_b) = (a.generate(request()).unwrap(), b.generate(request()).unwrap());
    for (x, y) in from_a.into_iter().zip(from_b) {
        assert_eq!(x.wait().unwrap(), y.wait().unwrap());
    }
    // One ends amid its work, with sessions, a fork and handles still about; the other does not notice.
    let mut session = a.session();
    session.append(request().prompt).unwrap();
    let mut fork = session.fork().unwrap();
    let running = session.generate(Sampling { max_tokens: 400, ..Sampling::default() }).unwrap();
    let of_fork = fork.generate(Sampling { max_tokens: 400, ..Sampling::default() }).unwrap();
    let samples = a.generate(request()).unwrap();
    drop(a);
    for g in samples.into_iter().chain([running, of_fork]) {
        assert!(matches!(g.wait(), Ok(_) | Err(Error::Cancelled(_))));
    }
    assert!(session.generate(Sampling::default()).is_err() && session.fork().is_err() && session.tokens().is_err());
    drop((session, fork));
    let c = b.generate(request()).unwrap().remove(0).wait().unwrap();
    assert_eq!(c.tokens.len(), 30);
}
