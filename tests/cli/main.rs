//! The binary, as a person at a terminal meets it.

mod agent;
mod chat;
mod device;
mod doctor;
mod dry;
mod episodes;
mod first_run;
mod folders;
mod inspect;
mod quickstart;
mod training;

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
    assert!(
        ["quickstart", "init", "sft", "train", "rollout", "eval", "chat", "inspect", "report", "doctor"]
            .iter()
            .all(|c| all.contains(&c.to_string())),
        "{all:?}"
    );
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

/// A picture with an edge in it, written as a PNG.
fn picture(path: &Path, width: u32, height: u32) {
    image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8 * 3, y as u8 * 2, if x > y { 250 } else { 5 }]))
        .save(path)
        .unwrap();
}

/// Keys that make the synthetic task and its episodes small.
const SMALL: [&str; 13] = [
    "task.synthetic.content=[\"digits\"]",
    "task.synthetic.digits=[2, 2]",
    "task.synthetic.pairs=0.0",
    "task.synthetic.degradations=[\"dark\", \"none\"]",
    "task.synthetic.width=[56, 84]",
    "task.synthetic.height=[56, 56]",
    "task.eval_items=3",
    "rollout.prompt=brief",
    "rollout.max_turns=2",
    "rollout.max_new_tokens=12",
    "rollout.kv_cache_mib=8",
    "rollout.vision_cache_mib=4",
    "model.min_pixels=784",
];

fn with_sets<'a>(args: &[&'a str], keys: &[&'a str]) -> Vec<&'a str> {
    args.iter().copied().chain(keys.iter().flat_map(|k| ["--set", k])).collect()
}

fn lines(path: &str) -> Vec<serde_json::Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (model, out) = (at("gone"), at("out"));
    for (flag, n) in [("--items", "18446744073709551615"), ("--items", "0"), ("--samples", "65537"), ("--samples", "0")]
    {
        let o = varft(&["rollout", "--model", &model, "--out", &out, flag, n]);
        assert!(o.status.code() == Some(2) && stderr(&o).contains(flag), "{}", stderr(&o));
    }
    let path = format!("model.path={model}");
    let train = format!("run.dir={out}");
    for command in [
        &["rollout", "--model", &model, "--out", &out, "--items", "4294967296"][..],
        &["eval", "--model", &model, "--out", &out],
        &["train", "--set", &path, "--set", &train],
        &["chat", &model],
        &["inspect", "--model", &model, "talk.json", "--out", &out],
    ] {
        let o = varft(command);
        let said = stderr(&o);
        assert!(o.status.code() == Some(1) && said.contains("gone: there is no such folder"), "{said}");
    }
    assert!(!Path::new(&out).exists());
}

/// Runs a command and interrupts it as Ctrl-C does once a line of what it says begins with `sign`.
fn interrupted(args: &[&str], sign: &str) -> Output {
    signalled(args, sign, libc::SIGINT)
}

/// [`interrupted`] by another signal.
fn signalled(args: &[&str], sign: &str, signal: i32) -> Output {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;
    let mut command = Command::new(env!("CARGO_BIN_EXE_varft"));
    let mut child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut listening = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.lines().any(|l| l.starts_with(sign)) {
        assert_ne!(listening.read_line(&mut said).unwrap(), 0, "{said}");
    }
    // SAFETY: our own child, which has not been waited for.
    unsafe { libc::kill(child.id() as i32, signal) };
    listening.read_to_string(&mut said).unwrap();
    Output { stderr: said.into_bytes(), ..child.wait_with_output().unwrap() }
}
