//! `varft rollout` and `varft eval`.

use super::{SMALL, interrupted, lines, signalled, stderr, stdout, varft, with_sets};
use std::path::Path;
use std::process::Output;

#[test]
fn rollout_writes_episodes_token_by_token() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (model, out) = (at("model"), at("out"));
    let args = ["rollout", "--model", &model, "--out", &out, "--items", "2", "--samples", "2"];
    let o = varft(&with_sets(&args, &SMALL));
    assert!(o.status.success() && stdout(&o).contains("4 episodes"), "{} {}", stdout(&o), stderr(&o));
    let episodes = lines(&at("out/episodes.jsonl"));
    assert_eq!(episodes.len(), 4);
    for e in &episodes {
        let n = e["tokens"].as_array().unwrap().len();
        let logprobs = e["logprobs"].as_array().unwrap();
        assert_eq!(logprobs.len(), n);
        let mut end = 0;
        for span in e["spans"].as_array().unwrap() {
            let (from, to) = (span[1].as_u64().unwrap() as usize, span[2].as_u64().unwrap() as usize);
            assert_eq!(from, end);
            end = to;
            let wrote = span[0] == "policy";
            assert!(logprobs[from..to].iter().all(|l| (l.as_f64().unwrap() < 0.0) == wrote), "{e}");
        }
        assert_eq!((end, e["spans"][0][0].as_str()), (n, Some("prompt")));
        for image in e["images"].as_array().unwrap() {
            let png = image::open(dir.path().join("out").join(image["file"].as_str().unwrap())).unwrap();
            let grid = image["grid_thw"].as_array().unwrap();
            assert_eq!(u64::from(png.height()), 14 * grid[1].as_u64().unwrap());
            assert_eq!(u64::from(png.width()), 14 * grid[2].as_u64().unwrap());
        }
    }
    assert!(episodes[0]["tokens"] != episodes[1]["tokens"] && episodes[0]["item"] == episodes[1]["item"]);
    assert!(Path::new(&at("out/report.html")).is_file());
    // The same again is the same, and does not overwrite.
    let again = varft(&with_sets(&args, &SMALL));
    assert!(again.status.code() == Some(1) && stderr(&again).contains("--out"), "{}", stderr(&again));
    let elsewhere = at("again");
    let args = ["rollout", "--model", &model, "--out", &elsewhere, "--items", "2", "--samples", "2"];
    let one = [&SMALL[..], &["rollout.concurrency=1", "run.threads=1"]].concat();
    assert!(varft(&with_sets(&args, &one)).status.success());
    assert_eq!(lines(&at("again/episodes.jsonl")), episodes);
}

#[test]
fn eval_scores_rows_of_a_file_and_writes_results_as_the_published_evaluation_does() {
    use varft::tasks::synthetic::{Config, Subset, Synthetic};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let rows = Synthetic::new(Config::default(), 1).unwrap().write_dataset(at("data"), Subset::HeldOut, 3).unwrap();
    let (model, out, mat, images) = (at("model"), at("out"), at("data/synthetic.json"), at("data/images"));
    let args = ["eval", "--model", &model, "--out", &out, "--mat", &mat, "--images", &images];
    let o = varft(&with_sets(&args, &SMALL));
    assert!(o.status.success(), "{}", stderr(&o));
    let all = stdout(&o).lines().find(|l| l.starts_with("all ")).unwrap().to_string();
    assert_eq!(all.split_whitespace().nth(1), Some("3"), "{all}");
    let results: Vec<serde_json::Value> =
        serde_json::from_str(&std::fs::read_to_string(at("out/results.json")).unwrap()).unwrap();
    assert_eq!(results.len(), 3);
    for (result, row) in results.iter().zip(&rows) {
        let keys: Vec<_> = result.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["id", "pred_answer", "gt", "query"]);
        assert!(result["pred_answer"].is_null() || result["pred_answer"].is_string());
        assert_eq!((&result["id"], &result["query"]), (&row.id.into(), &row.question.clone().into()));
        assert_eq!(result["gt"], serde_json::json!(row.answers));
    }
    assert!(Path::new(&at("out/report.html")).is_file());
    let (gone, elsewhere) = (at("gone.json"), at("elsewhere"));
    let o = varft(&["eval", "--model", &model, "--out", &elsewhere, "--mat", &gone]);
    assert!(o.status.code() == Some(1) && stderr(&o).contains("gone.json"), "{}", stderr(&o));
}

#[test]
fn a_rollout_that_is_killed_keeps_its_episodes_and_an_empty_file_is_no_result() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (model, out) = (at("model"), at("out"));
    let args = ["rollout", "--model", &model, "--out", &out, "--items", "1000"];
    let o = signalled(&with_sets(&args, &SMALL), "rollout 1/1000", libc::SIGKILL);
    assert!(o.status.code().is_none() && !lines(&at("out/episodes.jsonl")).is_empty(), "{}", stderr(&o));
    let args = ["rollout", "--model", &model, "--out", &out, "--items", "1"];
    let again = varft(&with_sets(&args, &SMALL));
    assert!(again.status.code() == Some(1) && stderr(&again).contains("results in this folder"), "{}", stderr(&again));
    std::fs::write(at("out/episodes.jsonl"), "").unwrap();
    let again = varft(&with_sets(&args, &SMALL));
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(lines(&at("out/episodes.jsonl")).len(), 1);
}

#[test]
fn ctrl_c_keeps_the_episodes_that_are_complete() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (model, out) = (at("model"), at("eval"));
    let long = [&SMALL[..], &["task.eval_items=3000", "rollout.max_new_tokens=100", "rollout.concurrency=4"]].concat();
    // What it says of itself at the end: so many of so many.
    let complete = |o: &Output, all: &str| -> usize {
        let said = stderr(o);
        assert_eq!(o.status.code(), Some(1), "{said}");
        let line =
            said.lines().find(|l| l.starts_with("error: cancelled: stopped: ")).unwrap_or_else(|| panic!("{said}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[4..6], ["of", all], "{line}");
        words[3].parse().unwrap()
    };
    let o = interrupted(&with_sets(&["eval", "--model", &model, "--out", &out], &long), "eval 1/3000");
    let n = complete(&o, "3000");
    assert!((1..3000).contains(&n), "{n}");
    let results: Vec<serde_json::Value> =
        serde_json::from_str(&std::fs::read_to_string(at("eval/results.json")).unwrap()).unwrap();
    assert_eq!(results.len(), n);
    let all = stdout(&o).lines().find(|l| l.starts_with("all ")).unwrap().to_string();
    assert_eq!(all.split_whitespace().nth(1), Some(n.to_string().as_str()), "{all}");
    assert!(
        lines(&at("eval/trajectories/eval-000000.jsonl")).len() == n && Path::new(&at("eval/report.html")).is_file()
    );

    let out = at("rollout");
    let args = ["rollout", "--model", &model, "--out", &out, "--items", "1000", "--samples", "3"];
    let o = interrupted(&with_sets(&args, &long), "rollout 1/3000");
    let n = complete(&o, "3000");
    assert!((1..3000).contains(&n), "{n}");
    assert_eq!(lines(&at("rollout/episodes.jsonl")).len(), n);
    assert!(stdout(&o).contains(&format!("{n} episodes")) && Path::new(&at("rollout/report.html")).is_file());
}
