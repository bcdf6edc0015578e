//! What must hold whatever the weights: bits that do not depend on sharing, company, threads or memory plan.

use super::*;
use crate::device::Device;
use crate::input::{Image, Prompt};
use crate::model::{Config, LoadOptions, Preset};
use crate::ops::patch_embed::PATCH;
use std::sync::Arc;

fn model(device: &Device, freeze_vision: bool) -> Model {
    let options = LoadOptions { freeze_vision, progress: false };
    Model::random(Preset::Tiny.config(), 5, device, &options).unwrap()
}

fn image(seed: usize, h: usize, w: usize) -> Arc<Image> {
    let pixels = (0..h * w * 3 * PATCH * PATCH * 4).map(|i| ((i * 37 + i / 91 * seed + seed) % 251) as u8).collect();
    Arc::new(Image::from_resized(pixels, 2 * h * PATCH, 2 * w * PATCH, PATCH, (1, 1)).unwrap())
}

fn text(from: u32, n: u32) -> Prompt {
    Prompt::from_tokens((0..n).map(|i| (from + 7 * i) % 500).collect())
}

/// A prompt of 37 tokens and more with an image, and completions, one of which shows two images, one of them again.
fn group(c: &Config) -> Group {
    let (a, b) = (image(1, 3, 5), image(2, 2, 2));
    let mut prompt = text(3, 20);
    prompt.push_image(a.clone(), c.tokens.image);
    prompt.append(&text(9, 17));
    let mut second = text(40, 6);
    second.push_image(b, c.tokens.image);
    second.append(&text(4, 3));
    second.push_image(a, c.tokens.image);
    second.append(&text(8, 40));
    Group { prompt, completions: vec![text(100, 9), second, text(300, 1)] }
}

/// One group as sequences of their own, each with its own copy of the prompt.
fn apart(g: &Group) -> Vec<Group> {
    g.completions.iter().map(|c| Group { prompt: g.prompt.clone(), completions: vec![c.clone()] }).collect()
}

struct Run {
    hidden: Vec<f32>,
    grads: Vec<f32>,
    batch: TrainBatch,
}

/// The gradient of element `j` of the hidden state that predicts token `i`.
fn slope(completion: usize, i: usize, j: usize) -> f32 {
    ((completion * 31 + i * 7 + j * 3) % 13) as f32 / 13.0 - 0.4
}

/// Forward and backward with a gradient at the completions' rows that depends on group, completion and token only.
fn run(m: &Model, groups: &[Group], plan: Option<MemoryPlan>, of: impl Fn(usize, usize) -> usize) -> Run {
    let (d, h) = (m.device(), m.config.hidden_size);
    let s = d.stream();
    let batch = TrainBatch::pack(&m.config, d, &s, groups).unwrap();
    let mut acts = match plan {
        Some(plan) => Activations::new(m, plan, &batch),
        None => Activations::forward_only(m, &batch),
    };
    let hidden = forward(m, &s, &batch, &mut acts).unwrap();
    let values = s.read::<f32>(&hidden.view(0, batch.rows() * h)).wait().unwrap();
    let grads = GradStore::new(m);
    if plan.is_some() {
        let mut dhidden = vec![0.0f32; batch.rows() * h];
        for (g, group) in groups.iter().enumerate() {
            for (c, completion) in group.completions.iter().enumerate() {
                for i in 0..completion.tokens.len() {
                    let row = &mut dhidden[batch.completion_row(g, c, i) * h..][..h];
                    for (j, x) in row.iter_mut().enumerate() {
                        *x += slope(of(g, c), i, j);
                    }
                }
            }
        }
        backward(m, &s, &batch, &acts, &d.upload(&dhidden), &grads).unwrap();
    }
    Run { hidden: values, grads: s.read(&grads.flat).wait().unwrap(), batch }
}

fn rows_of(r: &Run, h: usize, group: usize, completion: usize, tokens: usize) -> Vec<f32> {
    (0..tokens).flat_map(|i| r.hidden[r.batch.completion_row(group, completion, i) * h..][..h].to_vec()).collect()
}

#[test]
fn a_shared_prompt_gives_the_bits_of_separate_sequences_and_their_gradients() {
    let d = Device::cpu(2);
    let m = model(&d, false);
    let (g, all) = (group(&m.config), MemoryPlan::keep_all(&m.config));
    let shared = run(&m, std::slice::from_ref(&g), Some(all), |_, c| c);
    let separate = run(&m, &apart(&g), Some(all), |g, _| g);
    assert!(shared.batch.rows() < separate.batch.rows());
    for (c, completion) in g.completions.iter().enumerate() {
        let n = completion.tokens.len();
        assert_eq!(rows_of(&shared, 64, 0, c, n), rows_of(&separate, 64, c, 0, n), "completion {c}");
    }
    // Only the order of additions differs.
    let norm = separate.grads.iter().map(|x| x * x).sum::<f32>().sqrt();
    let difference = shared.grads.iter().zip(&separate.grads).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
    assert!(norm > 0.0 && difference < 1e-5 * norm, "{difference} of {norm}");
}

