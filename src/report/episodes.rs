use super::escape::{Escaped, base64, cut};
use super::view::{EpisodeView, ImageRef, Phase, StepView, TokenView};
use super::{Limits, TrajectoryFile, TrajectoryStore};
use crate::{Error, Result};
use image::{ImageEncoder, ImageReader, codecs::jpeg::JpegEncoder, imageops::FilterType};
use std::collections::HashMap;
use std::fmt::Write;

/// The images of a page: each embedded once, scaled down, until the bytes allowed are spent.
pub(super) struct Images<'a> {
    store: &'a TrajectoryStore,
    limits: &'a Limits,
    index: HashMap<ImageRef, Option<Embedded>>,
    uris: Vec<String>,
    bytes: usize,
}

#[derive(Clone, Copy)]
struct Embedded {
    index: usize,
    width: u32,
    height: u32,
}

impl<'a> Images<'a> {
    pub(super) fn new(store: &'a TrajectoryStore, limits: &'a Limits) -> Self {
        Images { store, limits, index: HashMap::new(), uris: Vec::new(), bytes: 0 }
    }

    /// The data URIs as a JSON array, to stand inside a `<script>` element.
    pub(super) fn json(&self) -> String {
        // Data URIs hold neither quotes nor `<`.
        format!("[{}]", self.uris.iter().map(|u| format!("\"{u}\"")).collect::<Vec<_>>().join(",\n"))
    }

    /// An `<img>` that fits into `max_w` by `max_h`; the page's script fills it in.
    fn tag(&mut self, name: &ImageRef, alt: &str, max_w: f64, max_h: f64) -> String {
        let embedded = match self.index.get(name) {
            Some(e) => *e,
            None => {
                let e = self.embed(name);
                self.index.insert(name.clone(), e);
                e
            }
        };
        match embedded {
            Some(e) => {
                let fit = (max_w / f64::from(e.width)).min(max_h / f64::from(e.height));
                // Small images are shown larger, in whole pixels.
                let zoom = if fit >= 2.0 { fit.floor().min(4.0) } else { fit.min(1.0) };
                let class = if zoom > 1.0 { " class=\"tiny\"" } else { "" };
                let (w, h) = (f64::from(e.width) * zoom, f64::from(e.height) * zoom);
                format!("<img data-i=\"{}\" width=\"{w:.0}\" height=\"{h:.0}\" alt=\"{alt}\"{class}>", e.index)
            }
            None => "<span class=\"cut\">image left out</span>".into(),
        }
    }

    /// None when the image is missing, broken, or past what the page may hold.
    fn embed(&mut self, name: &ImageRef) -> Option<Embedded> {
        let path = self.store.image_path(name)?;
        let png = crate::files::read(&path).ok()?;
        let image = ImageReader::new(std::io::Cursor::new(&png)).with_guessed_format().ok()?.decode().ok()?;
        let side = self.limits.image_side;
        let (bytes, mime, width, height) = if image.width().max(image.height()) <= side && png.len() < 32 << 10 {
            (png, "png", image.width(), image.height())
        } else {
            let small = match image.width().max(image.height()) > side {
                true => image.resize(side, side, FilterType::Triangle),
                false => image,
            }
            .to_rgb8();
            let mut out = Vec::new();
            JpegEncoder::new_with_quality(&mut out, 84)
                .write_image(&small, small.width(), small.height(), image::ExtendedColorType::Rgb8)
                .ok()?;
            (out, "jpeg", small.width(), small.height())
        };
        let uri = format!("data:image/{mime};base64,{}", base64(&bytes));
        if self.bytes + uri.len() > self.limits.image_bytes {
            return None;
        }
        self.bytes += uri.len();
        self.uris.push(uri);
        Some(Embedded { index: self.uris.len() - 1, width, height })
    }
}

/// Which files to show, and how many episodes of each: the first and the last step of each phase and some between.
pub(super) fn choose(files: &[TrajectoryFile], limits: &Limits) -> Vec<(TrajectoryFile, usize)> {
    let mut out = Vec::new();
    for phase in [Phase::Eval, Phase::Train] {
        let of: Vec<&TrajectoryFile> = files.iter().filter(|f| f.phase == phase).collect();
        let n = of.len().min(limits.steps);
        let each = limits.episodes / n.max(1);
        for i in 0..n {
            let at = if n == 1 { of.len() - 1 } else { i * (of.len() - 1) / (n - 1) };
            out.push((of[at].clone(), each.max(1)));
        }
    }
    out
}

