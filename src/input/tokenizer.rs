use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tokenizers::DecoderWrapper;

use crate::error::panic_message;
use crate::{Error, Result};

/// Ids of the control tokens of Qwen2.5-VL, looked up by name (they differ between tokenizers of one family).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialIds {
    /// `<|endoftext|>`: end of a document, and padding.
    pub endoftext: u32,
    /// `<|im_start|>`: begins a turn.
    pub im_start: u32,
    /// `<|im_end|>`: ends a turn.
    pub im_end: u32,
    /// `<|vision_start|>`: stands before an image.
    pub vision_start: u32,
    /// `<|vision_end|>`: stands after an image.
    pub vision_end: u32,
    /// `<|vision_pad|>`.
    pub vision_pad: u32,
    /// `<|image_pad|>`: placeholder for a piece of an image.
    pub image_pad: u32,
    /// `<|video_pad|>`: placeholder for a piece of a video.
    pub video_pad: u32,
}

impl SpecialIds {
    /// Ids that stand for pictures and mean nothing as text: the ones a rollout must not sample, ascending.
    pub fn placeholders(&self) -> Vec<u32> {
        let mut ids = vec![self.vision_start, self.vision_end, self.vision_pad, self.image_pad, self.video_pad];
        ids.sort_unstable();
        ids
    }
}

/// A byte-level BPE tokenizer as Qwen ships it (`tokenizer.json`).
///
/// Safe to share between threads. Ids are `u32`; an id the tokenizer does not know decodes to nothing (a model's
/// vocabulary is padded beyond its tokenizer's).
pub struct Tokenizer {
    /// Where it came from, for errors.
    name: String,
    inner: tokenizers::Tokenizer,
    /// The same, but reading control tokens in the text as plain text; made when first needed.
    plain: OnceLock<tokenizers::Tokenizer>,
    special: SpecialIds,
    /// Contents of all special tokens.
    special_texts: Vec<String>,
    /// The bytes of all tokens, end to end; those of token i end at `ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    /// `is_special[i]`: token i is a control token.
    is_special: Vec<bool>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in a model folder, or the file itself.
    ///
    /// # Errors
    /// When the file is missing, is no tokenizer, is not byte-level, or lacks a control token; the message names it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file: PathBuf = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
        let bytes = crate::files::read(&file).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::input(
                format!("{}: there is no tokenizer here", file.display()),
                "copy tokenizer.json from the model's own repository (such as Qwen/Qwen2.5-VL-3B-Instruct) into this folder",
            ),
            _ => Error::io("read the tokenizer", &file, e),
        })?;
        Self::from_bytes(&bytes, &file.display().to_string())
    }

    /// Reads the contents of a `tokenizer.json`; `name` stands for it in errors.
    pub fn from_bytes(json: &[u8], name: &str) -> Result<Self> {
        let broken = |why: &dyn std::fmt::Display| {
            Error::input(
                format!("{name}: not a tokenizer.json: {why}"),
                "copy the file again from the model's repository; it may be cut short or of another kind",
            )
        };
        // The reader panics on some files (a decoder that is none of those it knows).
        let mut inner = catch_unwind(|| tokenizers::Tokenizer::from_bytes(json))
            .map_err(|_| broken(&"a part of it is of no known kind"))?
            .map_err(|e| broken(&e))?;
        let byte_level = match inner.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => true,
            Some(DecoderWrapper::Sequence(s)) => {
                s.get_decoders().iter().any(|d| matches!(d, DecoderWrapper::ByteLevel(_)))
            }
            _ => false,
        };
        if !byte_level {
            return Err(Error::input(
                format!("{name}: this tokenizer is not of the byte-level kind"),
                "use the tokenizer.json of a Qwen2.5-VL model",
            ));
        }
        // A prompt is never cut or padded behind our back.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::internal(format!("{name}: {e}")))?;

        let added = inner.get_added_tokens_decoder();
        let vocab = inner.get_vocab(true);
        let count = vocab.values().chain(added.keys()).max().map_or(0, |&id| id as usize + 1);
        if count > 1 << 24 {
            return Err(Error::input(
                format!("{name}: a token has the id {}, out of all proportion", count - 1),
                "copy the file again from the model's repository",
            ));
        }
        let mut texts: Vec<Vec<u8>> = vec![Vec::new(); count];
        let alphabet = byte_alphabet();
        for (text, &id) in &vocab {
            texts[id as usize] = token_to_bytes(text, &alphabet);
        }
        let mut is_special = vec![false; count];
        let mut special_texts = Vec::new();
        for (&id, token) in &added {
            texts[id as usize] = token.content.clone().into_bytes();
            if token.special {
                is_special[id as usize] = true;
                special_texts.push(token.content.clone());
            }
        }
        // Longest first, so that no token hides a longer one that begins with it.
        special_texts.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        let mut bytes = Vec::with_capacity(texts.iter().map(Vec::len).sum());
        let ends = texts
            .iter()
            .map(|t| {
                bytes.extend_from_slice(t);
                bytes.len() as u32
            })
            .collect();

        let id = |token: &str| {
            inner.token_to_id(token).ok_or_else(|| {
                Error::input(
                    format!("{name}: the tokenizer has no {token} token"),
                    "use the tokenizer.json of a Qwen2.5-VL model; its chat and images need this token",
                )
            })
        };
        let special = SpecialIds {
            endoftext: id("<|endoftext|>")?,
            im_start: id("<|im_start|>")?,
            im_end: id("<|im_end|>")?,
            vision_start: id("<|vision_start|>")?,
            vision_end: id("<|vision_end|>")?,
            vision_pad: id("<|vision_pad|>")?,
            image_pad: id("<|image_pad|>")?,
            video_pad: id("<|video_pad|>")?,
        };
        Ok(Tokenizer {
            name: name.to_owned(),
            inner,
            plain: OnceLock::new(),
            special,
            special_texts,
            bytes,
            ends,
            is_special,
        })
    }

    /// Ids of the control tokens.
    pub fn special(&self) -> &SpecialIds {
        &self.special
    }

    /// Number of ids: the largest plus one.
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The id of a token by its text, such as `</answer>` where a tokenizer has that as one token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is a control token such as `<|im_end|>`.
    pub fn is_special(&self, id: u32) -> bool {
        self.is_special.get(id as usize).copied().unwrap_or(false)
    }

    /// Contents of all control tokens, longest first.
    pub(super) fn special_texts(&self) -> &[String] {
        &self.special_texts
    }

    /// Text to ids; control tokens in the text become their ids. For text that we wrote (templates).
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer fails on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(&self.inner, text)
    }

    /// Text to ids; a control token in the text is only characters. For text that others wrote (users, tools, pages),
    /// which must not be able to end a turn or claim to be an image.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        if !self.special_texts.iter().any(|s| text.contains(s.as_str())) {
            return self.encode(text);
        }
        let plain = self.plain.get_or_init(|| {
            let mut t = self.inner.clone();
            t.set_encode_special_tokens(true);
            t
        });
        self.encode_with(plain, text)
    }

    fn encode_with(&self, tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
        // Some files that load (a normalizer that replaces the empty text) panic here. Nothing is changed by then but a
        // cache, which the crate guards itself.
        let encoded = catch_unwind(AssertUnwindSafe(|| tokenizer.encode_fast(text, false))).map_err(|panic| {
            Error::input(
                format!("{}: this tokenizer fails on text: {}", self.name, panic_message(&*panic)),
                "use the tokenizer.json of the model's own repository; its normalizer or pre-tokenizer is broken",
            )
        })?;
        let encoding = encoded.map_err(|e| {
            let start: String = text.chars().take(40).collect();
            Error::input(
                format!("the text that begins with {start:?} cannot be tokenised: {e}"),
                "shorten or split the text",
            )
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The bytes a token stands for; empty for an id the tokenizer does not know. Not always whole UTF-8 characters.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Ids to text, control tokens included. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_where(ids, |_| true)
    }

    /// Ids to text, control tokens left out.
    pub fn decode_text(&self, ids: &[u32]) -> String {
        self.decode_where(ids, |id| !self.is_special(id))
    }

    fn decode_where(&self, ids: &[u32], keep: impl Fn(u32) -> bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        ids.iter().filter(|&&id| keep(id)).for_each(|&id| bytes.extend_from_slice(self.token_bytes(id)));
        match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => String::from_utf8_lossy(e.as_bytes()).into_owned(),
        }
    }
}

