use std::path::Path;

use super::decode::{Picture, PictureLimits, decode_picture};
use super::resize::{ResizeOrder, resize_bicubic};
use super::{Grid, Image, ImageHash, MERGE};
use crate::ops::patch_embed::PATCH;
use crate::{Error, Result};

/// How pictures become [`Image`]s: the settings of `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor {
    /// Side of a vision patch, pixels.
    pub patch: usize,
    /// Fewest pixels of a resized image.
    pub min_pixels: usize,
    /// Most pixels of a resized image; each [`MERGE`]² patches of them are a token of the prompt.
    pub max_pixels: usize,
    /// Mean of each channel after scaling to 0..=1: for the patch embedding.
    pub mean: [f32; 3],
    /// Standard deviation of each channel after scaling to 0..=1: for the patch embedding.
    pub std: [f32; 3],
    /// Order of the resizing passes.
    pub order: ResizeOrder,
    /// The largest picture that is taken in.
    pub limits: PictureLimits,
}

impl Default for ImageProcessor {
    /// transformers' defaults for Qwen2.5-VL: patches of 14, 56² to 1280 * 28² pixels, CLIP's mean and deviation.
    fn default() -> Self {
        ImageProcessor {
            patch: 14,
            min_pixels: 56 * 56,
            max_pixels: 1280 * 28 * 28,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            order: ResizeOrder::default(),
            limits: PictureLimits::default(),
        }
    }
}

