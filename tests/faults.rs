//! An engine whose GPU fails it, at any moment: an error that says what happened, no panic, and nobody waits for ever. On the
//! emulated device.
#![cfg(emulator)]

#[allow(dead_code)] // the model is made here, because that may fail
mod tiny;

use std::sync::Arc;
use tiny::{image, kv_bytes, text};
use varft::device::{Device, Fault, Injected};
use varft::engine::{Completion, Engine, EngineOptions, Request, Sampling};
use varft::input::Prompt;
use varft::model::{LoadOptions, Model, Preset};

/// A few tokens about an image, by a model and an engine of their own.
fn completion(fault: &Arc<Injected>) -> varft::Result<Completion> {
    let device = Device::emulated_failing(1, 90, Some(fault.clone()))?;
    let model = Arc::new(Model::random(Preset::Tiny.config(), 7, &device, &LoadOptions::default())?);
    let options = EngineOptions {
        kv_bytes: kv_bytes(&model, 8),
        vision_bytes: 64 << 10,
        max_context: 128,
        max_sequences: 2,
        step_tokens: 32,
        step_patches: 64,
        ..EngineOptions::default()
    };
    let mut prompt = Prompt::from_tokens(text(1, 5));
    prompt.tokens.push(model.config.tokens.vision_start);
    prompt.push_image(image(1, 2, 2), model.config.tokens.image);
    prompt.tokens.push(model.config.tokens.vision_end);
    let engine = Engine::start(model, options)?;
    let sampling = Sampling { max_tokens: 3, ..Sampling::default() };
    engine.generate(Request { prompt, sampling, n: 1 })?.remove(0).wait()
}

#[test]
fn a_failing_gpu_is_an_error_of_what_waits_for_it() {
    let kinds = [
        (Fault::Memory, "the GPU cannot give more memory", "rollout.kv_cache_mib"),
        (Fault::PageLocked, "locks no more of the host's memory", "ulimit -l"),
        (Fault::Launch, "the GPU cannot", "please report it"),
        (Fault::Copy, "the GPU cannot copy", "please report it"),
        (Fault::Lost, "the GPU is lost", "Xid"),
    ];
    const NEVER: u64 = 1 << 40;
    for (kind, what, mend) in kinds {
        let calm = Arc::new(Injected::new(kind, NEVER));
        assert_eq!(completion(&calm).unwrap().tokens.len(), 3);
        let all = NEVER - calm.left();
        println!("{kind:?}: {all} operations");
        assert!(all > 10, "{kind:?}");
        for nth in [1, all / 3, all * 2 / 3, all * 9 / 10] {
            let fault = Arc::new(Injected::new(kind, nth));
            let said = match completion(&fault) {
                Ok(_) => panic!("{kind:?} {nth} of {all} went unnoticed"),
                Err(e) => e.to_string(),
            };
            assert!(said.contains(what) && said.contains(mend), "{kind:?} {nth} of {all}: {said}");
        }
    }
}