/// What a bucket's episodes are, in the numbering of the curves: training episodes belong to the step that learned from them,
/// held-out ones to the last step before them. `trained`: the run has taken steps; without any (`varft rollout`, `varft eval`)
/// there is nothing to number.
fn title(file: &TrajectoryFile, trained: bool) -> (&'static str, Option<u64>) {
    match (file.phase, trained) {
        (Phase::Eval, true) => ("Held-out, after step", Some(file.step)),
        (Phase::Train, true) => ("Training, step", Some(file.step + 1)),
        (Phase::Eval, false) => ("Held-out", None),
        (Phase::Train, false) => ("Rollouts", None),
    }
}

/// The episodes of one file, `all` of `kept` of them: a section with a card for each group.
pub(super) fn bucket(
    html: &mut String,
    id: usize,
    (title, step): (&str, Option<u64>),
    (all, kept): (&[EpisodeView], usize),
    images: &mut Images<'_>,
    limits: &Limits,
) {
    let step = step.map_or(String::new(), |step| step.to_string());
    let _ = write!(
        html,
        "<section class=\"bucket\" id=\"b{id}\" data-phase=\"{title}\" data-step=\"{step}\"><h3>{title} {step}<span> {} of {kept} \
         episodes that were kept</span></h3>",
        all.len()
    );
    let mut rest = all;
    while let Some(first) = rest.first() {
        let n = rest.iter().take_while(|e| e.group == first.group && e.question == first.question).count();
        let (group, more) = rest.split_at(n);
        rest = more;
        ask(html, first, group.len() as u64, images);
        let top = group.iter().map(|e| e.reward.abs()).fold(1.0, f64::max);
        // One episode is open, to be looked at without a click: the best of the first group.
        let best = group.iter().rev().max_by(|a, b| a.reward.total_cmp(&b.reward));
        for e in group {
            let open = e.group == all[0].group && best.is_some_and(|b| std::ptr::eq(b, e));
            episode(html, e, &(e.sample + 1).to_string(), open, top, images, limits);
        }
        html.push_str("</article>");
    }
    html.push_str("</section>");
}

/// The question of a card, of whose group so many episodes are shown.
fn ask(html: &mut String, first: &EpisodeView, shown: u64, images: &mut Images<'_>) {
    html.push_str("<article class=\"group\"><div class=\"ask\">");
    if let Some(image) = first.steps.iter().find_map(|s| s.image_before.as_ref().or(s.image_after.as_ref())) {
        html.push_str(&images.tag(image, "the image of the question", 120.0, 90.0));
    }
    let (question, _) = cut(&first.question, 1000);
    let _ = write!(
        html,
        "<div><div class=\"q\">{}</div><div class=\"meta\">right: <b>{}</b>",
        Escaped(question),
        Escaped(&first.answers.join(" | "))
    );
    for (what, text) in [("image", &first.kind), ("item", &first.item)] {
        if !text.is_empty() {
            let _ = write!(html, " · {what}: {}", Escaped(text));
        }
    }
    if first.of > shown {
        let _ = write!(html, " · {} of its {} episodes", shown, first.of);
    }
    html.push_str("</div></div></div>");
}

/// The held-out questions that were asked at both ends of a run, each with what was said before and after. Nothing where there
/// is none.
fn ends(html: &mut String, before: &[EpisodeView], after: &[EpisodeView], images: &mut Images<'_>, limits: &Limits) {
    let both: Vec<(&EpisodeView, &EpisodeView)> = before
        .iter()
        .filter_map(|b| Some((b, after.iter().find(|a| (a.group, &a.question) == (b.group, &b.question))?)))
        .take(limits.episodes / 2)
        .collect();
    let Some((first, last)) = both.first() else { return };
    let _ = write!(
        html,
        "<section class=\"bucket\" id=\"ends\" data-phase=\"Held-out, after step\" data-step=\"{} and {}\"><h3>Held-out, before \
         against after<span> {} questions after step {} and after step {}</span></h3>",
        first.step,
        last.step,
        both.len(),
        first.step,
        last.step
    );
    for (i, (b, a)) in both.iter().enumerate() {
        ask(html, b, 1, images);
        let top = b.reward.abs().max(a.reward.abs()).max(1.0);
        episode(html, b, "before", i == 0, top, images, limits);
        episode(html, a, "after", i == 0, top, images, limits);
        html.push_str("</article>");
    }
    html.push_str("</section>");
}

