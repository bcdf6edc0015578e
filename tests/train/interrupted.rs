//! Processes that end before their work is done: killed at any moment, or asked to stop.

use super::school::{ok, school, sft_args, stderr, text};
use super::{Ended, Job, Run, Turn, moved, train};
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use varft::report::read_metrics;
use varft::train::Checkpoints;
use varft::train::grpo::Finished;

/// The moments of kills, from a seed that is printed; `VARFT_KILL_SEED` gives that of an earlier test to have its kills again.
struct Moments(u64);

impl Moments {
    fn new() -> Moments {
        let given = std::env::var("VARFT_KILL_SEED").ok();
        let seed = given.map_or_else(|| RandomState::new().hash_one("kills"), |s| s.parse().expect("a whole number"));
        println!("the seed of kills: VARFT_KILL_SEED={seed}");
        Moments(seed)
    }

    /// In [0, 1).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// So many shares of a whole, from its beginning to its end: one moment in each, in random order.
    fn spread(&mut self, n: usize) -> Vec<f64> {
        let mut all: Vec<f64> = (0..n).map(|i| (i as f64 + self.next()) / n as f64).collect();
        for i in (1..n).rev() {
            all.swap(i, (self.next() * (i + 1) as f64) as usize);
        }
        all
    }
}

/// How a process ended, if it did before `moment`.
fn ended_before(child: &mut Child, started: Instant, moment: Duration) -> Option<ExitStatus> {
    loop {
        let status = child.try_wait().unwrap();
        let left = moment.saturating_sub(started.elapsed());
        if status.is_some() || left.is_zero() {
            return status;
        }
        std::thread::sleep(left.min(Duration::from_millis(5)));
    }
}

/// Until it has been killed so often, a process is killed at a moment of its work and a new one goes on. The moments are
/// spread over the whole time, `whole`, that a process takes which nobody disturbs; one that comes after a process has ended
/// waits for the next that begins anew.
fn killed(job: &Job, moments: &mut Moments, times: usize, mut whole: Duration, want: &Ended) {
    let moments = moments.spread(times);
    let mut kills = 0;
    let mut checks = 0;
    while kills < times || checks == 0 {
        if kills == times {
            job.finish();
        } else {
            let anew = !job.run.join("config.toml").exists();
            let started = Instant::now();
            let mut child: Child = job.command().stderr(Stdio::null()).spawn().unwrap();
            let moment = whole.mul_f64(moments[kills]);
            match ended_before(&mut child, started, moment) {
                None => {
                    child.kill().unwrap(); // SIGKILL
                    child.wait().unwrap();
                    kills += 1;
                    let of = if anew { "a first process" } else { "one that went on" };
                    println!(
                        "kill {kills}: {moment:.2?} ({:.0}% of {whole:.2?}) into {of}",
                        100.0 * moments[kills - 1]
                    );
                }
                Some(status) => {
                    assert!(status.success());
                    // The machine was slower when the whole was measured.
                    whole = if anew { whole.min(started.elapsed()) } else { whole };
                }
            }
        }
        if job.run.join(format!("checkpoints/step-{}/train_state.json", job.last)).exists() {
            job.finish(); // if it was killed after its last checkpoint
            let got = job.result();
            assert!(got.0 == want.0, "weights differ after {kills} kills");
            assert!(got.1 == want.1, "moments differ after {kills} kills");
            assert_eq!(got.2, want.2);
            checks += 1;
            std::fs::remove_dir_all(&job.run).unwrap();
        }
    }
}

#[test]
fn a_run_that_is_killed_ends_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let school = school();
    let mut moments = Moments::new();
    let calm = |job: &Job| {
        let started = Instant::now();
        job.finish();
        (started.elapsed(), job.result())
    };
    // Supervised.
    let short = ["--set", "optim.steps=40", "--set", "log.checkpoint_every=5"].map(str::to_string);
    let sft = |name: &str| {
        let run = dir.path().join(name);
        let args = [sft_args(&school.random, &school.talks, &run), short.to_vec()].concat();
        Job { args, run, last: 40 }
    };
    let (_, undisturbed) = calm(&sft("sft"));
    let (took, again) = calm(&sft("sft-again"));
    assert!(again == undisturbed, "two undisturbed runs differ");
    killed(&sft("sft-killed"), &mut moments, 10, took, &undisturbed);
    // By reinforcement, with the python tool, evaluations and every checkpoint.
    let keys = ["optim.lr=1e-3", "log.eval_every=2", "log.checkpoint_every=1", "algo.mask_truncated=false"];
    let train = |name: &str| Job::train(school, &dir.path().join(name), 3, &keys);
    let (took, undisturbed) = calm(&train("calm"));
    assert!(!moved(&dir.path().join("calm"), 3).is_empty(), "nothing was learned, so nothing is shown");
    killed(&train("killed"), &mut moments, 10, took, &undisturbed);
}

#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("stopped");
    let job = Job::train(school(), &run, 100_000, &["log.eval_every=0", "log.checkpoint_every=0"]);
    let child = job.command().spawn().unwrap();
    while read_metrics(&run).map_or(0, |m| m.len()) < 2 {
        std::thread::sleep(Duration::from_millis(20));
    }
    // SAFETY: our own child, which has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let o = child.wait_with_output().unwrap();
    let said = stderr(&o);
    assert_eq!(o.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("varft train {} --resume", text(&run))), "{said}");
    let step = Checkpoints::new(&run, 0).latest().unwrap().0.unwrap().state.step;
    assert!(step >= 2 && said.contains(&format!("after step {step}")), "{said}");
    let page = std::fs::read_to_string(run.join("report.html")).unwrap();
    for (name, _) in read_metrics(&run).unwrap().iter().flat_map(|r| &r.values) {
        assert!(!page.contains(&format!("<b>{name}</b>")), "no title for {name}");
    }
    // By the folder alone, as the message says.
    let steps = format!("optim.steps={}", step + 1);
    ok(&["train", text(&run), "--resume", "--set", &steps]);
    assert!(run.join(format!("checkpoints/step-{}/model.safetensors", step + 1)).is_file());
}

