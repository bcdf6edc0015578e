//! Decoding on a GPU, the emulated one and a card where there is one: steps replay graphs and allocate nothing.
#![cfg(emulator)]

mod setting;
mod tiny;

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use tiny::{image, kv_bytes, model, text};
use varft::device::Device;
use varft::engine::{Engine, EngineOptions, Request, Sampling};
use varft::input::Prompt;
use varft::model::Model;

fn engine(m: &Arc<Model>) -> Engine {
    let options = EngineOptions {
        kv_bytes: kv_bytes(m, 40),
        vision_bytes: 1 << 16,
        max_context: 160,
        max_sequences: 6,
        step_tokens: 64,
        step_patches: 64,
        ..EngineOptions::default()
    };
    Engine::start(m.clone(), options).unwrap()
}

/// Tokens and the bits of their log-probabilities, of `n` samples.
fn sample(e: &Engine, m: &Model, n: usize, mut each: impl FnMut(usize)) -> Vec<Vec<(u32, u32)>> {
    let sampling = Sampling { max_tokens: 9, seed: 5, ..Sampling::default() };
    let mut prompt = Prompt::from_tokens(text(1, 30));
    prompt.push_image(image(0, 1, 2), m.config.tokens.image);
    prompt.tokens.extend(text(2, 5));
    let mut handles = e.generate(Request { prompt, sampling, n }).unwrap();
    (0..9).for_each(|i| {
        for g in &mut handles {
            g.next().expect("nine tokens").unwrap();
        }
        each(i);
    });
    let done = handles.into_iter().map(|g| g.wait().unwrap());
    done.map(|c| c.tokens.into_iter().zip(c.logprobs.into_iter().map(f32::to_bits)).collect()).collect()
}

#[test]
fn steps_of_one_size_are_replayed_and_allocate_nothing() {
    if setting::emulates() {
        let warps = RandomState::new().hash_one("seed");
        println!("warps {warps}");
        on(&Device::emulated(warps).unwrap());
    }
    if let Some(card) = setting::card() {
        on(&card);
    }
}

fn on(d: &Device) {
    let m = model(d);
    let e = engine(&m);
    // Five sequences are filled up to six rows: eight are more than the engine lets run at once.
    let mut asked = Vec::new();
    let five = sample(&e, &m, 5, |_| asked.push(d.allocations()));
    let replayed = e.stats().graph_steps;
    assert!(replayed >= 5, "{replayed} steps of {} were replayed", e.stats().steps);
    // The first has its tokens a step before the others, whose last step is then of another size.
    assert!(asked[3..7].iter().all(|&n| n == asked[3]), "allocations by token: {asked:?}");
    // Alone and in company, with and without graphs, every bit is the same.
    let one = sample(&engine(&m), &m, 1, |_| ());
    assert_eq!(one[0], five[0]);
    assert_eq!(sample(&e, &m, 5, |_| ()), five);
    assert!(e.stats().graph_steps > replayed);
}
