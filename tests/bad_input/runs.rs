//! Commands on folders and disks that refuse them, and run files with mistakes.

use super::{Folder, fails, refused, varft};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::process::{Command, Output};

#[test]
fn a_folder_that_cannot_be_written_or_read_is_named() {
    let f = Folder::new();
    fs::write(f.path("file"), "").unwrap();
    fails(&["init", "tiny", &f.at("file/model")], &["file/model"]);
    fails(&["init", "tiny", &f.at("other"), "--tokenizer", &f.at("none.json")], &["none.json", "check the path"]);
    assert!(!f.path("other").exists(), "nothing half made");
    fails(&["report", &f.at("file")], &["file"]);
    fails(&["report", &f.at("nowhere")], &["nowhere"]);
    let o = varft(&["inspect", "--model", &f.at("model"), &f.at("talk.json"), "--out", &f.at("no/such/out")]);
    refused(&o, &["no/such/out"]);
}

/// Runs the binary where no file may grow beyond half a megabyte, which stands for a disk without room: the system
/// refuses what is written past it.
fn without_room(args: &[&str]) -> Output {
    let script = r#"trap "" XFSZ; ulimit -S -f 500; exec "$0" "$@""#;
    Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_varft")]).args(args).output().unwrap()
}

#[test]
fn a_disk_without_room_leaves_the_model_that_was_there() {
    let f = Folder::new();
    let before = f.weights();
    let o = without_room(&["init", "tiny", &f.at("model"), "--seed", "5", "--force"]);
    refused(&o, &["model/model.safetensors", "write", "make room"]);
    assert_eq!(f.weights(), before);
    let left: Vec<_> = fs::read_dir(f.path("model")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().contains("tmp")), "{left:?}");
    assert!(f.inspect().status.success());
}

/// A run of a few small steps that needs no download but the tool's environment.
const RUN: &str = r#"
[rollout]
prompts = 1
group_size = 2
max_new_tokens = 12
context = 1500
kv_cache_mib = 16
vision_cache_mib = 4
concurrency = 2
prompt = "brief"
[task]
train_items = 4
[optim]
schedule = "constant"
[log]
eval_every = 0
checkpoint_every = 1
keep_last = 0
"#;

#[test]
fn a_disk_without_room_at_a_checkpoint_leaves_the_run_to_go_on_with() {
    let f = Folder::new();
    fs::write(f.path("run.toml"), RUN).unwrap();
    let run = f.path("r");
    let (dir, model) = (format!("run.dir={}", f.at("")), format!("model.path={}", f.at("model")));
    let (file, at) = (f.at("run.toml"), f.at("r"));
    let o = varft(&["train", &file, "--set", &dir, "--set", "run.name=r", "--set", &model, "--set", "optim.steps=1"]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let files = |step: u64| -> Vec<(PathBuf, Vec<u8>)> {
        let entries = fs::read_dir(run.join(format!("checkpoints/step-{step}"))).unwrap();
        let mut all: Vec<_> = entries.map(|e| e.unwrap().path()).map(|p| (p.clone(), fs::read(p).unwrap())).collect();
        all.sort();
        all
    };
    let before = files(1);

    let o = without_room(&["train", &at, "--resume", "--set", "optim.steps=3"]);
    refused(&o, &["checkpoints/", "model.safetensors", "make room"]);
    assert!(String::from_utf8_lossy(&o.stderr).contains("--resume"), "how to go on");
    assert_eq!(files(1), before);
    let left: Vec<_> = fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["step-1"]);

    let o = varft(&["train", &at, "--resume", "--set", "optim.steps=3"]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    assert_eq!(files(1), before);
    assert!(run.join("checkpoints/step-3/train_state.json").is_file());
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let steps: Vec<Value> =
        metrics.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].clone()).collect();
    assert!(steps.windows(2).all(|w| w[0].as_u64() <= w[1].as_u64()), "each step's figures once, in order: {steps:?}");
}

