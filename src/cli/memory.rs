//! The table of `varft doctor`: what models take to train, side by side.

use super::session::model_folder;
use crate::Result;
use crate::device::{DType, Device};
use crate::model::{Config, Preset};
use crate::train::RunConfig;
use crate::train::memory::{CARDS, Part, Plan, Target, ways};
use crate::train::room::Work;
use std::fmt::Write;
use std::path::Path;

/// Models by name: the published sizes, and the one in a folder.
///
/// # Errors
/// Where the folder is no model's, nor a run's.
pub(super) fn models(dir: Option<&Path>) -> Result<Vec<(String, Config)>> {
    let mut all: Vec<_> = [Preset::B3, Preset::B7].map(|p| (p.to_string(), p.config())).into();
    if let Some(dir) = dir {
        let name = dir.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
        all.push((name, Config::load(&model_folder(dir)?)?));
    }
    Ok(all)
}

/// A model on a device.
struct Column<'a> {
    model: &'a str,
    config: &'a Config,
    /// `here`, or which card.
    place: &'a str,
    plan: Plan,
}

/// A column for each model on this device (`card`, or else `host`) and, where there is no card, on those that there are; then, of
/// every column that does not fit, what would.
pub(super) fn table(config: &RunConfig, models: &[(String, Config)], card: Option<&Device>, host: &Device) -> String {
    let here = card.unwrap_or(host);
    let mut targets = vec![("here", Target::of(here))];
    if card.is_none() {
        targets.extend(CARDS.map(|(name, free)| (name, Target::card(free))));
    }
    let mut columns = Vec::new();
    for (model, shape) in models {
        for &(place, target) in &targets {
            let plan = Plan::compute(shape, config, target, Work::Episodes);
            columns.push(Column { model, config: shape, place, plan });
        }
    }
    let mut out = format!("memory of varft train in GiB; here: {here:?}\n");
    let mut row = |name: &str, cell: &dyn Fn(&Column<'_>) -> String| {
        let mut line = format!("{name:<17}");
        for column in &columns {
            let width = column.model.len().max(7);
            let _ = write!(line, " {:>width$}", cell(column));
        }
        let _ = writeln!(out, "{}", line.trim_end());
    };
    let gib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 30));
    let word = |yes: bool, [one, other]: [&str; 2]| if yes { one.to_owned() } else { other.to_owned() };
    row("model", &|c| c.model.to_owned());
    row("on", &|c| c.place.to_owned());
    row("in", &|c| word(c.plan.target.float == DType::F32, ["f32", "bf16"]));
    for part in Part::ALL {
        if columns.iter().any(|c| c.plan.bytes(part) > 0) {
            row(part.name(), &|c| match c.plan.bytes(part) {
                0 => "-".into(),
                bytes => gib(bytes as u64),
            });
        }
    }
    row("in all", &|c| gib(c.plan.total() as u64));
    row("free", &|c| c.plan.target.free.map_or("?".into(), gib));
    row("fits", &|c| word(c.plan.fits(), ["yes", "no"]));
    row("layers kept", &|c| format!("{}/{}", c.plan.kept[0].text, c.plan.kept[1].text));
    row("KV tokens", &|c| c.plan.kv_tokens.to_string());
    for c in columns.iter().filter(|c| !c.plan.fits()) {
        let place = if c.place == "here" { "here".to_owned() } else { format!("on a card of {}", c.place) };
        let _ = writeln!(out, "{} {place}: {}", c.model, ways(c.config, config, c.plan.target, Work::Episodes).told());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other_and_what_does_not_fit_is_said() {
        let config = RunConfig::read(None, &["model.freeze_vision=false".into()]).unwrap();
        let models = models(None).unwrap();
        let table = table(&config, &models, None, &Device::cpu(1));
        let lines: Vec<&str> = table.lines().collect();
        let at = lines.iter().position(|l| l.starts_with("in all")).unwrap();
        // Every cell ends where the one above it does.
        let ends = |l: &str| -> Vec<usize> {
            let bytes = l.as_bytes();
            (18..l.len()).filter(|&i| bytes[i] != b' ' && bytes.get(i + 1).is_none_or(|b| *b == b' ')).collect()
        };
        let numbers = lines[4..=at].iter().filter(|l| !l.starts_with("on ")).map(|l| ends(l));
        let all: Vec<_> = numbers.collect();
        assert!(all.iter().all(|e| *e == all[0] && e.len() == 6), "{table}");
        let cell = |row: &str, column: usize| {
            let line = lines.iter().find(|l| l.starts_with(row)).unwrap();
            line[17..].split_whitespace().nth(column).unwrap().to_owned()
        };
        assert_eq!(
            (cell("weights", 0), cell("weights", 1), cell("masters", 0)),
            ("14.0".into(), "7.0".into(), "-".into())
        );
        assert_eq!([1, 2, 4, 5].map(|i| cell("fits", i)), ["yes", "yes", "no", "no"], "{table}");
        assert!(
            table.contains("\n7b on a card of 80 GB: not even ") && table.contains("\n7b on a card of 141 GB: set ")
        );
    }
}
