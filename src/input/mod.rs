//! What the model reads: text to token ids, images to patches, conversations to [`Prompt`]s.
//!
//! Everything here is equal to the reference (transformers' Qwen2.5-VL processor): the same ids, the same resized
//! pixels to the bit. Nothing here knows the model's weights; a prompt is host memory only.
//!
//! - [`Tokenizer`], [`Detokenizer`]: `tokenizer.json`, ids both ways, bytes of a token.
//! - [`Message`], [`ChatTemplate`], [`build_prompt`], [`continue_prompt`]: conversations in Hugging Face's format.
//! - [`ImageProcessor`], [`Preprocessor`]: decoding, `smart_resize`, antialiased bicubic, in parallel and cached.
//! - [`Prompt`], [`ImageSpan`], [`Image`]: the result.

mod chat;
mod prompt;
mod tokenizer;

pub use chat::{ChatTemplate, Content, ImageUrl, Message, Part, build_prompt, continue_prompt};
pub use prompt::{Grid, Image, ImageHash, ImageSpan, MERGE, Prompt};
pub use tokenizer::{Detokenizer, SpecialIds, Tokenizer};