#[test]
fn a_run_file_with_a_mistake_is_refused_by_line_and_nothing_begins() {
    let f = Folder::new();
    let file = f.at("run.toml");
    let dir = format!("run.dir={}", f.at("runs"));
    let with = |text: &str, set: &[&str], expected: &[&str]| {
        fs::write(f.path("run.toml"), text).unwrap();
        let set: Vec<&str> = set.iter().flat_map(|s| ["--set", s]).collect();
        fails(&[&["train", &file, "--set", &dir], &set[..]].concat(), expected);
        assert!(!f.path("runs/run/checkpoints").exists());
    };
    let mend = "to mend it";
    with("[algo]\n\nbetta = 0.1\n", &[], &["run.toml, line 3", "`algo.betta`", "`algo.beta`", mend]);
    with("[algos]\nbeta = 0.1\n", &[], &["run.toml, line 1", "`algos`", "`algo`", mend]);
    with("[algo\n", &[], &["run.toml, line 1", mend]);
    with("[algo]\nbeta = \"x\"\n", &[], &["run.toml, line 2", "a number", mend]);
    with("", &["algo.betta=1"], &["the command line", "`algo.beta`", mend]);
    with("", &["rollout.temperature=nan"], &["`rollout.temperature`", mend]);
    with("", &["tools.python.cpu_s=1e300"], &["`tools.python.cpu_s`", mend]);
    with("", &["rollout.kv_cache_mib=9000000000000000000"], &["`rollout.kv_cache_mib`", mend]);
    with("", &["rollout.concurrency=1000000"], &["`rollout.concurrency`", mend]);
    with("", &["run.threads=1000000"], &["`run.threads`", mend]);
    with("", &["rollout.group_size=-1"], &["group_size", mend]);
    with("", &[], &["`model.path` is not set", "varft init", mend]);
    with("", &["model.path=/no/such/model"], &["/no/such/model", mend]);
    with("[task]\nkind = \"mat\"\n", &[&format!("model.path={}", f.at("model"))], &["task.train", mend]);
    fails(&["train", &f.at("none.toml")], &["none.toml", "check the path"]);
    fails(&["train", &f.at("model")], &["no run in this folder", mend]);
}

#[test]
fn what_is_no_file_is_not_replaced_by_one() {
    let f = Folder::new();
    let pipe = f.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::os::unix::fs::symlink(&pipe, f.path("link")).unwrap();
    for out in ["pipe", "link", "model"] {
        let args = ["inspect", "--model", &f.at("model"), &f.at("talk.json"), "--out", &f.at(out)];
        fails(&args, &[out, "a folder, a device or a pipe", "--out"]);
    }
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo() && f.path("link").is_symlink());
}

#[test]
fn paths_that_lead_nowhere_are_told_apart() {
    let f = Folder::new();
    let train = |key: &str, value: &str, expected: &[&str]| {
        let model = format!("model.path={}", f.at("model"));
        let dir = format!("run.dir={}", f.at("runs"));
        fails(&["train", "--set", &model, "--set", &dir, "--set", &format!("{key}={value}")], expected);
    };
    train("run.dir", &f.at("a.png"), &["a.png", "check the path"]);
    train("run.name", &"x".repeat(300), &["xxx", "choose a shorter name"]);
    train(
        "tools.python.interpreter",
        "/no/such/python",
        &["/no/such/python", "tools.python.interpreter", "to mend it"],
    );
    fs::write(f.path("run.toml"), b"[run]\nname = \"\xff\"\n").unwrap();
    fails(&["train", &f.at("run.toml")], &["run.toml", "UTF-8"]);
    fails(&["train", "/dev/zero"], &["/dev/zero", "not a regular file"]);
    fails(&["init", "tiny", &f.at("new"), "--tokenizer", "/dev/zero"], &["/dev/zero", "not a regular file"]);
    fs::create_dir_all(f.path("half/checkpoints")).unwrap();
    fails(&["chat", &f.at("half")], &["half", "without its config.toml", "to mend it"]);
}

#[test]
fn threads_that_no_machine_has_are_refused() {
    for threads in ["1000000", "-1", "all"] {
        let set = format!("--threads={threads}");
        for args in [&["chat", "model", &set][..], &["inspect", "talk.json", "--model=model", "--out=out", &set]] {
            let o = varft(args);
            let e = String::from_utf8_lossy(&o.stderr);
            assert!(o.status.code() == Some(2) && e.contains("--threads") && e.contains("1024"), "{e}");
        }
    }
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_varft"))
        .args(["doctor", "--dir", "."])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let o = child.wait_with_output().unwrap();
    assert!(!String::from_utf8_lossy(&o.stderr).contains("panicked"), "{}", String::from_utf8_lossy(&o.stderr));
}
