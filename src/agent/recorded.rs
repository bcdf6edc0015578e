use super::reward::Reward;
use super::trajectory::{Author, Ending, Trajectory};
use crate::input::{
    ChatTemplate, Content, Image, ImageProcessor, ImageSource, Message, Part, Preprocessor, Tokenizer, build_prompt,
    continue_prompt, picture_size,
};
use crate::{Error, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Conversations that others wrote down, to learn from: one JSON value per line, either a list of messages as Hugging
/// Face writes them, or `{"messages": [...], "images": [path, ...]}`, whose images fill the image parts that name none,
/// in order. Paths are relative to the file. What the assistant says is learned, all else is context.
pub struct Conversations {
    path: PathBuf,
    items: Vec<Item>,
}

struct Item {
    /// Line in the file, from 1.
    line: usize,
    messages: Vec<Message>,
    images: Vec<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    messages: Vec<Message>,
    #[serde(default)]
    images: Vec<String>,
}

/// What of a conversation decides how much there is to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Tokens, images included.
    pub tokens: usize,
    /// Tokens of its images.
    pub image: usize,
    /// Tokens that the assistant says.
    pub said: usize,
}

impl Length {
    fn of(t: &Trajectory) -> Length {
        let image = t.sequence.images.iter().map(|s| s.len).sum();
        Length { tokens: t.sequence.len(), image, said: t.sampled() }
    }
}

