//! Tasks: questions about images that need repair, where they come from, and how answers are scored.
//!
//! | file | what it holds |
//! |---|---|
//! | [`mat`] | MAT-Coding's row format: reading, writing, loading the images of a row |
//! | [`scorer`] | F1 and exact match: the published scorer and the modern one |
//! | [`synthetic`] | examples made by us: text and shapes, degraded, with answer and ideal repair |

mod examples;
pub mod mat;
pub mod scorer;
pub mod synthetic;

pub use examples::{Examples, MatExamples, Outline, SyntheticExamples};

use std::path::Path;
use std::sync::Arc;

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::input::{Picture, PictureLimits, decode_picture};
use crate::{Error, Result};

/// What was done to an image, by the names that MAT-Coding (arXiv 2505.14246, section 3) gives and that the protocol's
/// `<problem>` step uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Degradation {
    /// Turned by a quarter, clockwise.
    Rotation90,
    /// Turned upside down.
    Rotation180,
    /// Too little light.
    Dark,
    /// Too much light.
    Overexposure,
    /// Out of focus.
    Blur,
    /// Salt and pepper noise.
    Noise,
    /// Nothing was done; what the question asks about is a small part of the image.
    Crop,
    /// Nothing was done.
    None,
}

impl Degradation {
    /// All of them, in the order in which the published prompt lists them.
    pub const ALL: [Degradation; 8] = [
        Degradation::Rotation90,
        Degradation::Rotation180,
        Degradation::Dark,
        Degradation::Overexposure,
        Degradation::Blur,
        Degradation::Noise,
        Degradation::Crop,
        Degradation::None,
    ];

    /// Its name in data files and prompts.
    pub fn name(self) -> &'static str {
        match self {
            Degradation::Rotation90 => "rotation90",
            Degradation::Rotation180 => "rotation180",
            Degradation::Dark => "dark",
            Degradation::Overexposure => "overexposure",
            Degradation::Blur => "blur",
            Degradation::Noise => "noise",
            Degradation::Crop => "crop",
            Degradation::None => "none",
        }
    }

    /// The one with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl std::fmt::Display for Degradation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// MAT-Coding's two halves: one degradation (`simple`), or two or a crop (`hard`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// One degradation, or none.
    Simple,
    /// A rotation together with another degradation, or a crop.
    Hard,
}

impl Split {
    /// The half that an example with these degradations belongs to.
    pub fn of(kinds: &[Degradation]) -> Self {
        if kinds.len() > 1 || kinds.contains(&Degradation::Crop) { Split::Hard } else { Split::Simple }
    }
}

/// Reads an image file by the rules for what the model is shown; `what` it is stands in errors beside its path.
pub(crate) fn read_image(path: &Path, what: &str) -> Result<RgbImage> {
    let bytes = crate::files::read(path).map_err(|e| Error::io(format!("read ({what})"), path, e))?;
    let name = format!("{} ({what})", path.display());
    let Picture { pixels, height, width } = decode_picture(&bytes, &name, &PictureLimits::default())?;
    RgbImage::from_raw(width as u32, height as u32, pixels)
        .ok_or_else(|| Error::internal(format!("{name}: {width}x{height} pixels of another size")))
}

/// One question about one image, decoded and in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Identifies it within its data set.
    pub id: u64,
    /// What is asked.
    pub question: String,
    /// What counts as right; any of them.
    pub answers: Vec<String>,
    /// What was done to the image, in order; `[None]` where nothing was.
    pub kinds: Vec<Degradation>,
    /// Which half of the benchmark it belongs to.
    pub split: Split,
    /// The image before degradation.
    pub original: Arc<RgbImage>,
    /// The image after it; for a crop, the part that the question asks about.
    pub processed: Arc<RgbImage>,
}

impl Example {
    /// The image that the agent is given: the processed one, except that of a crop the original (as the published
    /// evaluation does).
    pub fn input(&self) -> &Arc<RgbImage> {
        if self.kinds.first() == Some(&Degradation::Crop) { &self.original } else { &self.processed }
    }
}
