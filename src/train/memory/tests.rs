//! The plan against what real buffers hold, and what is said where it does not fit.

use super::super::learner::Learner;
use super::*;
use crate::engine::Engine;
use crate::model::{LoadOptions, Model, Preset};
use std::sync::Arc;

const GIB: f64 = (1u64 << 30) as f64;

fn config(keys: &[&str]) -> RunConfig {
    RunConfig::read(None, &keys.iter().map(|k| k.to_string()).collect::<Vec<_>>()).unwrap()
}

fn devices() -> Vec<Device> {
    let emulated = cfg!(emulator).then(|| Device::emulated(1).unwrap());
    [Device::cpu(1)].into_iter().chain(emulated).collect()
}

const SMALL: [&str; 4] =
    ["rollout.kv_cache_mib=3", "rollout.vision_cache_mib=1", "rollout.concurrency=3", "rollout.batch_tokens=100"];

#[test]
fn every_part_is_what_its_buffers_hold() {
    for (d, keys) in devices().into_iter().flat_map(|d| {
        let more = ["model.freeze_vision=true", "model.freeze_vision=false", "optim.masters=false"];
        more.map(|key| (d.clone(), config(&[&SMALL[..], &[key]].concat())))
    }) {
        let shape = Preset::Tiny.config();
        let plan = Plan::compute(&shape, &keys, Target { float: d.float(), free: None }, Work::Episodes);
        let mut before = d.allocated_bytes();
        let mut same = |parts: &[Part]| {
            let planned: usize = parts.iter().map(|p| plan.bytes(*p)).sum();
            let held = d.allocated_bytes() - before;
            // The host's buffers are rounded up to 64 bytes.
            assert!(held.abs_diff(planned) <= 64 * 200, "{d:?} {parts:?}: {held} held, {planned} planned");
            before = d.allocated_bytes();
        };
        let options = LoadOptions { freeze_vision: keys.model.freeze_vision, progress: false };
        let model = Arc::new(Model::random(shape.clone(), 1, &d, &options).unwrap());
        same(&[Part::Weights]);
        assert_eq!(plan.parameters[0], model.params.count());
        let learner = Learner::new(model.clone(), &keys.optim, &[]).unwrap();
        same(&[Part::Masters, Part::Gradients, Part::Moments, Part::Logits]);
        let page = EngineOptions::kv_bytes_for(&shape, d.float(), 1);
        assert_eq!(plan.bytes(Part::KvPages) % page, 0, "whole pages");
        let options = EngineOptions { kv_bytes: plan.bytes(Part::KvPages), ..engine_options(&keys, &shape) };
        let engine = Engine::start(model, options).unwrap();
        same(&[Part::Engine, Part::VisionCache, Part::KvPages]);
        drop((learner, engine));
    }
}

#[test]
fn a_parameter_takes_18_bytes_on_a_card_and_14_without_masters() {
    for (keys, bytes) in [(&[][..], 18.0), (&["optim.masters=false"], 14.0)] {
        let keys = config(&[keys, &["model.freeze_vision=false"]].concat());
        let model = Preset::B7.config();
        let plan = Plan::compute(&model, &keys, Target::card(139 << 30), Work::Episodes);
        let [all, moved] = plan.parameters;
        assert_eq!(all, moved);
        let held: usize =
            [Part::Weights, Part::Masters, Part::Gradients, Part::Moments].iter().map(|p| plan.bytes(*p)).sum();
        assert!((held as f64 / all as f64 - bytes).abs() < 1e-4, "{held} bytes of {all} parameters");
        if bytes == 18.0 {
            assert_eq!((held as f64 / GIB).round(), 139.0, "what all of a 7B takes");
        }
    }
}

#[test]
fn the_reference_is_there_only_where_something_ties_the_policy_to_it() {
    let model = Preset::B3.config();
    let plan = |keys: &[&str], work| Plan::compute(&model, &config(keys), Target::card(139 << 30), work);
    let parts = |p: &Plan| [Part::Reference, Part::ReferencePass].map(|part| p.bytes(part));
    assert_eq!(parts(&plan(&[], Work::Episodes)), [0, 0]);
    let tied = plan(&["algo.beta=0.04"], Work::Episodes);
    assert!(tied.bytes(Part::Reference) == tied.bytes(Part::Weights) && parts(&tied)[1] > 0);
    assert_eq!(parts(&plan(&["algo.beta=0.04"], Work::Conversations { longest: 0 })), [0, 0]);
    let rollouts = plan(&["algo.beta=0.04"], Work::Rollouts);
    let trained = [Part::Masters, Part::Gradients, Part::Moments, Part::Activations, Part::Logits, Part::Reference];
    assert!(trained.iter().all(|p| rollouts.bytes(*p) == 0) && rollouts.bytes(Part::KvPages) > 0);
    assert_eq!(plan(&[], Work::Conversations { longest: 0 }).bytes(Part::KvPages), 0);
}

