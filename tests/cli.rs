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
    let empty = tempfile::tempdir().unwrap();
    let o = Command::new(env!("CARGO_BIN_EXE_varft"))
        .args(["doctor", "--dir", "/proc/nothing"])
        .env("XDG_CACHE_HOME", empty.path())
        .env_remove("VARFT_PYTHON")
        .env_remove("VARFT_NO_INSTALL")
        .env_remove("VIRTUAL_ENV")
        .output()
        .unwrap();
    let out = stdout(&o);
    let python = out.lines().find(|l| l.starts_with("warn  python")).unwrap_or_else(|| panic!("{out}"));
    assert!(python.contains("varft doctor --install") && !python.contains("VARFT_NO_INSTALL"), "{python}");
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
fn the_folder_of_a_run_stands_for_the_model_that_it_trained() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let talk = "[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]\n";
    std::fs::write(at("talks.jsonl"), talk).unwrap();
    let keys = [
        format!("model.path={}", at("model")),
        format!("run.dir={}", at("")),
        format!("sft.data={}", at("talks.jsonl")),
        "optim.lr=0.01".into(),
        "optim.steps=2".into(),
        "sft.batch_size=1".into(),
    ];
    let o = varft(&with_sets(&["sft"], &keys.each_ref().map(String::as_str)));
    assert!(o.status.success(), "{}", stderr(&o));
    let (run, newest) = (at("run"), at("run/checkpoints/step-2"));
    std::fs::write(at("talk.json"), r#"[{"role": "user", "content": "x"}]"#).unwrap();
    let inspected = |model: &str| {
        let o = varft(&["inspect", "--model", model, &at("talk.json"), "--out", &at("out")]);
        assert!(o.status.success(), "{}", stderr(&o));
        std::fs::read(at("out")).unwrap()
    };
    let trained = inspected(&newest);
    assert!(inspected(&run) == trained && inspected(&at("model")) != trained);
    let said = |model: &str| {
        let o = chat(&[model, "--max-tokens", "8", "--context", "256"], "hello\n");
        assert!(o.status.success(), "{}", stderr(&o));
        stdout(&o)
    };
    assert_eq!(said(&run), said(&newest));
    // Before its first checkpoint a run's model is the one that it began with.
    std::fs::remove_dir_all(at("run/checkpoints")).unwrap();
    assert!(inspected(&run) == inspected(&at("model")));
    std::fs::remove_dir_all(at("model")).unwrap();
    let o = chat(&[&run], "hello\n");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("no such folder"), "{}", stderr(&o));
}

