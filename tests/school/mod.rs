//! A tiny model that has learned a little of the agent's format, so that some of its episodes are rewarded and others not.

use super::setting;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

pub fn varft() -> Command {
    let mut c = Command::new(setting::program());
    c.env_remove("VARFT_NO_INSTALL");
    c
}

pub fn stderr(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

/// Runs a command that must succeed.
pub fn ok(args: &[&str]) -> String {
    let o = varft().args(args).output().unwrap();
    assert!(o.status.success(), "varft {}: {}", args.join(" "), stderr(&o));
    String::from_utf8(o.stdout).unwrap()
}

/// What the runs of these tests have in common: small images, short turns, every kind of turn.
pub const COMMON: [&str; 20] = [
    "task.synthetic.width=[56, 84]",
    "task.synthetic.height=[56, 56]",
    "task.synthetic.content=[\"digits\"]",
    "task.synthetic.digits=[2, 2]",
    "task.synthetic.degradations=[\"rotation180\", \"none\"]",
    "task.synthetic.pairs=0.0",
    "task.eval_items=4",
    "rollout.prompt=brief",
    "rollout.prompts=3",
    "rollout.group_size=4",
    "rollout.max_turns=2",
    "rollout.max_new_tokens=48",
    "rollout.context=1024",
    "rollout.kv_cache_mib=8",
    "rollout.vision_cache_mib=4",
    "model.min_pixels=784",
    "optim.max_grad_norm=0.5",
    "optim.weight_decay=0.01",
    "run.threads=2",
    "run.device=cpu",
];

pub struct School {
    _dir: tempfile::TempDir,
    /// A model folder with random weights.
    pub random: PathBuf,
    /// Conversations, with their pictures beside them.
    pub talks: PathBuf,
    /// The run that taught the model below.
    pub run: PathBuf,
    /// A model folder: the last checkpoint of that run.
    pub model: PathBuf,
}

/// Keys of the run that teaches.
pub const SFT: [&str; 7] = [
    "optim.steps=120",
    "optim.lr=3e-3",
    "optim.warmup_steps=5",
    "optim.schedule=linear",
    "sft.batch_size=4",
    "log.checkpoint_every=10",
    "log.keep_last=1",
];

/// The school, made once for all tests of a file.
pub fn school() -> &'static School {
    static SCHOOL: OnceLock<School> = OnceLock::new();
    SCHOOL.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (random, talks, run) = (at("random"), at("talks.jsonl"), at("runs/school"));
        ok(&["init", "tiny", text(&random), "--seed", "5"]);
        write_talks(&talks);
        let args = sft_args(&random, &talks, &run);
        ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let model = run.join("checkpoints/step-120");
        School { _dir: dir, random, talks, run, model }
    })
}

/// Conversations about pictures of all sorts, in the two ways to go about it: answer at once, or repair and then answer.
/// There is nothing to be learned from the pictures but the form.
fn write_talks(path: &Path) {
    const TALKS: u32 = 32;
    let mut lines = String::new();
    for i in 0..TALKS {
        let noise = |n: u32| (i * 8 + n).wrapping_mul(0x9E37_79B9).rotate_right(11).wrapping_mul(0x85EB_CA6B) >> 24;
        let colour = |n: u32| image::Rgb([0, 1, 2].map(|c| noise(n + c) as u8));
        let (front, back, period) = (colour(0), colour(3), 5 + noise(6) % 35);
        let pattern = |x: u32, y: u32| if (x / 7 * 31 + y / 7 * 17) % period < 3 { front } else { back };
        let picture = image::RgbImage::from_fn(if i % 3 == 0 { 56 } else { 84 }, 56, pattern);
        picture.save(path.with_file_name(format!("{i}.png"))).unwrap();
        let shown = |i: u32| serde_json::json!({"type": "image", "image": format!("{}.png", i % TALKS)});
        let question = serde_json::json!({"type": "text", "text": "What number is written in the image?"});
        let mut talk = vec![
            serde_json::json!({"role": "system", "content": "Repair the image, then answer."}),
            serde_json::json!({"role": "user", "content": [shown(i), question]}),
        ];
        if i % 2 == 1 {
            let code = "<code>```python\nimage = image[::-1]\n```</code>";
            talk.push(serde_json::json!({"role": "assistant", "content": code}));
            talk.push(serde_json::json!({"role": "user", "content": [shown(i * 7 + 3)]}));
        }
        let answer = format!("<answer>{}</answer>", 10 + 37 * i % 90);
        talk.push(serde_json::json!({"role": "assistant", "content": answer}));
        lines += &format!("{}\n", serde_json::Value::Array(talk));
    }
    std::fs::write(path, lines).unwrap();
}

/// The command that teaches the model in `from`, as the run `run`.
pub fn sft_args(from: &Path, talks: &Path, run: &Path) -> Vec<String> {
    let own = [format!("model.path={}", text(from)), format!("sft.data={}", text(talks))];
    let keys = own.into_iter().chain(run_keys(run)).chain(COMMON.iter().chain(&SFT).map(|k| k.to_string()));
    ["sft".to_string()].into_iter().chain(keys.flat_map(|k| ["--set".into(), k])).collect()
}

/// Keys that say where a run lies.
pub fn run_keys(run: &Path) -> [String; 2] {
    let name = run.file_name().unwrap().to_str().unwrap();
    [format!("run.dir={}", text(run.parent().unwrap())), format!("run.name={name}")]
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
