use super::episodes::Shown;
use super::escape::Escaped;
use super::progress::duration;
use super::{Record, TrajectoryStore, charts, episodes, read_metrics, store, tables};
use crate::{Error, Result};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What a page may hold. The run's folder keeps everything; the page is for looking.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Steps whose episodes are shown, per phase.
    pub steps: usize,
    /// Episodes shown, per phase.
    pub episodes: usize,
    /// The longer side of an embedded image, in pixels.
    pub image_side: u32,
    /// All embedded images together, in bytes of the page.
    pub image_bytes: usize,
    /// Characters of one text (a turn, a tool's output).
    pub text_chars: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { steps: 12, episodes: 160, image_side: 480, image_bytes: 24 << 20, text_chars: 20_000 }
    }
}

/// Makes `report.html` from what lies in `run_dir`, in place of an older one, and gives its path.
///
/// # Errors
/// [`Error::Input`] when the folder is not a run's, [`Error::Io`] when something cannot be read or written.
pub fn write(run_dir: &Path) -> Result<PathBuf> {
    write_with(run_dir, &Limits::default())
}

/// [`write()`] with other limits.
///
/// # Errors
/// As [`write()`].
pub fn write_with(run_dir: &Path, limits: &Limits) -> Result<PathBuf> {
    if !["metrics.jsonl", "trajectories", "config.toml"].iter().any(|f| run_dir.join(f).exists()) {
        return Err(Error::input(
            format!("{}: no metrics.jsonl, trajectories or config.toml here", run_dir.display()),
            "name the folder of a run, such as runs/quickstart",
        ));
    }
    let records = read_metrics(run_dir)?;
    let steps = records.iter().map(|r| r.step).max().unwrap_or(0);
    let shown = match run_dir.join("trajectories").is_dir() {
        true => Some(episodes::episodes(&TrajectoryStore::open(run_dir)?, steps > 0, limits)?),
        false => None,
    };
    let config_path = run_dir.join("config.toml");
    let config = match crate::files::read_to_string(&config_path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::io("read", &config_path, e)),
    };
    let full = run_dir.canonicalize().unwrap_or_else(|_| run_dir.to_path_buf());
    let name = full.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
    // The table of an evaluation, as it was printed.
    let table_path = run_dir.join(TABLE);
    let table = match crate::files::read_to_string(&table_path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::io("read", &table_path, e)),
    };
    let mut head = format!("<h1>{}</h1>", Escaped(&name));
    tables::facts(&mut head, run_dir, &config);
    let html = page(&name, (head, table), steps, &records, shown.as_ref(), &config);
    let path = run_dir.join("report.html");
    store::replace(&path, html.as_bytes())?;
    Ok(path)
}

/// The file of an evaluation's table, in its folder.
pub const TABLE: &str = "table.txt";

fn page(
    name: &str,
    (head, table): (String, String),
    steps: u64,
    records: &[Record],
    shown: Option<&Shown>,
    config: &str,
) -> String {
    let mut main = head;
    let wall = duration(records.last().map_or(0.0, |r| r.wall_s) as u64);
    match (steps, records.is_empty()) {
        (_, true) => main.push_str("<p class=\"sub\">no step is complete yet</p>"),
        (0, _) => main.push_str("<p class=\"sub\">no training</p>"),
        (1, _) => drop(write!(main, "<p class=\"sub\">1 step in {wall}</p>")),
        _ => drop(write!(main, "<p class=\"sub\">{steps} steps in {wall}</p>")),
    }
    tiles(&mut main, records);
    let mut scores = String::new();
    match table.is_empty() {
        true => tables::by_kind(&mut scores, records),
        false => drop(write!(scores, "<pre class=\"scores\">{}</pre>", Escaped(table.trim_end()))),
    }
    if !scores.is_empty() {
        let _ = write!(main, "<h2>Scores</h2>{scores}");
    }
    let charts = charts::charts(records);
    if !charts.is_empty() {
        let _ = write!(main, "<h2>{}</h2>{charts}", if steps > 0 { "Curves" } else { "Figures" });
    }
    if let Some(Shown { html, episodes, files, .. }) = shown.filter(|s| !s.html.is_empty()) {
        let _ = write!(
            main,
            "<h2>Episodes</h2><div class=\"controls\" id=\"controls\" hidden><label><input type=\"checkbox\" id=\"lp\" checked> \
             colour tokens by log-probability</label><span class=\"scale\">p &lt; <span class=\"t1\">0.8</span><span \
             class=\"t2\">0.5</span><span class=\"t3\">0.2</span><span class=\"t4\">0.05</span></span></div>{html}\
             <p class=\"foot\">This page shows {} of the {} episodes that the run kept, from {} of its {} measurements and steps. All of \
             them are in the folder trajectories/; <code>log.trajectories</code> says how many of each are kept.</p>",
            episodes[0], episodes[1], files[0], files[1]
        );
    }
    if !config.is_empty() {
        let _ = write!(
            main,
            "<h2>Configuration</h2><details class=\"config\"><summary>config.toml, as resolved</summary><pre>{}</pre></details>",
            Escaped(config)
        );
    }
    let style = include_str!("style.css");
    let script = include_str!("page.js");
    // Only elements that carry this word are run or applied; what the page shows cannot know it beforehand.
    let images = shown.map_or("[]", |s| &s.images);
    let nonce = blake3::hash(format!("{main}{images}").as_bytes()).to_hex()[..32].to_string();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\">\n<meta http-equiv=\"Content-Security-Policy\" content=\"default-src \
         'none'; img-src data:; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; base-uri 'none'; form-action \
         'none'\">\n<title>{} · varft</title>\n<style nonce=\"{nonce}\">\n{style}</style></head>\n<body><main>{main}</main>\n\
         <script id=\"images\" type=\"application/json\">{images}</script>\n<script nonce=\"{nonce}\">\n{script}</script>\n\
         </body></html>\n",
        Escaped(name)
    )
}

/// The figures to take in first: where the run began and where it is.
fn tiles(html: &mut String, records: &[Record]) {
    html.push_str("<div class=\"tiles\">");
    for (name, label, percent, mean) in [
        ("eval/f1", "held-out F1", true, false),
        ("eval/em", "held-out exact match", true, false),
        ("reward/mean", "reward", false, false),
        ("episodes/used_tool", "episodes that use the tool", true, false),
        ("sft/loss", "loss", false, false),
        ("speed/rollout_tokens_s", "rollout tokens per second, mean", false, true),
    ] {
        let all: Vec<f64> = records
            .iter()
            .flat_map(|r| &r.values)
            .filter(|(k, v)| k == name && v.is_finite())
            .map(|(_, v)| *v)
            .collect();
        let Some((first, last)) = charts::ends(&all) else { continue };
        let text = |v: f64| match percent {
            true => format!("{:.1}%", v * 100.0),
            false if v.abs() >= 100.0 => format!("{v:.0}"),
            false => format!("{v:.2}"),
        };
        let _ = write!(html, "<div class=\"tile\"><span>{label}</span><b>");
        if all.len() > 1 && !mean {
            let _ = write!(html, "<span class=\"from\">{} → </span>", text(first));
        }
        let main = if mean { all.iter().sum::<f64>() / all.len() as f64 } else { last };
        let _ = write!(html, "{}</b></div>", text(main));
    }
    html.push_str("</div>");
}