#[test]
fn a_question_that_cannot_fit_is_named_before_anything_is_asked() {
    use varft::tasks::synthetic::{Config, Subset, Synthetic};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    Synthetic::new(Config::default(), 1).unwrap().write_dataset(at("data"), Subset::Train, 6).unwrap();
    let file = at("data/synthetic.json");
    let mut rows: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    for row in [2, 4] {
        rows[row]["question"] = "Why? ".repeat(400).into();
    }
    std::fs::write(&file, serde_json::to_string(&rows).unwrap()).unwrap();
    let (model, out) = (at("model"), at("out"));
    let keys = [
        "task.kind=mat",
        &format!("task.train={file}"),
        &format!("task.eval={file}"),
        &format!("task.images={}", at("data/images")),
        "rollout.context=700",
    ];
    let keys = [&SMALL[..], &keys].concat();
    let told = |args: &[&str], parts: &[&str]| {
        let o = varft(&with_sets(args, &keys));
        let said = stderr(&o);
        assert!(o.status.code() == Some(1) && parts.iter().all(|p| said.contains(p)), "{said}");
        assert!(!said.contains("EngineOptions") && said.contains("rollout.context"), "{said}");
    };
    let row = "synthetic.json: row 2 (id 2): the prompt has";
    told(&["rollout", "--model", &model, "--out", &out, "--items", "5"], &[row, "and one more item"]);
    told(&["eval", "--model", &model, "--out", &out], &["item 2: the prompt has"]);
    let (path, runs) = (format!("model.path={model}"), format!("run.dir={}", at("runs")));
    told(&["train", "--set", &path, "--set", &runs], &[row, "and one more item"]);
    assert!(!Path::new(&at("runs/run/config.toml")).exists());
    // What is not asked need not fit.
    let o = varft(&with_sets(&["rollout", "--model", &model, "--out", &out, "--items", "2"], &keys));
    assert!(o.status.success(), "{}", stderr(&o));
    // Made questions are measured without being made.
    let keys = [&SMALL[..], &["rollout.context=40", "rollout.max_new_tokens=8", "task.train_items=100000"]].concat();
    let o = varft(&with_sets(&["train", "--set", &path, "--set", &runs], &keys));
    let said = stderr(&o);
    assert!(
        o.status.code() == Some(1) && said.contains("item 0 of the synthetic task") && said.contains("99999 more"),
        "{said}"
    );
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
    let o = varft(&["inspect", "--model", &at("model"), &at("talk.json"), "--out", &at("model/../talk.json")]);
    assert!(o.status.code() == Some(1) && stderr(&o).contains("overwrite the conversation"), "{}", stderr(&o));
    std::fs::remove_file(at("model/tokenizer.json")).unwrap();
    says(r#"[{"role": "user", "content": "x"}]"#, &["tokenizer.json"]);
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
    let resume =
        said.lines().find_map(|l| l.trim().strip_prefix("to go on: varft ")).unwrap_or_else(|| panic!("{said}"));
    let o = varft(&resume.split(' ').collect::<Vec<_>>());
    assert!(o.status.success(), "{}", stderr(&o));
    let last = lines(&format!("{run}/metrics.jsonl")).pop().unwrap();
    assert_eq!(last["step"], 12, "{last}");
    // And it can be read, and changed, as a run file.
    let out = dir.path().join("eval").to_str().unwrap().to_string();
    let o = varft(&["eval", &run, "--out", &out]);
    assert!(o.status.success(), "{}", stderr(&o));
}

/// Talks to a model through a pipe.
fn chat(args: &[&str], said: &str) -> Output {
    use std::io::Write;
    use std::process::Stdio;
    let mut child = Command::new(env!("CARGO_BIN_EXE_varft"))
        .arg("chat")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A chat that refused to begin does not listen.
    let _ = child.stdin.take().unwrap().write_all(said.as_bytes());
    child.wait_with_output().unwrap()
}

#[test]
fn chat_answers_through_a_pipe_and_remembers_until_it_is_reset() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (model, photo) = (at("model"), at("a.png"));
    assert!(varft(&["init", "tiny", &model]).status.success());
    picture(Path::new(&photo), 84, 56);
    let args = [&model[..], "--max-tokens", "8", "--context", "1024"];
    let o = chat(&args, "hello\n\nhello\n/reset\nhello\n");
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stderr(&o).contains("--max-tokens") || stdout(&o).lines().count() == 3, "{}", stderr(&o));
    // Greedy: the first reply and the one after a reset are the same text.
    let whole = stdout(&o);
    let first = stdout(&chat(&args, "hello\n"));
    assert!(
        whole.starts_with(&first) && whole.ends_with(&first) && whole.len() > 2 * first.len(),
        "{whole:?} {first:?}"
    );
    // An image is shown either way; one that is not there is named.
    let seen = chat(&[&args[..], &["--image", &photo]].concat(), "hello\n");
    assert!(seen.status.success(), "{}", stderr(&seen));
    assert_eq!(stdout(&chat(&args, &format!("/image {photo}\nhello\n"))), stdout(&seen));
    let o = chat(&args, "/image\nhello\n");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("/image FILE"), "{}", stderr(&o));
    let o = chat(&args, "/image gone.png\nhello\n");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("gone.png"), "{}", stderr(&o));
    let o = chat(&[&args[..], &["--context", "32"]].concat(), "hello\n");
    assert_eq!(o.status.code(), Some(2), "given twice");
    for (context, hint) in [("32", "--context"), ("1000000", "all that the model takes")] {
        let o = chat(&[&model, "--context", context], &"hello ".repeat(5000));
        let said = stderr(&o);
        assert!(o.status.code() == Some(1) && said.contains(hint) && said.contains("/reset"), "{said}");
        assert!(!said.contains("EngineOptions"), "{said}");
    }
    assert_eq!(chat(&[&model, "--context", "1"], "").status.code(), Some(2));
}

#[test]
fn sft_names_the_line_that_it_cannot_learn_from() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let (model, runs, data) = (
        format!("model.path={}", at("model")),
        format!("run.dir={}", at("runs")),
        format!("sft.data={}", at("talks.jsonl")),
    );
    let said = |talks: &str| {
        std::fs::write(at("talks.jsonl"), talks).unwrap();
        let o = varft(&with_sets(&["sft"], &[&model, &runs, &data, "optim.steps=1", "sft.batch_size=1"]));
        assert_eq!(o.status.code(), Some(1));
        stderr(&o)
    };
    let e = said("\n[{\"role\": \"user\", \"content\": \"a\"}]\n");
    assert!(e.contains("talks.jsonl, line 2") && e.contains("nothing to learn"), "{e}");
    let long = "word ".repeat(4000);
    let talk = |said: &str| {
        format!("[{{\"role\":\"user\",\"content\":\"{said}\"}},{{\"role\":\"assistant\",\"content\":\"b\"}}]\n")
    };
    let e = said(&talk(&long));
    assert!(e.contains("talks.jsonl, line 1") && e.contains("context is 4096"), "{e}");
    std::fs::remove_dir_all(at("runs")).unwrap();
    let image = "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]},{\"role\":\"assistant\",\"content\":\"b\"}],\"images\":[\"gone.png\"]}";
    let e = said(image);
    assert!(e.contains("gone.png"), "{e}");
}
