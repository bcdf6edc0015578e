use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{Image, Prompt, Tokenizer};
use crate::{Error, Result};

/// One turn of a conversation, as Hugging Face writes it: `{"role": "user", "content": ...}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant` (a template may know others).
    pub role: String,
    /// A string, or a list of parts.
    pub content: Content,
}

impl Message {
    /// A turn of text only.
    pub fn text(role: impl Into<String>, text: impl Into<String>) -> Self {
        Message { role: role.into(), content: Content::Text(text.into()) }
    }

    /// A turn of parts.
    pub fn parts(role: impl Into<String>, parts: Vec<Part>) -> Self {
        Message { role: role.into(), content: Content::Parts(parts) }
    }

    /// Where this turn's images are to be had, in order: `None` for one that the caller hands over apart.
    pub fn image_sources(&self) -> impl Iterator<Item = Option<&str>> {
        let parts = match &self.content {
            Content::Text(_) => &[][..],
            Content::Parts(parts) => parts,
        };
        parts.iter().filter_map(|part| match part {
            Part::Text { .. } => None,
            Part::Image { image } => Some(image.as_deref()),
            Part::ImageUrl { image_url } => Some(Some(image_url.url.as_str())),
        })
    }
}

/// What a turn says: a string, or a list of text and image parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Content {
    /// Text only.
    Text(String),
    /// Text and images in order.
    Parts(Vec<Part>),
}

/// One part of a turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Part {
    /// `{"type": "text", "text": ...}`
    Text {
        /// The text.
        text: String,
    },
    /// `{"type": "image", "image": path}`; `url` and `path` are read as well, and nothing where the image comes apart.
    Image {
        /// A path, if the image is named here.
        #[serde(default, alias = "url", alias = "path", skip_serializing_if = "Option::is_none")]
        image: Option<String>,
    },
    /// `{"type": "image_url", "image_url": {"url": path}}`, as OpenAI writes it.
    ImageUrl {
        /// The object that holds the path.
        image_url: ImageUrl,
    },
}

/// The inner object of [`Part::ImageUrl`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageUrl {
    /// A path.
    pub url: String,
}

// By hand, because serde's untagged enums answer every mistake with "did not match any variant".
impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, or a list of parts such as {\"type\": \"text\", \"text\": ...}")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

/// How a conversation becomes text: the model folder's own Jinja template, or Qwen2.5-VL's built in.
pub struct ChatTemplate {
    /// `None`: built in.
    jinja: Option<(minijinja::Environment<'static>, PathBuf)>,
}

const TEMPLATE: &str = "chat";
const DEFAULT_SYSTEM: &str = "You are a helpful assistant.";
const IMAGE: &str = "<|vision_start|><|image_pad|><|vision_end|>";

impl ChatTemplate {
    /// Qwen2.5-VL's own: ChatML turns, "You are a helpful assistant." where the first turn is not a system one, and
    /// `<|vision_start|><|image_pad|><|vision_end|>` for each image.
    pub fn builtin() -> Self {
        ChatTemplate { jinja: None }
    }

    /// The template of a model folder: `chat_template.jinja`, else `chat_template.json`, else `chat_template` in
    /// `tokenizer_config.json`, else the built-in one.
    ///
    /// # Errors
    /// When a file that is there cannot be read or does not parse.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let read = |name: &str| match crate::files::read_to_string(&dir.join(name)) {
            Ok(text) => Ok(Some((text, dir.join(name)))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("read the chat template", dir.join(name), e)),
        };
        if let Some((source, path)) = read("chat_template.jinja")? {
            return Self::from_jinja(source, path);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let Some((text, path)) = read(name)? else { continue };
            let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| {
                Error::input(
                    format!("{}: not valid JSON: {e}", path.display()),
                    "copy the file again from the model's repository, or remove it to use the built-in template",
                )
            })?;
            // Some models ship several, as a list of {name, template}.
            let named = |list: &Vec<serde_json::Value>| {
                list.iter()
                    .find(|t| t["name"] == "default")
                    .or(list.first())
                    .and_then(|t| t["template"].as_str().map(str::to_owned))
            };
            let source = match &json["chat_template"] {
                serde_json::Value::String(s) => Some(s.clone()),
                serde_json::Value::Array(list) => named(list),
                _ => None,
            };
            if let Some(source) = source {
                return Self::from_jinja(source, path);
            }
        }
        Ok(Self::builtin())
    }

    /// A template in Jinja; `path` stands for it in errors.
    pub fn from_jinja(source: String, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let mut env = minijinja::Environment::new();
        // As transformers sets up Jinja.
        let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| Error::internal(e.to_string()))?);
        env.set_unknown_method_callback(python_method);
        // A template that loops without end fails within a second; a long conversation takes some thousands of these.
        env.set_fuel(Some(10_000_000));
        env.add_function("raise_exception", |message: String| -> std::result::Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        env.add_template_owned(TEMPLATE, source).map_err(|e| {
            Error::input(
                format!("{}: the chat template does not parse: {e}", path.display()),
                "correct the template, or remove it to use the built-in one",
            )
        })?;
        Ok(ChatTemplate { jinja: Some((env, path)) })
    }

    /// The conversation as text, control tokens included, one `<|image_pad|>` for each image; with `generate`, the
    /// beginning of an assistant turn at the end.
    ///
    /// # Errors
    /// [`Error::Input`] where the template refuses the conversation or fails.
    pub fn render(&self, messages: &[Message], generate: bool) -> Result<String> {
        match &self.jinja {
            None => Ok(render_builtin(messages, generate)),
            Some((env, path)) => env
                .get_template(TEMPLATE)
                .and_then(|t| {
                    t.render(minijinja::context! {
                    messages => minijinja::Value::from(minijinja::value::Serde(messages)), add_generation_prompt => generate })
                })
                .map_err(|e| {
                    Error::input(
                        format!("{}: the chat template refuses this conversation: {e}", path.display()),
                        "check roles and their order, or remove the template to use the built-in one",
                    )
                }),
        }
    }
}

