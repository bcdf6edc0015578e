//! docs/configuration.md is what the source says of the run file: every key, its type, its default and its meaning.

use std::fmt::Write;
use std::path::Path;
use varft::train::RunConfig;

/// Which commands a key matters to, by the longest of these that it begins with. `sft`: with the synthetic task's demonstrations
/// in place of `sft.data`, where that makes a difference.
const USED_BY: [(&str, &str); 32] = [
    ("run.name", "sft, train"),
    ("run.dir", "sft, train"),
    ("run.seed", "sft, train, rollout, eval"),
    ("run.device", "sft, train, rollout, eval"),
    ("run.threads", "sft, train, rollout, eval"),
    ("model.path", "sft, train, rollout, eval"),
    ("model.freeze_vision", "sft, train"),
    ("model.m", "sft, train, rollout, eval, chat (of a run's folder)"),
    ("task.kind", "sft (demonstrations), train, rollout, eval"),
    ("task.train", "train, rollout"),
    ("task.train_items", "sft (demonstrations), train, rollout"),
    ("task.eval", "train, eval, rollout --held-out"),
    ("task.images", "train, rollout, eval"),
    ("task.seed", "sft (demonstrations), train, rollout, eval"),
    ("task.photographs", "sft (demonstrations), train, rollout, eval"),
    ("task.synthetic.", "sft (demonstrations), train, rollout, eval"),
    ("rollout.", "train, rollout, eval"),
    ("rollout.prompts", "train"),
    ("rollout.group_size", "train"),
    ("rollout.prompt", "sft (demonstrations), train, rollout, eval"),
    ("rollout.max_turns", "sft (demonstrations), train, rollout, eval"),
    ("rollout.output_chars", "sft (demonstrations), train, rollout, eval"),
    ("rollout.temperature", "train, rollout"),
    ("rollout.eval_temperature", "train, eval"),
    ("tools.", "sft (demonstrations), train, rollout, eval"),
    ("reward.", "train, rollout, eval"),
    ("sft.", "sft"),
    ("algo.", "train"),
    ("optim.", "sft, train"),
    ("log.", "sft, train"),
    ("log.eval_every", "train"),
    ("log.trajectories", "train"),
];

const HEAD: &str = "\
# The run file

Every key of the TOML file that `varft sft`, `train`, `rollout` and `eval` read. Each has a default, so that a file needs no more
than `[model]` `path`; each can be given on the command line instead, `--set algo.beta=0.04`; and the `config.toml` in a run's
folder holds all of them as they were resolved. `varft quickstart` is `train` with a run file of its own, of which `--set` changes
single keys. A key that is not here is refused, with the nearest that is.

A run that is gone on with (`--resume`) keeps its keys, but for those that change no weight: where it lies, threads, concurrency,
caches, memory, and `[log]`.

This page is made from the documentation in the source, and a test compares the two.
";

/// One key, as the source documents it.
struct Key {
    name: String,
    kind: &'static str,
    meaning: String,
}

/// What a type of the source is in a run file.
fn kind(ty: &str) -> &'static str {
    match ty {
        "String" | "Option<PathBuf>" => "text",
        "usize" | "u64" => "whole number",
        "f64" | "f32" => "number",
        "bool" => "true or false",
        "[u32; 2]" => "[low, high], whole",
        "[f32; 2]" => "[low, high]",
        t if t.starts_with("Vec<") => "list of names",
        _ => "name",
    }
}

/// The documented fields of the struct or section that begins with `start` in `source`; their names begin with `prefix`.
fn fields(source: &str, start: &str, prefix: &str) -> Vec<Key> {
    let body = source.split_once(start).unwrap_or_else(|| panic!("no `{start}`")).1;
    let mut keys = Vec::new();
    let mut meaning: Vec<&str> = Vec::new();
    for line in body.lines().skip(1).map(str::trim).take_while(|l| !l.starts_with('}')) {
        if let Some(doc) = line.strip_prefix("///") {
            meaning.push(doc.trim());
            continue;
        }
        let field = line.strip_prefix("pub ").unwrap_or(line);
        let Some((name, rest)) = field.split_once(": ") else { continue };
        let ty = rest.split(" = ").next().unwrap().trim_end_matches(',');
        assert!(!meaning.is_empty(), "{prefix}{name} is not documented");
        // Links are for the documentation of the library.
        let text =
            std::mem::take(&mut meaning).join(" ").replace("[`photographs`](super::photographs)", "`task.photographs`");
        keys.push(Key { name: format!("{prefix}{name}"), kind: kind(ty), meaning: text });
    }
    keys
}

