//! Reading run files: every mistake is named with its file, line and key, and what was probably meant.

use super::config::RunConfig;
use crate::{Error, Result};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

/// Keys that may differ between a run and its continuation: they change no weight.
const FREE: [&str; 12] = [
    "run.name",
    "run.dir",
    "run.threads",
    "rollout.concurrency",
    "rollout.batch_tokens",
    "rollout.kv_cache_mib",
    "rollout.vision_cache_mib",
    "tools.python.interpreter",
    "tools.python.install",
    "tools.python.concurrency",
    "optim.activations_mib",
    "log.",
];

impl RunConfig {
    /// Reads a run file (none: all defaults), then applies `overrides`, each `section.key=value` with a TOML value (text
    /// needs no quotes), and checks the whole.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read; [`Error::Input`] naming file, line and key of a key that does not
    /// exist (with the nearest that does) or a value that does not fit, or the override.
    pub fn read(file: Option<&Path>, overrides: &[String]) -> Result<RunConfig> {
        match file {
            Some(path) => {
                let text = crate::files::read_to_string(path).map_err(|e| Error::io("read the run file", path, e))?;
                RunConfig::read_text(&text, &path.display().to_string(), overrides)
            }
            None => RunConfig::read_text("", "the run file", overrides),
        }
    }

    /// [`read`](Self::read) for a run file that is at hand as text; `name` stands for it in errors.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_text(text: &str, name: &str, overrides: &[String]) -> Result<RunConfig> {
        let mut table = parse(text, name)?;
        let mut config: RunConfig = from_table(&table, "the run file")?;
        let schema = schema()?;
        for text in overrides {
            let Some((key, raw)) = text.split_once('=') else {
                return Err(Error::input(
                    format!("the override `{text}` has no `=`"),
                    "write it as section.key=value, such as algo.beta=0.04",
                ));
            };
            let (key, raw) = (key.trim(), raw.trim());
            let Some(like) = leaf(&schema, key) else {
                return Err(unknown("the command line", key, &schema));
            };
            // A line break could begin another key: what has one is no value.
            let one = |t: &Table| t.len() == 1;
            let parsed =
                toml::from_str::<Table>(&format!("v = {raw}")).ok().filter(one).and_then(|mut t| t.remove("v"));
            let value = match parsed {
                Some(v) if v.is_str() || !like.is_str() => v,
                _ => Value::String(raw.to_string()),
            };
            set(&mut table, key, value);
            config = from_table(&table, &format!("the override `{text}`"))?;
        }
        if leaf(&table, "algo.scale").is_none() {
            config.algo.scale = config.algo.loss.scale();
        }
        config.check()?;
        Ok(config)
    }

    /// The folder of the run.
    pub fn run_dir(&self) -> PathBuf {
        Path::new(&self.run.dir).join(&self.run.name)
    }

    /// Every key with its value, as a run file that says where they are explained.
    ///
    /// # Errors
    /// [`Error::Internal`] if a value has no TOML form.
    pub fn to_toml(&self) -> Result<String> {
        let keys = toml::to_string(self).map_err(|e| Error::internal(format!("the configuration as TOML: {e}")))?;
        Ok(format!("# Every key of the run as it was resolved; docs/configuration.md says what each means.\n\n{keys}"))
    }

    /// The keys whose values would make a continuation of the run `earlier` another run, with both values.
    ///
    /// # Errors
    /// As [`RunConfig::to_toml`].
    pub fn conflicts(&self, earlier: &RunConfig) -> Result<Vec<String>> {
        let (new, old) = (flat(self)?, flat(earlier)?);
        let mut keys = Vec::new();
        leaves(&schema()?, "", &mut |key, _| keys.push(key.to_string()));
        let shown = |v: Option<&Value>| v.map_or("nothing".into(), |v| v.to_string());
        let mut conflicts = Vec::new();
        for key in keys {
            let (new, old) = (new.get(&key), old.get(&key));
            let free = FREE.iter().any(|f| key == *f || (f.ends_with('.') && key.starts_with(f)));
            // A constant rate does not know how long it lasts.
            let longer = key == "optim.steps" && self.optim.schedule == super::schedule::Decay::Constant;
            if new != old && !free && !longer {
                conflicts.push(format!("{key}: {} before, {} now", shown(old), shown(new)));
            }
        }
        Ok(conflicts)
    }
}

