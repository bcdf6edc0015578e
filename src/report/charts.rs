use super::Record;
use super::escape::Escaped;
use std::collections::BTreeMap;
use std::fmt::Write;

/// How a figure reads.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Unit {
    Plain,
    /// A share of one, shown as percent.
    Percent,
}

/// A figure that the page knows: its name in the metrics, its label, and its hue (an index into the page's palette; a
/// figure keeps its hue wherever it appears).
struct Known {
    name: &'static str,
    label: &'static str,
    hue: usize,
}

const fn k(name: &'static str, label: &'static str, hue: usize) -> Known {
    Known { name, label, hue }
}

/// Panels in reading order: what is learned first, then how, then at what speed.
const PANELS: &[(&str, Unit, &[Known])] = &[
    ("Held-out F1 and exact match", Unit::Percent, &[k("eval/f1", "F1", 0), k("eval/em", "exact match", 1)]),
    (
        "Reward",
        Unit::Plain,
        &[k("reward/mean", "total", 2), k("reward/answer", "answer", 0), k("reward/format", "format", 3)],
    ),
    ("F1 and exact match in training", Unit::Percent, &[k("train/f1", "F1", 0), k("train/em", "exact match", 1)]),
    ("Loss of the conversations (nats per token)", Unit::Plain, &[k("sft/loss", "loss", 7)]),
    ("KL to the reference (nats per token)", Unit::Plain, &[k("policy/kl", "KL", 4)]),
    ("Entropy (nats per token)", Unit::Plain, &[k("policy/entropy", "entropy", 5)]),
    ("Gradient norm before clipping", Unit::Plain, &[k("optim/grad_norm", "gradient norm", 6)]),
    ("Policy loss", Unit::Plain, &[k("policy/loss", "loss", 7)]),
    ("Ratio of new to old probability", Unit::Plain, &[k("policy/ratio", "ratio", 3)]),
    ("Ratio clipped (share of tokens)", Unit::Percent, &[k("policy/clip_share", "clipped", 4)]),
    (
        "Tool calls per episode",
        Unit::Plain,
        &[k("tools/calls", "calls", 0), k("tools/exceptions", "raised an exception", 6)],
    ),
    (
        "Episodes",
        Unit::Percent,
        &[
            k("episodes/well_formed", "well formed", 2),
            k("episodes/used_tool", "used the tool", 0),
            k("episodes/truncated", "cut short", 6),
        ],
    ),
    (
        "Held-out episodes",
        Unit::Percent,
        &[k("eval/format", "well formed", 2), k("eval/used_tool", "used the tool", 0)],
    ),
    ("Groups without variance", Unit::Percent, &[k("groups/zero_variance", "dropped or flat", 3)]),
    (
        "Response length (tokens per episode)",
        Unit::Plain,
        &[k("episodes/tokens", "in training", 5), k("eval/tokens", "held-out", 1)],
    ),
    ("Turns per episode", Unit::Plain, &[k("episodes/turns", "turns", 0)]),
    (
        "Episodes left out",
        Unit::Plain,
        &[
            k("episodes/masked", "cut short", 3),
            k("episodes/void", "failed by the machinery", 6),
            k("eval/void", "held-out, failed", 1),
        ],
    ),
    ("Episodes written", Unit::Plain, &[k("episodes/written", "episodes", 0)]),
    (
        "Tokens per second",
        Unit::Plain,
        &[k("speed/rollout_tokens_s", "rollout", 1), k("speed/train_tokens_s", "training", 0)],
    ),
    ("Seconds per step", Unit::Plain, &[k("speed/rollout_s", "rollout", 1), k("speed/train_s", "training", 0)]),
    ("Memory at its peak (MiB)", Unit::Plain, &[k("memory/peak_mib", "memory", 7)]),
    ("Learning rate", Unit::Plain, &[k("optim/lr", "learning rate", 7)]),
    ("Updates not taken (gradients not finite)", Unit::Plain, &[k("optim/skipped", "updates", 6)]),
    (
        "Sampler and trainer apart (largest difference of log-probabilities)",
        Unit::Plain,
        &[k("policy/mismatch", "difference", 6)],
    ),
];

const HUES: usize = 8;