fn render_builtin(messages: &[Message], generate: bool) -> String {
    let mut out = String::new();
    let mut turn = |role: &str, content: &dyn Fn(&mut String)| {
        out.push_str("<|im_start|>");
        out.push_str(role);
        out.push('\n');
        content(&mut out);
        out.push_str("<|im_end|>\n");
    };
    if messages.first().is_some_and(|m| m.role != "system") {
        turn("system", &|out| out.push_str(DEFAULT_SYSTEM));
    }
    for message in messages {
        turn(&message.role, &|out| match &message.content {
            Content::Text(text) => out.push_str(text),
            Content::Parts(parts) => parts.iter().for_each(|part| match part {
                Part::Text { text } => out.push_str(text),
                Part::Image { .. } | Part::ImageUrl { .. } => out.push_str(IMAGE),
            }),
        });
    }
    if generate {
        out.push_str("<|im_start|>assistant\n");
    }
    out
}

/// The Python methods that chat templates call, which Jinja itself does not have.
fn python_method(
    _: &mut minijinja::State,
    value: &minijinja::Value,
    method: &str,
    args: &[minijinja::Value],
) -> std::result::Result<minijinja::Value, minijinja::Error> {
    use minijinja::{Error as JinjaError, ErrorKind, Value};
    let unknown = || JinjaError::new(ErrorKind::UnknownMethod, format!("no method named {method}"));
    let arg = |i: usize| args.get(i).and_then(Value::as_str);
    if let Some(text) = value.as_str() {
        let set: Option<Vec<char>> = arg(0).map(|s| s.chars().collect());
        let strips = |c: char| set.as_ref().map_or(c.is_whitespace(), |set| set.contains(&c));
        return Ok(match (method, arg(0), arg(1)) {
            ("strip", ..) => text.trim_matches(strips).into(),
            ("lstrip", ..) => text.trim_start_matches(strips).into(),
            ("rstrip", ..) => text.trim_end_matches(strips).into(),
            ("lower", ..) => text.to_lowercase().into(),
            ("upper", ..) => text.to_uppercase().into(),
            ("startswith", Some(what), _) => text.starts_with(what).into(),
            ("endswith", Some(what), _) => text.ends_with(what).into(),
            ("replace", Some(from), Some(to)) => text.replace(from, to).into(),
            ("split", None, _) => text.split_whitespace().map(Value::from).collect(),
            ("split", Some(by), _) if !by.is_empty() => text.split(by).map(Value::from).collect(),
            _ => return Err(unknown()),
        });
    }
    match (method, args.first()) {
        ("get", Some(key)) => {
            let found = value.get_item(key)?;
            Ok(if found.is_undefined() { args.get(1).cloned().unwrap_or(Value::from(())) } else { found })
        }
        ("items", None) => Ok(value
            .try_iter()?
            .map(|key| value.get_item(&key).map(|item| Value::from(vec![key, item])))
            .collect::<std::result::Result<Vec<_>, _>>()?
            .into()),
        _ => Err(unknown()),
    }
}

