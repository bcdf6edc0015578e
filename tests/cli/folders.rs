//! Which folders are models, which are left behind, and what a command line that cannot be says.

use super::{stderr, varft};
use std::path::Path;

fn with_sets<'a>(args: &[&'a str], keys: &[&'a str]) -> Vec<&'a str> {
    args.iter().copied().chain(keys.iter().flat_map(|k| ["--set", k])).collect()
}

/// Keys that make the synthetic task and its episodes small.
const SMALL: [&str; 10] = [
    "task.synthetic.content=[\"digits\"]",
    "task.synthetic.digits=[2, 2]",
    "task.synthetic.width=[56, 84]",
    "task.synthetic.height=[56, 56]",
    "task.eval_items=2",
    "rollout.prompt=brief",
    "rollout.max_turns=1",
    "rollout.max_new_tokens=4",
    "rollout.kv_cache_mib=8",
    "rollout.vision_cache_mib=4",
];

#[test]
fn a_run_is_a_model_wherever_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let talk = "[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]\n";
    std::fs::write(at("talks.jsonl"), talk).unwrap();
    let (runs, data) = (format!("run.dir={}", at("runs")), format!("sft.data={}", at("talks.jsonl")));
    let sft = |name: &str, model: &str, steps: &str, resume: bool| {
        let keys = [
            runs.clone(),
            data.clone(),
            format!("run.name={name}"),
            format!("model.path={model}"),
            format!("optim.steps={steps}"),
            "optim.lr=0.01".into(),
            "sft.batch_size=1".into(),
        ];
        let args = if resume { &["sft", "--resume"][..] } else { &["sft"] };
        let o = varft(&with_sets(args, &keys.each_ref().map(String::as_str)));
        assert!(o.status.success(), "{}", stderr(&o));
        std::fs::read(at(&format!("runs/{name}/checkpoints/step-{steps}/model.safetensors"))).unwrap()
    };
    sft("warm", &at("model"), "1", false);
    let (warm, newest) = (at("runs/warm"), at("runs/warm/checkpoints/step-1"));
    let further = sft("further", &warm, "1", false);
    assert!(further == sft("same", &newest, "1", false) && further != sft("from-start", &at("model"), "1", false));
    let config = std::fs::read_to_string(at("runs/further/config.toml")).unwrap();
    assert!(config.contains(&format!("path = \"{newest}\"")), "{config}");
    // It goes on from what it began with, though the other run has gone on too.
    sft("warm", &at("model"), "2", true);
    let config = |name: &str| std::fs::read_to_string(at(&format!("runs/{name}/config.toml"))).unwrap();
    sft("further", &warm, "2", true);
    assert!(config("further").contains(&format!("path = \"{newest}\"")), "{}", config("further"));

    std::fs::write(at("talk.json"), r#"[{"role": "user", "content": "x"}]"#).unwrap();
    let inspected = |model: &str| {
        let o = varft(&["inspect", "--model", model, &at("talk.json"), "--out", &at("out")]);
        assert!(o.status.success(), "{}", stderr(&o));
        std::fs::read(at("out")).unwrap()
    };
    assert!(inspected(&warm) == inspected(&at("runs/warm/checkpoints/step-2")));
    let answered = |model: &str, out: &str| {
        let (model, out) = (at(model), at(out));
        for command in [
            &["eval", "--model", &model, "--out", &out][..],
            &["rollout", "--model", &model, "--out", &out, "--items", "1"],
        ] {
            let _ = std::fs::remove_dir_all(&out);
            let o = varft(&with_sets(command, &SMALL));
            assert!(o.status.success(), "{}", stderr(&o));
        }
        std::fs::read_to_string(format!("{out}/episodes.jsonl")).unwrap()
    };
    assert_eq!(answered("runs/warm", "a"), answered("runs/warm/checkpoints/step-2", "b"));
}

#[test]
fn a_folder_without_a_model_is_said_to_be_what_it_looks_like() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    for name in ["empty", "docs", "weights", "models/mine", "runs/quick"] {
        std::fs::create_dir_all(at(name)).unwrap();
    }
    std::fs::write(at("docs/method.md"), "x").unwrap();
    std::fs::write(at("weights/model.safetensors"), "x").unwrap();
    std::fs::write(at("models/mine/config.json"), "{}").unwrap();
    std::fs::write(at("runs/quick/config.toml"), "").unwrap();
    std::fs::write(at("talk.json"), "[]").unwrap();
    for (name, parts) in [
        ("empty", &["there is no model in", "is empty"][..]),
        ("docs", &["there is no model in", "method.md"]),
        ("weights", &["there is no model in", "it has weights"]),
        ("models", &["there is no model in", "a folder of models", "models/mine"]),
        ("runs", &["there is no model in", "a folder of runs", "runs/quick"]),
        ("talk.json", &["this is a file"]),
        ("gone", &["no such folder"]),
    ] {
        let (model, out) = (at(name), at("out"));
        let (path, run) = (format!("model.path={model}"), format!("run.dir={out}"));
        for command in [
            &["chat", &model][..],
            &["inspect", "--model", &model, &at("talk.json"), "--out", &out],
            &["eval", "--model", &model, "--out", &out],
            &["rollout", "--model", &model, "--out", &out],
            &["train", "--set", &path, "--set", &run],
            &["sft", "--set", &path, "--set", &run],
        ] {
            let o = varft(command);
            let said = stderr(&o);
            assert!(o.status.code() == Some(1) && parts.iter().all(|p| said.contains(p)), "{command:?}: {said}");
            assert!(said.contains("to mend it") && !Path::new(&out).exists(), "{command:?}: {said}");
        }
    }
}