/// Figures that are set, only ever rise, or count what is rare: a running mean of them is none of their values.
const AS_LOGGED: [&str; 6] =
    ["optim/lr", "optim/skipped", "memory/peak_mib", "episodes/masked", "episodes/void", "eval/void"];

/// One curve.
#[derive(Clone)]
struct Series {
    /// In the metrics; of curves that are the same, all of them.
    name: String,
    label: String,
    hue: usize,
    /// (step, value), ascending; not finite where the run logged no number.
    points: Vec<(f64, f64)>,
}

/// All curves of `records` as HTML: a figure with an inline SVG per panel, and a list of what never changed. Figures that the
/// page does not know follow, each alone, under the names that they have in the metrics.
pub(super) fn charts(records: &[Record]) -> String {
    let mut by_name: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for r in records {
        for (name, value) in &r.values {
            // What no axis can show is as good as no number.
            let value = if value.abs() < 1e100 { *value } else { f64::NAN };
            by_name.entry(name).or_default().push((r.step as f64, value));
        }
    }
    let mut panels: Vec<(String, Unit, Vec<Series>)> = Vec::new();
    for (title, unit, known) in PANELS {
        let one = |k: &Known| {
            let points = by_name.remove(k.name)?;
            Some(Series { name: k.name.into(), label: k.label.into(), hue: k.hue, points })
        };
        let series: Vec<Series> = known.iter().filter_map(one).collect();
        if !series.is_empty() {
            panels.push((title.to_string(), *unit, series));
        }
    }
    // The page has a table of these.
    let by_kind = |name: &str| ["eval/f1/", "eval/n/", "withheld/"].iter().any(|group| name.starts_with(group));
    for (i, (name, points)) in by_name.into_iter().filter(|(name, _)| !by_kind(name)).enumerate() {
        let series = Series { name: name.into(), label: name.into(), hue: i % HUES, points };
        panels.push((name.into(), Unit::Plain, vec![series]));
    }
    // One step makes no curve.
    let one = records.iter().all(|r| r.step == records[0].step);
    let (flat, curves): (Vec<_>, Vec<_>) =
        panels.into_iter().partition(|(.., series)| one || series.iter().all(is_flat));
    let mut html = String::new();
    if !curves.is_empty() {
        html.push_str("<div class=\"panels\">");
        curves.iter().for_each(|(title, unit, series)| panel(&mut html, title, *unit, series));
        html.push_str("</div>");
    }
    if !flat.is_empty() {
        html.push_str("<p class=\"flat\">");
        html.push_str(if one { "" } else { "The same at every step: " });
        for (i, (title, unit, series)) in flat.iter().enumerate() {
            let _ = write!(html, "{}{}", if i > 0 { " · " } else { "" }, Escaped(title));
            for (j, s) in series.iter().enumerate() {
                html.push_str(if j > 0 { ", " } else { ": " });
                let label = if series.len() > 1 { s.label.as_str() } else { "" };
                let last = s.points.last().map_or(f64::NAN, |p| p.1);
                let _ = write!(html, "{} <b title=\"{}\">{}</b>", Escaped(label), Escaped(&s.name), value(last, *unit));
            }
        }
        html.push_str("</p>");
    }
    html
}

/// Whether a curve would be a level line.
fn is_flat(s: &Series) -> bool {
    s.points.len() > 1 && s.points.iter().all(|p| p.1.is_finite() && p.1 == s.points[0].1)
}

const WIDTH: f64 = 400.0;
const HEIGHT: f64 = 190.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;
/// A path with more points than this says nothing more to the eye; neighbours are averaged.
const MAX_POINTS: usize = 500;
/// From this many points on a running mean is drawn over the raw curve.
const SMOOTH_FROM: usize = 30;

/// The curves as they are drawn: with fewer points, and those that are the same as one.
fn drawn(series: &[Series]) -> Vec<Series> {
    let mut out: Vec<Series> = Vec::new();
    for s in series {
        match out.iter_mut().find(|o| o.points.len() > 1 && o.points == s.points) {
            Some(same) => {
                same.label += &format!(" = {}", s.label);
                same.name += &format!(" · {}", s.name);
            }
            None => out.push(s.clone()),
        }
    }
    out.iter_mut().for_each(|s| s.points = thin(&s.points, MAX_POINTS));
    out
}

