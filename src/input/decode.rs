//! Encoded pictures (PNG, JPEG, WebP) to RGB, as Pillow's `exif_transpose` and `convert("RGB")` give them.

use std::io::{BufRead, BufReader, Cursor, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};

use crate::{Error, Result};

/// A decoded picture, upright.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// `[height][width][3]`, RGB.
    pub pixels: Vec<u8>,
    /// Pixels.
    pub height: usize,
    /// Pixels.
    pub width: usize,
}

/// The largest picture that is decoded: what lies beyond is a mistake or an attack (a few bytes can claim any size).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PictureLimits {
    /// Pixels along the longer side.
    pub max_side: usize,
    /// Width times height.
    pub max_pixels: usize,
}

impl Default for PictureLimits {
    /// 16,384 pixels a side, and 2^30 / 12 pixels in all: where Pillow begins to warn.
    fn default() -> Self {
        PictureLimits { max_side: 16_384, max_pixels: (1 << 30) / 12 }
    }
}

impl PictureLimits {
    /// Checks a size before memory is spent on it; `name` stands for the picture in errors.
    pub(super) fn check(&self, width: usize, height: usize, name: &str) -> Result<()> {
        if width == 0 || height == 0 {
            return Err(Error::input(
                format!("{name}: the picture is {width}x{height} pixels: there is nothing to see"),
                "give a picture with at least one pixel",
            ));
        }
        if width > self.max_side || height > self.max_side {
            return Err(Error::limit(
                format!("{name}: the picture is {width}x{height} pixels; a side may have {}", self.max_side),
                "scale it down or cut it into pieces (the model sees about a million pixels at once)",
            ));
        }
        match width.checked_mul(height) {
            Some(pixels) if pixels <= self.max_pixels => Ok(()),
            _ => Err(Error::limit(
                format!("{name}: the picture is {width}x{height} pixels; {} in all are allowed", self.max_pixels),
                "scale it down or cut it into pieces (the model sees about a million pixels at once)",
            )),
        }
    }
}

/// Decodes a PNG, JPEG or WebP file (the first frame of an animated one) to upright RGB.
///
/// The EXIF orientation is applied. Alpha is dropped, not composited, as Pillow's `convert("RGB")` does: the colour
/// stored beneath a transparent pixel is what the model sees. Of 16-bit samples the high byte counts (Pillow does
/// so too, except that it clips 16-bit grayscale at 255, which leaves such pictures white; ours stay what they are).
///
/// # Errors
/// A broken, empty, zero-sized or oversized picture; `name` stands for it in the message.
pub fn decode_picture(bytes: &[u8], name: &str, limits: &PictureLimits) -> Result<Picture> {
    // A panic in a decoder must not take down the thread that feeds a run.
    catch_unwind(AssertUnwindSafe(|| decode(bytes, name, limits)))
        .unwrap_or_else(|_| Err(broken(name, "the decoder failed")))
}

fn broken(name: &str, why: impl std::fmt::Display) -> Error {
    Error::input(
        format!("{name}: the picture cannot be decoded: {why}"),
        "check that the file is whole: open it in a viewer, or save it again as PNG",
    )
}

fn decode(bytes: &[u8], name: &str, limits: &PictureLimits) -> Result<Picture> {
    if bytes.is_empty() {
        return Err(broken(name, "the file is empty"));
    }
    // The PNG decoder refuses a zero side without saying which; the header has it.
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.get(12..16) == Some(b"IHDR") {
        let side = |at: usize| bytes.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize);
        if let (Some(width), Some(height)) = (side(16), side(20)) {
            limits.check(width, height, name)?;
        }
    }
    let mut decoder = decoder(Cursor::new(bytes), name, limits)?;
    let (width, height) = decoder.dimensions();
    // A damaged EXIF block is no reason to refuse a picture that can be seen.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let color = decoder.color_type();
    let mut raw = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut raw).map_err(|e| broken(name, e))?;
    let pixels =
        to_rgb(raw, color).ok_or_else(|| broken(name, format!("its pixel format {color:?} is not supported")))?;
    let rgb = RgbImage::from_raw(width, height, pixels).ok_or_else(|| broken(name, "pixels are missing"))?;
    let mut picture = DynamicImage::ImageRgb8(rgb);
    picture.apply_orientation(orientation);
    let rgb = picture.into_rgb8();
    Ok(Picture { height: rgb.height() as usize, width: rgb.width() as usize, pixels: rgb.into_raw() })
}

/// The size (height, width) of a file that [`decode_picture`] would decode, from its header alone; on its side where EXIF would
/// turn it, which changes no number of tokens.
///
/// # Errors
/// As [`decode_picture`], as far as the header tells; [`Error::Io`] where the file cannot be read.
pub(crate) fn picture_size(path: &Path, name: &str, limits: &PictureLimits) -> Result<(usize, usize)> {
    let file = crate::files::open(path).map_err(|e| Error::io(format!("read ({name})"), path, e))?;
    let name = format!("{} ({name})", path.display());
    let read = || decoder(BufReader::new(file), &name, limits).map(|d| d.dimensions());
    let (width, height) =
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(broken(&name, "the decoder failed")))?;
    Ok((height as usize, width as usize))
}

/// A picture whose header was read and found good.
fn decoder<'a>(source: impl BufRead + Seek + 'a, name: &str, limits: &PictureLimits) -> Result<impl ImageDecoder + 'a> {
    let mut reader = ImageReader::new(source).with_guessed_format().map_err(|e| broken(name, e))?;
    if !matches!(reader.format(), Some(ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) {
        return Err(Error::input(
            format!("{name}: neither PNG, JPEG nor WebP"),
            "save the picture in one of these formats",
        ));
    }
    // Sizes are checked below, by our own limits, before the pixels are read.
    reader.no_limits();
    let decoder = reader.into_decoder().map_err(|e| broken(name, e))?;
    let (width, height) = decoder.dimensions();
    limits.check(width as usize, height as usize, name)?;
    Ok(decoder)
}

/// Samples to 8-bit RGB: alpha dropped, gray repeated, the high byte of 16 bits.
fn to_rgb(raw: Vec<u8>, color: ColorType) -> Option<Vec<u8>> {
    // Decoders give 16-bit samples in the machine's own order.
    let high = |sample: &[u8]| (u16::from_ne_bytes([sample[0], sample[1]]) >> 8) as u8;
    Some(match color {
        ColorType::Rgb8 => raw,
        ColorType::L8 => raw.iter().flat_map(|&v| [v; 3]).collect(),
        ColorType::La8 => raw.chunks_exact(2).flat_map(|p| [p[0]; 3]).collect(),
        ColorType::Rgba8 => raw.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect(),
        ColorType::L16 => raw.chunks_exact(2).flat_map(|p| [high(p); 3]).collect(),
        ColorType::La16 => raw.chunks_exact(4).flat_map(|p| [high(p); 3]).collect(),
        ColorType::Rgb16 => raw.chunks_exact(2).map(high).collect(),
        ColorType::Rgba16 => raw.chunks_exact(8).flat_map(|p| [high(p), high(&p[2..]), high(&p[4..])]).collect(),
        _ => return None,
    })
}
