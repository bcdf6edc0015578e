use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::ops::patch_embed::PATCH;
use crate::{Error, Result};

/// Side of the square of patches that the vision merger joins into one token (`spatial_merge_size`).
pub const MERGE: usize = 2;

/// Size of an image (or video) in vision patches: frames, rows, columns (`image_grid_thw` in transformers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Temporal patches; 1 for a still image (its two frames are the same pixels).
    pub t: usize,
    /// Rows of patches; a multiple of [`MERGE`].
    pub h: usize,
    /// Columns of patches; a multiple of [`MERGE`].
    pub w: usize,
}

impl Grid {
    /// Vision patches in all: t * h * w, or the largest number there is.
    pub fn patches(&self) -> usize {
        self.t.saturating_mul(self.h).saturating_mul(self.w)
    }

    /// Tokens that the decoder sees: one for each [`MERGE`] x [`MERGE`] square of patches.
    pub fn tokens(&self) -> usize {
        self.patches() / (MERGE * MERGE)
    }
}

/// BLAKE3 of what the model sees of an image: the size and the bytes of the resized pixels.
///
/// Two files whose resized pixels agree share one hash, and so one entry in every cache downstream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageHash(pub [u8; 32]);

impl fmt::Display for ImageHash {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ImageHash {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "ImageHash({self})")
    }
}

/// An image ready for the vision tower: resized RGB pixels, not yet normalised (the patch embedding does that).
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    /// `[height][width][3]`, RGB, 0..=255.
    pub pixels: Vec<u8>,
    /// Pixels; a multiple of patch size * [`MERGE`].
    pub height: usize,
    /// Pixels; a multiple of patch size * [`MERGE`].
    pub width: usize,
    /// Size in patches.
    pub grid: Grid,
    /// Identity of the content.
    pub hash: ImageHash,
    /// (width, height) of the decoded picture before resizing, after its orientation was applied.
    pub original: (usize, usize),
}

impl Image {
    /// Wraps pixels that already have the size the model is to see.
    ///
    /// # Errors
    /// When a side is zero or no multiple of `patch * MERGE`, or the number of bytes does not fit.
    pub fn from_resized(
        pixels: Vec<u8>,
        height: usize,
        width: usize,
        patch: usize,
        original: (usize, usize),
    ) -> Result<Self> {
        let factor = patch * MERGE;
        if height == 0 || width == 0 || !height.is_multiple_of(factor) || !width.is_multiple_of(factor) {
            return Err(Error::input(
                format!("an image of {width}x{height} pixels does not divide into squares of {factor} pixels"),
                "resize it with ImageProcessor, which picks a size that does",
            ));
        }
        if Some(pixels.len()) != height.checked_mul(width).and_then(|n| n.checked_mul(3)) {
            return Err(Error::input(
                format!("{} bytes of pixels for an RGB image of {width}x{height}", pixels.len()),
                "give height * width * 3 bytes: rows from the top, RGB",
            ));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(height as u64).to_le_bytes());
        hasher.update(&(width as u64).to_le_bytes());
        hasher.update(&pixels);
        let hash = ImageHash(*hasher.finalize().as_bytes());
        let grid = Grid { t: 1, h: height / patch, w: width / patch };
        Ok(Image { pixels, height, width, grid, hash, original })
    }

    /// Tokens this image takes in a prompt.
    pub fn tokens(&self) -> usize {
        self.grid.tokens()
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Image({}x{}, {:?}, {})", self.width, self.height, self.grid, &self.hash.to_string()[..8])
    }
}

/// The tokens of a prompt that stand for one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpan {
    /// Index of the first `<|image_pad|>` in [`Prompt::tokens`].
    pub offset: usize,
    /// Tokens; equals `image.tokens()`.
    pub len: usize,
    /// The image.
    pub image: Arc<Image>,
}

impl ImageSpan {
    /// Token indices of the span.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// Token ids and the images that some of them stand for, in order: what a session is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids; each image takes `image.tokens()` times `<|image_pad|>`.
    pub tokens: Vec<u32>,
    /// Spans in ascending order, not overlapping.
    pub images: Vec<ImageSpan>,
}

