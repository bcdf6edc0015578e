use super::EventWriter;
use crate::model::write_atomically;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// One line of `metrics.jsonl`. Several lines may carry one step (training and evaluation).
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Completed optimizer steps when it was written.
    pub step: u64,
    /// Seconds the run has been going, over all its sessions.
    pub wall_s: f64,
    /// Named figures, in the order in which they were logged. A figure that was not finite reads as NaN.
    pub values: Vec<(String, f64)>,
}

/// The metrics of a run: appended to `metrics.jsonl` line by line, and to TensorBoard events if wanted.
///
/// A line is one write, so a killed run loses at most the line it was writing.
pub struct MetricsLog {
    file: File,
    path: PathBuf,
    tensorboard: Option<EventWriter>,
    started: Instant,
    wall_before: f64,
}

impl MetricsLog {
    /// Opens the log of the run in `run_dir` (made if missing) after its step `step`: lines of later steps, written by a
    /// session that was lost after its last checkpoint, are cut, as is an unfinished last line. 0 keeps what was
    /// logged before the first step. A new run starts with an empty log.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read or written.
    pub fn open(run_dir: &Path, step: u64, tensorboard: bool) -> Result<MetricsLog> {
        std::fs::create_dir_all(run_dir).map_err(|e| Error::io("create the run's folder", run_dir, e))?;
        let path = run_dir.join("metrics.jsonl");
        let kept: Vec<Record> = read_metrics(run_dir)?.into_iter().filter(|r| r.step <= step).collect();
        let text: String = kept.iter().map(line).collect();
        write_atomically(&path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("write", &path, e)))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io("open", &path, e))?;
        let tensorboard = match tensorboard {
            true => Some(EventWriter::create(&run_dir.join("tensorboard"), step)?),
            false => None,
        };
        let wall_before = kept.last().map_or(0.0, |r| r.wall_s);
        Ok(MetricsLog { file, path, tensorboard, started: Instant::now(), wall_before })
    }

    /// Seconds the run has been going, over all its sessions.
    pub fn wall_s(&self) -> f64 {
        self.wall_before + self.started.elapsed().as_secs_f64()
    }

    /// Whether the file that is written to still lies where it was opened: not where it, or its folder, was removed, renamed or
    /// replaced since. What is written then goes where nobody will find it.
    pub fn is_in_place(&self) -> bool {
        let id = |m: std::fs::Metadata| (m.dev(), m.ino());
        let here = self.file.metadata().map(id);
        here.is_ok_and(|here| self.path.metadata().map(id).is_ok_and(|there| there == here))
    }

    /// Appends one line. Names follow TensorBoard's habit, `group/figure`; [`super::write`] draws those that it knows
    /// together and every other one alone.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written.
    pub fn log(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let values_owned = values.iter().map(|(k, v)| (k.to_string(), *v)).collect();
        let text = line(&Record { step, wall_s: self.wall_s(), values: values_owned });
        self.file.write_all(text.as_bytes()).map_err(|e| Error::io("append to", &self.path, e))?;
        match &mut self.tensorboard {
            Some(t) => t.scalars(step, values),
            None => Ok(()),
        }
    }
}

fn line(r: &Record) -> String {
    let mut m = Map::new();
    m.insert("step".into(), r.step.into());
    m.insert("wall_s".into(), ((r.wall_s * 1e3).round() / 1e3).into());
    for (k, v) in &r.values {
        m.insert(k.clone(), (*v).into()); // not finite becomes null
    }
    format!("{}\n", Value::Object(m))
}

/// The lines of `run_dir/metrics.jsonl`, in file order; none when there is no such file. An unfinished last line is
/// left out.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::Input`] when a finished line is not one of ours.
pub fn read_metrics(run_dir: &Path) -> Result<Vec<Record>> {
    let path = run_dir.join("metrics.jsonl");
    let mut bytes = Vec::new();
    match crate::files::open(&path) {
        Ok(mut f) => f.read_to_end(&mut bytes).map_err(|e| Error::io("read", &path, e))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("open", &path, e)),
    };
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
    let mut out = Vec::new();
    for (n, text) in bytes[..whole].split(|&b| b == b'\n').enumerate().filter(|(_, t)| !t.is_empty()) {
        let bad = |what: String| {
            Error::input(
                format!("{}, line {}: {what}", path.display(), n + 1),
                "delete that line, or the file if the curves don't matter",
            )
        };
        let object: Map<String, Value> = serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;
        let step = object.get("step").and_then(Value::as_u64).ok_or_else(|| bad("no `step`".into()))?;
        let wall_s = object.get("wall_s").and_then(Value::as_f64).unwrap_or(0.0);
        let values = object.into_iter().filter(|(k, _)| k != "step" && k != "wall_s");
        let values = values.map(|(k, v)| (k, v.as_f64().unwrap_or(f64::NAN))).collect();
        out.push(Record { step, wall_s, values });
    }
    Ok(out)
}