impl Conversations {
    /// Reads a file. Images are read when a conversation is asked for.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read; [`Error::Input`] naming the line that is no conversation, has nothing to learn,
    /// or whose images and image parts differ in number; also when there is none.
    pub fn open(path: &Path) -> Result<Conversations> {
        let text = crate::files::read_to_string(path).map_err(|e| Error::io("read the conversations", path, e))?;
        let mut items = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            items.push(item(line, i + 1, path.parent().unwrap_or(Path::new("")), path)?);
        }
        if items.is_empty() {
            return Err(Error::input(
                format!("{}: no conversation in this file", path.display()),
                "write one per line: [{\"role\": \"user\", \"content\": \"...\"}, {\"role\": \"assistant\", ...}]",
            ));
        }
        Ok(Conversations { path: path.to_path_buf(), items })
    }

    /// Looks whether every image is there, without reading it: the training should not be what finds out, hours later.
    ///
    /// # Errors
    /// [`Error::Input`] naming the line and the first image that is no file.
    pub fn check_images(&self) -> Result<()> {
        for item in &self.items {
            if let Some(image) = item.images.iter().find(|image| !image.is_file()) {
                return Err(Error::input(
                    format!("{}, line {}: there is no image {}", self.path.display(), item.line, image.display()),
                    "correct the path (it is relative to the file), or remove the line",
                ));
            }
        }
        Ok(())
    }

    /// How long the conversations are, reading no more of their images than their sizes: that one does not fit `max_tokens` the
    /// training should not be what finds out.
    ///
    /// # Errors
    /// As [`trajectory`](Self::trajectory), of the first that is not as it should be.
    pub fn lengths(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        processor: &ImageProcessor,
        max_tokens: usize,
    ) -> Result<Vec<Length>> {
        let one = |i: usize| -> Result<Length> {
            let outline = |path: &PathBuf| {
                let size = picture_size(path, "an image", &processor.limits)?;
                processor.outline(size, &path.display().to_string()).map(Arc::new)
            };
            let outlines = self.items[i].images.iter().map(outline).collect::<Result<Vec<_>>>();
            outlines
                .and_then(|images| self.read(i, &images, tokenizer, template, max_tokens))
                .map(|t| Length::of(&t))
                .map_err(|e| self.about(i, e))
        };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let part = self.items.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let one = &one;
            let parts: Vec<_> = (0..self.items.len())
                .step_by(part)
                .map(|first| {
                    let work = move || (first..self.items.len().min(first + part)).map(one).collect();
                    let thread = std::thread::Builder::new().spawn_scoped(scope, work);
                    thread.map_err(|e| Error::no_thread("a thread that measures conversations", e))
                })
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Vec<Length>>>| {
                thread.join().unwrap_or_else(|panic| Err(Error::panicked("measuring the conversations", &*panic)))
            };
            let mut all = Vec::with_capacity(self.items.len());
            for thread in parts {
                all.extend(join(thread?)?);
            }
            Ok(all)
        })
    }

    /// How many there are; at least 1.
    pub fn count(&self) -> usize {
        self.items.len()
    }

    /// The `i`-th, from 0, as a trajectory: every turn of the assistant, with the token that ends it, is the policy's.
    ///
    /// # Errors
    /// When an image cannot be read, the template refuses the conversation, or it is longer than `max_tokens`; all name the
    /// line.
    pub fn trajectory(
        &self,
        i: usize,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        preprocessor: &Preprocessor,
        max_tokens: usize,
    ) -> Result<Trajectory> {
        let images = preprocessor.load_all(self.items[i].images.iter().cloned().map(ImageSource::Path));
        images.and_then(|images| self.read(i, &images, tokenizer, template, max_tokens)).map_err(|e| self.about(i, e))
    }

    /// An error about the `i`-th, with its line.
    fn about(&self, i: usize, e: Error) -> Error {
        let place = format!("{}, line {}", self.path.display(), self.items[i].line);
        match e {
            Error::Input { what, mend } => Error::input(format!("{place}: {what}"), mend),
            Error::Limit { what, mend } => Error::limit(format!("{place}: {what}"), mend),
            Error::Io { action, path, source } => Error::io(format!("{action} (for {place})"), path, source),
            e => e,
        }
    }

    /// [`trajectory`](Self::trajectory) with images at hand, and errors that do not name the line.
    fn read(
        &self,
        i: usize,
        mut images: &[Arc<Image>],
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        max_tokens: usize,
    ) -> Result<Trajectory> {
        let item = &self.items[i];
        let mut take = |messages: &[Message]| {
            let n: usize = messages.iter().map(|m| m.image_sources().count()).sum();
            let (now, later) = images.split_at(n);
            images = later;
            now
        };
        let is_assistant = |m: &Message| m.role == "assistant";
        let first = item.messages.iter().position(is_assistant).unwrap_or(item.messages.len());
        let (opening, mut rest) = item.messages.split_at(first);
        let opening = build_prompt(tokenizer, template, opening, take(opening))?;
        let mut t = Trajectory {
            item: item.line.to_string(),
            kind: String::new(),
            question: String::new(),
            answers: Vec::new(),
            group: i as u64,
            sample: 0,
            sequence: Default::default(),
            prompt_len: opening.len(),
            authors: Vec::new(),
            logprobs: Vec::new(),
            temperature: 1.0,
            steps: Vec::new(),
            ending: Ending::OutOfTurns,
            reward: Reward::default(),
        };
        t.push_prompt(&opening, Author::Prompt);
        while let Some((said, after)) = rest.split_first() {
            let mut tokens = tokenizer.encode_plain(&plain_text(said))?;
            tokens.push(tokenizer.special().im_end);
            let logprobs = vec![0.0; tokens.len()];
            t.push_sampled(&tokens, &logprobs);
            let others = after.iter().position(is_assistant).unwrap_or(after.len());
            let (heard, later) = after.split_at(others);
            rest = later;
            // What follows the last turn of the assistant teaches nothing.
            if !rest.is_empty() {
                t.push_prompt(&continue_prompt(tokenizer, template, heard, take(heard), true)?, Author::Tool);
            }
        }
        if t.sequence.len() > max_tokens {
            return Err(Error::limit(
                format!("{} tokens, and the model's context is {max_tokens}", t.sequence.len()),
                "shorten or leave out this conversation, or lower model.max_pixels",
            ));
        }
        Ok(t)
    }
}