/// Renders, tokenises and expands a conversation; the prompt ends where the assistant is to speak.
///
/// `images` are those of the messages in order. Text within a message never becomes a control token: a message that
/// quotes `<|im_end|>` is read as those characters (transformers would end the turn there).
///
/// # Errors
/// When the numbers of images differ, or the template fails.
pub fn build_prompt(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    images: &[Arc<Image>],
) -> Result<Prompt> {
    encode_conversation(tokenizer, template, messages, images, |text| Ok(text.to_owned()))
}

/// What follows a generated turn: its end, the new turns, and the beginning of the next assistant turn.
///
/// Append the result to a session whose last tokens were generated; nothing that was generated is encoded again.
/// `ended`: generation stopped with `<|im_end|>`, which the session then holds already.
///
/// # Errors
/// As [`build_prompt`].
pub fn continue_prompt(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    images: &[Arc<Image>],
    ended: bool,
) -> Result<Prompt> {
    // The template is asked for a whole conversation with a marked assistant turn; what it puts behind the mark is
    // what belongs behind a generated turn, whatever the template.
    let mark = unused_char(messages, 1);
    let mut all = vec![Message::text("user", ""), Message::text("assistant", mark)];
    all.extend_from_slice(messages);
    encode_conversation(tokenizer, template, &all, images, |text| {
        let (_, after) = text.split_once(mark).ok_or_else(|| {
            Error::input(
                "the chat template leaves out the assistant's turn, so no conversation can go on",
                "correct the template, or remove it to use the built-in one",
            )
        })?;
        Ok(if ended { after.strip_prefix("<|im_end|>").unwrap_or(after) } else { after }.to_owned())
    })
}

/// The `n`-th private-use character that occurs in no message.
fn unused_char(messages: &[Message], n: usize) -> char {
    let occurs = |c: char| {
        messages.iter().any(|m| {
            m.role.contains(c)
                || match &m.content {
                    Content::Text(text) => text.contains(c),
                    Content::Parts(parts) => parts.iter().any(|p| matches!(p, Part::Text { text } if text.contains(c))),
                }
        })
    };
    // Plane 16 is private use in whole: no text holds all of it.
    ('\u{100000}'..='\u{10FFFD}').filter(|&c| !occurs(c)).nth(n).unwrap_or('\u{10FFFD}')
}

fn encode_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    images: &[Arc<Image>],
    select: impl Fn(&str) -> Result<String>,
) -> Result<Prompt> {
    let expected: usize = messages.iter().map(|m| m.image_sources().count()).sum();
    if expected != images.len() {
        return Err(Error::input(
            format!("the conversation shows {expected} images, but {} were given", images.len()),
            "give one image for each image part, in order",
        ));
    }
    // A control token quoted in a message is taken out before rendering and put back as plain characters after it.
    let fence = unused_char(messages, 0);
    let mut messages = messages.to_vec();
    for message in &mut messages {
        fence_off(&mut message.role, tokenizer, fence);
        match &mut message.content {
            Content::Text(text) => fence_off(text, tokenizer, fence),
            Content::Parts(parts) => parts.iter_mut().for_each(|part| {
                if let Part::Text { text } = part {
                    fence_off(text, tokenizer, fence);
                }
            }),
        }
    }
    let text = select(&template.render(&messages, true)?)?;
    let image_pad = tokenizer.special().image_pad;
    let mut prompt = Prompt::default();
    let mut next = images.iter();
    for (n, piece) in text.split(fence).enumerate() {
        // Odd pieces stand between two fences: the number of a control token.
        if n % 2 == 1 {
            let quoted = piece.parse().ok().and_then(|i: usize| tokenizer.special_texts().get(i));
            let quoted = quoted.ok_or_else(|| Error::internal(format!("the chat template changed {piece:?}")))?;
            prompt.tokens.extend(tokenizer.encode_plain(quoted)?);
            continue;
        }
        for id in tokenizer.encode(piece)? {
            match (id == image_pad).then(|| next.next()) {
                None => prompt.tokens.push(id),
                Some(Some(image)) => prompt.push_image(image.clone(), image_pad),
                Some(None) => return Err(template_count(images.len())),
            }
        }
    }
    if next.next().is_some() {
        return Err(template_count(images.len()));
    }
    Ok(prompt)
}

fn template_count(given: usize) -> Error {
    Error::input(
        format!("the chat template writes another number of <|image_pad|> than the {given} images of the conversation"),
        "correct the template, or remove it to use the built-in one",
    )
}

fn fence_off(text: &mut String, tokenizer: &Tokenizer, fence: char) {
    for (i, special) in tokenizer.special_texts().iter().enumerate() {
        if text.contains(special.as_str()) {
            *text = text.replace(special.as_str(), &format!("{fence}{i}{fence}"));
        }
    }
}
