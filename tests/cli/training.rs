//! `varft train` and `varft sft`, and what a run's folder stands for.

use super::chat::chat;
use super::{SMALL, stderr, stdout, varft, with_sets};
use std::path::Path;

/// A file of one short conversation.
pub const TALK: &str = "[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]\n";

/// Keys of two steps of `varft sft` on the conversations in the file `talks`.
pub fn sft_keys(model: &str, runs: &str, talks: &str) -> [String; 6] {
    [
        format!("model.path={model}"),
        format!("run.dir={runs}"),
        format!("sft.data={talks}"),
        "optim.lr=0.01".into(),
        "optim.steps=2".into(),
        "sft.batch_size=1".into(),
    ]
}

#[test]
fn the_folder_of_a_run_stands_for_the_model_that_it_trained() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    std::fs::write(at("talks.jsonl"), TALK).unwrap();
    let keys = sft_keys(&at("model"), &at(""), &at("talks.jsonl"));
    let o = varft(&with_sets(&["sft"], &keys.each_ref().map(String::as_str)));
    assert!(o.status.success(), "{}", stderr(&o));
    let (run, newest) = (at("run"), at("run/checkpoints/step-2"));
    std::fs::write(at("talk.json"), r#"[{"role": "user", "content": "x"}]"#).unwrap();
    let inspected = |model: &str| {
        let o = varft(&["inspect", "--model", model, &at("talk.json"), "--out", &at("out")]);
        assert!(o.status.success(), "{}", stderr(&o));
        std::fs::read(at("out")).unwrap()
    };
    let trained = inspected(&newest);
    assert!(inspected(&run) == trained && inspected(&at("model")) != trained);
    let said = |model: &str| {
        let o = chat(&[model, "--max-tokens", "8", "--context", "256"], "hello\n");
        assert!(o.status.success(), "{}", stderr(&o));
        stdout(&o)
    };
    assert_eq!(said(&run), said(&newest));
    // Before its first checkpoint a run's model is the one that it began with.
    std::fs::remove_dir_all(at("run/checkpoints")).unwrap();
    assert!(inspected(&run) == inspected(&at("model")));
    std::fs::remove_dir_all(at("model")).unwrap();
    let o = chat(&[&run], "hello\n");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("no such folder"), "{}", stderr(&o));
}

#[test]
fn a_question_that_cannot_fit_is_named_before_anything_is_asked() {
    use varft::tasks::synthetic::{Config, Subset, Synthetic};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    Synthetic::new(Config::default(), 1).unwrap().write_dataset(at("data"), Subset::Train, 6).unwrap();
    let file = at("data/synthetic.json");
    let mut rows: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    for row in [2, 4] {
        rows[row]["question"] = "Why? ".repeat(400).into();
    }
    std::fs::write(&file, serde_json::to_string(&rows).unwrap()).unwrap();
    let (model, out) = (at("model"), at("out"));
    let keys = [
        "task.kind=mat",
        &format!("task.train={file}"),
        &format!("task.eval={file}"),
        &format!("task.images={}", at("data/images")),
        "rollout.context=700",
    ];
    let keys = [&SMALL[..], &keys].concat();
    let told = |args: &[&str], parts: &[&str]| {
        let o = varft(&with_sets(args, &keys));
        let said = stderr(&o);
        assert!(o.status.code() == Some(1) && parts.iter().all(|p| said.contains(p)), "{said}");
        assert!(!said.contains("EngineOptions") && said.contains("rollout.context"), "{said}");
    };
    let row = "synthetic.json: row 2 (id 2): the prompt has";
    told(&["rollout", "--model", &model, "--out", &out, "--items", "5"], &[row, "and one more item"]);
    told(&["eval", "--model", &model, "--out", &out], &["item 2: the prompt has"]);
    let (path, runs) = (format!("model.path={model}"), format!("run.dir={}", at("runs")));
    told(&["train", "--set", &path, "--set", &runs], &[row, "and one more item"]);
    assert!(!Path::new(&at("runs/run/config.toml")).exists());
    // What is not asked need not fit.
    let o = varft(&with_sets(&["rollout", "--model", &model, "--out", &out, "--items", "2"], &keys));
    assert!(o.status.success(), "{}", stderr(&o));
    // Made questions are measured without being made.
    let keys = [&SMALL[..], &["rollout.context=40", "rollout.max_new_tokens=8", "task.train_items=100000"]].concat();
    let o = varft(&with_sets(&["train", "--set", &path, "--set", &runs], &keys));
    let said = stderr(&o);
    assert!(
        o.status.code() == Some(1) && said.contains("item 0 of the synthetic task") && said.contains("99999 more"),
        "{said}"
    );
}