/// The curve to read: the running mean of one with many points, or else itself.
fn read(s: &Series) -> Option<Vec<(f64, f64)>> {
    (s.points.len() >= SMOOTH_FROM && !AS_LOGGED.contains(&s.name.as_str())).then(|| running_mean(&s.points))
}

/// Where a figure began and where it is, as its curve reads.
pub(super) fn ends(values: &[f64]) -> Option<(f64, f64)> {
    let points: Vec<(f64, f64)> = values.iter().enumerate().map(|(i, y)| (i as f64, *y)).collect();
    let began = match values.len() >= SMOOTH_FROM {
        true => values[..values.len() / 20].iter().sum::<f64>() / (values.len() / 20) as f64,
        false => *values.first()?,
    };
    let is = if values.len() >= SMOOTH_FROM { running_mean(&points) } else { points };
    Some((began, is.last()?.1))
}

/// The width of a label of ticks, in the panel's units; on the safe side.
fn width(label: &str) -> f64 {
    6.3 * label.chars().count() as f64
}

fn panel(html: &mut String, title: &str, unit: Unit, series: &[Series]) {
    let shared = series.len() > 1;
    let series = drawn(series);
    let finite = || series.iter().flat_map(|s| &s.points).filter(|p| p.1.is_finite());
    let fold = |f: fn(f64, f64) -> f64, pick: fn(&(f64, f64)) -> f64| finite().map(pick).reduce(f);
    let xs = (fold(f64::min, |p| p.0), fold(f64::max, |p| p.0));
    let ys = (fold(f64::min, |p| p.1), fold(f64::max, |p| p.1));
    let _ = write!(html, "<figure class=\"panel\"><figcaption><b>{}</b><span class=\"legend\">", Escaped(title));
    for s in &series {
        let smooth = read(s);
        let last = smooth.as_ref().unwrap_or(&s.points).iter().rev().find(|p| p.1.is_finite());
        let last = last.map_or("-".into(), |p| value(p.1, unit));
        let label = if shared { s.label.as_str() } else { "" };
        let _ = write!(html, "<span class=\"key h{}\">{} <i>{last}</i></span>", s.hue, Escaped(label));
    }
    html.push_str("</span></figcaption>");
    let ((Some(x0), Some(x1)), (Some(y0), Some(y1))) = (xs, ys) else {
        html.push_str("<p class=\"none\">no finite value</p>");
        names(html, title, &series);
        return;
    };
    let y_ticks = match unit {
        // A level line of a share stands on the scale of shares.
        Unit::Percent if y0 == y1 && (0.0..=1.0).contains(&y0) => ticks(0.0, 1.0, 4),
        _ => ticks(y0, y1, 4),
    };
    let (y0, y1) = (y_ticks[0], y_ticks[y_ticks.len() - 1]);
    let (x0, x1) = if x1 > x0 { (x0, x1) } else { (x0 - 0.5, x0 + 0.5) };
    let labels: Vec<String> = y_ticks.iter().map(|&t| tick_label(t, y_ticks[1] - y_ticks[0], unit)).collect();
    let left = labels.iter().map(|l| width(l)).fold(24.0, f64::max) + 10.0;
    let px = |x: f64| left + (x - x0) / (x1 - x0) * (WIDTH - left - RIGHT);
    let py = |y: f64| HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let _ = write!(
        html,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\" data-frame=\"{left} {RIGHT} {TOP} \
         {BOTTOM} {x0} {x1} {y0} {y1}\" data-percent=\"{}\" data-series=\"{}\">",
        Escaped(title),
        u8::from(unit == Unit::Percent),
        Escaped(&series_json(&series))
    );
    for (&t, label) in y_ticks.iter().zip(&labels) {
        let y = py(t);
        let _ = write!(
            html,
            "<path class=\"grid\" d=\"M{left} {y:.1}H{:.1}\"/><text class=\"ty\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
            WIDTH - RIGHT,
            left - 6.0,
            y + 3.5,
        );
    }
    for t in ticks(x0, x1, 5).into_iter().filter(|t| t.fract() == 0.0 && (x0..=x1).contains(t)) {
        let (label, half) = (t.to_string(), width(&t.to_string()) / 2.0);
        let x = px(t).min(WIDTH - half);
        let _ = write!(html, "<text class=\"tx\" x=\"{x:.1}\" y=\"{:.1}\">{label}</text>", HEIGHT - 7.0);
    }
    for (i, s) in series.iter().enumerate() {
        let path = |points: &[(f64, f64)]| {
            let mut d = String::new();
            let mut pen = 'M';
            for &(x, y) in points {
                if y.is_finite() {
                    let _ = write!(d, "{pen}{:.1} {:.1}", px(x), py(y));
                }
                pen = if y.is_finite() { 'L' } else { 'M' };
            }
            d
        };
        let smooth = read(s);
        // Dashes let a curve that runs with another one be seen.
        let dashed = if i > 0 { " over" } else { "" };
        let kind = if smooth.is_some() { " raw" } else { dashed };
        let _ = write!(html, "<path class=\"line h{}{kind}\" d=\"{}\"/>", s.hue, path(&s.points));
        if let Some(smooth) = smooth {
            let _ = write!(html, "<path class=\"line h{}{dashed}\" d=\"{}\"/>", s.hue, path(&smooth));
        } else if s.points.len() < SMOOTH_FROM {
            for p in s.points.iter().filter(|p| p.1.is_finite()) {
                let _ = write!(
                    html,
                    "<circle class=\"h{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.2\"/>",
                    s.hue,
                    px(p.0),
                    py(p.1)
                );
            }
        }
    }
    html.push_str("</svg>");
    names(html, title, &series);
}

