use super::coding::CodingProtocol;
use super::episode::{EpisodeOptions, Key, run_episode};
use super::policy::{Conversation, Policy};
use super::trajectory::Trajectory;
use crate::input::Image;
use crate::tasks::Example;
use crate::tools::Tool;
use crate::{Error, Result};
use image::RgbImage;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// A group of episodes on one example.
#[derive(Clone)]
pub struct Job {
    /// What to solve.
    pub example: Arc<Example>,
    /// Names the group; with the seed and the index of a sample it keys that sample's randomness.
    pub group: u64,
    /// How many episodes; at least one.
    pub samples: usize,
}

/// An episode that the machinery failed, after it was tried again: neither right nor wrong, it counts nowhere.
#[derive(Debug)]
pub struct Void {
    /// The group.
    pub group: u64,
    /// Index within the group.
    pub sample: u64,
    /// The last failure.
    pub error: Error,
}

/// Runs many episodes at once: each on a thread of its own that mostly waits, for the engine or for its tool.
#[derive(Clone)]
pub struct Rollouts {
    /// Who answers.
    pub policy: Arc<dyn Policy>,
    /// The rules.
    pub protocol: CodingProtocol,
    /// What runs the model's code.
    pub tool: Arc<dyn Tool>,
    /// Turns pixels into what the model reads.
    pub see: Arc<See>,
    /// How episodes are run.
    pub options: EpisodeOptions,
    /// Episodes in flight at once.
    pub concurrency: usize,
    /// Raised by whoever wants the work to end early; what is under way then ends as an error.
    pub stop: Arc<AtomicBool>,
}

/// Turns pixels into what the model reads.
pub type See = dyn Fn(&Arc<RgbImage>) -> Result<Arc<Image>> + Send + Sync;
/// What came of each sample of each job.
pub type Episodes = Vec<Vec<Result<Trajectory, Void>>>;

/// Episodes that may have ended before all of them were complete.
pub struct Partial {
    /// What is complete, per job, in the order of the jobs and of the samples; samples that are not are missing.
    pub episodes: Episodes,
    /// Why some are missing: [`Error::Cancelled`] when `stop` was raised, or the failure that ended the work. `None`: none is.
    pub ended_by: Option<Error>,
}

/// How often the flag that stops the work is looked at.
const WATCH: Duration = Duration::from_millis(100);
/// How often an episode that the machinery failed is tried again.
const RETRIES: usize = 2;

/// An opened conversation, waiting for a thread: the job, the sample, and the conversation.
type Opened = (usize, usize, Result<Box<dyn Conversation>>);

