//! Examples made by us: text and shapes on plain or photographic backgrounds, degraded as MAT-Coding's images are, with question,
//! answer and ideal repair. Any number of them, the same for ever for the same seed.
//!
//! ```
//! use varft::tasks::synthetic::{Config, Subset, Synthetic, teacher};
//!
//! let task = Synthetic::new(Config::default(), 7)?;
//! let example = task.example(Subset::Train, 0);
//! println!("{} -> {:?}, repaired by:\n{}", example.question, example.answers, teacher(&example));
//! # Ok::<(), varft::Error>(())
//! ```

mod config;
mod degrade;
mod draw;
mod font;
mod rng;
mod words;

use std::path::Path;
use std::sync::Arc;

use image::{RgbImage, imageops};
use serde::{Deserialize, Serialize};

use self::config::MARGIN;
use self::draw::{Area, Shape};
use self::rng::Rng;
use super::mat::{self, Row};
use super::{Degradation, Example, Split, read_image};
use crate::tools::python::environment;
use crate::{Error, Result};

pub use config::{Config, Content};
pub use degrade::{Strengths, repair, repair_crop};

/// Examples to learn from, and others to measure on. No word or number that is an answer in one occurs as one in the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subset {
    /// To learn from: four fifths of all texts.
    Train,
    /// To measure on: the others.
    HeldOut,
}

impl Subset {
    fn holds(self, text: &str) -> bool {
        let first = blake3::hash(text.as_bytes()).as_bytes()[0];
        first.is_multiple_of(5) == (self == Subset::HeldOut)
    }
}

/// A source of examples.
pub struct Synthetic {
    config: Config,
    seed: u64,
    words: [Vec<&'static str>; 2],
    photographs: Vec<RgbImage>,
}

impl Synthetic {
    /// Checks the configuration and loads the photographs, if it names any.
    ///
    /// # Errors
    /// [`Error::Input`] naming the field that is wrong; [`Error::Io`] where photographs cannot be read.
    pub fn new(config: Config, seed: u64) -> Result<Self> {
        config.check()?;
        let words = [Subset::Train, Subset::HeldOut]
            .map(|s| words::of_length(config.letters).into_iter().filter(|w| s.holds(w)).collect());
        let photographs = match &config.photographs {
            Some(folder) => load_photographs(folder)?,
            None => Vec::new(),
        };
        Ok(Synthetic { config, seed, words, photographs })
    }

    /// The configuration in use.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Example number `index` of a subset; the same for the same seed and configuration, whatever else was asked for.
    pub fn example(&self, subset: Subset, index: u64) -> Example {
        let (mut rng, kinds, width, height) = self.begin(subset, index);
        let mut scene = Scene { task: self, subset, photographic: false, image: RgbImage::new(0, 0) };
        scene.background(&mut rng, width, height);
        let is_crop = kinds == [Degradation::Crop];
        let content = *rng.pick(&self.config.content);
        let (question, answer, stroke, area) = match content {
            _ if is_crop => scene.small_texts(&mut rng),
            Content::Colour => scene.shapes(&mut rng),
            content => scene.text(&mut rng, content, &kinds),
        };
        let original = scene.image;
        let mut processed = match area {
            Some([x, y, right, bottom]) if is_crop => {
                imageops::crop_imm(&original, x, y, right - x, bottom - y).to_image()
            }
            _ => original.clone(),
        };
        // A pair names the rotation first; it is applied last, as when a picture is taken badly and then put down sideways.
        for kind in kinds.iter().rev() {
            processed = degrade::apply(&processed, *kind, &self.config.strengths, stroke, &mut rng);
        }
        Example {
            id: index,
            question,
            answers: vec![answer],
            split: Split::of(&kinds),
            kinds,
            original: Arc::new(original),
            processed: Arc::new(processed),
        }
    }