#[test]
fn what_fails_before_it_begins_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (model, out, gone) = (at("model"), at("made/out"), at("gone.json"));
    let (path, run) = (format!("model.path={model}"), format!("run.dir={out}"));
    let (train, data) = (format!("task.train={gone}"), format!("sft.data={gone}"));
    for command in [
        &["eval", "--model", &model, "--out", &out, "--mat", &gone][..],
        &["eval", "--model", &model, "--out", &out, "--set", "rollout.kv_cache_mib=1", "--set", "rollout.context=4000"],
        &["rollout", "--model", &model, "--out", &out, "--set", "task.kind=mat", "--set", &train],
        &["train", "--set", &path, "--set", &run, "--set", "task.kind=mat", "--set", &train],
        &["sft", "--set", &path, "--set", &run, "--set", &data],
    ] {
        let o = varft(command);
        assert_eq!(o.status.code(), Some(1), "{command:?}: {}", stderr(&o));
        assert!(!Path::new(&at("made")).exists(), "{command:?}: {}", stderr(&o));
    }
    // What was there stays.
    std::fs::create_dir_all(at("made/out/run")).unwrap();
    let o = varft(&["train", "--set", &path, "--set", &run, "--set", "task.kind=mat", "--set", &train]);
    assert_eq!(o.status.code(), Some(1), "{}", stderr(&o));
    assert_eq!(Path::new(&at("made/out/run")).read_dir().unwrap().count(), 0);
    std::fs::write(at("file"), "mine").unwrap();
    let o = varft(&["eval", "--model", &model, "--out", &at("file")]);
    assert!(o.status.code() == Some(1) && stderr(&o).contains("this is a file"), "{}", stderr(&o));
}

#[test]
fn the_keys_of_an_evaluation_are_those_of_the_rows_that_it_asks() {
    use varft::tasks::synthetic::{Config, Subset, Synthetic};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    Synthetic::new(Config::default(), 1).unwrap().write_dataset(at("data"), Subset::HeldOut, 3).unwrap();
    let (model, out, rows, images) = (at("model"), at("out"), at("data/synthetic.json"), at("data/images"));
    let args = ["eval", "--model", &model, "--out", &out, "--mat", &rows, "--images", &images];
    // All of them: of the synthetic task there is no such number.
    let o = varft(&with_sets(&args, &[&SMALL[..], &["task.eval_items=0"]].concat()));
    assert!(o.status.success(), "{}", stderr(&o));
    let results = std::fs::read_to_string(at("out/results.json")).unwrap();
    assert_eq!(serde_json::from_str::<Vec<serde_json::Value>>(&results).unwrap().len(), 3);
}