/// `name`: what tells it from the others of its card.
fn episode(
    html: &mut String,
    e: &EpisodeView,
    name: &str,
    open: bool,
    top: f64,
    images: &mut Images<'_>,
    limits: &Limits,
) {
    let (class, verdict) = match (e.em >= 1.0, e.f1, &e.prediction) {
        (true, ..) => ("good", "right".to_string()),
        (_, f1, Some(_)) if f1 > 0.0 => ("mid", format!("F1 {f1:.2}")),
        (.., Some(_)) => ("bad", "wrong".to_string()),
        (.., None) => ("plain", e.finish.clone()),
    };
    let prediction = e.prediction.as_deref().unwrap_or("no answer");
    let calls = e.steps.iter().filter(|s| s.tool_status.is_some() || s.tool_output.is_some()).count();
    let tokens: usize = e.steps.iter().map(|s| s.tokens.len()).sum();
    let _ = write!(
        html,
        "<details class=\"episode\"{}><summary><span class=\"num\">{}</span><span class=\"chip {class}\">{}</span>\
         <span class=\"pred\">{}</span>{}{}<span class=\"calls\">{calls} call{}",
        if open { " open" } else { "" },
        name,
        Escaped(cut(&verdict, 24).0),
        Escaped(cut(prediction, 300).0),
        reward_bar(e.reward, top),
        advantage_bar(e.advantage),
        if calls == 1 { "" } else { "s" },
    );
    if tokens > 0 {
        let _ = write!(html, ", {tokens} tokens");
    }
    html.push_str("</span></summary><div class=\"body\"><div class=\"parts\">reward <b>");
    let _ = write!(html, "{}</b>", short(e.reward));
    for (i, p) in e.reward_parts.iter().enumerate() {
        let _ = write!(
            html,
            "{}{} <b>{}</b>",
            if i == 0 { " = " } else { " + " },
            Escaped(cut(&p.name, 60).0),
            short(p.value)
        );
    }
    let _ = write!(
        html,
        " · F1 <b>{}</b> · exact match <b>{}</b> · ended: {}",
        short(e.f1),
        short(e.em),
        Escaped(cut(&e.finish, 200).0)
    );
    html.push_str("</div>");
    for step in &e.steps {
        turn(html, step, images, limits);
    }
    html.push_str("</div></details>");
}

fn turn(html: &mut String, s: &StepView, images: &mut Images<'_>, limits: &Limits) {
    let who = match s.who.as_str() {
        w @ ("system" | "user" | "assistant" | "tool") => w,
        _ => "other",
    };
    let _ = write!(html, "<div class=\"turn {who}\"><div class=\"who\">{}</div>", Escaped(cut(&s.who, 40).0));
    let left = spoken(html, s, limits.text_chars);
    if left > 0 {
        let _ = write!(html, "<div class=\"cut\">{left} more characters in trajectories/</div>");
    }
    if s.tool_output.is_some() || s.tool_status.is_some() {
        let status = s.tool_status.as_deref().unwrap_or("");
        let bad = if status.is_empty() || status == "ok" { "" } else { " bad" };
        let (output, left) = cut(s.tool_output.as_deref().unwrap_or(""), limits.text_chars);
        html.push_str("<div class=\"who\">tool");
        if !status.is_empty() {
            let _ = write!(html, ": {}", Escaped(cut(status, 80).0));
        }
        if let Some(ms) = s.tool_ms {
            let _ = write!(html, ", {ms:.1} ms");
        }
        html.push_str("</div>");
        if !output.is_empty() {
            let _ = write!(html, "<pre class=\"out{bad}\">{}</pre>", Escaped(output));
        }
        if left > 0 {
            let _ = write!(html, "<div class=\"cut\">{left} more characters in trajectories/</div>");
        }
    }
    match (&s.image_before, &s.image_after) {
        (Some(a), Some(b)) => {
            let same = if a == b { " (unchanged)" } else { "" };
            let _ = write!(
                html,
                "<div class=\"change\"><figure>{}<figcaption>before</figcaption></figure><span class=\"arrow\">→</span>\
                 <figure>{}<figcaption>after{same}</figcaption></figure></div>",
                images.tag(a, "before the step", 340.0, 280.0),
                images.tag(b, "after the step", 340.0, 280.0)
            );
        }
        (Some(a), None) | (None, Some(a)) => {
            let what = match (s.image_before.is_some(), s.who.as_str()) {
                (true, "assistant") => "the image that this turn was written from",
                (true, _) => "the image of this turn",
                (false, _) => "the image that the next turn sees",
            };
            let _ = write!(
                html,
                "<div class=\"change\"><figure>{}<figcaption>{what}</figcaption></figure></div>",
                images.tag(a, what, 340.0, 280.0)
            );
        }
        (None, None) => {}
    }
    html.push_str("</div>");
}