#[test]
fn plans_threads_and_late_launches_leave_the_bits_alone() {
    let d = Device::cpu(2);
    let m = model(&d, false);
    let groups = [group(&m.config), Group { prompt: text(50, 33), completions: vec![text(60, 2)] }];
    let kept = run(&m, &groups, Some(MemoryPlan::keep_all(&m.config)), |g, c| g + c);
    assert!(kept.grads.iter().all(|x| x.is_finite()) && kept.hidden.iter().all(|x| x.is_finite()));
    for plan in [MemoryPlan { text: 0, vision: 0 }, MemoryPlan { text: 2, vision: 3 }] {
        let again = run(&m, &groups, Some(plan), |g, c| g + c);
        assert!(again.hidden == kept.hidden && again.grads == kept.grads, "{plan:?}");
    }
    for device in [Device::cpu(1), Device::cpu_deferred(2)] {
        let m = model(&device, false);
        let again = run(&m, &groups, Some(MemoryPlan { text: 1, vision: 1 }), |g, c| g + c);
        assert!(again.hidden == kept.hidden && again.grads == kept.grads, "{device:?}");
    }
    assert!(run(&m, &groups, None, |g, c| g + c).hidden == kept.hidden, "forward only");
}

#[test]
fn a_frozen_tower_gets_no_gradient_and_changes_no_other() {
    let d = Device::cpu(2);
    let (free, frozen) = (model(&d, false), model(&d, true));
    let groups = [group(&free.config)];
    let plan = MemoryPlan::keep_all(&free.config);
    let (a, b) = (run(&free, &groups, Some(plan), |_, c| c), run(&frozen, &groups, Some(plan), |_, c| c));
    assert!(a.hidden == b.hidden && b.grads.len() < a.grads.len());
    let s = d.stream();
    let (ga, gb) = (d.upload(&a.grads), d.upload(&b.grads));
    for name in free.params.names() {
        let of = |m: &Model, g| m.params.read(&s, g, name);
        if name.starts_with("visual.") {
            assert!(of(&frozen, &gb).is_err());
            assert!(of(&free, &ga).unwrap().iter().any(|x| *x != 0.0), "{name}");
        } else {
            assert_eq!(of(&free, &ga).unwrap(), of(&frozen, &gb).unwrap(), "{name}");
        }
    }
}

#[test]
fn micro_batches_accumulate_and_buffers_grow() {
    let d = Device::cpu(2);
    let m = model(&d, false);
    let s = d.stream();
    let small = Group { prompt: text(50, 5), completions: vec![text(60, 4)] };
    let grads = GradStore::new(&m);
    let plan = MemoryPlan::keep_all(&m.config);
    let first = TrainBatch::pack(&m.config, &d, &s, std::slice::from_ref(&small)).unwrap();
    let mut acts = Activations::new(&m, plan, &first);
    for g in [small.clone(), group(&m.config), small] {
        let batch = TrainBatch::pack(&m.config, &d, &s, &[g]).unwrap();
        forward(&m, &s, &batch, &mut acts).unwrap();
        let dhidden = d.upload(&vec![0.01f32; batch.rows() * m.config.hidden_size]);
        backward(&m, &s, &batch, &acts, &dhidden, &grads).unwrap();
    }
    let of = |n: usize| -> Vec<f32> {
        let (grads, groups) =
            (GradStore::new(&m), [Group { prompt: text(50, 5), completions: vec![text(60, 4)] }, group(&m.config)]);
        let batch = TrainBatch::pack(&m.config, &d, &s, &groups[n..n + 1]).unwrap();
        let mut acts = Activations::new(&m, plan, &batch);
        forward(&m, &s, &batch, &mut acts).unwrap();
        let dhidden = d.upload(&vec![0.01f32; batch.rows() * m.config.hidden_size]);
        backward(&m, &s, &batch, &acts, &dhidden, &grads).unwrap();
        s.read(&grads.flat).wait().unwrap()
    };
    let (small, large, sum) = (of(0), of(1), s.read::<f32>(&grads.flat).wait().unwrap());
    let norm = sum.iter().map(|x| x * x).sum::<f32>().sqrt();
    let off = (0..sum.len()).map(|i| (sum[i] - 2.0 * small[i] - large[i]).powi(2)).sum::<f32>().sqrt();
    assert!(norm > 0.0 && off < 1e-5 * norm, "{off} of {norm}");
    grads.zero(&s);
    assert!(s.read::<f32>(&grads.flat).wait().unwrap().iter().all(|x| *x == 0.0));
}

