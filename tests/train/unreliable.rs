//! A tool whose machinery fails: episodes are tried again, then left out, and never wrong for it.

use super::{Job, Turn, figure, moved, train_with};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use varft::report::view::{EpisodeView, Phase};
use varft::report::{TrajectoryStore, read_metrics};
use varft::tools::{Tool, ToolCall, ToolResult};
use varft::train::RunConfig;
use varft::train::advantages::group_advantages;
use varft::train::config::AdvantageScale;

/// [`Turn`] with machinery that fails some calls.
struct Unreliable {
    /// Whether a call fails: the index of the sample within its group, and how many calls about this image it has made.
    fails: fn(u64, usize) -> bool,
    calls: Mutex<HashMap<(u64, Vec<u8>), usize>>,
    failures: AtomicU64,
}

impl Unreliable {
    fn new(fails: fn(u64, usize) -> bool) -> Arc<Unreliable> {
        Arc::new(Unreliable { fails, calls: Mutex::default(), failures: AtomicU64::new(0) })
    }
}

impl Tool for Unreliable {
    fn name(&self) -> &str {
        "unreliable"
    }
    fn run(&self, call: ToolCall) -> varft::Result<ToolResult> {
        // An episode's seed is its run's and the index of its sample.
        let sample = call.seed ^ RunConfig::default().run.seed;
        let mut calls = self.calls.lock().unwrap();
        let before = calls.entry((sample, call.images[0].as_raw().clone())).or_default();
        *before += 1;
        if (self.fails)(sample, *before - 1) {
            self.failures.fetch_add(1, Ordering::Relaxed);
            return Err(varft::Error::Tool { tool: self.name().into(), what: "its process is gone".into() });
        }
        Turn.run(call)
    }
}

#[test]
fn what_the_tool_failed_is_left_out_with_its_group_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let keys = ["optim.steps=4", "optim.lr=1e-3", "algo.mask_truncated=false", "algo.drop_zero_variance=false"];
    let tool = Unreliable::new(|sample, _| sample == 0);
    let run = dir.path().join("run");
    train_with(&[&keys[..], &["log.eval_every=0", "log.trajectories=100"]].concat(), &run, tool.clone());
    let store = TrajectoryStore::open(&run).unwrap();
    let (mut voids, mut whole) = (0.0, 0);
    for r in read_metrics(&run).unwrap() {
        let file =
            store.files().unwrap().into_iter().find(|f| f.phase == Phase::Train && f.step + 1 == r.step).unwrap();
        let (episodes, _) = store.read(&file, 100).unwrap();
        let void = figure(&r, "episodes/void");
        voids += void;
        assert_eq!(episodes.len() as f64 + void, 12.0, "three groups of four: {r:?}");
        // The mean is over those that have a reward; one that failed does not count as 0.
        let mean = episodes.iter().map(|e| e.reward).sum::<f64>() / episodes.len() as f64;
        assert!((figure(&r, "reward/mean") - mean).abs() < 1e-12, "{mean}: {r:?}");
        for group in 3 * file.step..3 * file.step + 3 {
            let group: Vec<&EpisodeView> = episodes.iter().filter(|e| e.group == group).collect();
            let learned: Vec<_> = group.iter().map(|e| e.advantage).collect();
            if group[0].sample == 0 {
                whole += 1;
                let rewards: Vec<f64> = group.iter().map(|e| e.reward).collect();
                let want = group_advantages(&rewards, AdvantageScale::Group).values;
                assert_eq!(learned, want.into_iter().map(|a| Some(f64::from(a))).collect::<Vec<_>>());
            } else {
                assert_eq!(learned, [None; 3], "what is left of a group is no fair sample");
            }
        }
    }
    // Every void episode was tried three times.
    assert_eq!(voids * 3.0, tool.failures.load(Ordering::Relaxed) as f64);
    assert!(voids > 0.0 && whole > 0, "{voids} episodes are void, {whole} groups whole");
    assert!(!moved(&run, 4).is_empty(), "nothing was learned from whole groups");
}

#[test]
fn an_episode_that_the_tool_failed_once_is_the_one_that_it_would_have_been() {
    let dir = tempfile::tempdir().unwrap();
    let keys = ["optim.steps=3", "optim.lr=1e-3", "algo.mask_truncated=false", "log.eval_every=0"];
    let ended = |name: &str, tool: Arc<dyn Tool>| {
        let job = Job { args: Vec::new(), run: dir.path().join(name), last: 3 };
        train_with(&keys, &job.run, tool);
        job.result()
    };
    // A call, then the same call of the next try.
    let tool = Unreliable::new(|_, calls| calls % 2 == 0);
    let (calm, failed) = (ended("calm", Arc::new(Turn)), ended("failed", tool.clone()));
    assert!(tool.failures.load(Ordering::Relaxed) > 0, "no episode called its tool");
    assert!(calm == failed, "{:?}\n{:?}", calm.2, failed.2);
    assert!(calm.2.iter().all(|line| line.contains("\"episodes/void\":0.0")), "{:?}", calm.2);
}