/// All keys, by section, in the order of the source.
fn documented() -> Vec<(&'static str, Vec<Key>)> {
    let read = |file: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let config = read("src/train/config.rs");
    let (synthetic, degrade) = (read("src/tasks/synthetic/config.rs"), read("src/tasks/synthetic/degrade.rs"));
    let section = |title, start: &str| {
        let mut keys = fields(&config, start, &format!("{title}."));
        // These two are sections of their own.
        keys.retain(|k| k.name != "task.synthetic" && k.name != "tools.python");
        (title, keys)
    };
    let mut all = vec![section("run", "    Run {"), section("model", "    Model {"), section("task", "    Task {")];
    let mut keys = fields(&synthetic, "pub struct Config {", "task.synthetic.");
    keys.retain(|k| k.name != "task.synthetic.strengths");
    all.push(("task.synthetic", keys));
    all.push(("task.synthetic.strengths", fields(&degrade, "pub struct Strengths {", "task.synthetic.strengths.")));
    all.extend([
        section("rollout", "    Rollout {"),
        section("tools.python", "    Python {"),
        section("reward", "    Reward {"),
        section("sft", "    Sft {"),
        section("algo", "    Algo {"),
        section("optim", "    Optim {"),
        section("log", "    Log {"),
    ]);
    all
}

/// Keys with their defaults, as a run writes them.
fn defaults() -> Vec<(String, String)> {
    fn leaves(table: &toml::Table, prefix: &str, out: &mut Vec<(String, String)>) {
        for (key, value) in table {
            match value {
                toml::Value::Table(inner) => leaves(inner, &format!("{prefix}{key}."), out),
                value => out.push((format!("{prefix}{key}"), value.to_string())),
            }
        }
    }
    let mut out = Vec::new();
    leaves(&RunConfig::default().to_toml().unwrap().parse().unwrap(), "", &mut out);
    // TOML has no word for what is absent.
    out.push(("task.synthetic.photographs".into(), "none".into()));
    out
}

fn used_by(key: &str) -> (&'static str, &'static str) {
    *USED_BY
        .iter()
        .filter(|(start, _)| key.starts_with(start))
        .max_by_key(|(start, _)| start.len())
        .unwrap_or_else(|| panic!("{key}"))
}

#[test]
fn the_page_says_what_the_source_says() {
    let (documented, mut defaults) = (documented(), defaults());
    let mut page = HEAD.to_owned();
    let mut rules = Vec::new();
    for (title, keys) in &documented {
        let _ = write!(page, "\n## [{title}]\n\n| key | type | default | used by | meaning |\n|---|---|---|---|---|\n");
        for Key { name, kind, meaning } in keys {
            let at = defaults.iter().position(|(k, _)| k == name).unwrap_or_else(|| panic!("{name} is no key"));
            let (_, default) = defaults.swap_remove(at);
            let (rule, commands) = used_by(name);
            rules.push(rule);
            let key = name.strip_prefix(&format!("{title}.")).unwrap();
            assert!(!format!("{default}{meaning}").contains('|'), "{name}: a bar would end its cell");
            let _ = writeln!(page, "| `{key}` | {kind} | `{default}` | {commands} | {meaning} |");
        }
    }
    assert!(defaults.is_empty(), "keys that nothing documents: {defaults:?}");
    let unused: Vec<_> = USED_BY.iter().filter(|(start, _)| !rules.contains(start)).collect();
    assert!(unused.is_empty(), "{unused:?}");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    if std::fs::read_to_string(&file).unwrap_or_default() != page {
        let right = Path::new(env!("CARGO_TARGET_TMPDIR")).join("configuration.md");
        std::fs::write(&right, page).unwrap();
        panic!("docs/configuration.md is not what the source says: copy {} there", right.display());
    }
}