    /// A question as long as any that example number `index` may ask, and the (height, width) of the image that it gives.
    pub(super) fn outline(&self, subset: Subset, index: u64) -> (String, (usize, usize)) {
        let (_, kinds, width, height) = self.begin(subset, index);
        let size = (height as usize, width as usize);
        match kinds[0] {
            Degradation::Crop => (ask_crop([1000; 4]), size),
            Degradation::Rotation90 => (ask_text(Content::Digits), (size.1, size.0)),
            // No other question is longer.
            _ => (ask_text(Content::Digits), size),
        }
    }

    /// What an example begins with: its noise, what is done to its image, the image's width and height before that.
    fn begin(&self, subset: Subset, index: u64) -> (Rng, Vec<Degradation>, u32, u32) {
        let mut rng = Rng::new(&[self.seed, subset as u64, index]);
        let kinds = self.draw_kinds(&mut rng);
        let (width, height) = (rng.int(self.config.width), rng.int(self.config.height));
        (rng, kinds, width, height)
    }

    fn draw_kinds(&self, rng: &mut Rng) -> Vec<Degradation> {
        let (rotations, others) = self.config.pair_parts();
        if rng.unit() < self.config.pairs {
            vec![*rng.pick(&rotations), *rng.pick(&others)]
        } else {
            vec![*rng.pick(&self.config.degradations)]
        }
    }

    /// A word or number of the subset that tells up from down.
    fn draw_text(&self, rng: &mut Rng, subset: Subset, content: Content) -> String {
        if content == Content::Word {
            return rng.pick(&self.words[subset as usize]).to_string();
        }
        loop {
            let n = rng.int(self.config.digits);
            let text: String = (0..n).map(|i| char::from(b'0' + rng.int([u32::from(i == 0), 9]) as u8)).collect();
            if words::has_an_upright(&text) && subset.holds(&text) {
                return text;
            }
        }
    }

    /// Writes examples `0..n` of a subset as a MAT-Coding data set: `synthetic.json` in `folder`, images in `folder/images`.
    ///
    /// # Errors
    /// [`Error::Io`] where a file cannot be written.
    pub fn write_dataset(&self, folder: impl AsRef<Path>, subset: Subset, n: u64) -> Result<Vec<Row>> {
        let folder = folder.as_ref();
        let images = folder.join("images");
        std::fs::create_dir_all(&images).map_err(|e| Error::io("create", &images, e))?;
        let mut rows = Vec::new();
        for index in 0..n {
            let example = self.example(subset, index);
            let kinds = example.kinds.iter().map(|k| k.name()).collect::<Vec<_>>().join("+");
            let save = |image: &RgbImage, which: &str| {
                let name = format!("{kinds}_{index}_{which}.png");
                let path = images.join(&name);
                image.save(&path).map_err(|e| match e {
                    image::ImageError::IoError(e) => Error::io("write", &path, e),
                    e => Error::internal(format!("{}: {e}", path.display())),
                })?;
                Ok::<_, Error>(name)
            };
            rows.push(Row {
                id: index,
                ori_image_path: save(&example.original, "ori")?,
                processed_image_path: save(&example.processed, "proc")?,
                question: example.question,
                answers: example.answers,
                kinds: example.kinds,
                split: example.split,
            });
        }
        mat::write(folder.join("synthetic.json"), &rows)?;
        Ok(rows)
    }
}

/// What a scene asks and what is right, the width of its strokes in pixels, and the box that a crop cuts out, in pixels.
type Asked = (String, String, u32, Option<[u32; 4]>);

/// An image in the making.
struct Scene<'a> {
    task: &'a Synthetic,
    subset: Subset,
    photographic: bool,
    image: RgbImage,
}

