//! `varft chat` with what a run has trained, through a pipe.

use super::chat::chat;
use super::{stderr, stdout, varft};
use std::path::Path;
use std::process::Command;

/// What was said between the lines in brackets that begin with `from` and with `to`.
fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let rest = text.split_once(from).unwrap_or_else(|| panic!("{from}: {text}")).1;
    rest.split_once(to).unwrap_or_else(|| panic!("{to}: {text}")).0.split_once('\n').unwrap().1
}

#[test]
fn a_run_is_talked_to_as_the_agent_that_it_trained() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let run = at("a run");
    let small = ["optim.steps=1", "task.eval_items=3", "rollout.prompts=2", "rollout.group_size=2"];
    let sets = small.iter().flat_map(|k| ["--set", k]);
    let o = varft(&["quickstart", "--out", &run].into_iter().chain(sets).collect::<Vec<_>>());
    assert!(o.status.success(), "{}", stderr(&o));

    // What it says last can be pasted, and asks what the run was measured on.
    let command = stdout(&o).lines().find_map(|l| l.strip_prefix("talk to it  ").map(str::to_owned)).unwrap();
    let command = command.split("   (").next().unwrap();
    let pasted = Command::new("sh").args(["-c", &format!("echo /example | {command}")]).output().unwrap();
    assert!(pasted.status.success(), "{}", stderr(&pasted));
    let measured = std::fs::read_to_string(Path::new(&run).join("trajectories/eval-000001.jsonl")).unwrap();
    let measured: Vec<serde_json::Value> = measured.lines().map(|l| serde_json::from_str(l).unwrap()).collect();

    let out = at("album");
    let o = chat(&[&run, "--out", &out], "/example\n/example\n");
    assert!(o.status.success(), "{}", stderr(&o));
    let said = stdout(&o);
    let [first, second] = said.split_inclusive("[right: ").collect::<Vec<_>>()[..2] else { panic!("{said}") };
    for (said, episode, image) in [(first, &measured[0], 1), (second, &measured[1], 3)] {
        let turns = episode["steps"].as_array().unwrap();
        assert_eq!(turns.len(), 2, "{episode}");
        for turn in turns {
            assert!(said.contains(turn["text"].as_str().unwrap()), "{said} {turn}");
        }
        let made = format!("{out}/{}.png]", image + 1);
        assert!(said.contains("[python: ok, ") && said.contains(&format!("the image now: {made}")), "{said}");
        for (file, hash) in [(image, &turns[0]["image_before"]), (image + 1, &turns[0]["image_after"])] {
            let kept = format!("{run}/trajectories/images/{}.png", hash.as_str().unwrap());
            assert_eq!(image::open(format!("{out}/{file}.png")).unwrap(), image::open(kept).unwrap());
        }
    }
    assert!(stdout(&pasted).contains(measured[0]["steps"][1]["text"].as_str().unwrap()), "{}", stdout(&pasted));

    // An image of one's own; what is wrong with a line does not end the conversation.
    let question = measured[0]["question"].as_str().unwrap();
    let lines = format!("{question}\n/image gone.png\n/immage x\n/image {out}/1.png\n{question}\n{question}\n");
    let o = chat(&[&run, "--out", &at("another")], &lines);
    let told = stderr(&o);
    assert_eq!(o.status.code(), Some(1), "{told}");
    for part in ["there is no image yet", "gone.png", "/immage: there is no such command", "3 lines of standard input"]
    {
        assert!(told.contains(part), "{told}");
    }
    let answered = measured[0]["steps"][1]["text"].as_str().unwrap();
    assert_eq!(stdout(&o).matches(answered).count(), 2, "each question is an episode of its own: {}", stdout(&o));
    assert!(stdout(&o).starts_with(between(first, "[image: ", "[python")), "{} {first}", stdout(&o));

    // A checkpoint is one of its run; a bare model is not asked for an image.
    let checkpoint = format!("{run}/checkpoints/step-1");
    let o = chat(&[&checkpoint, "--out", &at("third")], "/example\n");
    assert_eq!(stdout(&o).matches(answered).count(), 1, "{} {}", stdout(&o), stderr(&o));
    let plain = chat(&[&run, "--plain", "--max-tokens", "8"], "hello\n");
    assert!(plain.status.success() && !stdout(&plain).is_empty(), "{}", stderr(&plain));
    let o = chat(&[&run, "--plain"], "/example\n");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("without --plain"), "{}", stderr(&o));
    for (args, part) in [(&["--system", "x"][..], "--plain"), (&["--image", "a", "--image", "b"], "one image")] {
        let o = chat(&[&[&run[..]], args].concat(), "");
        assert!(o.status.code() == Some(1) && stderr(&o).contains(part), "{}", stderr(&o));
    }
}

#[test]
fn flags_are_checked_though_nothing_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model").to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &model]).status.success());
    for (flag, value, part) in [
        ("--temperature", "-1", "at least 0"),
        ("--temperature", "warm", "at least 0"),
        ("--temperature", "inf", "at least 0"),
        ("--top-p", "-0.5", "above 0"),
        ("--top-p", "0", "above 0"),
        ("--top-p", "1.5", "at most 1"),
        ("--max-tokens", "0", "--max-tokens"),
        ("--context", "1", "--context"),
    ] {
        let o = chat(&[&model, flag, value], "");
        assert!(o.status.code() == Some(2) && stderr(&o).contains(part), "{flag} {value}: {}", stderr(&o));
    }
    let o = chat(&[&model, "--image", "gone.png"], "");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("gone.png"), "{}", stderr(&o));
    let o = chat(&[&model, "--temperature", "0.5"], "/help\n");
    assert!(o.status.success() && stderr(&o).contains("/image FILE"), "{}", stderr(&o));
}
