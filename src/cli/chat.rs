//! The two who can be talked to, and the lines of a conversation with either: a bare model here, an agent in `agent`.

mod agent;

use super::device::{DeviceArgs, settle};
use super::session::{OfRun, run_of};
use super::setup::{Folder, Loaded, see_file};
use crate::engine::{Engine, EngineOptions, Finish, Sampling, Session};
use crate::input::{Detokenizer, Image, Message, Part, build_prompt, continue_prompt};
use crate::train::RunConfig;
use crate::train::config::Model as ModelConfig;
use crate::train::room::Work;
use crate::{Error, Result};
use agent::Agent;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Talk to a model; it sees images. A run's is the agent that was trained, with its tool
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  varft chat runs/quickstart\n  echo /example | varft chat runs/quickstart\n  varft chat models/tiny --image photo.jpg\n  echo 'What is in the image?' | varft chat models/tiny --image photo.jpg\n\n\
                        One line is one message. /image FILE shows an image with the next message, /reset begins anew, /quit (or Ctrl-D) ends, /help says so again.\n\n\
                        What a run has trained is talked to as it was trained: with its prompt, and a tool that runs the code that it writes. Each question is \
                        an episode of its own, about the image that was shown last; the images that its code makes are written to files. /example asks the next held-out question \
                        of the run. With --plain it is a bare model: no prompt, no tool."
)]
pub(super) struct Args {
    /// The model's folder, or that of a run, whose newest checkpoint is then the model
    model: PathBuf,
    /// Shows this image with the first message; may be repeated
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// Talks to the model of a run without the run's prompt and tool
    #[arg(long)]
    plain: bool,
    /// Where the images that an agent's code makes are written [default: a folder for temporary files]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The system prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 takes the likeliest token each time [default: 0, an agent's as its run is measured]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = super::temperature)]
    temperature: Option<f32>,
    /// Samples among the likeliest tokens that together reach this probability [default: 1, an agent's as in its run]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = super::probability)]
    top_p: Option<f32>,
    /// Tokens of one reply at most [default: 512, an agent's as in its run]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = super::whole::<usize>(1..=1 << 30))]
    max_tokens: Option<usize>,
    /// The same seed gives the same replies
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = super::seed)]
    seed: u64,
    /// Tokens of the whole conversation at most [default: 8192, an agent's as in its run]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = super::whole::<usize>(2..=1 << 30))]
    context: Option<usize>,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = super::threads)]
    threads: usize,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Who is talked to.
trait Partner {
    /// What can be said to it, for a person.
    fn help(&self) -> String;
    /// Shows it an image with the next message.
    fn show(&mut self, path: &Path) -> Result<()>;
    /// Gives it a message, and prints what it replies.
    fn say(&mut self, text: &str) -> Result<()>;
    /// Asks it the next question of its run.
    fn example(&mut self) -> Result<()>;
    /// Forgets what was said and shown.
    fn reset(&mut self);
}

pub(super) fn run(args: &Args) -> Result<()> {
    let of_run = run_of(&args.model)?;
    match of_run {
        // Conversations teach no tool.
        Some(OfRun { config, kind })
            if !args.plain && (config.sft.data.is_empty() || kind.as_deref() != Some("sft")) =>
        {
            converse(args, &mut Agent::new(args, config)?)
        }
        of_run => converse(args, &mut Plain::new(args, of_run.map(|r| r.config.model))?),
    }
}

/// Reads messages until there are no more.
///
/// # Errors
/// What is wrong with the images of the command line, and standard input that cannot be read. What cannot be done with one line is
/// told, and the next line read; where nobody sits at a terminal, that is an error at the end.
fn converse(args: &Args, partner: &mut dyn Partner) -> Result<()> {
    args.image.iter().try_for_each(|path| partner.show(path))?;
    let terminal = std::io::stdin().is_terminal();
    let ask = || {
        if terminal {
            // As with `note!`: nobody may be there to see it.
            let _ = write!(std::io::stderr(), "> ");
        }
    };
    if terminal {
        note!("{}", partner.help());
    }
    ask();
    let mut failed = 0;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("read", "standard input", e))?;
        let (command, rest) = line.trim_end().split_once(char::is_whitespace).unwrap_or((line.trim_end(), ""));
        let done = match command {
            "/quit" => break,
            "/help" => {
                note!("{}", partner.help());
                Ok(())
            }
            "/reset" => {
                partner.reset();
                Ok(())
            }
            "/example" => partner.example(),
            "/image" if rest.trim().is_empty() => {
                Err(Error::input("/image: no file is named", "say /image FILE; the next message shows it"))
            }
            "/image" => partner.show(Path::new(rest.trim())),
            _ if line.starts_with('/') => Err(Error::input(
                format!("{command}: there is no such command"),
                "say /help to see those that there are, or put a space before a message that begins with a slash",
            )),
            _ if line.trim().is_empty() => Ok(()),
            _ => partner.say(line.trim()),
        };
        if let Err(e) = done {
            failed += 1;
            note!("error: {e}");
        }
        ask();
    }
    match failed {
        // A person has seen it, and could mend it.
        n if terminal || n == 0 => Ok(()),
        n => Err(Error::input(
            format!("{n} line{} of standard input could not be done, as told above", if n == 1 { "" } else { "s" }),
            "mend what was told, and say it again",
        )),
    }
}

