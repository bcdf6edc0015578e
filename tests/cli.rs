//! The binary, as a person at a terminal meets it.

use std::path::Path;
use std::process::{Command, Output};

fn varft(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_varft")).args(args).output().unwrap()
}

fn stdout(o: &Output) -> String {
    String::from_utf8(o.stdout.clone()).unwrap()
}

fn stderr(o: &Output) -> String {
    String::from_utf8(o.stderr.clone()).unwrap()
}

/// The commands as the binary lists them.
fn commands() -> Vec<String> {
    let help = stdout(&varft(&["--help"]));
    let list = help.split("Commands:").nth(1).unwrap().split("\n\n").next().unwrap();
    // A command's line is indented by two; continued descriptions by more.
    let lines = list.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   "));
    lines.filter_map(|l| l.split_whitespace().next()).filter(|c| *c != "help").map(str::to_string).collect()
}

#[test]
fn every_command_explains_itself_with_an_example() {
    let all = commands();
    assert!(["init", "report", "doctor"].iter().all(|c| all.contains(&c.to_string())), "{all:?}");
    for command in all {
        let o = varft(&[&command, "--help"]);
        let help = stdout(&o);
        assert!(o.status.success() && help.contains(&format!("Example:\n  varft {command}")), "{help}");
    }
}

#[test]
fn a_wrong_command_line_is_refused_with_a_hint() {
    let o = varft(&["reprot"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("report"), "{}", stderr(&o));
    let o = varft(&["init", "huge", "x"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("tiny, mid, 3b, 7b"), "{}", stderr(&o));
}

#[test]
fn init_writes_a_model_that_loads_and_does_not_overwrite_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny");
    let at = path.to_str().unwrap();
    let o = varft(&["init", "tiny", at, "--seed", "3"]);
    assert!(o.status.success(), "{}", stderr(&o));
    let device = varft::device::Device::cpu(1);
    let model = varft::model::Model::load(&path, &device, &Default::default()).unwrap();
    let tokenizer = varft::input::Tokenizer::load(&path).unwrap();
    assert_eq!(tokenizer.special().image_pad, model.config.tokens.image);
    assert!(tokenizer.vocab_size() <= model.config.vocab_size);

    let weights = std::fs::read(path.join("model.safetensors")).unwrap();
    let again = varft(&["init", "tiny", at, "--seed", "4"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("--force"), "{}", stderr(&again));
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights);
    assert!(varft(&["init", "tiny", at, "--seed", "4", "--force"]).status.success());
    assert_ne!(std::fs::read(path.join("model.safetensors")).unwrap(), weights);
}

#[test]
fn report_names_what_it_wrote_or_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap();
    let o = varft(&["report", at]);
    assert_eq!(o.status.code(), Some(1));
    assert!(stderr(&o).starts_with("error: ") && stderr(&o).contains(at), "{}", stderr(&o));
    std::fs::write(dir.path().join("metrics.jsonl"), "{\"step\":1,\"wall_s\":2.0,\"loss\":0.5}\n").unwrap();
    let o = varft(&["report", at]);
    assert!(o.status.success() && Path::new(stdout(&o).trim()).is_file(), "{}", stderr(&o));
}

#[test]
fn doctor_says_where_it_hurts() {
    let o = varft(&["doctor", "--dir", "/proc/nothing"]);
    assert_eq!(o.status.code(), Some(1), "{}", stdout(&o));
    assert!(stdout(&o).lines().any(|l| l.starts_with("fail  disk") && l.contains("--dir")), "{}", stdout(&o));
    assert!(stderr(&o).contains("disk"), "{}", stderr(&o));
    let out = stdout(&o);
    for check in ["cores", "simd", "memory", "kernels"] {
        assert!(out.lines().any(|l| l.split_whitespace().nth(1) == Some(check)), "{out}");
    }
}