fn item(line: &str, number: usize, beside: &Path, path: &Path) -> Result<Item> {
    let bad = |what: String, mend: &str| Error::input(format!("{}, line {number}: {what}", path.display()), mend);
    let form = "write a list of messages, or {\"messages\": [...], \"images\": [\"a.png\"]}, on one line";
    let parsed = match line.trim_start().starts_with('[') {
        true => serde_json::from_str(line).map(|messages| Record { messages, images: Vec::new() }),
        false => serde_json::from_str::<Record>(line),
    };
    let Record { messages, images } = parsed.map_err(|e| bad(format!("no conversation: {e}"), form))?;
    let mut apart = images.iter();
    let mut sources = Vec::new();
    for (n, message) in messages.iter().enumerate() {
        let mut here = message.image_sources().peekable();
        if message.role == "assistant" && here.peek().is_some() {
            return Err(bad(
                format!("message {n} (from 0) is the assistant's and holds an image"),
                "move the image to a user's message: the model writes text",
            ));
        }
        for source in here {
            let source = source.or_else(|| apart.next().map(String::as_str)).ok_or_else(|| {
                bad(
                    format!("message {n} (from 0) has an image part without a path, and none is left in \"images\""),
                    "give the path in the part as \"image\", or in the list \"images\"",
                )
            })?;
            sources.push(beside.join(source.strip_prefix("file://").unwrap_or(source)));
        }
    }
    if apart.next().is_some() {
        return Err(bad(
            format!("{} paths in \"images\", more than image parts without a path", images.len()),
            "add a part {\"type\": \"image\"} where each image belongs",
        ));
    }
    match messages.iter().position(|m| m.role == "assistant") {
        Some(0) => Err(bad("the first message is the assistant's".into(), "begin with a system or user message")),
        None => Err(bad("no message of the assistant, so nothing to learn".into(), "add one, or remove the line")),
        _ => Ok(Item { line: number, messages, images: sources }),
    }
}

