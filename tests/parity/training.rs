//! Gradients, losses and optimizer steps against the reference.

use crate::reference::{Reference, largest_difference, norm, relative_difference};
use serde_json::Value;
use varft::device::{Buffer, Device};
use varft::input::Prompt;
use varft::model::Model;
use varft::model::train::{self, Activations, GradStore, Group, MemoryPlan, TrainBatch};
use varft::ops::adamw::{self, AdamW, Params};
use varft::ops::linear::{self, Weight};
use varft::ops::loss::{self, Kl, LossRows, Objective, Outputs};
use varft::ops::softmax::forbidden_words;
use varft::train::advantages::token_weights;
use varft::train::config::LossKind;

const LOGPROBS: f32 = 1e-4;
/// Relative, per tensor.
const GRADIENTS: f64 = 1e-3;
/// Relative.
const LOSSES: f64 = 1e-5;
const ADAMW: f32 = 1e-5;
/// What the reference's optimizer was made with; its vectors do not say.
const HYPER: AdamW = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// One group, and an entry for each token of its completions.
struct Scored<'a> {
    model: &'a Model,
    batch: TrainBatch,
    acts: Activations,
    rows: LossRows,
    forbidden: Buffer,
}

impl<'a> Scored<'a> {
    fn new(model: &'a Model, prompt: Prompt, completions: &[Vec<u32>], backward: bool) -> Scored<'a> {
        let d = model.device();
        let prompts = completions.iter().map(|c| Prompt::from_tokens(c.clone())).collect();
        let groups = [Group { prompt, completions: prompts }];
        let batch = TrainBatch::pack(&model.config, d, &d.stream(), &groups).unwrap();
        let acts = match backward {
            true => Activations::new(model, MemoryPlan::keep_all(&model.config), &batch),
            false => Activations::forward_only(model, &batch),
        };
        let rows: Vec<u32> = completions
            .iter()
            .enumerate()
            .flat_map(|(c, tokens)| (0..tokens.len()).map(move |i| (c, i)))
            .map(|(c, i)| batch.completion_row(0, c, i) as u32)
            .collect();
        let rows = LossRows::new(&d.stream(), &rows, &completions.concat(), &vec![1.0; rows.len()]);
        let forbidden = d.upload(&vec![0u32; forbidden_words(model.config.vocab_size)]);
        Scored { model, batch, acts, rows, forbidden }
    }

    fn workspace(&self) -> loss::Workspace {
        let c = &self.model.config;
        // A budget of a few rows, so that chunks are crossed.
        loss::Workspace::new(self.model.device(), c.vocab_size, c.hidden_size, self.batch.rows(), 4 * c.vocab_size * 5)
    }

    fn logprobs(&mut self) -> Vec<f32> {
        let s = self.model.device().stream();
        let hidden = train::forward(self.model, &s, &self.batch, &mut self.acts).unwrap();
        let logp = self.model.device().upload(&vec![0f32; self.rows.len()]);
        let head = &self.model.text.head;
        loss::logprobs(&s, &hidden, head, &self.rows, &self.forbidden, &self.workspace(), &logp, None);
        s.read(&logp).wait().unwrap()
    }

    /// Per-entry results and the gradients of the weighted sum.
    fn backward(&mut self, objective: Objective<'_>, weight: &[f32]) -> (Outputs, GradStore) {
        let d = self.model.device();
        let s = d.stream();
        let hidden = train::forward(self.model, &s, &self.batch, &mut self.acts).unwrap();
        let (out, grads) = (Outputs::new(d, self.rows.len()), GradStore::new(self.model));
        let dhidden = d.upload(&vec![0f32; self.batch.rows() * self.model.config.hidden_size]);
        loss::forward_backward(
            &s,
            &hidden,
            &self.model.text.head,
            &self.rows,
            objective,
            &d.upload(weight),
            &self.forbidden,
            &self.workspace(),
            &out,
            &dhidden,
            Some(&grads.head().data),
        );
        train::backward(self.model, &s, &self.batch, &self.acts, &dhidden, &grads).unwrap();
        (out, grads)
    }
}

fn read(m: &Model, b: &Buffer) -> Vec<f32> {
    m.device().stream().read(b).wait().unwrap()
}

/// Every tensor that the vectors have, and the norm of every other.
fn compare_gradients(r: &Reference, m: &Model, case: &str, grads: &GradStore) {
    let s = m.device().stream();
    let mut worst: (f64, String) = (0.0, String::new());
    let prefix = format!("{case}.grad.");
    let names = r.below(&prefix);
    assert!(!names.is_empty());
    for name in names {
        let got = m.params.read(&s, &grads.flat, &name).unwrap();
        let relative = relative_difference(&got, &r.f32(&format!("{prefix}{name}")));
        assert!(relative <= GRADIENTS, "{case}: the gradient of {name} differs by {relative:.1e} of its norm");
        if relative > worst.0 {
            worst = (relative, name);
        }
    }
    println!("{case}: gradients {:.1e} ({})", worst.0, worst.1);
    for (name, want) in r.json[case]["grad_norms"].as_object().unwrap() {
        let want = want.as_f64().unwrap();
        let got = norm(&m.params.read(&s, &grads.flat, name).unwrap());
        let off = (got - want).abs();
        assert!(off <= GRADIENTS * want, "{case}: the gradient of {name} has norm {got}, not {want}");
    }
}

/// Per-token losses of given log-probabilities: those of a head with two tokens, whose logits are 0 and what it takes.
fn losses_of(d: &Device, logp: &[f32], objective: Objective<'_>) -> Vec<f32> {
    let (s, n) = (d.stream(), logp.len());
    let mut packed = vec![0f32; linear::packed_len(2, 1)];
    linear::pack(&[0.0, 1.0], 2, 1, &mut packed);
    let head = Weight { data: d.upload(&packed), n: 2, k: 1 };
    let logits: Vec<f32> = logp.iter().map(|&l| (l as f64 - (-(l as f64).exp()).ln_1p()) as f32).collect();
    let rows = LossRows::new(&s, &(0..n as u32).collect::<Vec<_>>(), &vec![1; n], &vec![1.0; n]);
    let (out, zeros) = (Outputs::new(d, n), d.upload(&vec![0f32; n]));
    loss::forward_backward(
        &s,
        &d.upload(&logits),
        &head,
        &rows,
        objective,
        &d.upload(&vec![1f32; n]),
        &d.upload(&vec![0u32; forbidden_words(2)]),
        &loss::Workspace::new(d, 2, 1, n, 1 << 10),
        &out,
        &zeros,
        None,
    );
    assert!(largest_difference(&s.read::<f32>(&out.logp).wait().unwrap(), logp) < 2e-6);
    s.read(&out.loss).wait().unwrap()
}

#[test]
fn gradients_of_the_likelihood_agree() {
    let r = Reference::open();
    let d = Device::cpu(0);
    let j = &r.json["nll"];
    let case = j["case"].as_str().unwrap();
    let m = r.model(case, &d);
    let completion = ids(&j["completion"]);
    let n = completion.len();
    let mut scored = Scored::new(&m, r.case_prompt(&m.config, case), &[completion], true);
    let (out, grads) = scored.backward(Objective::Nll, &vec![1.0 / n as f32; n]);
    let want: Vec<f32> = j["logprobs"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    let worst = largest_difference(&read(&m, &out.logp), &want);
    println!("nll: log-probabilities {worst:.1e}");
    assert!(worst <= LOGPROBS, "log-probabilities differ by {worst}");
    let got = read(&m, &out.loss).iter().map(|&l| l as f64).sum::<f64>() / n as f64;
    let want = j["loss"].as_f64().unwrap();
    assert!((got - want).abs() <= LOSSES * want.abs(), "the loss is {got}, not {want}");
    compare_gradients(&r, &m, "nll", &grads);
}

#[test]
fn grpo_losses_gradients_and_steps_agree() {
    let r = Reference::open();
    let d = Device::cpu(0);
    let j = &r.json["grpo"];
    let m = r.model("", &d);
    let completions: Vec<Vec<u32>> = j["completions"].as_array().unwrap().iter().map(ids).collect();
    let images = r.images(r.json["nll"]["case"].as_str().unwrap());
    let prompt = r.prompt(&m.config, &ids(&j["prompt_ids"]), &images);
    // The vectors are right-padded `[completions, longest]`; ours are packed.
    let longest = r.shape("grpo.mask")[1];
    let mask = r.f32("grpo.mask");
    let packed = |name: &str| -> Vec<f32> {
        r.f32(name).into_iter().zip(&mask).filter(|(_, m)| **m == 1.0).map(|(x, _)| x).collect()
    };
    let lengths: Vec<usize> = completions.iter().map(Vec::len).collect();
    let per_token = |f: &dyn Fn(usize) -> f32| -> Vec<f32> {
        lengths.iter().enumerate().flat_map(|(c, &n)| vec![f(c); n]).collect()
    };
    let total: usize = lengths.iter().sum();
    assert_eq!(packed("grpo.mask").len(), total);

    let reference = r.reference_policy(&d);
    let ref_logp = Scored::new(&reference, prompt.clone(), &completions, false).logprobs();
    let worst = largest_difference(&ref_logp, &packed("grpo.ref_logprobs"));
    println!("grpo: the reference's log-probabilities {worst:.1e}");
    assert!(worst <= LOGPROBS, "the reference's log-probabilities differ by {worst}");

    let number = |v: &Value| v.as_f64().unwrap();
    let advantages: Vec<f32> = j["advantages"].as_array().unwrap().iter().map(|x| number(x) as f32).collect();
    let (old, reference) = (d.upload(&packed("grpo.old_logprobs")), d.upload(&packed("grpo.ref_logprobs")));
    let advantage = d.upload(&per_token(&|c| advantages[c]));
    let clip = number(&j["clip"]) as f32;
    let objective = Objective::Grpo {
        old_logp: &old,
        advantage: &advantage,
        clip_low: clip,
        clip_high: clip,
        kl: Some(Kl { ref_logp: &reference, beta: number(&j["beta"]) as f32 }),
    };
    let dr_key = j.as_object().unwrap().keys().find(|k| k.starts_with("loss_dr_grpo_C")).unwrap();
    assert_eq!(*dr_key, format!("loss_dr_grpo_C{longest}"));
    let kinds =
        [("loss_seq_mean", LossKind::Grpo), ("loss_token_mean", LossKind::Dapo), (dr_key.as_str(), LossKind::DrGrpo)];
    let weights_of = |kind: LossKind| {
        let of_completion = token_weights(kind, &lengths, 0.0, longest);
        per_token(&|c| of_completion[c])
    };
    let (_, descended) = kinds.into_iter().find(|(key, _)| j["grad_of"] == *key).unwrap();
    let weights = weights_of(descended);
    let mut scored = Scored::new(&m, prompt, &completions, true);
    let (out, grads) = scored.backward(objective, &weights);

    let worst = largest_difference(&read(&m, &out.logp), &packed("grpo.logprobs"));
    println!("grpo: log-probabilities {worst:.1e}");
    assert!(worst <= LOGPROBS, "log-probabilities differ by {worst}");
    let through_the_model = read(&m, &out.loss);
    let alone = losses_of(&d, &packed("grpo.logprobs"), objective);
    for (key, kind) in kinds {
        let want = number(&j[key]);
        let weights = weights_of(kind);
        for (how, losses) in [("alone", &alone), ("through the model", &through_the_model)] {
            let got: f64 = losses.iter().zip(&weights).map(|(&l, &w)| f64::from(l) * f64::from(w)).sum();
            let relative = (got - want).abs() / want.abs();
            println!("grpo: {key} {how} {relative:.1e} relative");
            assert!(relative <= LOSSES, "{key} {how} is {got}, not {want}");
        }
    }
    let mean = |b: &Buffer| read(&m, b).iter().map(|&x| x as f64).sum::<f64>() / total as f64;
    assert!((mean(&out.kl) - number(&j["kl_masked_mean"])).abs() <= 1e-4 * number(&j["kl_masked_mean"]));
    assert!((mean(&out.clipped) - number(&j["clip_frac"])).abs() < 1e-6);
    compare_gradients(&r, &m, "grpo", &grads);
    let s = d.stream();
    let global = d.upload(&[0f32]);
    adamw::grad_norm(&s, &grads.flat, &global);
    let (got, want) = (read(&m, &global)[0] as f64, number(&j["global_grad_norm"]));
    assert!((got - want).abs() <= GRADIENTS * want, "the global norm is {got}, not {want}");

    // So many steps on this gradient as the name of the vectors says; the reference decays every parameter.
    let stepped: Vec<String> = r.below("adamw");
    let steps: u64 = stepped[0].split_once('.').unwrap().0.parse().unwrap();
    let (first, second) = (m.params.mirror(&d), m.params.mirror(&d));
    let trained = m.params.flat.view(0, m.params.trainable().len());
    for step in 1..=steps {
        adamw::step(&s, Params::Float(&trained), &grads.flat, &first, &second, HYPER, step, 1.0);
    }
    for name in r.below(&format!("adamw{steps}.")) {
        let want = r.f32(&format!("adamw{steps}.{name}"));
        let worst = largest_difference(&m.params.read(&s, &m.params.flat, &name).unwrap(), &want);
        println!("adamw: {name} {worst:.1e}");
        assert!(worst <= ADAMW, "{name} differs by {worst} after {steps} steps");
    }
}
