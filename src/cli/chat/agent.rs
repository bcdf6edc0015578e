//! What a run has trained, as it was trained: each question is an episode, its code is run, and its images are written to files.

use super::{Args, Partner};
use crate::agent::{Conversation, Ending, EnginePolicy, EpisodeOptions, Job, Policy, Rollouts, Said};
use crate::cli::device::settle;
use crate::cli::fit;
use crate::cli::setup::{Folder, Loaded, held_out_source, python};
use crate::engine::Sampling;
use crate::input::{Image, Message, Prompt};
use crate::tasks::{Example, Examples, Outline, Split, read_image};
use crate::tools::{Tool, ToolCall, ToolResult};
use crate::train::RunConfig;
use crate::train::room::Work;
use crate::train::run::eval_options;
use crate::{Error, Result};
use image::RgbImage;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

pub(super) struct Agent {
    config: RunConfig,
    loaded: Loaded,
    rollouts: Rollouts,
    album: Arc<Album>,
    /// The image that questions are about.
    image: Option<Arc<RgbImage>>,
    /// The held-out questions, once one was asked for.
    questions: Option<Arc<dyn Examples>>,
    /// How many of them were.
    next: u64,
    asked: u64,
}

impl Agent {
    /// The model that `config` names, for episodes as in its run.
    ///
    /// # Errors
    /// Whatever is wrong with the model or the tool; [`Error::Input`] for what only a bare model takes.
    pub fn new(args: &Args, mut config: RunConfig) -> Result<Agent> {
        if args.system.is_some() {
            return Err(Error::input(
                "--system: an agent has the prompt that it was trained with",
                "leave it out, or talk to the bare model: --plain",
            ));
        }
        if args.image.len() > 1 {
            return Err(Error::input(
                "--image is given more than once, and an agent works on one image",
                "give one, or talk to the bare model: --plain",
            ));
        }
        config.run.threads = args.threads;
        config.run.seed = args.seed;
        config.run.device = RunConfig::read(None, &args.device.with(&[]))?.run.device;
        settle(&mut config);
        let r = &mut config.rollout;
        r.concurrency = 1;
        r.context = args.context.unwrap_or(r.context);
        r.max_new_tokens = args.max_tokens.unwrap_or(r.max_new_tokens);
        r.eval_temperature = args.temperature.map_or(r.eval_temperature, f64::from);
        r.top_p = args.top_p.map_or(r.top_p, f64::from);
        let python = python(&config)?;
        let loaded = Folder::open(&config)?.load(&config, None, Work::Rollouts)?;
        let engine = loaded.engine(&config)?;
        let album = Arc::new(Album { chosen: args.out.clone(), dir: OnceLock::new(), written: AtomicU64::new(0) });
        let tool = Arc::new(AloudTool { tool: python, album: album.clone() });
        let rollouts = loaded.rollouts(&config, &engine, tool, &Arc::default());
        let policy = EnginePolicy::new(engine, loaded.folder.tokenizer.clone(), loaded.folder.template.clone());
        let rollouts = Rollouts {
            policy: Arc::new(Aloud(policy)),
            options: EpisodeOptions { withhold_images: false, ..eval_options(&rollouts.options, &config) },
            ..rollouts
        };
        Ok(Agent { config, loaded, rollouts, album, image: None, questions: None, next: 0, asked: 0 })
    }

    /// Plays the episode of a question; what is said in it is printed as it comes.
    fn play(&mut self, example: Example) -> Result<()> {
        let outline = Outline { name: "the question".into(), ..Outline::of(&example) };
        fit::check(&self.config, &self.loaded.folder, std::iter::once(Ok(outline))).map_err(|e| match e {
            Error::Limit { what, .. } => {
                Error::limit(what, "ask something shorter, show a smaller image, or allow more with --context")
            }
            e => e,
        })?;
        let job = Job { example: Arc::new(example), group: self.asked, samples: 1 };
        self.asked += 1;
        let episodes = self.rollouts.run(&[job], self.config.run.seed, |_, _| ())?;
        match episodes.into_iter().flatten().next() {
            Some(Ok(t)) => match t.ending {
                Ending::Answered(_) => {}
                Ending::OutOfTurns => note!("[no answer in {} turns]", self.config.rollout.max_turns),
                Ending::Truncated => {
                    note!(
                        "[cut off: a reply has {} tokens at most (--max-tokens), and a conversation {} (--context)]",
                        self.config.rollout.max_new_tokens,
                        self.config.rollout.context
                    );
                }
            },
            Some(Err(void)) => return Err(void.error),
            None => return Err(Error::internal("a job without an episode")),
        }
        Ok(())
    }
}

impl Partner for Agent {
    fn help(&self) -> String {
        "/image FILE shows an image, and each message asks a question about it; /example asks a held-out question of the run, \
         /reset forgets the image, /quit (or Ctrl-D) ends"
            .into()
    }