/// What the threads of one run share.
#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    next_job: usize,
    /// Groups that a thread is opening right now.
    opening: usize,
    waiting: Vec<Opened>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Rollouts {
    /// Runs every job's episodes and returns them per job, in the order of the jobs and of the samples.
    ///
    /// `done` is called from this thread after each episode with the number finished so far. The same seed gives the same
    /// episodes whatever the concurrency.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when `stop` was raised, failures of the engine, and [`Error::Internal`] for a panic of a policy or
    /// a tool; [`Error::Input`] for a job without samples. A failure of a tool's machinery is tried again, then gives a
    /// [`Void`] in that episode's place.
    pub fn run(&self, jobs: &[Job], seed: u64, done: impl FnMut(usize, &Result<Trajectory, Void>)) -> Result<Episodes> {
        let Partial { episodes, ended_by } = self.run_as_far_as_it_goes(jobs, seed, done);
        ended_by.map_or(Ok(episodes), Err)
    }

    /// [`run`](Self::run) that keeps what is complete when the work ends early.
    ///
    /// # Errors
    /// What ended the work is in its result; see [`run`](Self::run).
    pub fn run_as_far_as_it_goes(
        &self,
        jobs: &[Job],
        seed: u64,
        mut done: impl FnMut(usize, &Result<Trajectory, Void>),
    ) -> Partial {
        if let Some(job) = jobs.iter().find(|j| j.samples == 0) {
            let what = format!("the job of item {} (group {}) asks for no episode", job.example.id, job.group);
            let e = Error::input(what, "ask for at least one, or leave the job out");
            return Partial { episodes: jobs.iter().map(|_| Vec::new()).collect(), ended_by: Some(e) };
        }
        let mut results: Vec<Vec<Option<Result<Trajectory, Void>>>> =
            jobs.iter().map(|j| (0..j.samples).map(|_| None).collect()).collect();
        let queue = Queue::default();
        let (send, receive) = mpsc::channel::<(usize, usize, Result<Result<Trajectory, Void>>)>();
        let total: usize = jobs.iter().map(|j| j.samples).sum();
        let failed = AtomicBool::new(false);
        let mut failure = None;
        std::thread::scope(|scope| {
            for _ in 0..self.concurrency.clamp(1, total.max(1)) {
                let send = send.clone();
                let (queue, failed) = (&queue, &failed);
                let work = move || {
                    while !failed.load(Ordering::Relaxed) && !self.stop.load(Ordering::Relaxed) {
                        let Some((index, sample, conversation)) = self.take(jobs, queue) else { break };
                        let job = &jobs[index];
                        let key = Key { group: job.group, sample: sample as u64, seed };
                        let result = conversation.and_then(|c| caught("an episode", job, || self.episode(job, c, key)));
                        if send.send((index, sample, result)).is_err() {
                            break;
                        }
                    }
                };
                if let Err(e) = std::thread::Builder::new().spawn_scoped(scope, work) {
                    failed.store(true, Ordering::Relaxed);
                    failure = Some(Error::no_thread("a thread for episodes (rollout.concurrency)", e));
                    break;
                }
            }
            drop(send);
            let mut finished = 0;
            loop {
                if self.stop.load(Ordering::Relaxed) || failed.load(Ordering::Relaxed) {
                    self.policy.interrupt();
                }
                let (job, sample, result) = match receive.recv_timeout(WATCH) {
                    Ok(received) => received,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => break,
                };
                match result {
                    Ok(result) => {
                        finished += 1;
                        done(finished, &result);
                        results[job][sample] = Some(result);
                    }
                    Err(e) => {
                        failed.store(true, Ordering::Relaxed);
                        failure.get_or_insert(e);
                    }
                }
            }
        });
        let whole = results.iter().flatten().all(Option::is_some);
        let stopped = || Error::Cancelled("the rollouts were asked to stop".into());
        Partial {
            episodes: results.into_iter().map(|g| g.into_iter().flatten().collect()).collect(),
            ended_by: failure.or_else(|| (!whole).then(stopped)),
        }
    }

    /// The next conversation to run: one that a group's opening left waiting, else the first of the next group.
    fn take(&self, jobs: &[Job], queue: &Queue) -> Option<Opened> {
        let mut q = queue.lock();
        loop {
            if let Some(o) = q.waiting.pop() {
                return Some(o);
            }
            if let Some(job) = jobs.get(q.next_job) {
                let index = q.next_job;
                q.next_job += 1;
                q.opening += 1;
                drop(q);
                // The first conversation of a group computes the prompt; meanwhile other threads open theirs.
                // A panic here would leave the others waiting for ever.
                let opened = caught("opening the conversations", job, || self.open(job, job.samples));
                q = queue.lock();
                q.opening -= 1;
                match opened {
                    Ok(all) => q.waiting.extend(all.into_iter().enumerate().rev().map(|(i, c)| (index, i, Ok(c)))),
                    Err(e) => q.waiting.push((index, 0, Err(e))),
                }
                queue.changed.notify_all();
            } else if q.opening == 0 {
                return None;
            } else {
                q = queue.changed.wait(q).unwrap_or_else(|e| e.into_inner());
            }
        }
    }

    fn open(&self, job: &Job, n: usize) -> Result<Vec<Box<dyn Conversation>>> {
        let about = |e: Error| match e {
            Error::Input { what, mend } => Error::input(format!("item {}: {what}", job.example.id), mend),
            Error::Limit { what, mend } => Error::limit(format!("item {}: {what}", job.example.id), mend),
            e => e,
        };
        let image = (self.see)(job.example.input()).map_err(about)?;
        let all = self.policy.open(&self.protocol.opening(&job.example.question), &[image], n).map_err(about)?;
        match all.len() {
            got if got == n => Ok(all),
            got => Err(Error::internal(format!("a policy opened {got} conversations where {n} were asked for"))),
        }
    }

    /// One episode, tried again where the tool's machinery failed it.
    fn episode(
        &self,
        job: &Job,
        mut conversation: Box<dyn Conversation>,
        key: Key,
    ) -> Result<Result<Trajectory, Void>> {
        let mut tries = 0;
        loop {
            match run_episode(
                &mut *conversation,
                &self.protocol,
                &*self.tool,
                &*self.see,
                &job.example,
                &self.options,
                key,
            ) {
                Ok(t) => return Ok(Ok(t)),
                Err(error @ Error::Tool { .. }) if tries == RETRIES => {
                    return Ok(Err(Void { group: key.group, sample: key.sample, error }));
                }
                Err(Error::Tool { .. }) => {
                    tries += 1;
                    conversation =
                        self.open(job, 1)?.pop().ok_or_else(|| Error::internal("a policy opened no conversation"))?;
                }
                Err(e) => return Err(e),
            }
        }
    }
}