#[test]
fn what_is_free_is_given_to_activations_and_pages_and_never_exceeded() {
    let (model, keys) = (Preset::B3.config(), config(&[]));
    let at = |free: u64| Plan::compute(&model, &keys, Target::card(free), Work::Episodes);
    let all = at(1 << 45);
    assert_eq!(all.kept[0], all.kept[1]);
    assert!(all.kv_tokens >= 64 * 8192, "pages for all episodes at once: {}", all.kv_tokens);
    let least = at(0);
    assert!(!least.fits() && (least.kept[0].text, least.kv_tokens) == (0, 8192));
    let mut before = (0, 0);
    for free in (0..40).map(|i| least.total() + (all.total() - least.total()) * i / 39) {
        let plan = at(free as u64);
        assert!(plan.fits(), "{} of {free}", plan.total());
        // Whatever is left is less than one more layer and one more page would take.
        let more = (plan.kept[0].text, plan.kv_tokens);
        assert!(more.0 >= before.0 && more.1 >= before.1, "{more:?} after {before:?}");
        before = more;
    }
    assert!(at(least.total() as u64).fits() && !at(least.total() as u64 - 1).fits());
    // What the run file gives is taken as it is.
    let given = config(&["optim.activations_mib=9000", "rollout.kv_cache_mib=700"]);
    let given = Plan::compute(&model, &given, Target::card(1 << 45), Work::Episodes);
    assert_eq!((given.activations, given.bytes(Part::KvPages)), (9000 << 20, 700 << 20));
    assert!(given.bytes(Part::Activations) <= 9000 << 20 && given.kept[0].text < 36);
}

#[test]
fn what_does_not_fit_names_what_would_here_and_on_cards() {
    let (model, keys) = (Preset::B7.config(), config(&["model.freeze_vision=false"]));
    let e = Plan::new(&model, &keys, Target::card(139 << 30), Work::Episodes).unwrap_err().to_string();
    let (what, mend) = e.split_once("to mend it: ").unwrap();
    assert!(what.contains("139.0 GiB are free") && what.contains("moments 61.8 GiB"), "{e}");
    assert!(mend.contains("optim.masters=false (") && mend.contains("model.freeze_vision=true"), "{e}");
    let card = |name: &str| e.lines().find(|l| l.contains(&format!("on a card of {name}: "))).unwrap().to_owned();
    assert!(card("80 GB").contains("not even"), "{e}");
    assert!(card("141 GB").contains("optim.masters=false ("), "{e}");
    // Every way that is named is enough, and says how much it takes; no part of it would do.
    let found = ways(&model, &keys, Target::card(139 << 30), Work::Episodes);
    assert!(!found.enough.is_empty());
    for way in &found.enough {
        let set: Vec<&str> = way.keys.iter().flat_map(|k| k.split(" with ")).collect();
        let plan = |set: &[&str]| {
            let keys = config(&[&["model.freeze_vision=false"], set].concat());
            Plan::compute(&model, &keys, Target::card(139 << 30), Work::Episodes)
        };
        assert!(plan(&set).fits() && plan(&set).total() == way.bytes, "{way:?}");
        assert!(
            set.len() == 1 || (0..set.len()).all(|i| !plan(&[&set[..i], &set[i + 1..]].concat()).fits()),
            "{way:?}"
        );
    }
    // The 3B fits the smaller card whole, and nothing has to be said of it.
    Plan::new(&Preset::B3.config(), &keys, Target::card(78 << 30), Work::Episodes).unwrap();
    assert!(on_card(&Preset::B3.config(), &keys, 78 << 30, Work::Episodes).contains("fits as it is"));
    let tiny = Plan::new(&Preset::Tiny.config(), &keys, Target::card(1 << 20), Work::Episodes).unwrap_err().to_string();
    assert!(tiny.contains("on a card of 80 GB: it fits as it is"), "{tiny}");
}

#[test]
fn on_the_host_there_are_no_masters_and_caches_stay_modest() {
    let plan = |preset: Preset| {
        let target = Target { float: DType::F32, free: Some(1 << 45) };
        Plan::compute(&preset.config(), &config(&["model.freeze_vision=false"]), target, Work::Episodes)
    };
    for preset in Preset::ALL {
        let plan = plan(preset);
        let [all, _] = plan.parameters;
        let held: usize =
            [Part::Weights, Part::Masters, Part::Gradients, Part::Moments].iter().map(|p| plan.bytes(*p)).sum();
        assert!((held as f64 / all as f64 - 16.0).abs() < 0.1, "{preset}: {held} bytes of {all} parameters");
        assert_eq!((plan.bytes(Part::Masters), plan.bytes(Part::Headroom)), (0, 0));
        assert!(plan.bytes(Part::KvPages) == 1 << 30 || preset == Preset::B7);
    }
    assert_eq!(plan(Preset::B3).logit_rows, 441);
    assert_eq!(Plan::compute(&Preset::B3.config(), &config(&[]), Target::card(0), Work::Episodes).logit_rows, 1024);
}

#[test]
fn a_table_has_a_line_for_each_part_and_the_sum() {
    let plan = Plan::compute(&Preset::B3.config(), &config(&[]), Target::card(78 << 30), Work::Episodes);
    let table = plan.table();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 10 + 1, "{table}");
    assert!(lines[0].starts_with("weights ") && lines[0].contains("7.0 GiB  bf16, 3754.6 M parameters"), "{table}");
    assert!(lines[10].starts_with("in all ") && lines[10].ends_with("of 78.0 GiB free"), "{table}");
    let end = |l: &str| l.find("iB").unwrap();
    assert!(lines.iter().all(|l| end(l) == end(lines[0])), "{table}");
    assert_eq!([1023, 5 << 20, 3 << 29].map(size), ["1.0 KiB", "5.0 MiB", "1.5 GiB"]);
}
