//! `--device`, of every command that runs a model.

use super::training::{TALK, sft_keys};
use super::{stderr, stdout, varft, with_sets};
use varft::device::usable_card;

/// The line that says what `auto` came to.
fn chosen(said: &str) -> String {
    let lines: Vec<&str> = said.lines().filter(|l| l.starts_with("device: ")).collect();
    let [line] = lines[..] else { panic!("one line about the device: {said}") };
    line.to_owned()
}

#[test]
fn every_command_that_runs_a_model_takes_a_device() {
    for command in ["quickstart", "sft", "train", "rollout", "eval", "chat", "inspect"] {
        let help = stdout(&varft(&[command, "--help"]));
        let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains("--device <DEVICE>") && words.contains("auto, cpu, cuda, emulated"), "{help}");
        let o = varft(&[command, "--device", "tpu"]);
        assert!(o.status.code() == Some(2) && stderr(&o).contains("emulated"), "{}", stderr(&o));
    }
}

#[test]
fn the_device_is_chosen_by_what_there_is_and_a_run_keeps_the_one_that_it_began_on() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    std::fs::write(at("talks.jsonl"), TALK).unwrap();
    let keys = sft_keys(&at("model"), &at(""), &at("talks.jsonl"));
    let keys = keys.each_ref().map(String::as_str);
    let written = || std::fs::read_to_string(at("run/config.toml")).unwrap();
    let device = |name: &str| written().contains(&format!("device = \"{name}\""));

    let o = varft(&with_sets(&["sft"], &keys));
    assert!(o.status.success(), "{}", stderr(&o));
    let line = chosen(&stderr(&o));
    let there = if usable_card(0).is_ok() { "cuda" } else { "cpu" };
    assert!(line.contains(there) && device(there), "{line}\n{}", written());

    // One that is named is not talked about; and the flag holds against the key.
    std::fs::remove_dir_all(at("run")).unwrap();
    let o = varft(&with_sets(&["sft", "--device", "cpu"], &[&keys[..], &["run.device=emulated"]].concat()));
    assert!(o.status.success() && !stderr(&o).contains("device: ") && device("cpu"), "{}", stderr(&o));
    // What would be another run is refused; what the run has is kept.
    let more = [&keys[..], &["optim.steps=3"]].concat();
    let o = varft(&with_sets(&["sft", "--resume", "--device", "emulated"], &more));
    assert!(o.status.code() == Some(1) && stderr(&o).contains("run.device: \"cpu\" before"), "{}", stderr(&o));
    let o = varft(&with_sets(&["sft", "--resume", "--device", "auto"], &more));
    assert!(o.status.success() && !stderr(&o).contains("device: ") && device("cpu"), "{}", stderr(&o));

    if there == "cpu" {
        for args in [&["chat", &at("model")][..], &["sft", "--set", "run.name=b"]] {
            let o =
                varft(&with_sets(&[args, &["--device", "cuda"]].concat(), if args[0] == "sft" { &keys } else { &[] }));
            assert!(o.status.code() == Some(1) && stderr(&o).contains("--device cpu"), "{}", stderr(&o));
        }
    }
}

#[cfg(emulator)]
#[test]
fn what_the_kernels_make_of_a_conversation_is_near_what_the_processor_does() {
    use super::{SMALL, picture};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    picture(&dir.path().join("a.png"), 56, 56);
    let talk =
        r#"[{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which?"}]}]"#;
    std::fs::write(at("talk.json"), talk).unwrap();
    let inspected = |device: &str| {
        let (model, talk, out) = (at("model"), at("talk.json"), at(device));
        let o = varft(&["inspect", "--model", &model, &talk, "--out", &out, "--device", device]);
        assert!(o.status.success(), "{}", stderr(&o));
        let bytes = std::fs::read(at(device)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        ["logits", "image_embeds"].map(|n| bytemuck::pod_collect_to_vec::<u8, f32>(file.tensor(n).unwrap().data()))
    };
    for (exact, got) in inspected("cpu").iter().zip(&inspected("emulated")) {
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let off = norm(&mut exact.iter().zip(got).map(|(a, b)| a - b));
        let all = norm(&mut exact.iter().copied());
        // bf16 keeps eight bits, and what it loses adds up over the layers; and it is not the same.
        assert!(off > 0.0 && off < 0.05 * all, "{off} of {all}");
    }
    let said =
        super::chat::chat(&[&at("model"), "--max-tokens", "2", "--context", "64", "--device", "emulated"], "a\n");
    assert!(said.status.success(), "{}", stderr(&said));
    let args = ["rollout", "--model", &at("model"), "--out", &at("out"), "--items", "1", "--device", "emulated"];
    let o = varft(&with_sets(&args, &[&SMALL[..], &["rollout.max_new_tokens=2", "rollout.max_turns=1"]].concat()));
    assert!(o.status.success() && stdout(&o).contains("1 episodes"), "{}", stderr(&o));
}