/// The kinds of held-out questions that `records` have figures of (`eval/f1/KIND`), in order.
pub fn kinds(records: &[Record]) -> Vec<String> {
    let names = records.iter().flat_map(|r| &r.values).filter_map(|(name, _)| name.strip_prefix("eval/f1/"));
    names.collect::<BTreeSet<_>>().into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(dir: &Path) -> Vec<u64> {
        read_metrics(dir).unwrap().iter().map(|r| r.step).collect()
    }

    #[test]
    fn appends_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), 0, true).unwrap();
        log.log(1, &[("reward", 0.5), ("kl", f64::INFINITY)]).unwrap();
        log.log(2, &[("reward", 0.1 + 0.2)]).unwrap();
        let got = read_metrics(dir.path()).unwrap();
        assert_eq!(got.len(), 2);
        assert!(got[0].values[1].1.is_nan());
        assert_eq!(got[1].values, [("reward".to_string(), 0.1 + 0.2)]); // to the bit
        assert_eq!(std::fs::read_dir(dir.path().join("tensorboard")).unwrap().count(), 1);
    }

    #[test]
    fn resume_cuts_later_steps_and_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), 0, false).unwrap();
        for step in 0..=5 {
            log.log(step, &[("reward", step as f64)]).unwrap();
        }
        log.file.write_all(b"{\"step\":6,\"rew").unwrap();
        drop(log);
        assert_eq!(steps(dir.path()), [0, 1, 2, 3, 4, 5]);
        let before = read_metrics(dir.path()).unwrap()[3].wall_s;
        let mut log = MetricsLog::open(dir.path(), 3, false).unwrap();
        assert!(log.wall_s() >= before);
        log.log(4, &[("reward", 9.0)]).unwrap();
        assert_eq!(steps(dir.path()), [0, 1, 2, 3, 4]);
    }

    /// What goes on after a resume must not alter what was there: lines are read and written again.
    #[test]
    fn opening_the_log_again_changes_no_digit_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), 0, false).unwrap();
        let mut bits = 1u64;
        let mut figures = Vec::new();
        while figures.len() < 4000 {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let anything = f64::from_bits(bits);
            // Every magnitude that a double has, and those that figures have.
            figures.extend([(bits >> 11) as f64 * 2f64.powi(-53), anything].into_iter().filter(|x| x.is_finite()));
        }
        for (step, values) in figures.chunks(20).enumerate() {
            let names: Vec<String> = (0..values.len()).map(|i| format!("figure/{i}")).collect();
            let values: Vec<(&str, f64)> = names.iter().map(String::as_str).zip(values.iter().copied()).collect();
            log.log(step as u64, &values).unwrap();
        }
        let written = std::fs::read(dir.path().join("metrics.jsonl")).unwrap();
        let read: Vec<f64> =
            read_metrics(dir.path()).unwrap().iter().flat_map(|r| r.values.iter().map(|v| v.1)).collect();
        let altered = read.iter().zip(&figures).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        assert!(
            read.len() == figures.len() && altered == 0,
            "{altered} of {} figures read back altered",
            figures.len()
        );
        drop(MetricsLog::open(dir.path(), u64::MAX, false).unwrap());
        assert!(std::fs::read(dir.path().join("metrics.jsonl")).unwrap() == written);
    }

    #[test]
    fn a_spoilt_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metrics.jsonl"), "{\"step\":1}\n{\"stop\":2}\n").unwrap();
        let e = read_metrics(dir.path()).unwrap_err().to_string();
        assert!(e.contains("metrics.jsonl, line 2"), "{e}");
    }
}
