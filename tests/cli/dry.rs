//! `--dry-run` of `varft train` and `varft sft`.

use super::training::{TALK, sft_keys};
use super::{SMALL, lines, stderr, stdout, varft, with_sets};

/// The words of the line that begins with `start`.
fn words(said: &str, start: &str) -> Vec<String> {
    let line = said.lines().find(|l| l.trim_start().starts_with(start)).unwrap_or_else(|| panic!("no {start}: {said}"));
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_dry_run_says_what_there_is_to_do_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (path, runs) = (format!("model.path={}", at("model")), format!("run.dir={}", at("runs")));
    let keys = [&SMALL[..], &[&path, &runs, "task.train_items=6", "rollout.prompts=2", "run.device=cpu"]].concat();
    let o = varft(&with_sets(&["train", "--dry-run"], &keys));
    assert!(o.status.success(), "{}", stderr(&o));
    let said = stdout(&o);
    assert!(!dir.path().join("runs").exists() && said.contains("nothing is written"), "{said}");
    // The prompts are as long as those of episodes.
    let out = at("out");
    let args = ["rollout", "--model", &at("model"), "--out", &out, "--items", "6"];
    let o = varft(&with_sets(&args, &keys));
    assert!(o.status.success(), "{}", stderr(&o));
    let episodes = lines(&at("out/episodes.jsonl"));
    let prompts: Vec<u64> = episodes.iter().map(|e| e["spans"][0][2].as_u64().unwrap()).collect();
    assert_eq!(words(&said, "prompt")[4], prompts.iter().max().unwrap().to_string(), "{said}");
    let mean = prompts.iter().sum::<u64>() as f64 / 6.0;
    assert_eq!(words(&said, "prompt")[1], format!("{mean:.0}"), "{said}");
    // 2 turns of 12 tokens each; between them an image of 512 tokens at most, and 2000 characters.
    assert_eq!(words(&said, "completion")[1..6], ["2536", "at", "most:", "24", "that"], "{said}");
    for part in ["weights", "gradients", "moments", "activations", "KV pages", "in all"] {
        assert!(words(&said, part).len() > 3, "{said}");
    }
    for part in ["rollouts: prompts", "rollouts: sampled", "forward", "backward"] {
        assert!(words(&said, part).last().unwrap().parse::<f64>().unwrap() > 0.0, "{said}");
    }
    // How large the product is depends on how fast the machine is at the moment.
    assert!(said.contains("measured now") && said.contains(" rows times ") && said.contains("FLOP/s"), "{said}");
    assert!(words(&said, "200 steps").len() == 4, "{said}");
}

#[test]
fn a_run_that_does_not_fit_says_so_before_it_begins() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (path, runs) = (format!("model.path={}", at("model")), format!("run.dir={}", at("runs")));
    let keys = [&SMALL[..], &[&path, &runs, "rollout.kv_cache_mib=1000000000", "run.device=cpu"]].concat();
    for args in [&["train", "--dry-run"][..], &["train"], &["rollout", "--out", &at("out")]] {
        let o = varft(&with_sets(args, &keys));
        let said = stderr(&o);
        assert!(
            o.status.code() == Some(1) && said.contains("this run needs") && said.contains("KV pages 976562.5 GiB"),
            "{said}"
        );
        assert!(
            said.contains("to mend it: set rollout.kv_cache_mib=0 (") && said.contains("on a card of 80 GB"),
            "{said}"
        );
        assert_eq!(stdout(&o).contains("KV pages"), args.contains(&"--dry-run"));
    }
    assert!(!dir.path().join("runs/run/config.toml").exists());
    let keys = [&SMALL[..], &[&path, &runs, "rollout.batch_tokens=9000000000000000000", "run.device=cpu"]].concat();
    let said = stderr(&varft(&with_sets(&["train", "--dry-run"], &keys)));
    assert!(said.contains("to mend it: set rollout.batch_tokens=512 ("), "{said}");
}

#[test]
fn a_dry_run_of_sft_measures_conversations_and_demonstrations() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    std::fs::write(at("talks.jsonl"), TALK.repeat(3)).unwrap();
    let keys = sft_keys(&at("model"), &at("runs"), &at("talks.jsonl"));
    let keys = [&keys.each_ref().map(String::as_str)[..], &["run.device=cpu"]].concat();
    let o = varft(&with_sets(&["sft", "--dry-run"], &keys));
    let said = stdout(&o);
    assert!(o.status.success() && said.contains("tokens of 3 conversations"), "{} {said}", stderr(&o));
    // "b", and the end of the turn.
    assert_eq!(words(&said, "learned from")[2..4], ["2", "on"], "{said}");
    assert!(!said.contains("rollouts") && !said.contains("KV pages"), "{said}");
    let o = varft(&with_sets(&["sft", "--dry-run"], &[&keys[..], &SMALL, &["sft.data="]].concat()));
    let said = stdout(&o);
    assert!(o.status.success() && said.contains("demonstrations"), "{} {said}", stderr(&o));
    assert!(!dir.path().join("runs").exists());
}

#[cfg(emulator)]
#[test]
fn a_dry_run_for_a_card_counts_bf16_and_masters() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let path = format!("model.path={}", at("model"));
    let keys = [&SMALL[..], &[&path, "task.train_items=2"]].concat();
    let o = varft(&with_sets(&["train", "--dry-run", "--device", "emulated"], &keys));
    let said = stdout(&o);
    assert!(o.status.success() && words(&said, "weights").contains(&"bf16,".to_owned()), "{} {said}", stderr(&o));
    assert_eq!(words(&said, "masters")[1..3], words(&said, "gradients")[1..3], "{said}");
    assert!(said.contains("measured now on emulated"), "{said}");
}
