//! What a synthetic data set looks like.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::degrade::Strengths;
use super::draw::text_size;
use super::words;
use crate::tasks::Degradation;
use crate::{Error, Result};

/// What questions are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// "What word is written in the image?"
    Word,
    /// "What number is written in the image?"
    Digits,
    /// "What color is the circle?"
    Colour,
}

/// What a synthetic data set looks like. Pairs are ranges, both ends included.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Width in pixels, before degradation.
    pub width: [u32; 2],
    /// Height in pixels, before degradation.
    pub height: [u32; 2],
    /// Kinds of content (`word`, `digits`, `colour`), each equally likely. Crops ask about text whatever is drawn.
    pub content: Vec<Content>,
    /// Letters of a word, from 3 to 7.
    pub letters: [u32; 2],
    /// Digits of a number, at least 2.
    pub digits: [u32; 2],
    /// Pixels per dot of the font, whose letters are 5 x 7 dots. Made smaller where a text would not fit, but not below the lower end.
    pub font_scale: [u32; 2],
    /// The same for the small texts of crops.
    pub crop_font_scale: [u32; 2],
    /// Small texts in the image of a crop, one of which is asked about.
    pub crop_texts: [u32; 2],
    /// Shapes strewn about beside what is asked about.
    pub clutter: [u32; 2],
    /// The largest random change of a background pixel, in steps of 255.
    pub grain: f32,
    /// Degradations by the names of MAT-Coding (as in the default), each equally likely. Crops and untouched images are among them.
    pub degradations: Vec<Degradation>,
    /// The share of examples whose image is rotated and degraded otherwise as well. Both come from `degradations`.
    pub pairs: f32,
    /// How strong the degradations are.
    pub strengths: Strengths,
    /// A folder of PNG or JPEG photographs to use as backgrounds, such as [`photographs`](super::photographs) gives.
    pub photographs: Option<PathBuf>,
    /// The share of examples with a photograph as the background, where there are any.
    pub photograph_share: f32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            width: [160, 320],
            height: [120, 240],
            content: vec![Content::Word, Content::Digits, Content::Colour],
            letters: [3, 6],
            digits: [2, 5],
            font_scale: [2, 4],
            crop_font_scale: [1, 1],
            crop_texts: [2, 4],
            clutter: [0, 2],
            grain: 4.0,
            degradations: Degradation::ALL.to_vec(),
            pairs: 0.25,
            strengths: Strengths::default(),
            photographs: None,
            photograph_share: 0.5,
        }
    }
}

/// Pixels that stay free at the edge of an image.
pub(super) const MARGIN: u32 = 2;

impl Config {
    /// The rotations and the others of [`Config::degradations`] that a pair is made of.
    pub(super) fn pair_parts(&self) -> (Vec<Degradation>, Vec<Degradation>) {
        use Degradation::*;
        let among = |kinds: &[Degradation]| self.degradations.iter().copied().filter(|d| kinds.contains(d)).collect();
        (among(&[Rotation90, Rotation180]), among(&[Dark, Overexposure, Blur, Noise]))
    }

    /// The smallest scale at which text is still text after noise and blur, whose repair takes strokes of two pixels.
    pub(super) fn smallest_scale(&self, kinds: &[Degradation]) -> u32 {
        let fine = kinds.iter().any(|k| matches!(k, Degradation::Blur | Degradation::Noise));
        self.font_scale[0].max(if fine { 2 } else { 1 })
    }

    /// Checks that every example can be made.
    ///
    /// # Errors
    /// [`Error::Input`] naming the field.
    pub(super) fn check(&self) -> Result<()> {
        let bad = |field: &str, what: String, mend: &str| {
            Err(Error::input(format!("synthetic task: `{field}` {what}"), mend))
        };
        for (field, [low, high], least, most) in [
            ("width", self.width, 16, 8192),
            ("height", self.height, 16, 8192),
            ("letters", self.letters, 3, 7),
            ("digits", self.digits, 2, 18),
            ("font_scale", self.font_scale, 1, 256),
            ("crop_font_scale", self.crop_font_scale, 1, 256),
            ("crop_texts", self.crop_texts, 1, 64),
            ("clutter", self.clutter, 0, 64),
        ] {
            if low > high || low < least || high > most {
                let mend = format!("give [low, high] with {least} <= low <= high <= {most}");
                return bad(field, format!("is [{low}, {high}]"), &mend);
            }
        }
        let s = &self.strengths;
        for (field, [low, high], most) in [
            ("strengths.dark", s.dark, 1.0),
            ("strengths.overexposure", s.overexposure, 1.0),
            ("strengths.blur", s.blur, 20.0),
            ("strengths.noise", s.noise, 0.5),
        ] {
            // Written so that NaN is refused too.
            if !(low > 0.0 && low <= high && high <= most) {
                let mend = format!("give [low, high] with 0 < low <= high <= {most}");
                return bad(field, format!("is [{low}, {high}]"), &mend);
            }
        }
        for (field, value, most) in
            [("pairs", self.pairs, 1.0), ("photograph_share", self.photograph_share, 1.0), ("grain", self.grain, 64.0)]
        {
            if !(0.0..=most).contains(&value) {
                return bad(field, format!("is {value}"), &format!("give a number from 0 to {most}"));
            }
        }
        if self.content.is_empty() || self.degradations.is_empty() {
            let field = if self.content.is_empty() { "content" } else { "degradations" };
            return bad(field, "is empty".into(), "name at least one");
        }
        let (rotations, others) = self.pair_parts();
        if self.pairs > 0.0 && (rotations.is_empty() || others.is_empty()) {
            let mend =
                "add a rotation and one of dark, overexposure, blur, noise to `degradations`, or set `pairs` to 0";
            return bad("pairs", "needs both halves of a pair".into(), mend);
        }
        if words::of_length(self.letters).is_empty() {
            return bad("letters", format!("is {:?}, and no word is so long", self.letters), "use 3 to 7");
        }
        self.check_fit()
    }

    fn check_fit(&self) -> Result<()> {
        let crops = self.degradations.contains(&Degradation::Crop);
        let words = self.content.contains(&Content::Word);
        let digits = self.content.contains(&Content::Digits) || (crops && !words);
        let longest = [(words, self.letters[1]), (digits, self.digits[1])];
        let longest = longest.iter().filter(|(used, _)| *used).map(|(_, n)| *n).max().unwrap_or(0);
        let scale = self.smallest_scale(&self.degradations);
        let mut needs = vec![(longest, scale)];
        if crops {
            needs.push((longest, self.crop_font_scale[1]));
        }
        for (n, scale) in needs {
            let (width, height) = text_size(n as usize, scale);
            let (width, height) = (width + 2 * MARGIN + 2 * scale, height + 2 * MARGIN + 2 * scale);
            if width > self.width[0] || height > self.height[0] {
                return Err(Error::input(
                    format!(
                        "synthetic task: {n} characters at {scale} pixels per dot need {width} x {height} pixels, and the smallest image \
                         is {} x {}",
                        self.width[0], self.height[0]
                    ),
                    "raise `width` and `height`, or lower `letters`, `digits` or the font's scale (2 is the least for blur and noise)",
                ));
            }
        }
        Ok(())
    }
}
