use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// A progress bar on standard error with the figures that matter beside it.
///
/// Where standard error is not a terminal (a log file, CI) it prints a plain line instead, at most one per ten seconds
/// and always the first and the last.
pub struct Progress {
    bar: ProgressBar,
    what: String,
    plain: Option<Plain>,
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
        bar.reset_eta();
        if let Ok(style) = ProgressStyle::with_template("{prefix:>9} {bar:24} {pos}/{len} [{elapsed}<{eta}] {wide_msg}")
        {
            bar.set_style(style.progress_chars("█▌ "));
        }
        bar.set_prefix(what.to_string());
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(500)); // the clock goes on during a long step
        }
        let plain = (!terminal).then(|| Plain { last: None, started: Instant::now() });
        Progress { bar, what: what.to_string(), plain }
    }

    /// `done` units are done; `figures` are names with values as they should read (`("reward", "0.41".into())`).
    pub fn set(&mut self, done: u64, figures: &[(&str, String)]) {
        self.bar.set_position(done);
        let text = figures.iter().map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join("  ");
        if let Some(plain) = &mut self.plain {
            let total = self.bar.length().unwrap_or(0);
            if plain.last.is_none_or(|t| t.elapsed() >= EVERY) || done == total {
                plain.last = Some(Instant::now());
                let secs = plain.started.elapsed().as_secs_f64();
                note!("{} {done}/{total} [{secs:.0} s] {text}", self.what);
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