    fn show(&mut self, path: &Path) -> Result<()> {
        self.image = Some(Arc::new(read_image(path, "an image of the conversation")?));
        Ok(())
    }

    fn say(&mut self, text: &str) -> Result<()> {
        let Some(image) = self.image.clone() else {
            return Err(Error::input(
                "there is no image yet, and an agent works on one",
                "show one with /image FILE (or --image FILE), say /example for a question of the run, or talk to the bare \
                 model: --plain",
            ));
        };
        self.play(Example {
            id: self.asked,
            question: text.to_owned(),
            answers: Vec::new(),
            kinds: Vec::new(),
            split: Split::Simple,
            original: image.clone(),
            processed: image,
        })
    }

    fn example(&mut self) -> Result<()> {
        if self.questions.is_none() {
            self.questions = Some(held_out_source(&self.config)?);
        }
        let Some(questions) = &self.questions else { return Err(Error::internal("questions that were just read")) };
        let example = questions.get(self.next % questions.len())?;
        self.next += 1;
        say!("{}\n[image: {}]", example.question, self.album.add(example.input())?.display());
        let right = example.answers.join(" | ");
        self.play(Example::clone(&example))?;
        say!("[right: {right}]");
        Ok(())
    }

    fn reset(&mut self) {
        self.image = None;
    }
}

/// The files of images, in the order in which they were shown or made.
struct Album {
    /// The folder, where one was asked for.
    chosen: Option<PathBuf>,
    /// The folder, made with the first image.
    dir: OnceLock<PathBuf>,
    written: AtomicU64,
}

impl Album {
    /// Writes an image, and gives its file.
    fn add(&self, image: &RgbImage) -> Result<PathBuf> {
        let dir = match self.dir.get() {
            Some(dir) => dir.clone(),
            None => {
                let made = self.make()?;
                self.dir.get_or_init(|| made).clone()
            }
        };
        let path = dir.join(format!("{}.png", self.written.fetch_add(1, Ordering::Relaxed) + 1));
        match image.save(&path) {
            Ok(()) => Ok(path),
            Err(image::ImageError::IoError(e)) => Err(Error::io("write the image", &path, e)),
            Err(e) => Err(Error::internal(format!("{}: {e}", path.display()))),
        }
    }

    fn make(&self) -> Result<PathBuf> {
        if let Some(dir) = &self.chosen {
            return std::fs::create_dir_all(dir)
                .map(|()| dir.clone())
                .map_err(|e| Error::io("create the folder", dir, e));
        }
        // One that is there is somebody else's.
        let name = |i: u64| std::env::temp_dir().join(format!("varft-chat-{}-{i}", std::process::id()));
        let mut i = 0;
        loop {
            match std::fs::create_dir(name(i)) {
                Ok(()) => return Ok(name(i)),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => i += 1,
                Err(e) => return Err(Error::io("create the folder", name(i), e)),
            }
        }
    }
}

/// A policy whose turns are printed.
struct Aloud(EnginePolicy);

impl Policy for Aloud {
    fn open(&self, messages: &[Message], images: &[Arc<Image>], n: usize) -> Result<Vec<Box<dyn Conversation>>> {
        let aloud = |c| Box::new(AloudConversation(c)) as Box<dyn Conversation>;
        Ok(self.0.open(messages, images, n)?.into_iter().map(aloud).collect())
    }
}

struct AloudConversation(Box<dyn Conversation>);

impl Conversation for AloudConversation {
    fn opening(&self) -> &Prompt {
        self.0.opening()
    }

    fn hear(&mut self, messages: &[Message], images: &[Arc<Image>]) -> Result<Prompt> {
        self.0.hear(messages, images)
    }

    fn speak(&mut self, sampling: &Sampling) -> Result<Said> {
        let said = self.0.speak(sampling)?;
        say!("{}", said.text.trim_end());
        Ok(said)
    }
}

/// A tool whose results are printed, and its images written to files.
struct AloudTool {
    tool: Arc<dyn Tool>,
    album: Arc<Album>,
}

impl Tool for AloudTool {
    fn name(&self) -> &str {
        self.tool.name()
    }

    fn run(&self, call: ToolCall) -> Result<ToolResult> {
        let result = self.tool.run(call)?;
        let (name, ms) = (self.name(), result.usage.wall.as_secs_f64() * 1e3);
        for text in [result.stdout.trim_end(), &result.outcome.message()] {
            if !text.is_empty() {
                say!("{text}");
            }
        }
        match &result.image {
            Some(image) => say!(
                "[{name}: {}, {ms:.0} ms; the image now: {}]",
                result.outcome.kind(),
                self.album.add(image)?.display()
            ),
            None => say!("[{name}: {}, {ms:.0} ms; the image is as before]", result.outcome.kind()),
        }
        Ok(result)
    }
}
