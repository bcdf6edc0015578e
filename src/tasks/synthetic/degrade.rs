//! What is done to images, and the code that undoes it.
//!
//! Every degradation here loses little that its repair cannot bring back: rotations are exact; light is scaled without clipping, so
//! only rounding is lost; noise hits single pixels, which a median restores; a blur keeps enough of the fine detail to be
//! sharpened.

use image::{Rgb, RgbImage, imageops};
use serde::{Deserialize, Serialize};

use super::rng::Rng;
use crate::tasks::Degradation;

/// How strong degradations are; each is drawn evenly between its two ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Strengths {
    /// The share of light that `dark` leaves, above 0.
    pub dark: [f32; 2],
    /// The share of the distance to white that `overexposure` leaves, above 0.
    pub overexposure: [f32; 2],
    /// Standard deviation of the Gaussian that `blur` applies, in strokes of the text (its scale in pixels).
    pub blur: [f32; 2],
    /// The share of pixels that `noise` turns black or white.
    pub noise: [f32; 2],
}

impl Default for Strengths {
    fn default() -> Self {
        Strengths { dark: [0.15, 0.35], overexposure: [0.15, 0.35], blur: [0.6, 1.0], noise: [0.06, 0.15] }
    }
}

/// Applies one degradation; `stroke` is the width in pixels of the text's strokes.
pub(super) fn apply(
    image: &RgbImage,
    kind: Degradation,
    strengths: &Strengths,
    stroke: u32,
    rng: &mut Rng,
) -> RgbImage {
    match kind {
        Degradation::Rotation90 => imageops::rotate90(image),
        Degradation::Rotation180 => imageops::rotate180(image),
        Degradation::Dark => {
            let left = rng.float(strengths.dark);
            map(image, |v| v * left)
        }
        Degradation::Overexposure => {
            let left = rng.float(strengths.overexposure);
            map(image, |v| 255.0 - (255.0 - v) * left)
        }
        Degradation::Blur => gaussian(image, rng.float(strengths.blur) * stroke as f32),
        Degradation::Noise => {
            let share = rng.float(strengths.noise);
            let mut noisy = image.clone();
            for pixel in noisy.pixels_mut() {
                if rng.unit() < share {
                    *pixel = Rgb([if rng.unit() < 0.5 { 0 } else { 255 }; 3]);
                }
            }
            noisy
        }
        Degradation::Crop | Degradation::None => image.clone(),
    }
}

fn map(image: &RgbImage, f: impl Fn(f32) -> f32) -> RgbImage {
    let table: Vec<u8> = (0..256).map(|v| f(v as f32).round().clamp(0.0, 255.0) as u8).collect();
    let mut out = image.clone();
    for v in out.iter_mut() {
        *v = table[usize::from(*v)];
    }
    out
}

/// Separable, cut at three standard deviations, edges repeated.
fn gaussian(image: &RgbImage, sigma: f32) -> RgbImage {
    let radius = (sigma * 3.0).ceil().max(1.0) as i64;
    let mut weights: Vec<f32> = (-radius..=radius).map(|d| (-(d * d) as f32 / (2.0 * sigma * sigma)).exp()).collect();
    let sum: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= sum);
    let (width, height) = (image.width() as usize, image.height() as usize);
    let rows: Vec<f32> = image.iter().map(|v| f32::from(*v)).collect();
    let pass = |from: &[f32], along: usize, stride: usize| -> Vec<f32> {
        (0..from.len())
            .map(|i| {
                let at = (i / stride % along) as i64;
                let tap =
                    |d: i64| from[(i as i64 + ((at + d).clamp(0, along as i64 - 1) - at) * stride as i64) as usize];
                weights.iter().zip(-radius..).map(|(w, d)| w * tap(d)).sum()
            })
            .collect()
    };
    let smooth = pass(&pass(&rows, width, 3), height, 3 * width);
    let mut out = image.clone();
    for (v, s) in out.iter_mut().zip(smooth) {
        *v = s.round().clamp(0.0, 255.0) as u8;
    }
    out
}

/// The code that undoes a degradation, as the `python` tool runs it; empty for `none`. It needs no knowledge of the strength. That
/// of a crop takes the box from the question: see [`repair_crop`].
pub fn repair(kind: Degradation) -> &'static str {
    match kind {
        Degradation::Rotation90 => "image = cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)",
        Degradation::Rotation180 => "image = cv2.rotate(image, cv2.ROTATE_180)",
        Degradation::Dark => "image = cv2.convertScaleAbs(image, alpha=255 / image.max())",
        Degradation::Overexposure => "image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)",
        Degradation::Blur => "image = cv2.addWeighted(image, 2.5, cv2.GaussianBlur(image, (0, 0), 3), -1.5, 0)",
        Degradation::Noise => "image = cv2.medianBlur(image, 3)",
        Degradation::Crop | Degradation::None => "",
    }
}

/// The code that cuts out and enlarges the box `[x_min, y_min, x_max, y_max]`, which runs from 0 to 1000 over width and height.
pub fn repair_crop([x_min, y_min, x_max, y_max]: [u32; 4]) -> String {
    format!(
        "h, w = image.shape[:2]\n\
         image = image[{y_min} * h // 1000:{y_max} * h // 1000, {x_min} * w // 1000:{x_max} * w // 1000]\n\
         image = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> RgbImage {
        RgbImage::from_fn(30, 20, |x, y| Rgb([(x * 8) as u8, (y * 12) as u8, if x > 15 { 250 } else { 4 }]))
    }

    #[test]
    fn light_is_scaled_without_clipping() {
        let strengths = Strengths { dark: [0.25; 2], overexposure: [0.25; 2], ..Strengths::default() };
        let mut rng = Rng::new(&[1]);
        let dark = apply(&picture(), Degradation::Dark, &strengths, 2, &mut rng);
        let light = apply(&picture(), Degradation::Overexposure, &strengths, 2, &mut rng);
        for ((v, d), l) in picture().iter().zip(dark.iter()).zip(light.iter()) {
            assert_eq!(*d, (f32::from(*v) * 0.25).round() as u8);
            assert_eq!(*l, (255.0 - (255.0 - f32::from(*v)) * 0.25).round() as u8);
        }
    }

    #[test]
    fn a_blur_keeps_what_is_even_and_the_mean_and_softens_edges() {
        let even = RgbImage::from_pixel(9, 7, Rgb([10, 200, 77]));
        assert_eq!(gaussian(&even, 2.5), even);
        let soft = gaussian(&picture(), 2.0);
        let edge = |i: &RgbImage| i64::from(i.get_pixel(16, 9).0[2]) - i64::from(i.get_pixel(15, 9).0[2]);
        assert!(edge(&soft) * 3 < edge(&picture()), "{}", edge(&soft));
        let mean = |i: &RgbImage| i.iter().map(|v| f64::from(*v)).sum::<f64>() / i.len() as f64;
        assert!((mean(&soft) - mean(&picture())).abs() < 1.0);
    }

    #[test]
    fn noise_hits_its_share() {
        let grey = RgbImage::from_pixel(100, 100, Rgb([128; 3]));
        let strengths = Strengths { noise: [0.1; 2], ..Strengths::default() };
        let noisy = apply(&grey, Degradation::Noise, &strengths, 2, &mut Rng::new(&[5]));
        let hit = noisy.pixels().filter(|p| p.0 != [128; 3]).count();
        assert!((850..1150).contains(&hit), "{hit}");
        assert!(noisy.pixels().all(|p| matches!(p.0, [0, 0, 0] | [128, 128, 128] | [255, 255, 255])));
    }
}
