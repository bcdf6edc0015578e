//! Ten thousand rollouts, each with an image of its own, through one engine: the process stops growing.
//!
//! Alone in its file, because it measures the process.
#![cfg(target_os = "linux")]

use std::sync::Arc;
use varft::device::Device;
use varft::engine::{Engine, EngineOptions, Request, Sampling};
use varft::input::{Image, Prompt};
use varft::model::{LoadOptions, Model, Preset};

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn ten_thousand_rollouts_with_distinct_images_leave_nothing_behind() {
    let m = Model::random(Preset::Tiny.config(), 7, &Device::cpu(2), &LoadOptions::default()).unwrap();
    let image_token = m.config.tokens.image;
    let options = EngineOptions {
        kv_bytes: 8 << 20,
        vision_bytes: 1 << 20,
        step_patches: 256,
        max_context: 1024,
        ..EngineOptions::default()
    };
    let engine = Engine::start(Arc::new(m), options).unwrap();
    let mut drawn = 0u64;
    let mut picture = |prompt: &mut Prompt| {
        let mut pixels = vec![0; 56 * 56 * 3];
        pixels[..8].copy_from_slice(&drawn.to_le_bytes());
        drawn += 1;
        let image = Image::from_resized(pixels, 56, 56, 14, (56, 56)).unwrap();
        prompt.push_image(Arc::new(image), image_token);
        prompt.tokens.push(7);
    };
    let sampling = |seed| Sampling { seed, max_tokens: 3, ..Sampling::default() };
    let mut resident = Vec::new();
    for thousand in 0..10 {
        for round in 0..125 {
            // Seven requests and a session of two turns, at once.
            let mut running = Vec::new();
            for i in 0..7 {
                let mut prompt = Prompt::from_tokens(vec![i; 3]);
                picture(&mut prompt);
                running.extend(engine.generate(Request { prompt, sampling: sampling(round), n: 1 }).unwrap());
            }
            let mut session = engine.session();
            for _ in 0..2 {
                let mut prompt = Prompt::from_tokens(vec![9; 4]);
                picture(&mut prompt);
                session.append(prompt).unwrap();
                session.generate(sampling(round)).unwrap().wait().unwrap();
            }
            running.into_iter().for_each(|g| drop(g.wait().unwrap()));
        }
        resident.push(resident_bytes());
        assert_eq!(engine.stats().images_encoded, (thousand + 1) * 125 * 9);
    }
    for (thousand, w) in resident.windows(2).enumerate() {
        let grown = w[1].saturating_sub(w[0]);
        assert!(grown < 1 << 20, "{grown} bytes in thousand {} ({resident:?})", thousand + 2);
    }
}
