use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A progress bar on standard error with the figures that matter beside it.
///
/// Where standard error is not a terminal (a log file, CI) it prints a plain line instead, at most one per ten seconds
/// and always the first and the last. Both say how long the rest will take, once something is done.
pub struct Progress {
    bar: ProgressBar,
    what: String,
    plain: Option<Plain>,
    pace: Arc<Mutex<Pace>>,
}

/// How long a unit takes, as a mean that forgets: what was done long ago (the measurement before the first step of a run) says
/// little about what is to come.
struct Pace {
    at: Instant,
    done: u64,
    /// So many units must be done before the pace says something: the first ones are slow, or, of many at once, many's.
    few: u64,
    /// Units over which the weight of what was done falls to 1/e.
    memory: f64,
    units: f64,
    seconds: f64,
}

impl Pace {
    /// `total` units, `done` of them by now.
    fn new(done: u64, total: u64) -> Pace {
        let all = total.saturating_sub(done);
        let (memory, few) = ((all as f64 / 10.0).max(3.0), done + (all / 20).clamp(1, 8));
        Pace { at: Instant::now(), done, few, memory, units: 0.0, seconds: 0.0 }
    }

    /// `done` units were done at the time `at`.
    fn reached(&mut self, done: u64, at: Instant) {
        let more = done.saturating_sub(self.done) as f64;
        if more > 0.0 {
            let kept = (-more / self.memory).exp();
            self.units = self.units * kept + more;
            self.seconds = self.seconds * kept + at.saturating_duration_since(self.at).as_secs_f64();
            (self.at, self.done) = (at, done);
        }
    }

    /// How long the units up to `total` take at this pace; nothing where too few were done yet to tell, or none is left.
    fn left(&self, total: u64) -> Option<Duration> {
        let rest = total.checked_sub(self.done).filter(|n| *n > 0 && self.done >= self.few)?;
        let seconds = self.seconds / self.units * rest as f64;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// A duration in at most two units: `42 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`.
pub(super) fn duration(seconds: u64) -> String {
    match seconds {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min {} s", s / 60, s % 60),
        s @ 3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        s => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

struct Plain {
    last: Option<Instant>,
    started: Instant,
}

const EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// A bar for `total` units of `what` (`grpo`, `loading`), of which `done` were done before.
    pub fn new(what: &str, done: u64, total: u64) -> Progress {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr_with_hz(8) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target).with_position(done);
        let pace = Arc::new(Mutex::new(Pace::new(done, total)));
        if let Ok(style) = ProgressStyle::with_template("{prefix:>9} {bar:24} {pos}/{len} [{elapsed}{left}] {wide_msg}")
        {
            let pace = pace.clone();
            let left = move |_: &ProgressState, out: &mut dyn Write| {
                let pace = pace.lock().unwrap_or_else(PoisonError::into_inner);
                // Nobody reads the failure of a bar.
                let _ = pace.left(total).map_or(Ok(()), |d| write!(out, ", {} left", duration(d.as_secs())));
            };
            bar.set_style(style.progress_chars("█▌ ").with_key("left", left));
        }
        bar.set_prefix(what.to_string());
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(500)); // the clock goes on during a long step
        }
        let plain = (!terminal).then(|| Plain { last: None, started: Instant::now() });
        Progress { bar, what: what.to_string(), plain, pace }
    }

    /// `done` units are done; `figures` are names with values as they should read (`("reward", "0.41".into())`).
    pub fn set(&mut self, done: u64, figures: &[(&str, String)]) {
        let left = {
            let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
            pace.reached(done, Instant::now());
            self.bar.length().and_then(|total| pace.left(total))
        };
        self.bar.set_position(done);
        let text = figures.iter().map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join("  ");
        if let Some(plain) = &mut self.plain {
            let total = self.bar.length().unwrap_or(0);
            if plain.last.is_none_or(|t| t.elapsed() >= EVERY) || done == total {
                plain.last = Some(Instant::now());
                let gone = duration(plain.started.elapsed().as_secs());
                let left = left.map_or(String::new(), |d| format!(", {} left", duration(d.as_secs())));
                note!("{} {done}/{total} [{gone}{left}] {text}", self.what);
            }
        }
        self.bar.set_message(text);
    }

    /// What is under way, beside the bar until there are new figures; nothing where standard error is not a terminal.
    pub fn busy(&self, text: String) {
        self.bar.set_message(text);
    }

    /// A line above the bar.
    pub fn note(&self, text: &str) {
        match self.plain {
            Some(_) => note!("{text}"),
            None => self.bar.println(text),
        }
    }

    /// Ends the bar and leaves it on the screen.
    pub fn finish(self) {
        self.bar.abandon();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_the_pace_and_forgets_a_slow_start() {
        let start = Instant::now();
        let mut pace = Pace { at: start, ..Pace::new(20, 120) };
        assert_eq!(pace.left(120), None, "nothing is known yet");
        let mut at = start + Duration::from_secs(60);
        pace.reached(21, at);
        assert_eq!(pace.left(120), None, "one says too little");
        for done in 22..=25 {
            at += Duration::from_secs(60);
            pace.reached(done, at);
        }
        assert_eq!(pace.left(120), Some(Duration::from_secs(95 * 60)));
        for done in 26..=100 {
            at += Duration::from_secs(2);
            pace.reached(done, at);
            pace.reached(done, at + Duration::from_secs(1)); // the same again is no progress
        }
        let left = pace.left(120).unwrap().as_secs_f64();
        assert!((left - 40.0).abs() < 1.0, "{left}");
        pace.reached(120, at);
        assert_eq!(pace.left(120), None);
        // Where there are few in all, the first says something.
        let mut pace = Pace { at: start, ..Pace::new(0, 2) };
        pace.reached(1, start + Duration::from_secs(7));
        assert_eq!(pace.left(2), Some(Duration::from_secs(7)));
    }

    #[test]
    fn durations_read_as_a_person_says_them() {
        let texts = [0, 59, 185, 7805, 273_600].map(duration);
        assert_eq!(texts, ["0 s", "59 s", "3 min 5 s", "2 h 10 min", "3 d 4 h"]);
    }
}
