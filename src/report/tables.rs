//! What is read before any curve: what the page is of, and the scores by kind of question.

use super::charts::{Unit, value};
use super::escape::Escaped;
use super::{Record, kinds};
use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The model, the task, the seed and the day of the run in `dir`, as far as they are known.
pub(super) fn facts(html: &mut String, dir: &Path, config: &str) {
    let config: toml::Table = config.parse().unwrap_or_default();
    let at = |section: &str, key: &str| config.get(section)?.get(key).cloned();
    let text = |section: &str, key: &str| Some(at(section, key)?.as_str()?.to_owned()).filter(|t| !t.is_empty());
    let task = text("task", "kind").map(|kind| match (kind.as_str(), text("task", "eval").or(text("task", "train"))) {
        ("mat", Some(file)) => format!("mat, {file}"),
        _ => kind,
    });
    let written = dir.join("metrics.jsonl").metadata().and_then(|m| m.modified()).ok();
    let facts = [
        ("model", text("model", "path")),
        ("task", task),
        ("seed", at("run", "seed").map(|seed| seed.to_string())),
        ("last measured", written.map(date)),
    ];
    html.push_str("<p class=\"facts\">");
    for (what, fact) in facts.iter().filter_map(|(what, fact)| Some((what, fact.as_ref()?))) {
        let _ = write!(html, "<span>{what} <b>{}</b></span>", Escaped(fact));
    }
    html.push_str("</p>");
}

/// `2026-11-25 20:10 UTC`; a time before 1970 reads as 1970.
fn date(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (mut days, minutes) = (seconds / 86_400, seconds % 86_400 / 60);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02} {:02}:{:02} UTC", days + 1, minutes / 60, minutes % 60)
}

/// F1 of the held-out questions by kind: before the first step, after the last that was measured, and then with the images of
/// the tool withheld, where that was asked. Nothing where nothing was measured.
pub(super) fn by_kind(html: &mut String, records: &[Record]) {
    let kinds = kinds(records);
    let figures = |figure: &str| -> Vec<(u64, f64)> {
        let of = |r: &Record| Some((r.step, r.values.iter().find(|(name, _)| name == figure)?.1));
        records.iter().filter_map(of).collect()
    };
    let all = figures("eval/f1");
    let (Some(first), Some(last), false) = (all.first(), all.last(), kinds.is_empty()) else { return };
    let (before, after) = (first.0, last.0);
    let at = |figure: &str, step: u64| figures(figure).iter().rev().find(|f| f.0 == step).map(|f| f.1);
    let withheld = at("withheld/f1", after).is_some();
    html.push_str("<table><tr><th>held-out F1</th><th>questions</th>");
    match before == after {
        true => html.push_str("<th>F1</th>"),
        false => drop(write!(html, "<th>after step {before}</th><th>after step {after}</th>")),
    }
    html.push_str(if withheld { "<th>images withheld</th></tr>" } else { "</tr>" });
    let mut row = |name: &str, class: &str, questions: Option<f64>, figure: &str| {
        let percent = |v: Option<f64>| v.map_or("-".into(), |v| value(v, Unit::Percent));
        let _ = write!(html, "<tr{class}><td>{}</td>", Escaped(name));
        let _ = write!(html, "<td>{}</td>", questions.map_or("-".into(), |n| format!("{n}")));
        let (was, is) = (at(&format!("eval/{figure}"), before), at(&format!("eval/{figure}"), after));
        if before != after {
            let _ = write!(html, "<td>{}</td>", percent(was));
        }
        let change = match (was, is) {
            (Some(was), Some(is)) if is > was => " class=\"up\"",
            (Some(was), Some(is)) if is < was => " class=\"down\"",
            _ => "",
        };
        let _ = write!(html, "<td{change}>{}</td>", percent(is));
        if withheld {
            let _ = write!(html, "<td>{}</td>", percent(at(&format!("withheld/{figure}"), after)));
        }
        html.push_str("</tr>");
    };
    let questions = |kind: &String| at(&format!("eval/n/{kind}"), after);
    row("all", " class=\"all\"", kinds.iter().map(questions).sum(), "f1");
    kinds.iter().for_each(|kind| row(kind, "", questions(kind), &format!("f1/{kind}")));
    html.push_str("</table>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (seconds, day) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59 UTC"),
            (1_735_689_599, "2024-12-31 23:59 UTC"),
            (1_795_637_442, "2026-11-25 20:10 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(date(UNIX_EPOCH + Duration::from_secs(seconds)), day);
        }
    }

    #[test]
    fn the_table_has_each_kind_before_and_after() {
        let record = |step, values: &[(&str, f64)]| Record {
            step,
            wall_s: 0.0,
            values: values.iter().map(|(k, v)| (k.to_string(), *v)).collect(),
        };
        let figures = |f1, dark, turned| {
            [
                ("eval/f1", f1),
                ("eval/f1/dark", dark),
                ("eval/f1/<turned>", turned),
                ("eval/n/dark", 3.0),
                ("eval/n/<turned>", 1.0),
            ]
        };
        let mut html = String::new();
        by_kind(&mut html, &[record(0, &[("reward/mean", 1.0)])]);
        assert_eq!(html, "");
        by_kind(&mut html, &[record(0, &figures(0.25, 0.0, 1.0))]);
        assert!(html.contains("<th>F1</th>") && !html.contains("withheld"), "{html}");
        html.clear();
        let withheld = [("withheld/f1", 0.0), ("withheld/f1/dark", 0.0)];
        let records = [
            record(0, &figures(0.25, 0.0, 1.0)),
            record(9, &[("reward/mean", 1.0)]),
            record(20, &figures(0.5, 2.0 / 3.0, 0.0)),
            record(20, &withheld),
        ];
        by_kind(&mut html, &records);
        for row in [
            "<td>all</td><td>4</td><td>25.0%</td><td class=\"up\">50.0%</td><td>0.0%</td>",
            "<td>dark</td><td>3</td><td>0.0%</td><td class=\"up\">66.7%</td><td>0.0%</td>",
            "<td>&lt;turned&gt;</td><td>1</td><td>100.0%</td><td class=\"down\">0.0%</td><td>-</td>",
            "<th>after step 0</th><th>after step 20</th><th>images withheld</th>",
        ] {
            assert!(html.contains(row), "{row}\n{html}");
        }
    }
}