/// Ends a panel with the names that its curves have in the metrics, unless its title says as much.
fn names(html: &mut String, title: &str, series: &[Series]) {
    let names: Vec<&str> = series.iter().map(|s| s.name.as_str()).filter(|name| *name != title).collect();
    let _ = write!(html, "<small class=\"names\">{}</small></figure>", Escaped(&names.join(" · ")));
}

/// `[[label, hue, [[x, y], ...]], ...]`, for the page's tooltip.
fn series_json(series: &[Series]) -> String {
    let all: Vec<serde_json::Value> = series
        .iter()
        .map(|s| {
            let points: Vec<[f64; 2]> =
                s.points.iter().filter(|p| p.1.is_finite()).map(|&(x, y)| [x, round_to(y, 5)]).collect();
            serde_json::json!([s.label, s.hue, points])
        })
        .collect();
    serde_json::Value::from(all).to_string()
}

fn round_to(y: f64, digits: i32) -> f64 {
    if y == 0.0 {
        return y;
    }
    let scale = 10f64.powi(digits - 1 - y.abs().log10().floor() as i32);
    let r = (y * scale).round() / scale;
    if r.is_finite() { r } else { y }
}

/// Averages neighbours until at most `max` points are left.
fn thin(points: &[(f64, f64)], max: usize) -> Vec<(f64, f64)> {
    let per = points.len().div_ceil(max).max(1);
    let mean = |c: &[(f64, f64)]| {
        let n = c.len() as f64;
        (c[c.len() - 1].0, c.iter().map(|p| p.1).sum::<f64>() / n)
    };
    if per == 1 { points.to_vec() } else { points.chunks(per).map(mean).collect() }
}

/// An exponential mean over about a twentieth of the run, corrected for its start; skips what is not finite.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 2.0 / (points.len() as f64 / 20.0 + 2.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut out = Vec::with_capacity(points.len());
    for &(x, y) in points.iter().filter(|p| p.1.is_finite()) {
        sum = sum * keep + y;
        weight = weight * keep + 1.0;
        out.push((x, sum / weight));
    }
    out
}

/// About `n` round values that cover `[low, high]`: steps of 1, 2 or 5 times a power of ten. At least two.
fn ticks(low: f64, high: f64, n: usize) -> Vec<f64> {
    let size = low.abs().max(high.abs());
    // A constant still needs a scale: one that starts at 0 where that is near.
    let (low, high) = match high - low > size * 1e-9 {
        true => (low, high),
        false if size == 0.0 => (0.0, 1.0),
        false => (low - size * 0.5, high + size * 0.5),
    };
    let raw = (high - low) / n as f64;
    let magnitude = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * magnitude >= raw * 0.999).unwrap_or(10.0) * magnitude;
    let first = (low / step + 1e-9).floor() as i64;
    let last = ((high / step - 1e-9).ceil() as i64).max(first + 1);
    (first..=last).map(|i| i as f64 * step).collect()
}

