//! What `varft quickstart` says, and what becomes of an earlier one.

use super::{stderr, stdout};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

fn quickstart(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_varft"));
    command.arg("quickstart").args(args);
    command
}

/// A run of one step on few questions.
const SMALL: [&str; 8] = [
    "--set",
    "optim.steps=1",
    "--set",
    "task.eval_items=12",
    "--set",
    "rollout.prompts=2",
    "--set",
    "rollout.group_size=2",
];

#[test]
fn it_prints_what_became_of_each_damage_and_keeps_the_run_before() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let run = at("quick");
    let args = [&["--out", &run][..], &SMALL].concat();
    let o = quickstart(&args).output().unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    let printed = stdout(&o);
    let metrics = std::fs::read_to_string(format!("{run}/metrics.jsonl")).unwrap();
    let metrics: Vec<serde_json::Value> = metrics.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let figure = |step: u64, name: &str| {
        let found = metrics.iter().filter(|r| r["step"] == step).find_map(|r| r.get(name)?.as_f64());
        found.unwrap_or_else(|| panic!("{step} {name}"))
    };
    for step in [0, 1] {
        for (of_all, group) in [("eval/f1", "eval"), ("withheld/f1", "withheld")] {
            let (mut questions, mut right) = (0.0, 0.0);
            for kind in ["rotation90", "rotation180", "dark", "overexposure"] {
                let n = figure(step, &format!("{group}/n/{kind}"));
                (questions, right) = (questions + n, right + n * figure(step, &format!("{group}/f1/{kind}")));
            }
            assert!(questions == 12.0 && (right / 12.0 - figure(step, of_all)).abs() < 1e-12, "{metrics:?}");
        }
    }
    let percent = |step, name: &str| format!("{:.1}%", 100.0 * figure(step, name));
    for kind in ["rotation90", "rotation180", "dark", "overexposure"] {
        let line = format!(
            "| {kind} | {} | {} | {} | {} |",
            figure(0, &format!("eval/n/{kind}")),
            percent(0, &format!("eval/f1/{kind}")),
            percent(1, &format!("eval/f1/{kind}")),
            percent(1, &format!("withheld/f1/{kind}"))
        );
        assert!(printed.contains(&line), "{line}\n{printed}");
    }
    assert!(printed.contains(&format!("| after | {} |", percent(1, "eval/f1"))), "{printed}");

    // Once more: the first is kept, and said to be.
    let o = quickstart(&args).output().unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    let kept = format!("{run}-1");
    assert!(stdout(&o).contains(&format!("the earlier run is kept as {kept}")), "{}", stdout(&o));
    let weights = |run: &str| std::fs::read(format!("{run}/checkpoints/step-1/model.safetensors")).unwrap();
    assert!(weights(&kept) == weights(&run));
}

#[test]
fn what_it_sets_itself_is_refused_and_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("quick").to_str().unwrap().to_string();
    for (set, part) in [
        ("model.path=models/mine", "varft train --set model.path="),
        ("run.name=mine", "--out"),
        (" run.dir = there", "--out"),
    ] {
        let o = quickstart(&["--out", &run, "--set", set]).output().unwrap();
        let said = stderr(&o);
        assert!(o.status.code() == Some(1) && said.contains(set.trim()) && said.contains(part), "{said}");
    }
    let o = quickstart(&["--out", &run]).env("VARFT_PYTHON", "/no/such/python").output().unwrap();
    assert!(o.status.code() == Some(1) && stderr(&o).contains("/no/such/python"), "{}", stderr(&o));
    // What is known only with the model at hand.
    let o = quickstart(&["--out", &run, "--set", "rollout.kv_cache_mib=1"]).output().unwrap();
    assert!(o.status.code() == Some(1) && stderr(&o).contains("rollout.kv_cache_mib"), "{}", stderr(&o));
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    let file = dir.path().join("README.md");
    std::fs::write(&file, "mine").unwrap();
    let o = quickstart(&["--out", file.to_str().unwrap()]).output().unwrap();
    let said = stderr(&o);
    assert!(o.status.code() == Some(1) && said.contains("this is a file") && said.contains("to mend it"), "{said}");
}

#[test]
fn stopped_in_its_first_measurement_it_says_how_to_begin_again() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("a quick one").to_str().unwrap().to_string();
    let mut child = quickstart(&["--out", &run, "--set", "task.eval_items=2000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("a Qwen2.5-VL of ") {
        line.clear();
        assert_ne!(out.read_line(&mut line).unwrap(), 0, "it ended before it began");
    }
    // SAFETY: our own child, which has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("nothing is saved") && !said.contains("engine"), "{said}");
    let again =
        format!("to begin again: {} quickstart --out '{run}' --set task.eval_items=2000", env!("CARGO_BIN_EXE_varft"));
    assert!(said.contains(&again), "{said}");
}
