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
    let o = Command::new(env!("CARGO_BIN_EXE_varft"))
        .args(["doctor", "--dir", "/proc/nothing"])
        .env("VARFT_PYTHON", "/no/such/python")
        .output()
        .unwrap();
    assert_eq!(o.status.code(), Some(1), "{}", stdout(&o));
    assert!(stdout(&o).lines().any(|l| l.starts_with("fail  disk") && l.contains("--dir")), "{}", stdout(&o));
    assert!(
        stdout(&o).lines().any(|l| l.starts_with("warn  python") && l.contains("/no/such/python")),
        "{}",
        stdout(&o)
    );
    assert!(stderr(&o).contains("disk"), "{}", stderr(&o));
    let out = stdout(&o);
    for check in ["cores", "simd", "memory", "kernels", "python"] {
        assert!(out.lines().any(|l| l.split_whitespace().nth(1) == Some(check)), "{out}");
    }
}

/// A picture with an edge in it, written as a PNG.
fn picture(path: &Path, width: u32, height: u32) {
    image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8 * 3, y as u8 * 2, if x > y { 250 } else { 5 }]))
        .save(path)
        .unwrap();
}

#[test]
fn inspect_writes_what_the_model_makes_of_a_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    picture(&dir.path().join("a.png"), 84, 56);
    picture(&dir.path().join("b.png"), 56, 56);
    let show = |name: &str| format!(r#"{{"type": "image", "image": "{name}"}}"#);
    let talk = format!(
        r#"[{{"role": "user", "content": [{}, {}, {}, {{"type": "text", "text": "Which?"}}]}}]"#,
        show("a.png"),
        show("b.png"),
        show("a.png")
    );
    std::fs::write(at("talk.json"), talk).unwrap();
    let o = varft(&["inspect", "--model", &at("model"), &at("talk.json"), "--out", &at("out.safetensors")]);
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stdout(&o).contains("3 images"), "{}", stdout(&o));

    let bytes = std::fs::read(at("out.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape = |name: &str| file.tensor(name).unwrap().shape().to_vec();
    let floats = |name: &str| bytemuck::pod_collect_to_vec::<u8, f32>(file.tensor(name).unwrap().data());
    let whole = |name: &str| bytemuck::pod_collect_to_vec::<u8, i64>(file.tensor(name).unwrap().data());
    let ids = whole("input_ids");
    let t = ids.len();
    assert_eq!(shape("position_ids"), [3, 1, t]);
    assert_eq!(shape("logits"), [1, t, 544]);
    assert_eq!(whole("image_grid_thw"), [1, 4, 6, 1, 4, 4, 1, 4, 6]);
    assert_eq!(shape("pixel_values"), [64, 1176]);
    assert_eq!(shape("image_embeds"), [16, 64]);
    // The image that is shown twice is the same both times; the one between is another.
    let embeds = floats("image_embeds");
    assert!(embeds[..6 * 64] == embeds[10 * 64..] && embeds[..64] != embeds[6 * 64..7 * 64]);
    // The log-probabilities are those of the logits, by a plain log-softmax in f64.
    let (logits, log_probs) = (floats("logits"), floats("log_probs"));
    assert_eq!(log_probs.len(), t - 1);
    for (i, lp) in log_probs.iter().enumerate() {
        let row = &logits[i * 544..(i + 1) * 544];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        let want = f64::from(row[ids[i + 1] as usize]) - sum.ln();
        assert!((f64::from(*lp) - want).abs() < 1e-5, "{i}: {lp} {want}");
    }
}

#[test]
fn inspect_names_what_it_cannot_read() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let says = |talk: &str, parts: &[&str]| {
        std::fs::write(at("talk.json"), talk).unwrap();
        let o = varft(&["inspect", "--model", &at("model"), &at("talk.json"), "--out", &at("out")]);
        let e = stderr(&o);
        assert!(o.status.code() == Some(1) && parts.iter().all(|p| e.contains(p)), "{e}");
        assert!(!Path::new(&at("out")).exists());
    };
    says("{", &["talk.json", "list of messages"]);
    says(r#"[{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]"#, &["gone.png"]);
    says(r#"[{"role": "user", "content": [{"type": "image"}]}]"#, &["names no file"]);
    let long = "word ".repeat(4000);
    says(&format!(r#"[{{"role": "user", "content": "{long}"}}]"#), &["talk.json", "context is 4096"]);
    std::fs::remove_file(at("model/tokenizer.json")).unwrap();
    says(r#"[{"role": "user", "content": "x"}]"#, &["tokenizer.json"]);
}