/// A bare model.
struct Plain<'a> {
    args: &'a Args,
    loaded: Loaded,
    engine: Arc<Engine>,
    session: Session,
    /// Tokens that a conversation may have, as planned.
    context: usize,
    /// Tokens of one reply at most.
    max_tokens: usize,
    /// To be shown with the next message.
    images: Vec<Arc<Image>>,
    begun: bool,
    /// The model itself ended its last turn.
    ended: bool,
}

impl Plain<'_> {
    /// `model`: as a run describes it, where it is a run's.
    fn new(args: &Args, model: Option<ModelConfig>) -> Result<Plain<'_>> {
        let model =
            model.unwrap_or_else(|| ModelConfig { path: args.model.display().to_string(), ..ModelConfig::default() });
        let context = args.context.unwrap_or(8192);
        let mut config = RunConfig::read(None, &args.device.with(&[]))?;
        config.model = model;
        config.run.threads = args.threads;
        settle(&mut config);
        config.rollout.context = context;
        config.rollout.concurrency = 1;
        let folder = Folder::open(&config)?;
        let patches = config.model.max_pixels / folder.preprocessor.processor().patch.pow(2);
        let bytes = EngineOptions::vision_bytes_for(&folder.config, folder.device.float(), patches);
        config.rollout.vision_cache_mib = bytes.div_ceil(1 << 20).max(config.rollout.vision_cache_mib);
        // Of what is planned, this is what a person who chats can change.
        let shorter = |e: Error| match e {
            Error::Limit { what, .. } => {
                Error::limit(what, format!("give less than --context {context}, or use a machine with more memory"))
            }
            e => e,
        };
        folder.plan(&config, Work::Rollouts).map_err(shorter)?;
        let loaded = folder.load(&config, None, Work::Rollouts)?;
        let engine = loaded.engine(&config).map_err(shorter)?;
        let (session, images) = (engine.session(), Vec::new());
        let max_tokens = args.max_tokens.unwrap_or(512);
        Ok(Plain { args, loaded, engine, session, context, max_tokens, images, begun: false, ended: true })
    }
}

impl Partner for Plain<'_> {
    fn help(&self) -> String {
        "/image FILE shows an image with the next message, /reset begins anew, /quit (or Ctrl-D) ends".into()
    }

    fn example(&mut self) -> Result<()> {
        Err(Error::input(
            "/example: a bare model has no questions of its own",
            "name the folder of a run, without --plain",
        ))
    }

    fn reset(&mut self) {
        (self.session, self.begun, self.ended) = (self.engine.session(), false, true);
        self.images.clear();
    }

    fn show(&mut self, path: &Path) -> Result<()> {
        self.images.push(see_file(&self.loaded.folder.preprocessor, path)?);
        Ok(())
    }

    /// One turn of each: the reply goes to standard output as it comes.
    fn say(&mut self, text: &str) -> Result<()> {
        let mut parts = vec![Part::Image { image: None }; self.images.len()];
        parts.push(Part::Text { text: text.to_owned() });
        let user = Message::parts("user", parts);
        let (tokenizer, template) = (&self.loaded.folder.tokenizer, &self.loaded.folder.template);
        let prompt = if self.begun {
            continue_prompt(tokenizer, template, &[user], &self.images, self.ended)?
        } else {
            let system = self.args.system.as_ref().map(|s| Message::text("system", s));
            build_prompt(tokenizer, template, &system.into_iter().chain([user]).collect::<Vec<_>>(), &self.images)?
        };
        let (past, most) = (self.session.tokens()?.len(), self.engine.max_context());
        if past + prompt.len() >= most {
            return Err(Error::limit(
                format!(
                    "the conversation has {past} tokens and the message {}: no room for a reply in {}",
                    prompt.len(),
                    most
                ),
                match most < self.context {
                    true => "say /reset to begin anew; this is all that the model takes",
                    false => "say /reset to begin anew, or allow more with --context",
                },
            ));
        }
        self.session.append(prompt)?;
        (self.begun, self.images) = (true, Vec::new());
        let special = tokenizer.special();
        let mut reply = self.session.generate(Sampling {
            temperature: self.args.temperature.unwrap_or(0.0),
            top_p: self.args.top_p.unwrap_or(1.0),
            max_tokens: self.max_tokens,
            stop_ids: vec![special.im_end, special.endoftext],
            seed: self.args.seed,
            ..Sampling::default()
        })?;
        let mut out = std::io::stdout().lock();
        let mut print = |text: &str| {
            out.write_all(text.as_bytes())
                .and_then(|()| out.flush())
                .map_err(|e| Error::io("write", "standard output", e))
        };
        let mut words = Detokenizer::new();
        for sampled in reply.by_ref() {
            let token = sampled?.token;
            if !tokenizer.is_special(token) {
                print(&words.push(tokenizer, token))?;
            }
        }
        print(&(words.finish() + "\n"))?;
        let completion = reply.wait()?;
        self.ended = completion.finish == Finish::Stop(special.im_end);
        match completion.finish {
            Finish::Length => note!("[cut off after {} tokens: --max-tokens]", self.max_tokens),
            Finish::Context => note!("[the conversation is full: --context, or /reset]"),
            _ => {}
        }
        Ok(())
    }
}
