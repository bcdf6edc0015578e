use super::device::{DeviceArgs, settle};
use super::session::model_in;
use super::setup::{Folder, Loaded, see_file};
use crate::engine::{EngineOptions, Finish, Sampling, Session};
use crate::input::{Detokenizer, Image, Message, Part, build_prompt, continue_prompt};
use crate::train::RunConfig;
use crate::train::room::Work;
use crate::{Error, Result};
use clap::builder::RangedU64ValueParser;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

/// Talk to a model; it sees images
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  varft chat models/tiny --image photo.jpg\n  varft chat runs/quickstart\n  echo 'What is in the image?' | varft chat models/tiny --image photo.jpg\n\n\
                        One line is one message. /image FILE shows an image with the next message, /reset begins anew, /quit (or Ctrl-D) ends."
)]
pub(super) struct Args {
    /// The model's folder, or that of a run, whose newest checkpoint is then the model
    model: PathBuf,
    /// Shows this image with the first message; may be repeated
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// The system prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 takes the likeliest token each time
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Samples among the likeliest tokens that together reach this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Tokens of one reply at most
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    /// The same seed gives the same replies
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens of the whole conversation at most
    #[arg(long, default_value_t = 8192, value_parser = RangedU64ValueParser::<usize>::new().range(2..=1 << 30))]
    context: usize,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0, value_parser = super::threads)]
    threads: usize,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut config = RunConfig::read(None, &args.device.with(&[]))?;
    config.model = model_in(&args.model)?;
    config.run.threads = args.threads;
    settle(&mut config);
    config.rollout.context = args.context;
    config.rollout.concurrency = 1;
    let folder = Folder::open(&config)?;
    let patches = config.model.max_pixels / folder.preprocessor.processor().patch.pow(2);
    let bytes = EngineOptions::vision_bytes_for(&folder.config, folder.device.float(), patches);
    config.rollout.vision_cache_mib = bytes.div_ceil(1 << 20).max(config.rollout.vision_cache_mib);
    // Of what is planned, this is what a person who chats can change.
    let shorter = |e: Error| match e {
        Error::Limit { what, .. } => {
            Error::limit(what, format!("give less than --context {}, or use a machine with more memory", args.context))
        }
        e => e,
    };
    folder.plan(&config, Work::Rollouts).map_err(shorter)?;
    let loaded = folder.load(&config, None, Work::Rollouts)?;
    let engine = loaded.engine(&config).map_err(shorter)?;
    let most = engine.max_context();
    let mut chat =
        Chat { args, loaded, session: engine.session(), most, images: Vec::new(), begun: false, ended: true };
    for path in &args.image {
        chat.show(path)?;
    }
    let terminal = std::io::stdin().is_terminal();
    let ask = || {
        if terminal {
            // As with `note!`: nobody may be there to see it.
            let _ = write!(std::io::stderr(), "> ");
        }
    };
    ask();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("read", "standard input", e))?;
        let done = match line.trim() {
            "" => Ok(()),
            "/quit" => break,
            "/reset" => {
                (chat.session, chat.begun, chat.ended) = (engine.session(), false, true);
                chat.images.clear();
                Ok(())
            }
            "/image" => Err(Error::input("/image: no file is named", "say /image FILE; the next message shows it")),
            other => match other.strip_prefix("/image ") {
                Some(path) => chat.show(path.trim()),
                None => chat.say(other),
            },
        };
        match done {
            // At a terminal a person can mend it; a script should stop.
            Err(e) if terminal => note!("error: {e}"),
            done => done?,
        }
        ask();
    }
    Ok(())
}

struct Chat<'a> {
    args: &'a Args,
    loaded: Loaded,
    session: Session,
    /// Tokens that a conversation may have.
    most: usize,
    /// To be shown with the next message.
    images: Vec<Arc<Image>>,
    begun: bool,
    /// The model itself ended its last turn.
    ended: bool,
}

impl Chat<'_> {
    fn show(&mut self, path: impl Into<PathBuf>) -> Result<()> {
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
        let past = self.session.tokens()?.len();
        if past + prompt.len() >= self.most {
            return Err(Error::limit(
                format!(
                    "the conversation has {past} tokens and the message {}: no room for a reply in {}",
                    prompt.len(),
                    self.most
                ),
                match self.most < self.args.context {
                    true => "say /reset to begin anew; this is all that the model takes",
                    false => "say /reset to begin anew, or allow more with --context",
                },
            ));
        }
        self.session.append(prompt)?;
        (self.begun, self.images) = (true, Vec::new());
        let special = tokenizer.special();
        let mut reply = self.session.generate(Sampling {
            temperature: self.args.temperature,
            top_p: self.args.top_p,
            max_tokens: self.args.max_tokens,
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
            Finish::Length => note!("[cut off after {} tokens: --max-tokens]", self.args.max_tokens),
            Finish::Context => note!("[the conversation is full: --context, or /reset]"),
            _ => {}
        }
        Ok(())
    }
}