/// The default configuration as a table: which keys there are, and the types of their values.
fn schema() -> Result<Table> {
    let mut config = RunConfig::default();
    // TOML has no null: a key that may be absent is in the schema by a stand-in.
    config.task.synthetic.photographs = Some(PathBuf::new());
    Table::try_from(config).map_err(|e| Error::internal(format!("the configuration as TOML: {e}")))
}

fn flat(config: &RunConfig) -> Result<HashMap<String, Value>> {
    let table = Table::try_from(config).map_err(|e| Error::internal(format!("the configuration as TOML: {e}")))?;
    let mut out = HashMap::new();
    leaves(&table, "", &mut |key, value| {
        out.insert(key.to_string(), value.clone());
    });
    Ok(out)
}

fn leaves(table: &Table, prefix: &str, f: &mut dyn FnMut(&str, &Value)) {
    for (key, value) in table {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Table(t) => leaves(t, &key, f),
            v => f(&key, v),
        }
    }
}

/// The value at a dotted key, if there is one that is not a section.
fn leaf<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let mut at = table;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        match (at.get(part)?, parts.peek()) {
            (Value::Table(t), Some(_)) => at = t,
            (Value::Table(_), None) | (_, Some(_)) => return None,
            (v, None) => return Some(v),
        }
    }
    None
}

fn set(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        Some((head, rest)) => {
            let inner = table.entry(head).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(t) = inner {
                set(t, rest, value);
            }
        }
        None => {
            table.insert(key.to_string(), value);
        }
    }
}

fn from_table(table: &Table, from: &str) -> Result<RunConfig> {
    RunConfig::deserialize(Value::Table(table.clone()))
        .map_err(|e| Error::input(format!("{from}: {}", plain(e.to_string().trim())), MEND))
}

/// What to do about a value of the wrong kind.
const MEND: &str = "give that key a value of the kind that is expected; docs/configuration.md has the kind of each";

