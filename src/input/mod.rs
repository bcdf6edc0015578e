//! What the model reads: text to token ids, images to patches, conversations to [`Prompt`]s.
//!
//! Everything here is equal to the reference (transformers' Qwen2.5-VL processor): the same ids, the same resized
//! pixels to the bit. Nothing here knows the model's weights; a prompt is host memory only.
//!
//! - [`Tokenizer`], [`Detokenizer`]: `tokenizer.json`, ids both ways, bytes of a token.
//! - [`Message`], [`ChatTemplate`], [`build_prompt`], [`continue_prompt`]: conversations in Hugging Face's format.
//! - [`decode_picture`], [`ImageProcessor`], [`resize_bicubic`]: files to upright RGB to the size the model sees.
//! - [`Preprocessor`]: the same on threads of its own, cached by content.
//! - [`Prompt`], [`ImageSpan`], [`Image`]: the result.

mod chat;
mod decode;
mod preprocessor;
mod processor;
mod prompt;
mod resize;
mod tokenizer;

pub use chat::{ChatTemplate, Content, ImageUrl, Message, Part, build_prompt, continue_prompt};
pub(crate) use decode::picture_size;
pub use decode::{Picture, PictureLimits, decode_picture};
pub use preprocessor::{ImageHandle, ImageSource, Preprocessor, PreprocessorStats};
pub use processor::ImageProcessor;
pub use prompt::{Grid, Image, ImageHash, ImageSpan, MERGE, Prompt};
pub use resize::{ResizeOrder, resize_bicubic};
pub use tokenizer::{Detokenizer, SpecialIds, Tokenizer};