#[test]
fn a_step_that_teaches_nothing_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (path, runs) = (format!("model.path={}", at("model")), format!("run.dir={}", at("runs")));
    // Random weights answer nothing.
    let few = ["optim.steps=1", "rollout.prompts=2", "rollout.group_size=2", "algo.mask_truncated=false", &path, &runs];
    for (name, beta, part) in
        [("free", "algo.beta=0.0", "nothing is updated"), ("tied", "algo.beta=0.1", "nothing but algo.beta")]
    {
        let name = format!("run.name={name}");
        let o = varft(&with_sets(&["train"], &[&SMALL[..], &few, &[beta, &name]].concat()));
        let said = stderr(&o);
        assert!(o.status.success(), "{said}");
        let line = said.lines().find(|l| l.starts_with("step 1: no group teaches")).unwrap_or_else(|| panic!("{said}"));
        assert!(line.contains("in 2 of 2") && line.contains(part), "{line}");
    }
}

#[test]
fn numbers_that_are_none_are_told_in_words() {
    for args in [
        &["init", "tiny", "x", "--seed", "abc"][..],
        &["init", "tiny", "x", "--seed", "-1"],
        &["quickstart", "--seed", "1.5"],
        &["chat", "x", "--threads", "-2"],
        &["chat", "x", "--max-tokens", "many"],
        &["rollout", "--model", "x", "--out", "y", "--items", "-3"],
        &["rollout", "--model", "x", "--out", "y", "--samples", "two"],
    ] {
        let o = varft(args);
        let said = stderr(&o);
        assert!(o.status.code() == Some(2) && said.contains("whole number"), "{args:?}: {said}");
        assert!(said.contains(args[args.len() - 1]) && !said.contains("digit"), "{args:?}: {said}");
    }
}

#[test]
fn a_tokenizer_is_checked_when_it_is_copied_and_an_inspection_is_a_file_like_others() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    std::fs::write(at("README.md"), "# mine").unwrap();
    let o = varft(&["init", "tiny", &at("model"), "--tokenizer", &at("README.md")]);
    let said = stderr(&o);
    assert!(o.status.code() == Some(1) && said.contains("README.md: not a tokenizer.json"), "{said}");
    assert!(!Path::new(&at("model")).exists());

    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let inspect = |talk: &str| {
        std::fs::write(at("talk.json"), talk).unwrap();
        varft(&["inspect", "--model", &at("model"), &at("talk.json"), "--out", &at("out")])
    };
    let o = inspect("[]");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("no message"), "{}", stderr(&o));
    assert!(!Path::new(&at("out")).exists());
    let o = inspect(r#"[{"role": "user", "content": "x"}]"#);
    assert!(o.status.success(), "{}", stderr(&o));
    let mode = |name: &str| Path::new(&at(name)).metadata().unwrap().permissions().mode();
    assert_eq!(mode("out"), mode("talk.json"));

    let o = varft(&["doctor", "--dir", &at("README.md")]);
    let said = String::from_utf8(o.stdout).unwrap();
    assert!(said.lines().any(|l| l.starts_with("fail  disk") && l.contains("is a file")), "{said}");
}

#[test]
fn a_folder_where_a_file_is_needed_is_told_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    std::fs::create_dir(at("docs")).unwrap();
    let (model, docs, out) = (at("model"), at("docs"), at("out"));
    let (path, runs, data) = (format!("model.path={model}"), format!("run.dir={out}"), format!("sft.data={docs}"));
    for command in [
        &["eval", "--model", &model, "--out", &out, "--mat", &docs][..],
        &["chat", &model, "--image", &docs],
        &["sft", "--set", &path, "--set", &runs, "--set", &data],
    ] {
        let o = varft(command);
        let said = stderr(&o);
        assert!(
            o.status.code() == Some(1) && said.contains(&docs) && said.contains("name a file"),
            "{command:?}: {said}"
        );
    }
}