impl ImageProcessor {
    /// Reads `preprocessor_config.json` (or the `image_processor` in `processor_config.json`) of a model folder; the
    /// defaults where there is neither.
    ///
    /// # Errors
    /// When the file does not parse, or asks for what Qwen2.5-VL does not do; the message names the field.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        for (name, field) in [("preprocessor_config.json", None), ("processor_config.json", Some("image_processor"))] {
            let path = dir.as_ref().join(name);
            let text = match crate::files::read_to_string(&path) {
                Ok(text) => text,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::io("read the image settings", &path, e)),
            };
            let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| {
                Error::input(
                    format!("{}: not valid JSON: {e}", path.display()),
                    "copy the file again from the model's repository, or remove it to use the defaults",
                )
            })?;
            if !json.is_object() {
                return Err(Error::input(
                    format!("{}: not a JSON object", path.display()),
                    "copy the file again from the model's repository, or remove it to use the defaults",
                ));
            }
            let json = match field {
                None => &json,
                Some(field) if json[field].is_object() => &json[field],
                Some(_) => continue,
            };
            return Self::from_json(json, &path.display().to_string());
        }
        Ok(Self::default())
    }

    fn from_json(json: &serde_json::Value, name: &str) -> Result<Self> {
        let bad = |field: &str, what: &str| {
            Error::input(
                format!("{name}: {field} is {}, but {what}", json[field]),
                "copy the file again from the model's repository, or remove it to use the defaults",
            )
        };
        let whole = |field: &str, value: &serde_json::Value, default: usize| match value {
            serde_json::Value::Null => Ok(default),
            v => match v.as_u64() {
                Some(n) if (1..=1 << 28).contains(&n) => Ok(n as usize),
                _ => Err(bad(field, "a whole number from 1 to 2^28 is needed")),
            },
        };
        let triple = |field: &str, default: [f32; 3]| match &json[field] {
            serde_json::Value::Null => Ok(default),
            v => match v.as_array().map(|a| a.iter().filter_map(|x| x.as_f64()).collect::<Vec<_>>()).as_deref() {
                Some(&[r, g, b]) => Ok([r as f32, g as f32, b as f32]),
                _ => Err(bad(field, "three numbers are needed")),
            },
        };
        for (field, needed) in [("temporal_patch_size", 2), ("merge_size", MERGE)] {
            if whole(field, &json[field], needed)? != needed {
                return Err(bad(field, &format!("Qwen2.5-VL's vision tower needs {needed}")));
            }
        }
        for field in ["do_resize", "do_rescale", "do_normalize"] {
            if json[field] == false {
                return Err(bad(field, "Qwen2.5-VL always does this"));
            }
        }
        if !(json["resample"].is_null() || json["resample"] == 3) {
            return Err(bad("resample", "only 3 (bicubic) is supported, which Qwen2.5-VL was trained with"));
        }
        if json["rescale_factor"].as_f64().is_some_and(|f| (f - 1.0 / 255.0).abs() > 1e-9) {
            return Err(bad("rescale_factor", "only 1/255 is supported"));
        }
        let d = Self::default();
        let size = &json["size"];
        let processor = ImageProcessor {
            patch: whole("patch_size", &json["patch_size"], d.patch)?,
            // Older files say min_pixels and max_pixels, which win over the newer `size`.
            min_pixels: whole("min_pixels", &json["min_pixels"], whole("size", &size["shortest_edge"], d.min_pixels)?)?,
            max_pixels: whole("max_pixels", &json["max_pixels"], whole("size", &size["longest_edge"], d.max_pixels)?)?,
            mean: triple("image_mean", d.mean)?,
            std: triple("image_std", d.std)?,
            ..d
        };
        if processor.mean.iter().any(|m| !m.is_finite()) {
            return Err(bad("image_mean", "a mean must be a number that fits 32 bits"));
        }
        if processor.std.iter().any(|&s| s <= 0.0 || !s.is_finite()) {
            return Err(bad("image_std", "a deviation must be above zero"));
        }
        if processor.patch != PATCH {
            return Err(bad("patch_size", &format!("Qwen2.5-VL's vision tower needs {PATCH}")));
        }
        if processor.min_pixels > processor.max_pixels {
            return Err(Error::input(
                format!("{name}: min_pixels {} exceeds max_pixels {}", processor.min_pixels, processor.max_pixels),
                "lower min_pixels or raise max_pixels",
            ));
        }
        Ok(processor)
    }

    /// The size (height, width) that a picture of `height` x `width` is resized to: multiples of `patch * MERGE`,
    /// between `min_pixels` and `max_pixels`, the aspect ratio kept as nearly as that allows. Equal to the reference's
    /// `smart_resize`, which rounds half to even.
    ///
    /// # Errors
    /// When one side is more than 200 times the other, or a side is zero.
    pub fn smart_resize(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let (long, short) = (height.max(width) as f64, height.min(width) as f64);
        if short == 0.0 || long / short > 200.0 {
            return Err(Error::input(
                format!("a picture of {width}x{height} pixels: one side is more than 200 times the other"),
                "crop it or cut it into pieces",
            ));
        }
        let factor = (self.patch * MERGE) as f64;
        let (h, w) = (height as f64, width as f64);
        let fit = |side: f64| (side / factor).round_ties_even() * factor;
        let (mut fit_h, mut fit_w) = (fit(h), fit(w));
        if fit_h * fit_w > self.max_pixels as f64 {
            let shrink = (h * w / self.max_pixels as f64).sqrt();
            let fit = |side: f64| ((side / shrink / factor).floor() * factor).max(factor);
            (fit_h, fit_w) = (fit(h), fit(w));
        } else if fit_h * fit_w < self.min_pixels as f64 {
            let grow = (self.min_pixels as f64 / (h * w)).sqrt();
            let fit = |side: f64| (side * grow / factor).ceil() * factor;
            (fit_h, fit_w) = (fit(h), fit(w));
        }
        Ok((fit_h as usize, fit_w as usize))
    }

    /// Decodes and resizes a PNG, JPEG or WebP file; `name` stands for it in errors.
    pub fn process(&self, bytes: &[u8], name: &str) -> Result<Image> {
        self.process_picture(decode_picture(bytes, name, &self.limits)?, name)
    }

    /// What a picture of `size` (height, width) would become, without its pixels: as long in a prompt, and nothing to show to a
    /// model.
    ///
    /// # Errors
    /// As [`process_picture`](Self::process_picture); `name` stands for the picture.
    pub(crate) fn outline(&self, (height, width): (usize, usize), name: &str) -> Result<Image> {
        let (h, w) = self.resized(height, width, name)?;
        let grid = Grid { t: 1, h: h / self.patch, w: w / self.patch };
        let hash = ImageHash([0; 32]);
        Ok(Image { pixels: Vec::new(), height: h, width: w, grid, hash, original: (width, height) })
    }

    /// [`smart_resize`](Self::smart_resize) of a picture within the limits; `name` stands for it in errors.
    fn resized(&self, height: usize, width: usize, name: &str) -> Result<(usize, usize)> {
        self.limits.check(width, height, name)?;
        self.smart_resize(height, width).map_err(|e| match e {
            Error::Input { what, mend } => Error::Input { what: format!("{name}: {what}"), mend },
            other => other,
        })
    }

    /// Resizes a decoded picture; `name` stands for it in errors.
    pub fn process_picture(&self, picture: Picture, name: &str) -> Result<Image> {
        let Picture { pixels, height, width } = picture;
        let (h, w) = self.resized(height, width, name)?;
        if pixels.len() != height * width * 3 {
            return Err(Error::input(
                format!("{name}: {} bytes of pixels for an RGB picture of {width}x{height}", pixels.len()),
                "give height * width * 3 bytes: rows from the top, RGB",
            ));
        }
        let resized = if (h, w) == (height, width) {
            pixels
        } else {
            resize_bicubic(&pixels, (height, width), (h, w), self.order)
        };
        Image::from_resized(resized, h, w, self.patch, (width, height))
    }
}