fn tick_label(t: f64, step: f64, unit: Unit) -> String {
    let (t, step, sign) = if unit == Unit::Percent { (t * 100.0, step * 100.0, "%") } else { (t, step, "") };
    let decimals = (-step.log10().floor()).clamp(0.0, 12.0) as usize;
    match t.abs() {
        _ if decimals > 4 && t.abs() < step / 2.0 => format!("0{sign}"),
        a if decimals > 4 || a >= 1e6 => {
            // As many digits as tell one tick from the next.
            let digits = (a.log10().floor() - step.log10().floor()).clamp(0.0, 12.0) as usize;
            format!("{t:.digits$e}{sign}")
        }
        a if a >= 1e4 => format!("{}k{sign}", round_to(t / 1e3, 3)),
        _ => format!("{t:.decimals$}{sign}"),
    }
}

/// A figure as it reads beside a label.
pub(super) fn value(v: f64, unit: Unit) -> String {
    match v.abs() {
        a if !a.is_finite() => "-".into(),
        _ if unit == Unit::Percent => format!("{:.1}%", v * 100.0),
        a if a != 0.0 && !(1e-3..1e6).contains(&a) => format!("{v:.2e}"),
        a if a >= 100.0 => format!("{v:.0}"),
        _ => format!("{}", round_to(v, 3)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(step: u64, values: &[(&str, f64)]) -> Record {
        Record { step, wall_s: 0.0, values: values.iter().map(|(k, v)| (k.to_string(), *v)).collect() }
    }

    #[test]
    fn draws_known_figures_together_and_others_alone() {
        let r = [record(0, &[("eval/f1", 0.3), ("eval/em", 0.2), ("<mine>", 1.0)]), record(9, &[("eval/f1", 0.6)])];
        let html = charts(&r);
        assert_eq!(html.matches("<figure").count(), 2);
        assert!(html.contains("F1 <i>60.0%</i>") && html.contains("&lt;mine&gt;") && !html.contains("<mine>"));
        assert!(html.contains("<small class=\"names\">eval/f1 · eval/em</small>"), "{html}");
    }

    #[test]
    fn what_never_changes_is_a_line_of_text_and_takes_no_panel() {
        let figures = |void: f64, lr: f64| [("episodes/void", void), ("optim/lr", lr), ("eval/format", 1.0)];
        let html = charts(&[record(1, &figures(0.0, 0.5)), record(2, &figures(0.0, 0.25))]);
        assert_eq!(html.matches("<figure").count(), 1);
        let flat = html.split("class=\"flat\"").nth(1).unwrap();
        assert!(
            flat.contains("<b title=\"episodes/void\">0</b>") && flat.contains("<b title=\"eval/format\">100.0%</b>")
        );
        assert!(!flat.contains("optim/lr"));
        // One step says nothing about what changes, and makes no curve.
        let one = charts(&[record(1, &figures(0.0, 0.5))]);
        assert!(!one.contains("<figure") && !one.contains("same at every step"), "{one}");
        assert_eq!(one.matches("<b title=").count(), figures(0.0, 0.5).len());
    }

    #[test]
    fn a_gap_where_there_is_no_number() {
        let r: Vec<Record> =
            [1.0, 2.0, f64::NAN, 3.0].iter().enumerate().map(|(i, &v)| record(i as u64, &[("sft/loss", v)])).collect();
        let html = charts(&r);
        let d = html.split("class=\"line h7\" d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!((d.matches('M').count(), d.matches('L').count()), (2, 1));
        for v in [f64::NAN, -1.7e308] {
            assert!(charts(&[0, 1].map(|step| record(step, &[("loss", v)]))).contains("no finite value"));
        }
    }

    #[test]
    fn what_is_read_is_the_smooth_curve_and_what_is_set_stays_as_it_was_logged() {
        let noisy = |i: u64| if i.is_multiple_of(2) { 1.0 } else { 3.0 };
        let r: Vec<Record> =
            (0..400).map(|i| record(i, &[("reward/mean", noisy(i)), ("optim/lr", noisy(i))])).collect();
        let html = charts(&r);
        let legend = |title: &str| {
            let panel = html.split(title).nth(1).unwrap();
            panel.split("<i>").nth(1).unwrap().split("</i>").next().unwrap().parse::<f64>().unwrap()
        };
        assert!((legend("<b>Reward") - 2.0).abs() < 0.1 && legend("<b>Learning rate") == 3.0, "{html}");
        assert_eq!(html.matches(" raw\"").count(), 1);
        let (began, is) = ends(&(0..400).map(noisy).collect::<Vec<_>>()).unwrap();
        assert!((began - 2.0).abs() < 1e-9 && (is - 2.0).abs() < 0.1, "{began} {is}");
        assert_eq!((ends(&[]), ends(&[1.0, 5.0])), (None, Some((1.0, 5.0))));
    }

    #[test]
    fn curves_that_are_the_same_are_one_and_others_are_told_apart() {
        let r = |em: f64| [0, 1].map(|s| record(s, &[("eval/f1", s as f64 * 0.5), ("eval/em", s as f64 * em)]));
        let same = charts(&r(0.5));
        assert!(same.contains("F1 = exact match <i>50.0%</i>") && same.matches("class=\"line").count() == 1, "{same}");
        assert!(same.contains("eval/f1 · eval/em"), "{same}");
        let apart = charts(&r(0.25));
        assert!(apart.contains("class=\"line h0\"") && apart.contains("class=\"line h1 over\""), "{apart}");
    }

    /// Of each label the place where it begins and where it ends, in the panel's units.
    #[test]
    fn labels_of_ticks_stay_within_the_panel() {
        for size in [1e-7, 1.0, 12_345.0, 3.4e9] {
            let r = [0, 160_000].map(|s| record(s, &[("loss", size * (1.0 + s as f64))]));
            let html = charts(&r);
            let labels = |class: &str| -> Vec<(f64, f64)> {
                let class = format!("class=\"{class}\" x=\"");
                let texts = html.split(class.as_str()).skip(1);
                let one = |t: &str| {
                    let label = t.split('>').nth(1).unwrap().split('<').next().unwrap();
                    (t.split('"').next().unwrap().parse().unwrap(), width(label))
                };
                texts.map(one).collect()
            };
            assert!(labels("ty").len() > 1 && labels("tx").len() > 1, "{html}");
            assert!(labels("ty").iter().all(|(x, w)| x - w >= 0.0), "{html}");
            assert!(labels("tx").iter().all(|(x, w)| x - w / 2.0 >= 0.0 && x + w / 2.0 <= WIDTH), "{html}");
        }
    }

    #[test]
    fn ticks_by_hand() {
        assert_eq!(ticks(0.0, 1.0, 4), [0.0, 0.5, 1.0]);
        assert_eq!(ticks(3.0, 97.0, 4), [0.0, 50.0, 100.0]);
        assert_eq!(ticks(0.0, 0.0, 4)[0], 0.0);
        let labels = |low, high| -> Vec<String> {
            let t = ticks(low, high, 4);
            t.iter().map(|&v| tick_label(v, t[1] - t[0], Unit::Plain)).collect()
        };
        assert_eq!(labels(0.0, 2e-4), ["0", "5e-5", "1.0e-4", "1.5e-4", "2.0e-4"]);
        assert_eq!(labels(0.0, 1.0), ["0.0", "0.5", "1.0"]);
    }

    proptest! {
        #[test]
        fn ticks_cover_what_they_are_given(a in -1e12..1e12f64, width in prop_oneof![Just(0.0), 1e-9..1e9f64]) {
            let t = ticks(a, a + width, 4);
            prop_assert!((2..=12).contains(&t.len()), "{:?}", t);
            let slack = (t[1] - t[0]) * 1e-3;
            prop_assert!(t[0] <= a + slack && t[t.len() - 1] >= a + width - slack, "{:?}", t);
        }

        #[test]
        fn any_numbers_draw(values in proptest::collection::vec(proptest::num::f64::ANY, 0..80)) {
            let r: Vec<Record> = values.iter().enumerate().map(|(i, &v)| record(i as u64, &[("loss", v)])).collect();
            let html = charts(&r);
            prop_assert!(!html.contains("NaN") && !html.contains("inf,"));
        }
    }
}