/// What was said: the sampled tokens where they are known, coloured by their log-probabilities, with the program that
/// was run set apart. Returns the number of characters left out.
fn spoken(html: &mut String, s: &StepView, max: usize) -> usize {
    let joined: String = s.tokens.iter().map(|t| t.text.as_str()).collect();
    let whole = if s.tokens.is_empty() { s.text.as_str() } else { joined.as_str() };
    let (text, left) = cut(whole, max);
    let code = s.code.as_deref().filter(|c| !c.is_empty());
    let span = code.and_then(|c| text.find(c).map(|at| (at, at + c.len())));
    if !text.is_empty() {
        html.push_str("<pre>");
        let mut at = 0;
        // Tokens that share a character are one piece.
        let together = s.tokens.chunk_by(|_, next| next.text.is_empty());
        let pieces = together.map(|tokens| (tokens.iter().map(|t| t.text.len()).sum(), tokens));
        let plain = s.tokens.is_empty().then_some((text.len(), &[][..]));
        for (len, tokens) in pieces.chain(plain) {
            let end = (at + len).min(text.len());
            // A token may straddle the program's ends.
            let mut cuts = vec![at];
            cuts.extend(span.iter().flat_map(|&(a, b)| [a, b]).filter(|c| (at + 1..end).contains(c)));
            cuts.push(end);
            for w in cuts.windows(2).filter(|w| w[0] < w[1]) {
                if span.is_some_and(|(a, _)| a == w[0]) {
                    html.push_str("<code>");
                }
                piece(html, &text[w[0]..w[1]], tokens);
                if span.is_some_and(|(_, b)| b == w[1]) {
                    html.push_str("</code>");
                }
            }
            at = end;
        }
        html.push_str("</pre>");
    }
    if let (Some(code), None) = (code, span) {
        let (code, _) = cut(code, max);
        let _ = write!(html, "<pre><code>{}</code></pre>", Escaped(code));
    }
    left
}

/// Text in the colour of the rarest of its tokens, with the figure of each.
fn piece(html: &mut String, text: &str, tokens: &[TokenView]) {
    let _ = match tokens.iter().map(|t| surprise(t.logp)).max() {
        Some(level @ 1..) => {
            let logp: Vec<String> = tokens.iter().map(|t| format!("{:.2}", t.logp)).collect();
            write!(html, "<span class=\"t{level}\" title=\"log p {}\">{}</span>", logp.join(", "), Escaped(text))
        }
        _ => write!(html, "{}", Escaped(text)),
    };
}

/// 0 for a token of probability over 0.8, then 1 to 4 by ever rarer ones (0.5, 0.2, 0.05). NaN counts as the rarest.
fn surprise(logp: f32) -> usize {
    let p = logp.exp();
    4 - [0.8, 0.5, 0.2, 0.05].iter().filter(|&&t| p > t).count()
}

fn reward_bar(reward: f64, top: f64) -> String {
    let width = (reward / top).clamp(0.0, 1.0) * 56.0;
    format!(
        "<span class=\"bar\"><svg viewBox=\"0 0 56 8\"><rect class=\"track\" width=\"56\" height=\"8\" rx=\"2\"/><rect \
         class=\"fill\" width=\"{:.1}\" height=\"8\" rx=\"2\"/></svg>reward <b>{}</b></span>",
        if width.is_finite() { width } else { 0.0 },
        short(reward)
    )
}

fn advantage_bar(advantage: Option<f64>) -> String {
    let Some(a) = advantage else { return "<span></span>".into() };
    let width = (a.abs() / 3.0).clamp(0.0, 1.0) * 28.0;
    let width = if width.is_finite() { width } else { 0.0 };
    let (class, x) = if a >= 0.0 { ("up", 28.0) } else { ("down", 28.0 - width) };
    format!(
        "<span class=\"bar\"><svg viewBox=\"0 0 56 8\"><rect class=\"track\" width=\"56\" height=\"8\" rx=\"2\"/><rect \
         class=\"{class}\" x=\"{x:.1}\" width=\"{width:.1}\" height=\"8\"/></svg>advantage <b>{a:+.2}</b></span>"
    )
}