#[test]
fn a_plan_keeps_what_fits() {
    let c = Preset::Mid.config();
    let size = BatchSize { rows: 2048, patches: 1600, blocks: 70 };
    for (float, trained) in [(DType::F32, true), (DType::F32, false), (DType::BF16, true), (DType::BF16, false)] {
        let most = MemoryPlan { vision: if trained { c.vision.depth } else { 0 }, ..MemoryPlan::keep_all(&c) };
        let all = most.bytes(&c, float, trained, size);
        assert_eq!(MemoryPlan::fit(&c, float, trained, size, all).unwrap(), most);
        let least = MemoryPlan::least(&c, float, trained, size);
        assert_eq!(MemoryPlan::fit(&c, float, trained, size, least).unwrap(), MemoryPlan { text: 0, vision: 0 });
        // In any budget nothing more could be kept, the decoder before the vision tower.
        for budget in (0..64).map(|i| least + (all - least) * i / 64) {
            let some = MemoryPlan::fit(&c, float, trained, size, budget).unwrap();
            let fits = |plan: MemoryPlan| plan.bytes(&c, float, trained, size) <= budget;
            assert!(fits(some), "{some:?} in {budget}");
            let more = [MemoryPlan { text: some.text + 1, vision: 0 }, MemoryPlan { vision: some.vision + 1, ..some }];
            let beyond = [some.text == c.layers, !trained || some.vision == c.vision.depth];
            for (more, beyond) in more.into_iter().zip(beyond) {
                assert!(beyond || !fits(more), "{more:?} too in {budget}");
            }
        }
        let e = MemoryPlan::fit(&c, float, trained, size, least - 1).unwrap_err().to_string();
        assert!(e.contains("2048 tokens") && e.contains("optim.activations_mib"), "{e}");
    }
    assert!(MemoryPlan::least(&c, DType::F32, false, size) < MemoryPlan::least(&c, DType::F32, true, size));
}

/// What holds its tensors, in f32 and, where there is the emulator, in bf16.
fn devices() -> Vec<Device> {
    let emulated = cfg!(emulator).then(|| Device::emulated(1).unwrap());
    [Device::cpu(1)].into_iter().chain(emulated).collect()
}

#[test]
fn activations_take_what_the_plan_says() {
    let size = BatchSize { rows: 300, patches: 200, blocks: 20 };
    for (d, freeze) in devices().into_iter().flat_map(|d| [(d.clone(), false), (d, true)]) {
        let m = model(&d, freeze);
        // Buffers are rounded up to 64 bytes on the host.
        let same =
            |held: usize, planned: usize| assert!(held >= planned && held <= planned + 64 * 200, "{held} {planned}");
        let (none, all) = (MemoryPlan { text: 0, vision: 0 }, MemoryPlan::keep_all(&m.config));
        let before = d.allocated_bytes();
        for plan in [none, MemoryPlan { text: 1, vision: 1 }, MemoryPlan { text: 3, vision: 3 }, all] {
            let _acts = Activations::with_room(&m, plan, size);
            let _dhidden = d.alloc(d.float(), size.rows * m.config.hidden_size);
            same(d.allocated_bytes() - before, plan.bytes(&m.config, d.float(), !freeze, size));
        }
        let _acts = Activations::forward_with_room(&m, size);
        same(d.allocated_bytes() - before, MemoryPlan::forward_bytes(&m.config, d.float(), size));
    }
}

#[test]
fn gradients_of_a_tied_model_are_the_slope_along_them() {
    let d = Device::cpu(2);
    let config = Config { tie_word_embeddings: true, ..Preset::Tiny.config() };
    let m = Model::random(config, 11, &d, &LoadOptions::default()).unwrap();
    let s = d.stream();
    let groups = [group(&m.config)];
    let g = run(&m, &groups, Some(MemoryPlan::keep_all(&m.config)), |_, c| c).grads;
    let square: f64 = g.iter().map(|x| (*x as f64).powi(2)).sum();
    let flat = s.read::<f32>(&m.params.flat).wait().unwrap();
    // The loss whose gradient `run` hands to the backward pass: the hidden states times that gradient.
    let loss = |step: f64| -> f64 {
        let moved: Vec<f32> = flat.iter().zip(&g).map(|(w, g)| (*w as f64 + step * *g as f64) as f32).collect();
        s.write(&m.params.flat, &moved);
        let r = run(&m, &groups, None, |_, c| c);
        let mut sum = 0.0;
        for (c, completion) in groups[0].completions.iter().enumerate() {
            for (i, row) in rows_of(&r, 64, 0, c, completion.tokens.len()).chunks(64).enumerate() {
                sum += row.iter().enumerate().map(|(j, x)| (*x * slope(c, i, j)) as f64).sum::<f64>();
            }
        }
        sum
    };
    let step = 2e-3 / square.sqrt();
    let slope = (loss(step) - loss(-step)) / (2.0 * step);
    assert!((slope - square).abs() < 5e-3 * square, "{slope} and {square}");
}