/// What the reader of values says, in people's words for the kinds of them.
fn plain(message: &str) -> String {
    const WORDS: [(&str, &str); 10] = [
        ("floating point `", "the number `"),
        ("integer `", "the number `"),
        ("boolean `", "`"),
        ("expected f64", "expected a number"),
        ("expected usize", "expected a whole number of at least 0"),
        ("expected u64", "expected a whole number of at least 0"),
        ("expected u32", "expected a whole number of at least 0"),
        ("expected a boolean", "expected true or false"),
        ("expected an array of length ", "expected a list of "),
        ("expected a sequence", "expected a list, such as [1, 2]"),
    ];
    WORDS.iter().fold(message.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Reads the text of a run file; `name` stands for it in errors.
fn parse(text: &str, name: &str) -> Result<Table> {
    let at = |e: &toml::de::Error| {
        let line = e.span().map_or(1, |s| line_of(text, s.start));
        let source = text.lines().nth(line - 1).unwrap_or("").trim();
        (format!("{name}, line {line}: {}", plain(e.message().trim())), shortened(source))
    };
    let document = DeTable::parse(text).map_err(|e| {
        let (what, line) = at(&e);
        Error::input(what, format!("make that line TOML: `{line}`"))
    })?;
    let schema = schema()?;
    check_keys(document.get_ref(), &schema, "", &|key, span| {
        unknown(&format!("{name}, line {}", line_of(text, span)), key, &schema)
    })?;
    // Now for the values: with the text at hand the error knows its line.
    toml::from_str::<RunConfig>(text).map_err(|e| {
        let (what, line) = at(&e);
        Error::input(format!("{what}, in `{line}`"), MEND)
    })?;
    // Only whole numbers that a table cannot hold are left to be refused.
    text.parse::<Table>().map_err(|e| {
        let (what, line) = at(&e);
        Error::input(format!("{what}, in `{line}`"), "give that key a smaller number")
    })
}

fn check_keys(table: &DeTable<'_>, schema: &Table, prefix: &str, bad: &dyn Fn(&str, usize) -> Error) -> Result<()> {
    for (key, value) in table {
        let name: &str = key.get_ref();
        let full = if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") };
        let value: &Spanned<DeValue<'_>> = value;
        match (schema.get(name), value.get_ref()) {
            (Some(Value::Table(inner)), DeValue::Table(t)) => check_keys(t, inner, &full, bad)?,
            (Some(_), _) => {}
            (None, _) => return Err(bad(&full, key.span().start)),
        }
    }
    Ok(())
}

/// So much of a line as can be shown in an error.
fn shortened(line: &str) -> String {
    const MOST: usize = 120;
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|&&b| b == b'\n').count() + 1
}

fn unknown(place: &str, key: &str, schema: &Table) -> Error {
    let mut keys: Vec<String> = schema.keys().filter(|k| schema[*k].is_table()).cloned().collect();
    leaves(schema, "", &mut |k, _| keys.push(k.to_string()));
    let last = |k: &str| k.rsplit('.').next().unwrap_or("").to_string();
    // The same name in another section is as near as one wrong letter.
    let near = |k: &String| distance(key, k).min(distance(&last(key), &last(k)) + 1);
    let nearest = keys.iter().min_by_key(|k| (near(k), distance(key, k)));
    let mend = match nearest {
        Some(k) if near(k) <= 1 + last(key).len() / 3 => format!("write `{k}`, if that was meant, or remove it"),
        _ => {
            let section = key.split('.').next().unwrap_or("");
            let of: Vec<&str> =
                keys.iter().filter(|k| k.split('.').next() == Some(section)).map(|k| k.as_str()).collect();
            let of =
                if of.is_empty() { keys.iter().filter(|k| !k.contains('.')).map(|k| k.as_str()).collect() } else { of };
            format!("remove it, or choose one of: {}", of.join(", "))
        }
    };
    Error::input(format!("{place}: there is no key `{}`", shortened(key)), mend)
}

/// Edit distance (Levenshtein), by characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str, overrides: &[&str]) -> Result<RunConfig> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("my run.toml");
        std::fs::write(&path, text).unwrap();
        RunConfig::read(Some(&path), &overrides.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    fn error(text: &str, overrides: &[&str]) -> String {
        read(text, overrides).unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_given_keeps_its_default_and_the_written_file_gives_the_same_run() {
        let c = read("[algo]\nbeta = 1 # a whole number will do\n[tools.python]\ncpu_s = 2.5\n", &[]).unwrap();
        assert_eq!((c.algo.beta, c.tools.python.cpu_s, c.rollout.group_size), (1.0, 2.5, 8));
        assert_eq!(read(&c.to_toml().unwrap(), &[]).unwrap(), c);
        assert_eq!(RunConfig::read(None, &[]).unwrap(), RunConfig::default());
    }

    #[test]
    fn overrides_win() {
        let set =
            ["algo.beta=0.04", "algo.loss=dr_grpo", "model.path=/a b/c=d", "run.name=7", "log.tensorboard = false"];
        let c = read("[algo]\nbeta = 1.0\n", &set).unwrap();
        assert_eq!((c.algo.beta, c.run.name.as_str(), c.log.tensorboard), (0.04, "7", false));
        assert_eq!(c.model.path, "/a b/c=d");
        assert_eq!(c.algo.loss, super::super::config::LossKind::DrGrpo);
    }

    #[test]
    fn a_misspelt_key_is_named_with_its_place_and_the_nearest() {
        for (text, line, key, meant) in [
            ("[algo]\n\nclip_hihg = 0.3\n", 3, "algo.clip_hihg", "algo.clip_high"),
            ("[optim]\nbeta = 0.3\n", 2, "optim.beta", "optim.beta"),
            ("[optim]\nclip_low = 0.3\n", 2, "optim.clip_low", "algo.clip_low"),
            ("x = 1\n[rolout]\n", 1, "x", "run"),
            ("[rolout]\nprompts = 4\n", 1, "rolout", "rollout"),
            ("[tools.python]\ncpu = 4\n", 2, "tools.python.cpu", "tools.python.cpu_s"),
            ("algo.losss = 'grpo'\n", 1, "algo.losss", "algo.loss"),
        ] {
            let e = error(text, &[]);
            assert!(e.contains(&format!("my run.toml, line {line}: there is no key `{key}`")), "{e}");
            assert!(e.split_once("mend it").unwrap().1.contains(meant), "{e}");
        }
        let e = error("", &["algo.betta=1"]);
        assert!(e.contains("the command line: there is no key `algo.betta`") && e.contains("`algo.beta`"), "{e}");
        assert!(error("", &["algo=1"]).contains("no key `algo`"));
    }

    #[test]
    fn a_value_that_does_not_fit_is_named() {
        for (text, parts) in [
            ("[algo]\nbeta = \"much\"\n", &["my run.toml, line 2", "beta = \"much\"", "expected a number"]),
            ("[algo]\nloss = \"ppo\"\n", &["line 2", "ppo", "dr_grpo"]),
            ("[algo]\nbeta = \n", &["line 2", "my run.toml", "TOML"]),
            ("[run]\nseed = -1\n", &["line 2", "seed = -1", "-1"]),
            ("[rollout]\ngroup_size = 0\n", &["`rollout.group_size`", "1 to 65536", "mend"]),
            ("[rollout]\ngroup_size = 1000000000000000000\n", &["`rollout.group_size`", "1 to 65536", "mend"]),
            ("[model]\nmax_pixels = 18446744073709551615\n", &["line 2", "max_pixels", "smaller number"]),
            ("[run]\nname = \"../x\"\n", &["`run.name`", "folder", "mend"]),
        ] {
            let e = error(text, &[]);
            assert!(parts.iter().all(|p| e.contains(p)), "{e}");
        }
        let e = error("", &["optim.lr=fast"]);
        assert!(e.contains("the override `optim.lr=fast`") && e.contains("expected a number"), "{e}");
        for (set, part) in [
            ("rollout.prompts=many", "a whole number"),
            ("rollout.prompts=1.5", "a whole number"),
            ("run.seed=-1", "a whole number"),
            ("log.tensorboard=1", "true or false"),
            ("task.synthetic.width=7", "a list"),
        ] {
            let e = error("", &[set]);
            assert!(e.contains(part) && e.contains(&format!("the override `{set}`")), "{e}");
            assert!(!["f64", "usize", "u64", "boolean", "sequence"].iter().any(|word| e.contains(word)), "{e}");
        }
        assert!(error("", &["optim.lr"]).contains("section.key=value"));
        let e = error("", &["run.seed=1\nx=3"]);
        assert!(e.contains("the override `run.seed=1") && e.contains("a whole number"), "{e}");
        // A line that is no TOML may be a whole file of another kind.
        for text in [format!("[run]\nname = {}\n", "[".repeat(100_000)), format!("x{} = 1\n", "é".repeat(100_000))] {
            let e = error(&text, &[]);
            assert!(e.contains("my run.toml, line ") && e.len() < 1000, "{} bytes: {e:.2000}", e.len());
        }
        let e = RunConfig::read(Some(Path::new("/no/such.toml")), &[]).unwrap_err().to_string();
        assert!(e.contains("/no/such.toml"), "{e}");
    }

    #[test]
    fn a_continuation_may_not_change_the_run() {
        let a = RunConfig::default();
        let mut b = a.clone();
        (b.run.threads, b.log.keep_last, b.optim.steps, b.optim.activations_mib) = (3, 9, 500, 4096);
        assert_eq!(b.conflicts(&a).unwrap(), Vec::<String>::new());
        b.optim.schedule = super::super::schedule::Decay::Linear;
        b.algo.beta = 0.5;
        let got = b.conflicts(&a).unwrap();
        assert_eq!(got.len(), 3, "{got:?}");
        assert!(got.contains(&"algo.beta: 0.0 before, 0.5 now".to_string()), "{got:?}");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[\\[\\]a-z.=\" \n#0-9-]{0,60}", set in "[a-z._=0-9\"\n]{0,20}") {
            let _ = parse(&text, "f");
            let _ = RunConfig::read(None, &[set]);
        }
    }
}
