//! `varft quickstart`.

use super::{interrupted, lines, stderr, varft, with_sets};

#[test]
fn a_quickstart_at_work_is_not_replaced_by_another() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("quick");
    std::fs::create_dir(&run).unwrap();
    for name in [".quickstart", "metrics.jsonl"] {
        std::fs::write(run.join(name), "x").unwrap();
    }
    let lock = std::fs::File::create(run.join(".lock")).unwrap();
    lock.lock().unwrap();
    let o = varft(&["quickstart", "--out", run.to_str().unwrap(), "--smoke", "--set", "optim.steps=0"]);
    assert!(o.status.code() == Some(1) && stderr(&o).contains("another process"), "{}", stderr(&o));
    assert!(run.join("metrics.jsonl").is_file());
}

#[test]
fn a_quickstart_of_few_steps_needs_no_word_about_the_warm_up() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("quick").to_str().unwrap().to_string();
    let small = ["optim.steps=2", "task.eval_items=2", "rollout.prompts=2", "rollout.group_size=2"];
    let o = varft(&with_sets(&["quickstart", "--out", &run], &small));
    let said = stderr(&o);
    assert!(o.status.success(), "{said}");
    let written = std::fs::read_to_string(format!("{run}/config.toml")).unwrap();
    assert!(written.contains("steps = 2\n") && written.contains("warmup_steps = 2\n"), "{written}");
    // Between the first step and the last there is something to say about the time.
    let first = said.lines().find(|l| l.starts_with("train 1/2 [")).unwrap_or_else(|| panic!("{said}"));
    assert!(first.contains(" left] "), "{first}");
    let last = said.lines().find(|l| l.starts_with("train 2/2 [")).unwrap();
    assert!(!last.contains(" left"), "{last}");
    // Who sets the warm-up too is told what is wrong with it.
    let o = varft(&with_sets(&["quickstart", "--out", &run], &["optim.steps=2", "optim.warmup_steps=3"]));
    let said = stderr(&o);
    assert!(
        o.status.code() == Some(1)
            && said.contains("`optim.warmup_steps` is 3")
            && said.contains("never reach its peak"),
        "{said}"
    );
}

#[test]
fn a_quickstart_that_was_interrupted_is_a_run_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("quick").to_str().unwrap().to_string();
    let small =
        ["task.eval_items=4", "rollout.prompts=2", "rollout.group_size=2", "optim.steps=12", "log.eval_every=12"];
    let o = interrupted(&with_sets(&["quickstart", "--out", &run], &small), "train 1/12");
    let said = stderr(&o);
    assert_eq!(o.status.code(), Some(1), "{said}");
    let resume = said.lines().find_map(|l| l.trim().strip_prefix("to go on: ")).unwrap_or_else(|| panic!("{said}"));
    let o = std::process::Command::new("sh").args(["-c", resume]).output().unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    let last = lines(&format!("{run}/metrics.jsonl")).pop().unwrap();
    assert_eq!(last["step"], 12, "{last}");
    // And it can be read, and changed, as a run file.
    let out = dir.path().join("eval").to_str().unwrap().to_string();
    let o = varft(&["eval", &run, "--out", &out]);
    assert!(o.status.success(), "{}", stderr(&o));
}