/// The printable character that byte-level BPE writes for each byte (GPT-2's table): printable Latin-1 characters stand
/// for themselves, the other 68 bytes for U+0100 and up, in order.
fn byte_alphabet() -> [Option<u8>; 0x144] {
    let mut table = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let itself = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let at = if itself { byte as usize } else { next };
        next += usize::from(!itself);
        table[at] = Some(byte);
    }
    table
}

/// A token that uses a character outside the alphabet was written as plain text, and stands for its own UTF-8.
fn token_to_bytes(token: &str, alphabet: &[Option<u8>]) -> Vec<u8> {
    let mapped: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(c as usize).copied().flatten()).collect();
    mapped.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Turns a stream of ids into text as it comes: a character whose bytes are spread over tokens appears when it is whole.
///
/// All text returned, with [`finish`](Detokenizer::finish)'s at the end, equals [`Tokenizer::decode`] of all ids.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Begins a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one more id; returns the text that is now certain (often, not always, that token's).
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.pending.extend_from_slice(tokenizer.token_bytes(id));
        let mut out = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, after) = rest.split_at(e.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    match e.error_len() {
                        Some(bad) => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[bad..];
                        }
                        None => {
                            rest = after;
                            break;
                        }
                    }
                }
            }
        }
        self.pending = rest.to_vec();
        out
    }

    /// Whether all ids so far have become text: no character is waiting for the rest of its bytes.
    pub fn is_whole(&self) -> bool {
        self.pending.is_empty()
    }

    /// Ends the stream: what is left of an incomplete character, as U+FFFD.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}