/// What `f` does about `job`; a panic is an error like others, so that whoever called can save what it has.
fn caught<T>(what: &str, job: &Job, f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        Err(Error::panicked(&format!("{what} of item {} (group {})", job.example.id, job.group), &*panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{Author, Ending, PromptStyle, ScriptedPolicy, demonstration};
    use crate::input::{ChatTemplate, ImageProcessor, Message, Picture, Tokenizer};
    use crate::tasks::Degradation;
    use crate::tasks::synthetic::{Config, Subset, Synthetic};
    use crate::tools::{Outcome, ToolCall, ToolResult};

    /// A tool that fails as no tool may.
    struct Panics;

    impl Tool for Panics {
        fn name(&self) -> &str {
            "panics"
        }
        fn run(&self, _: ToolCall) -> Result<ToolResult> {
            panic!("boom")
        }
    }

    /// Turns the image, except that its machinery fails the first calls of each sample: as often as said here.
    struct Fails {
        times: Vec<usize>,
        /// Calls of each sample so far.
        calls: Mutex<Vec<usize>>,
    }

    impl Fails {
        fn first(times: &[usize]) -> Arc<Fails> {
            Arc::new(Fails { times: times.to_vec(), calls: Mutex::new(vec![0; times.len()]) })
        }
    }

    impl Tool for Fails {
        fn name(&self) -> &str {
            "fails"
        }
        fn run(&self, call: ToolCall) -> Result<ToolResult> {
            // With 0 as the seed of all episodes, an episode's own is the number of its sample.
            let sample = call.seed as usize;
            let nth = {
                let mut calls = self.calls.lock().unwrap();
                calls[sample] += 1;
                calls[sample]
            };
            if nth <= self.times[sample] {
                return Err(Error::Tool { tool: "fails".into(), what: format!("call {nth} of sample {sample}") });
            }
            let image = call.images.last().map(|i| image::imageops::rotate180(&**i));
            let (stdout, stderr, usage) = Default::default();
            Ok(ToolResult { outcome: Outcome::Ok, stdout, stderr, image, usage })
        }
    }

    /// Opens so many conversations, whatever was asked; panics for none.
    struct Opens(usize, ScriptedPolicy);

    impl Policy for Opens {
        fn open(&self, messages: &[Message], images: &[Arc<Image>], _: usize) -> Result<Vec<Box<dyn Conversation>>> {
            assert!(self.0 > 0, "nothing to open");
            self.1.open(messages, images, self.0)
        }
    }

    fn example() -> Arc<Example> {
        let config = Config { degradations: vec![Degradation::Rotation180], pairs: 0.0, ..Config::default() };
        Arc::new(Synthetic::new(config, 1).unwrap().example(Subset::Train, 3))
    }

    fn script() -> ScriptedPolicy {
        let tokenizer = Tokenizer::from_bytes(include_bytes!("../cli/tiny/tokenizer.json"), "tiny").unwrap();
        let template = Arc::new(ChatTemplate::builtin());
        ScriptedPolicy { tokenizer: Arc::new(tokenizer), template, lines: demonstration(&example()) }
    }

    fn rollouts(policy: impl Policy + 'static) -> Rollouts {
        let processor = ImageProcessor::default();
        let see = move |i: &Arc<RgbImage>| {
            let (height, width) = (i.height() as usize, i.width() as usize);
            processor.process_picture(Picture { pixels: i.as_raw().clone(), height, width }, "image").map(Arc::new)
        };
        Rollouts {
            policy: Arc::new(policy),
            protocol: CodingProtocol { style: PromptStyle::Brief },
            tool: Arc::new(Panics),
            see: Arc::new(see),
            options: EpisodeOptions::default(),
            concurrency: 3,
            stop: Arc::default(),
        }
    }

    fn told(rollouts: &Rollouts, samples: &[usize]) -> String {
        let job = |(i, &samples): (usize, &usize)| Job { example: example(), group: i as u64, samples };
        let jobs: Vec<Job> = samples.iter().enumerate().map(job).collect();
        let ended = rollouts.run_as_far_as_it_goes(&jobs, 0, |_, _| ());
        assert_eq!(ended.episodes.len(), jobs.len());
        ended.ended_by.unwrap().to_string()
    }

    #[test]
    fn a_panic_is_an_error_that_names_the_job() {
        let e = told(&rollouts(script()), &[2, 2, 2]);
        let item = example().id.to_string();
        assert!(e.contains(&format!("an episode of item {item} (group ")) && e.contains("panicked: boom"), "{e}");
        let e = told(&rollouts(Opens(0, script())), &[1]);
        assert!(e.contains("opening the conversations of item") && e.contains("nothing to open"), "{e}");
    }

    #[test]
    fn other_numbers_of_episodes_than_asked_for_are_errors() {
        assert!(told(&rollouts(script()), &[2, 0]).contains("(group 1) asks for no episode"));
        for opened in [1, 3] {
            let e = told(&rollouts(Opens(opened, script())), &[2]);
            assert!(e.contains(&format!("opened {opened} conversations where 2 were asked for")), "{e}");
        }
    }

    #[test]
    fn what_the_machinery_failed_is_tried_again_and_then_void() {
        let tool = Fails::first(&[0, 1, RETRIES, RETRIES + 1, usize::MAX]);
        let rollouts = Rollouts { tool: tool.clone(), ..rollouts(script()) };
        let job = Job { example: example(), group: 7, samples: tool.times.len() };
        let mut told = Vec::new();
        let episodes = rollouts.run(&[job], 0, |n, e| told.push((n, e.is_ok()))).unwrap();
        assert_eq!(*tool.calls.lock().unwrap(), [1, 2, RETRIES + 1, RETRIES + 1, RETRIES + 1]);
        let [calm, rest @ ..] = &episodes[0][..] else { panic!("no episodes") };
        let calm = calm.as_ref().unwrap();
        assert_eq!((&calm.ending, calm.reward.f1), (&Ending::Answered(example().answers[0].clone()), 1.0));
        // One that was tried again is whole: nothing of the failed tries is in it.
        for (sample, t) in rest[..2].iter().enumerate() {
            let t = t.as_ref().unwrap();
            assert_eq!(t.sample, sample as u64 + 1);
            assert_eq!(
                (&t.sequence.tokens, &t.authors, t.prompt_len),
                (&calm.sequence.tokens, &calm.authors, calm.prompt_len)
            );
            assert_eq!((&t.ending, t.reward, t.steps.len()), (&calm.ending, calm.reward, 2));
            assert_eq!(t.steps[0].tool.as_ref().unwrap().status, Outcome::Ok.kind());
            assert!(t.authors.contains(&Author::Tool));
        }
        for (sample, v) in [3, 4].into_iter().zip(&rest[2..]) {
            let v = v.as_ref().unwrap_err();
            assert_eq!((v.group, v.sample), (7, sample));
            assert!(v.error.to_string().contains(&format!("call {} of sample {sample}", RETRIES + 1)), "{}", v.error);
        }
        // Each is reported once, when it is decided.
        assert_eq!(told.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert_eq!(told.iter().filter(|t| t.1).count(), 3);
    }
}