#[test]
fn ctrl_c_between_the_updates_of_a_step_ends_it_and_costs_no_complete_step() {
    let dir = tempfile::tempdir().unwrap();
    let (calm, first, saved) = (dir.path().join("calm"), dir.path().join("first"), dir.path().join("saved"));
    const UPDATES: u64 = 60;
    let updates = format!("algo.iterations={UPDATES}");
    let keys = [
        "log.eval_every=0",
        "log.keep_last=0",
        "optim.lr=1e-4",
        "optim.steps=3",
        "algo.mask_truncated=false",
        &updates,
    ];
    train(&[&keys[..], &["optim.steps=1"]].concat(), &calm);
    // Stops a run between two updates of a step, after so many steps were logged: when nobody reads the weights, and they have
    // moved since that was so for the first time.
    let stop_in_an_update = |run: &mut Run, dir: &Path, steps: usize| {
        let (model, stop) = (run.learner.model().clone(), run.setup.stop.clone());
        let (dir, done) = (dir.to_path_buf(), Arc::new(AtomicBool::new(false)));
        let watch = {
            let done = done.clone();
            std::thread::spawn(move || {
                while read_metrics(&dir).unwrap().len() < steps && !done.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let s = model.device().stream();
                let mut first: Option<Vec<f32>> = None;
                while !done.load(Ordering::Relaxed) {
                    if let Ok(_weights) = model.take_weights() {
                        let now = s.read::<f32>(&model.params.flat.view(0, 64)).wait().unwrap();
                        if *first.get_or_insert(now.clone()) != now {
                            break;
                        }
                    }
                    std::thread::yield_now();
                }
                stop.store(true, Ordering::Relaxed);
            })
        };
        let finished = run.train();
        done.store(true, Ordering::Relaxed);
        watch.join().unwrap();
        (finished.unwrap(), run.learner.optimizer().updates())
    };
    // In the first step, before anything is saved: nothing is lost by ending at once.
    let mut run =
        Run::new(&[&keys[..], &["log.checkpoint_every=0"]].concat(), &first, u64::MAX, Arc::new(Turn)).unwrap();
    let (finished, updates) = stop_in_an_update(&mut run, &first, 0);
    assert_eq!(finished, Finished::Stopped { at: 0 });
    assert!((1..UPDATES).contains(&updates), "{updates}");
    assert!(!first.join("checkpoints").exists() && read_metrics(&first).unwrap().is_empty());
    // In the second, with the first one saved: that is what the run goes on from.
    let mut run =
        Run::new(&[&keys[..], &["log.checkpoint_every=1"]].concat(), &saved, u64::MAX, Arc::new(Turn)).unwrap();
    let (finished, updates) = stop_in_an_update(&mut run, &saved, 1);
    assert_eq!(finished, Finished::Stopped { at: 1 });
    assert!((UPDATES + 1..2 * UPDATES).contains(&updates), "{updates}");
    assert_eq!(Checkpoints::new(&saved, 0).latest().unwrap().0.unwrap().state.step, 1);
    // In the second, with nothing saved: it is finished first.
    let unsaved = dir.path().join("unsaved");
    let mut run =
        Run::new(&[&keys[..], &["log.checkpoint_every=0"]].concat(), &unsaved, u64::MAX, Arc::new(Turn)).unwrap();
    let (finished, updates) = stop_in_an_update(&mut run, &unsaved, 1);
    assert_eq!((finished, updates), (Finished::Stopped { at: 2 }, 2 * UPDATES));
    for file in ["model.safetensors", "optimizer.safetensors", "train_state.json"] {
        let read = |run: &Path| std::fs::read(run.join("checkpoints/step-1").join(file)).unwrap();
        assert!(read(&calm) == read(&saved), "{file}");
    }
}

#[test]
fn a_run_whose_folder_is_taken_away_says_so_and_makes_no_other() {
    let dir = tempfile::tempdir().unwrap();
    for (name, keys) in
        [("metrics", &["log.trajectories=0"][..]), ("episodes", &[]), ("saved", &["log.checkpoint_every=1"])]
    {
        let run = dir.path().join(name);
        let common = ["log.eval_every=0", "log.tensorboard=false"];
        let job = Job::train(school(), &run, 100_000, &[&common[..], keys].concat());
        let child = job.command().spawn().unwrap();
        while read_metrics(&run).map_or(0, |m| m.len()) < 2 {
            std::thread::sleep(Duration::from_millis(20));
        }
        let away = dir.path().join(format!("{name}-away"));
        std::fs::rename(&run, &away).unwrap();
        let o = child.wait_with_output().unwrap();
        let said = stderr(&o);
        assert_eq!(o.status.code(), Some(1), "{said}");
        assert!(
            said.contains("the run's folder was removed, renamed or replaced") && !said.contains("panicked"),
            "{said}"
        );
        assert!(!run.exists(), "{name}");
        if name == "saved" {
            let step = Checkpoints::new(&away, 0).latest().unwrap().0.unwrap().state.step;
            ok(&["train", text(&away), "--resume", "--set", &format!("optim.steps={step}")]);
        }
    }
}