#[test]
fn sft_names_the_line_that_it_cannot_learn_from() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (model, runs, data) = (
        format!("model.path={}", at("model")),
        format!("run.dir={}", at("runs")),
        format!("sft.data={}", at("talks.jsonl")),
    );
    let said = |talks: &str| {
        std::fs::write(at("talks.jsonl"), talks).unwrap();
        let o = varft(&with_sets(&["sft"], &[&model, &runs, &data, "optim.steps=1", "sft.batch_size=1"]));
        assert_eq!(o.status.code(), Some(1));
        stderr(&o)
    };
    let e = said("\n[{\"role\": \"user\", \"content\": \"a\"}]\n");
    assert!(e.contains("talks.jsonl, line 2") && e.contains("nothing to learn"), "{e}");
    let long = "word ".repeat(4000);
    let talk = |said: &str| {
        format!("[{{\"role\":\"user\",\"content\":\"{said}\"}},{{\"role\":\"assistant\",\"content\":\"b\"}}]\n")
    };
    let e = said(&talk(&long));
    assert!(e.contains("talks.jsonl, line 1") && e.contains("context is 4096"), "{e}");
    assert!(!std::path::Path::new(&at("runs")).exists(), "nothing is left of what did not begin");
    let image = "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]},{\"role\":\"assistant\",\"content\":\"b\"}],\"images\":[\"gone.png\"]}";
    let e = said(image);
    assert!(e.contains("gone.png"), "{e}");
}

#[cfg(emulator)]
#[test]
fn a_run_without_masters_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    std::fs::write(at("talks.jsonl"), TALK).unwrap();
    let keys = sft_keys(&at("model"), &at(""), &at("talks.jsonl"));
    let keys = [&keys.each_ref().map(String::as_str)[..], &["run.device=emulated", "optim.masters=false"]].concat();
    let trained = |name: &str, more: &[&str]| {
        let name = format!("run.name={name}");
        let o = varft(&with_sets(&["sft"], &[&keys[..], &[&name], more].concat()));
        assert!(o.status.success(), "{}", stderr(&o));
    };
    trained("whole", &[]);
    trained("parts", &["optim.steps=1"]);
    let o = varft(&["sft", &at("parts"), "--resume", "--set", "optim.steps=2", "--set", "optim.masters=true"]);
    assert!(o.status.code() == Some(1) && stderr(&o).contains("optim.masters: false before"), "{}", stderr(&o));
    let o = varft(&["sft", &at("parts"), "--resume", "--set", "optim.steps=2"]);
    assert!(o.status.success(), "{}", stderr(&o));
    let file = |run: &str, name: &str| std::fs::read(at(&format!("{run}/checkpoints/step-2/{name}"))).unwrap();
    assert!(file("whole", "model.safetensors") != std::fs::read(at("model/model.safetensors")).unwrap());
    for name in ["model.safetensors", "optimizer.safetensors"] {
        assert!(file("whole", name) == file("parts", name), "{name}");
    }
    let moments = file("whole", "optimizer.safetensors");
    let moments = safetensors::SafeTensors::deserialize(&moments).unwrap();
    assert!(moments.names().iter().all(|n| n.starts_with("m.") || n.starts_with("v.")));
}