impl Scene<'_> {
    fn background(&mut self, rng: &mut Rng, width: u32, height: u32) {
        let config = &self.task.config;
        self.photographic = !self.task.photographs.is_empty() && rng.unit() < config.photograph_share;
        if !self.photographic {
            self.image = draw::background(rng, width, height, config.grain);
            return;
        }
        let photo = rng.pick(&self.task.photographs);
        // The largest part of the right proportions, or a smaller one down to the size that is needed.
        let most = (photo.width() as f32 / width as f32).min(photo.height() as f32 / height as f32);
        let zoom = if most > 1.0 { rng.float([1.0, most]) } else { most };
        let part = |n: u32, of: u32| ((n as f32 * zoom) as u32).clamp(1, of);
        let (w, h) = (part(width, photo.width()), part(height, photo.height()));
        let (x, y) = (rng.int([0, photo.width() - w]), rng.int([0, photo.height() - h]));
        let part = imageops::crop_imm(photo, x, y, w, h).to_image();
        self.image = imageops::resize(&part, width, height, imageops::FilterType::Triangle);
    }

    /// A place for something of this size that touches nothing in `taken`, if one is found soon.
    fn place(&self, rng: &mut Rng, width: u32, height: u32, taken: &[Area]) -> Option<Area> {
        let right = self.image.width().checked_sub(width + MARGIN).filter(|r| *r >= MARGIN)?;
        let bottom = self.image.height().checked_sub(height + MARGIN).filter(|b| *b >= MARGIN)?;
        (0..40).find_map(|_| {
            let (left, top) = (rng.int([MARGIN, right]), rng.int([MARGIN, bottom]));
            let area = Area { left, top, right: left + width, bottom: top + height };
            let apart =
                |t: &Area| area.right <= t.left || t.right <= area.left || area.bottom <= t.top || t.bottom <= area.top;
            taken.iter().all(apart).then_some(area)
        })
    }

    /// Writes a line where there is room; its area has a dot's width around it.
    fn write(&mut self, rng: &mut Rng, text: &str, scale: u32, taken: &[Area]) -> Option<Area> {
        let (width, height) = draw::text_size(text.len(), scale);
        let area = self.place(rng, width + 2 * scale, height + 2 * scale, taken)?;
        if self.photographic {
            draw::fill(&mut self.image, area, [0; 3].map(|_| rng.int([205, 245]) as u8));
        }
        draw::text(&mut self.image, text, area.left + scale, area.top + scale, scale, draw::ink(rng));
        Some(area)
    }

    fn clutter(&mut self, rng: &mut Rng, taken: &mut Vec<Area>) {
        for _ in 0..rng.int(self.task.config.clutter) {
            let side = self.image.width().min(self.image.height());
            let size = rng.int([side / 10 + 3, side / 5 + 3]);
            let (kind, (_, colour)) = (*rng.pick(&Shape::ALL), *rng.pick(&draw::COLOURS));
            if let Some(area) = self.place(rng, size, size, taken) {
                draw::shape(&mut self.image, kind, area.left, area.top, size, colour);
                taken.push(area);
            }
        }
    }

    fn text(&mut self, rng: &mut Rng, content: Content, kinds: &[Degradation]) -> Asked {
        let config = &self.task.config;
        let text = self.task.draw_text(rng, self.subset, content);
        let least = config.smallest_scale(kinds);
        let mut scale = rng.int(config.font_scale).max(least);
        let fits = |scale: u32| {
            let (width, height) = draw::text_size(text.len(), scale);
            let around = 2 * scale + 2 * MARGIN;
            width + around <= self.image.width() && height + around <= self.image.height()
        };
        while scale > least && !fits(scale) {
            scale -= 1;
        }
        let area = self.write(rng, &text, scale, &[]);
        self.clutter(rng, &mut area.into_iter().collect());
        (ask_text(content), text, scale, None)
    }

    fn small_texts(&mut self, rng: &mut Rng) -> Asked {
        let config = &self.task.config;
        let texts: Vec<Content> = config.content.iter().copied().filter(|c| *c != Content::Colour).collect();
        let scale = rng.int(config.crop_font_scale);
        let mut taken = Vec::new();
        let mut asked = None;
        for _ in 0..rng.int(config.crop_texts) {
            let content = if texts.is_empty() { Content::Digits } else { *rng.pick(&texts) };
            let text = self.task.draw_text(rng, self.subset, content);
            if let Some(area) = self.write(rng, &text, scale, &taken) {
                taken.push(area);
                asked.get_or_insert((text, area));
            }
        }
        self.clutter(rng, &mut taken);
        // The configuration was checked to leave room for the first one.
        let (text, area) = asked.unwrap_or((String::new(), Area { left: 0, top: 0, right: 1, bottom: 1 }));
        let (width, height) = (self.image.width(), self.image.height());
        let normal = [
            area.left * 1000 / width,
            area.top * 1000 / height,
            (area.right * 1000).div_ceil(width),
            (area.bottom * 1000).div_ceil(height),
        ];
        let pixels =
            [normal[0] * width / 1000, normal[1] * height / 1000, normal[2] * width / 1000, normal[3] * height / 1000];
        (ask_crop(normal), text, scale, Some(pixels))
    }

    fn shapes(&mut self, rng: &mut Rng) -> Asked {
        let (width, height) = (self.image.width(), self.image.height());
        let first = rng.int([0, 2]);
        let n = rng.int([2, 3]);
        let mut colours: Vec<_> = draw::COLOURS.to_vec();
        let mut asked = ("", "");
        for i in 0..n {
            let kind = Shape::ALL[((first + i) % 3) as usize];
            let (name, colour) = colours.swap_remove(rng.int([0, colours.len() as u32 - 1]) as usize);
            // One beside the other, each in a cell of its own.
            let cell = width / n;
            let room = cell.min(height) - 2 * MARGIN;
            let size = rng.int([room / 2, room]).max(1);
            let left = i * cell + rng.int([MARGIN, cell - size - MARGIN]);
            let top = rng.int([MARGIN, height - size - MARGIN]);
            if self.photographic {
                let area = Area { left, top, right: left + size, bottom: top + size };
                draw::fill(&mut self.image, area, [225; 3]);
            }
            draw::shape(&mut self.image, kind, left, top, size, colour);
            if i == 0 {
                asked = (kind.name(), name);
            }
        }
        (format!("What color is the {}?", asked.0), asked.1.to_string(), (width.min(height) / 40).max(2), None)
    }
}