/// Up to two decimals, none where they are zeros.
fn short(v: f64) -> String {
    let s = format!("{v:.2}");
    s.strip_suffix(".00").or(s.strip_suffix('0')).unwrap_or(&s).to_string()
}

/// The episodes of a page.
pub(super) struct Shown {
    pub html: String,
    /// The images, for the page's script.
    pub images: String,
    /// Episodes shown, and in the files.
    pub episodes: [usize; 2],
    /// Files shown (a phase and a step), and all.
    pub files: [usize; 2],
}

/// Reads the chosen episodes and renders them. `trained`: as in [`title`].
///
/// # Errors
/// What reading the trajectories gives.
pub(super) fn episodes(store: &TrajectoryStore, trained: bool, limits: &Limits) -> Result<Shown, Error> {
    let mut images = Images::new(store, limits);
    let files = store.files()?;
    let mut shown = Shown { html: String::new(), images: String::new(), episodes: [0, 0], files: [0, files.len()] };
    let chosen = choose(&files, limits);
    // A run opens on what it changed.
    let held_out: Vec<&TrajectoryFile> = files.iter().filter(|f| f.phase == Phase::Eval).collect();
    if let [before, .., after] = &held_out[..] {
        let (before, after) = (store.read(before, limits.episodes)?.0, store.read(after, limits.episodes)?.0);
        ends(&mut shown.html, &before, &after, &mut images, limits);
    }
    for file in &files {
        let Some((_, max)) = chosen.iter().find(|(f, _)| f == file) else {
            shown.episodes[1] += store.count(file)?;
            continue;
        };
        let (all, kept) = store.read(file, *max)?;
        shown.episodes = [shown.episodes[0] + all.len(), shown.episodes[1] + kept];
        bucket(&mut shown.html, shown.files[0], title(file, trained), (&all, kept), &mut images, limits);
        shown.files[0] += 1;
    }
    shown.images = images.json();
    Ok(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(tokens: &[&str], code: &str) -> StepView {
        let tokens = tokens.iter().map(|t| TokenView { text: t.to_string(), logp: -0.01 }).collect();
        StepView { who: "assistant".into(), tokens, code: Some(code.into()), ..Default::default() }
    }

    #[test]
    fn code_is_set_apart_across_token_borders() {
        let mut html = String::new();
        assert_eq!(spoken(&mut html, &step(&["ab", "cd", "ef"], "bcde"), 100), 0);
        assert_eq!(html, "<pre>a<code>bcde</code>f</pre>");
        html.clear();
        assert_eq!(spoken(&mut html, &step(&["ab", "cd"], "xyz"), 3), 1);
        assert_eq!(html, "<pre>abc</pre><pre><code>xyz</code></pre>");
    }

    #[test]
    fn tokens_that_share_a_character_are_shown_together_with_each_ones_figure() {
        let tokens = [("a", -0.01), ("😀!", -0.1), ("", -2.0), ("", -0.02), ("b", -0.01)];
        let tokens = tokens.map(|(text, logp)| TokenView { text: text.into(), logp }).to_vec();
        let mut html = String::new();
        spoken(&mut html, &StepView { tokens, ..Default::default() }, 100);
        assert_eq!(html, "<pre>a<span class=\"t3\" title=\"log p -0.10, -2.00, -0.02\">😀!</span>b</pre>");
    }

    #[test]
    fn rare_tokens_are_coloured() {
        assert_eq!([0.9f32, 0.7, 0.3, 0.1, 0.01].map(|p| surprise(p.ln())), [0, 1, 2, 3, 4]);
        assert_eq!(surprise(f32::NAN), 4);
    }

    #[test]
    fn first_and_last_steps_are_chosen() {
        let file = |phase, step| TrajectoryFile { phase, step, path: format!("{step}").into() };
        let mut files: Vec<_> = (1..=100).map(|s| file(Phase::Train, s)).collect();
        files.push(file(Phase::Eval, 7));
        let limits = Limits { steps: 5, episodes: 50, ..Limits::default() };
        let got: Vec<_> = choose(&files, &limits).iter().map(|(f, n)| (f.phase, f.step, *n)).collect();
        assert_eq!(got[0], (Phase::Eval, 7, 50));
        assert_eq!(got[1..].iter().map(|g| g.1).collect::<Vec<_>>(), [1, 25, 50, 75, 100]);
        assert!(got[1..].iter().all(|g| g.2 == 10));
        assert!(choose(&[], &limits).is_empty());
    }
}