fn plain_text(message: &Message) -> String {
    match &message.content {
        Content::Text(text) => text.clone(),
        Content::Parts(parts) => parts
            .iter()
            .map(|p| match p {
                Part::Text { text } => text.as_str(),
                Part::Image { .. } | Part::ImageUrl { .. } => "",
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(text: &str) -> Result<Conversations> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("talk.jsonl");
        std::fs::write(&path, text).unwrap();
        Conversations::open(&path)
    }

    #[test]
    fn an_image_that_is_not_there_is_named_with_its_line() {
        let talk = r#"
[{"role":"user","content":[{"type":"image","image":"x.png"}]},{"role":"assistant","content":"c"}]"#;
        let e = open(talk).unwrap().check_images().unwrap_err().to_string();
        assert!(e.contains("talk.jsonl, line 2: ") && e.contains("x.png") && e.contains("to mend it"), "{e}");
    }

    #[test]
    fn both_forms_are_read_and_images_find_their_places() {
        let talk = r#"[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]

{"messages":[{"role":"user","content":[{"type":"image"},{"type":"image","image":"x.png"},{"type":"image"}]},{"role":"assistant","content":"c"}],"images":["1.png","2.png"]}"#;
        let c = open(talk).unwrap();
        assert_eq!((c.count(), c.items[1].line), (2, 3));
        let names: Vec<_> = c.items[1].images.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["1.png", "x.png", "2.png"]);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, parts) in [
            ("", &["talk.jsonl", "one per line"][..]),
            ("[1]", &["line 1", "no conversation"]),
            ("{\"messages\":[], \"image\":[]}", &["line 1", "image"]),
            (r#"[{"role":"user","content":"a"}]"#, &["line 1", "nothing to learn"]),
            (r#"[{"role":"assistant","content":"a"}]"#, &["first message"]),
            (
                "\n[{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]},{\"role\":\"assistant\",\"content\":\"a\"}]",
                &["line 2", "without a path"],
            ),
            (
                r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"a"}],"images":["b"]}"#,
                &["more than image parts"],
            ),
            (
                r#"[{"role":"user","content":"a"},{"role":"assistant","content":[{"type":"image","image":"b"}]}]"#,
                &["message 1", "assistant's and holds an image"],
            ),
        ] {
            let e = open(text).err().unwrap().to_string();
            assert!(parts.iter().all(|p| e.contains(p)), "{e}");
        }
    }

    #[test]
    fn what_cannot_be_learned_is_named_with_its_line() {
        let talk = |question: &str| {
            format!(r#"[{{"role":"user","content":{question}}},{{"role":"assistant","content":"c"}}]"#)
        };
        let (text, picture) = (talk("\"a\""), talk(r#"[{"type":"image","image":"/no/such.png"}]"#));
        let c = open(&format!("\n{text}\n{picture}\n")).unwrap();
        let tokenizer = Tokenizer::from_bytes(include_bytes!("../cli/tiny/tokenizer.json"), "tiny").unwrap();
        let preprocessor = Preprocessor::new(ImageProcessor::default(), 1, 0).unwrap();
        let ours = ChatTemplate::builtin();
        let refuses = ChatTemplate::from_jinja("{{ raise_exception('not this') }}".into(), "strict.jinja").unwrap();
        let told = |i, template, most| {
            let t = c.trajectory(i, &tokenizer, template, &preprocessor, most);
            t.err().map(|e| e.to_string())
        };
        assert_eq!(told(0, &ours, 1000), None);
        for (i, template, most, line, why) in
            [(0, &ours, 3, 2, "context is 3"), (0, &refuses, 1000, 2, "not this"), (1, &ours, 1000, 3, "/no/such.png")]
        {
            let e = told(i, template, most).unwrap();
            assert!(e.contains(&format!("talk.jsonl, line {line}")) && e.contains(why), "{e}");
        }
    }

    #[test]
    fn lengths_are_known_without_the_pixels() {
        let dir = tempfile::tempdir().unwrap();
        let (picture, talks) = (dir.path().join("a.png"), dir.path().join("talk.jsonl"));
        image::RgbImage::new(300, 170).save(&picture).unwrap();
        let talk = |text: &str| {
            format!(
                r#"[{{"role":"user","content":[{{"type":"image","image":"a.png"}}]}},{{"role":"assistant","content":"{text}"}}]"#
            )
        };
        std::fs::write(&talks, format!("{}\n{}\n{}\n", talk("a"), talk("b b b"), talk("c"))).unwrap();
        let c = Conversations::open(&talks).unwrap();
        let tokenizer = Tokenizer::from_bytes(include_bytes!("../cli/tiny/tokenizer.json"), "tiny").unwrap();
        let (processor, template) = (ImageProcessor::default(), ChatTemplate::builtin());
        let preprocessor = Preprocessor::new(processor.clone(), 1, 0).unwrap();
        let longest = c.trajectory(1, &tokenizer, &template, &preprocessor, 1000).unwrap().sequence.len();
        let lengths = c.lengths(&tokenizer, &template, &processor, 1000).unwrap();
        for (i, length) in lengths.iter().enumerate() {
            let t = c.trajectory(i, &tokenizer, &template, &preprocessor, 1000).unwrap();
            assert_eq!((length.tokens, length.said), (t.sequence.len(), t.sampled()));
            assert_eq!(length.image, t.sequence.images.iter().map(|s| s.image.tokens()).sum::<usize>());
        }
        assert_eq!(lengths.len(), 3);
        let told = |most| c.lengths(&tokenizer, &template, &processor, most).map(drop).map_err(|e| e.to_string());
        told(longest).unwrap();
        let e = told(longest - 1).unwrap_err();
        assert!(e.contains("talk.jsonl, line 2: ") && e.contains(&format!("{longest} tokens")), "{e}");
        std::fs::write(&picture, "no picture").unwrap();
        let e = told(1000).unwrap_err();
        assert!(e.contains("talk.jsonl, line 1: ") && e.contains("a.png"), "{e}");
    }
}