impl Prompt {
    /// A prompt of text only.
    pub fn from_tokens(tokens: Vec<u32>) -> Self {
        Prompt { tokens, images: Vec::new() }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Adds the tokens of an image at the end. The caller adds `<|vision_start|>` and `<|vision_end|>`.
    pub fn push_image(&mut self, image: Arc<Image>, image_pad: u32) {
        let span = ImageSpan { offset: self.tokens.len(), len: image.tokens(), image };
        self.tokens.resize(span.offset + span.len, image_pad);
        self.images.push(span);
    }

    /// Adds `other` at the end.
    pub fn append(&mut self, other: &Prompt) {
        let base = self.tokens.len();
        self.tokens.extend_from_slice(&other.tokens);
        self.images.extend(other.images.iter().map(|s| ImageSpan { offset: s.offset + base, ..s.clone() }));
    }

    /// Keeps the first `len` tokens, or fewer: where the cut would fall inside an image it goes before that image, so
    /// that an image and its tokens leave together. Returns the number of tokens kept.
    pub fn truncate(&mut self, len: usize) -> usize {
        let cut = self.images.iter().find(|s| s.offset < len && len < s.offset + s.len).map_or(len, |s| s.offset);
        self.tokens.truncate(cut);
        self.images.retain(|s| s.offset + s.len <= cut);
        self.tokens.len()
    }

    /// The span that holds token `index`, if that token stands for a piece of an image.
    pub fn span_at(&self, index: usize) -> Option<&ImageSpan> {
        let after = self.images.partition_point(|s| s.offset <= index);
        self.images[..after].last().filter(|s| index < s.offset + s.len)
    }

    /// Checks what every consumer relies on: spans ascend without overlap and lie within the tokens, each is as long as
    /// its image's grid says and holds only `image_pad`, and `image_pad` stands nowhere else.
    ///
    /// # Errors
    /// Names the first token or span that does not fit.
    pub fn validate(&self, image_pad: u32) -> Result<()> {
        let mend = "build prompts with build_prompt, or put images in with Prompt::push_image";
        let mut at = 0;
        let stray = |range: Range<usize>| match self.tokens[range.clone()].iter().position(|&id| id == image_pad) {
            Some(i) => Err(Error::input(
                format!("token {} is the image placeholder {image_pad}, but no image stands there", range.start + i),
                mend,
            )),
            None => Ok(()),
        };
        for (n, span) in self.images.iter().enumerate() {
            let (grid, tokens) = (span.image.grid, span.image.tokens());
            if span.len != tokens || span.len == 0 {
                return Err(Error::input(
                    format!("image {n} has {} tokens, but its grid {grid:?} has {tokens}", span.len),
                    mend,
                ));
            }
            let seen = grid.patches().saturating_mul(PATCH * PATCH * 3);
            if grid.t != 1 || span.image.pixels.len() != seen {
                return Err(Error::input(
                    format!(
                        "image {n} has {} bytes of pixels, but its grid {grid:?} takes {seen}",
                        span.image.pixels.len()
                    ),
                    "make images with ImageProcessor or Image::from_resized, for patches of 14 pixels",
                ));
            }
            let end = span.offset.checked_add(span.len).filter(|&end| span.offset >= at && end <= self.tokens.len());
            let Some(end) = end else {
                return Err(Error::input(
                    format!(
                        "image {n} (tokens {} and {} more) overlaps another image or ends behind the prompt's {} tokens",
                        span.offset,
                        span.len,
                        self.tokens.len()
                    ),
                    mend,
                ));
            };
            stray(at..span.offset)?;
            if let Some(i) = self.tokens[span.range()].iter().position(|&id| id != image_pad) {
                return Err(Error::input(
                    format!(
                        "token {} lies within image {n} but is {}, not the image placeholder {image_pad}",
                        span.offset + i,
                        self.tokens[span.offset + i]
                    ),
                    mend,
                ));
            }
            at = end;
        }
        stray(at..self.tokens.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAD: u32 = 9;

    fn image(h: usize, w: usize) -> Arc<Image> {
        Arc::new(Image::from_resized(vec![7; h * w * 3 * 28 * 28], h * 28, w * 28, 14, (1, 1)).unwrap())
    }

    /// `true`: an image, `false`: one text token.
    fn prompt(parts: &[bool]) -> Prompt {
        let mut p = Prompt::default();
        for &is_image in parts {
            if is_image { p.push_image(image(1, 2), PAD) } else { p.tokens.push(1) }
        }
        p
    }

    #[test]
    fn tokens_per_image() {
        let i = image(2, 3);
        assert_eq!((i.grid, i.tokens()), (Grid { t: 1, h: 4, w: 6 }, 6));
        assert!(Image::from_resized(vec![0; 30], 1, 10, 14, (1, 1)).is_err());
        assert!(Image::from_resized(vec![0; 5], 28, 28, 14, (1, 1)).is_err());
        assert!(Image::from_resized(vec![], 0, 28, 14, (1, 1)).is_err());
        assert!(Image::from_resized(vec![], 28 << 32, 28 << 32, 14, (1, 1)).is_err(), "a product that wraps to zero");
    }

    #[test]
    fn hash_depends_on_shape_and_pixels() {
        assert_eq!(image(1, 2).hash, image(1, 2).hash);
        assert_ne!(image(1, 2).hash, image(2, 1).hash);
        let mut pixels = image(1, 2).pixels.clone();
        pixels[5] += 1;
        assert_ne!(Image::from_resized(pixels, 28, 56, 14, (1, 1)).unwrap().hash, image(1, 2).hash);
    }

    #[test]
    fn truncate_takes_an_image_whole() {
        let mut p = prompt(&[false, true, false, true]); // 1 PAD PAD 1 PAD PAD
        assert_eq!((p.clone().truncate(6), p.clone().truncate(5), p.clone().truncate(4)), (6, 4, 4));
        assert_eq!(p.truncate(2), 1);
        assert_eq!((p.tokens.as_slice(), p.images.len()), (&[1][..], 0));
    }

    #[test]
    fn validate_names_the_place() {
        let good = prompt(&[false, true, false]);
        good.validate(PAD).unwrap();
        let said = |change: &dyn Fn(&mut Prompt)| {
            let mut p = good.clone();
            change(&mut p);
            p.validate(PAD).unwrap_err().to_string()
        };
        assert!(said(&|p| p.tokens[0] = PAD).contains("token 0"));
        assert!(said(&|p| p.tokens[3] = PAD).contains("token 3"));
        assert!(said(&|p| p.tokens[2] = 4).contains("token 2"));
        assert!(said(&|p| p.images[0].len = 1).contains("grid"));
        let huge = |p: &mut Prompt| Arc::make_mut(&mut p.images[0].image).grid = Grid { t: 1 << 62, h: 2, w: 8 };
        assert!(said(&huge).contains("grid"));
        assert!(said(&|p| p.images[0].offset = 3).contains("behind"));
        assert!(said(&|p| p.images[0].offset = usize::MAX).contains("behind"));
        assert!(said(&|p| p.images.push(p.images[0].clone())).contains("overlaps"));
    }

    proptest! {
        #[test]
        fn spans_stay_valid(a in proptest::collection::vec(any::<bool>(), 0..12),
                            b in proptest::collection::vec(any::<bool>(), 0..12), cut in 0usize..40) {
            let (pa, pb) = (prompt(&a), prompt(&b));
            let mut p = pa.clone();
            p.append(&pb);
            prop_assert!(p.validate(PAD).is_ok());
            let joined: Vec<bool> = a.iter().chain(&b).copied().collect();
            prop_assert_eq!(&p, &prompt(&joined));
            for i in 0..p.len() {
                prop_assert_eq!(p.span_at(i).is_some(), p.tokens[i] == PAD);
            }
            let full = p.clone();
            let kept = p.truncate(cut);
            prop_assert!(kept <= cut && kept == p.len() && p.validate(PAD).is_ok());
            prop_assert_eq!(&full.tokens[..kept], &p.tokens[..]);
            prop_assert!(kept == cut.min(full.len()) || full.images.iter().any(|s| s.offset == kept));
        }

        #[test]
        fn wild_spans_never_panic(tokens in proptest::collection::vec(8u32..11, 0..20),
                                  spans in proptest::collection::vec((0usize..25, 0usize..6), 0..4)) {
            let images = spans.iter().map(|&(offset, len)| ImageSpan { offset, len, image: image(1, 2) }).collect();
            let p = Prompt { tokens, images };
            if p.validate(PAD).is_ok() {
                let inside: usize = p.images.iter().map(|s| s.len).sum();
                prop_assert_eq!(inside, p.tokens.iter().filter(|&&t| t == PAD).count());
            }
        }
    }
}
