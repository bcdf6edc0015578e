//! A run with the CUDA kernels, from images to moved weights, on the emulated device and on a card where there is one.

use super::school::{COMMON, ok, run_keys, school, stderr, text, varft};
use super::setting;
use std::path::Path;
use varft::report::read_metrics;

/// Few and short episodes: every multiplication may be emulated. The last two keys let every step move the weights.
const KEYS: [&str; 8] = [
    "rollout.prompts=2",
    "rollout.group_size=3",
    "rollout.max_new_tokens=24",
    "log.eval_every=0",
    "log.checkpoint_every=1",
    "optim.lr=1e-3",
    "algo.drop_zero_variance=false",
    "algo.beta=0.1",
];

fn train(run: &Path, device: &str, steps: u64) {
    let model = format!("model.path={}", text(&school().model));
    let own = [model, format!("run.device={device}"), format!("optim.steps={steps}")];
    let keys = COMMON.iter().chain(&KEYS).map(|k| k.to_string()).chain(run_keys(run)).chain(own);
    let args: Vec<String> = keys.flat_map(|k| ["--set".into(), k]).collect();
    let args: Vec<&str> = ["train"].into_iter().chain(args.iter().map(String::as_str)).collect();
    ok(&args);
}

#[test]
fn a_run_rolls_out_learns_saves_and_goes_on_to_the_same_bits() {
    let emulated = setting::emulates().then_some("emulated");
    for device in emulated.into_iter().chain(setting::card().map(|_| "cuda")) {
        println!("{device}");
        run(device);
    }
}

fn run(device: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    train(&whole, device, 2);
    let steps: Vec<_> = read_metrics(&whole).unwrap();
    let all = |name: &str| -> Vec<f64> {
        let values = steps.iter().flat_map(|r| &r.values);
        values.filter(|(n, _)| n == name).map(|(_, v)| *v).collect()
    };
    assert_eq!(all("policy/mismatch"), [0.0, 0.0], "the trainer's log-probabilities are the sampler's");
    assert!(all("optim/grad_norm").iter().all(|g| g.is_finite()) && all("optim/skipped") == [0.0, 0.0], "{steps:?}");
    let weights = |run: &Path| std::fs::read(run.join("checkpoints/step-2/model.safetensors")).unwrap();
    let moments = |run: &Path| std::fs::read(run.join("checkpoints/step-2/optimizer.safetensors")).unwrap();
    assert!(weights(&whole) != std::fs::read(school().model.join("model.safetensors")).unwrap(), "nothing was learned");
    train(&parts, device, 1);
    ok(&["train", text(&parts), "--resume", "--set", "optim.steps=2"]);
    assert!(weights(&parts) == weights(&whole) && moments(&parts) == moments(&whole));
}

/// Faults of the GPU in the second step, of which the first is saved.
#[test]
fn a_run_that_the_gpu_fails_says_so_and_goes_on_from_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train(&run, "emulated", 1);
    let files = |what: &str| std::fs::read(run.join("checkpoints").join(what)).unwrap();
    let saved = files("step-1/model.safetensors");
    let faults = [
        ("memory:40", "the GPU cannot give more memory", "rollout.kv_cache_mib"),
        ("page-locked:100", "the system locks no more of the host's memory", "ulimit -l"),
        ("launch:900", "the GPU cannot", "please report it"),
        ("copy:250", "the GPU cannot copy", "please report it"),
        ("lost:1500", "the GPU is lost", "Xid"),
    ];
    for (fault, what, mend) in faults {
        let resume = ["train", text(&run), "--resume", "--set", "optim.steps=2"];
        let o = varft().args(resume).env("VARFT_EMULATED_FAULT", fault).output().unwrap();
        let said = stderr(&o);
        assert_eq!(o.status.code(), Some(1), "{fault}: {said}");
        assert!(said.contains(what) && said.contains(mend) && !said.contains("panicked"), "{fault}: {said}");
        assert_eq!(
            std::fs::read_dir(run.join("checkpoints")).unwrap().count(),
            1,
            "{fault}: half a checkpoint was left"
        );
        assert!(files("step-1/model.safetensors") == saved, "{fault}: the checkpoint has changed");
    }
    ok(&["train", text(&run), "--resume", "--set", "optim.steps=2"]);
    let calm = dir.path().join("calm");
    train(&calm, "emulated", 2);
    for file in ["step-2/model.safetensors", "step-2/optimizer.safetensors"] {
        assert!(files(file) == std::fs::read(calm.join("checkpoints").join(file)).unwrap(), "{file}");
    }
}