fn ask_text(content: Content) -> String {
    let noun = if content == Content::Word { "word" } else { "number" };
    format!("What {noun} is written in the image?")
}

fn ask_crop(area: [u32; 4]) -> String {
    format!(
        "What is written inside the box {area:?}? The box is [x_min, y_min, x_max, y_max], normalized to 0-1000 by the width \
         and height of the image."
    )
}

/// The code that undoes what was done to the example's input, as the `python` tool runs it; empty where nothing was done.
pub fn teacher(example: &Example) -> String {
    let step = |kind: &Degradation| match (kind, mat::crop_box(&example.question)) {
        (Degradation::Crop, Some(area)) => repair_crop(area),
        (kind, _) => repair(*kind).to_string(),
    };
    example.kinds.iter().map(step).filter(|code| !code.is_empty()).collect::<Vec<_>>().join("\n")
}

/// A folder with photographs under free licences (CC0 or in the public domain), downloaded on first use: those that scikit-image's
/// package carries. For [`Config::photographs`].
///
/// # Errors
/// Those of [`environment::Search::find`].
pub fn photographs(search: &environment::Search) -> Result<std::path::PathBuf> {
    search.photographs()
}

/// Reads all PNG and JPEG files of a folder, in the order of their names, so that a seed means the same everywhere.
fn load_photographs(folder: &Path) -> Result<Vec<RgbImage>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io("read the folder of photographs", folder, e))? {
        let path = entry.map_err(|e| Error::io("read the folder of photographs", folder, e))?.path();
        let extension = path.extension().map(|e| e.to_ascii_lowercase());
        if extension.is_some_and(|e| e == "png" || e == "jpg" || e == "jpeg") {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::input(
            format!("{}: no photographs (PNG or JPEG files) in this folder", folder.display()),
            "put some there, or leave `photographs` out",
        ));
    }
    files.iter().map(|path| read_image(path, "a photograph")).collect()
}
