//! Drawing: backgrounds, text and shapes.

use image::{Rgb, RgbImage};

use super::font;
use super::rng::Rng;

/// A rectangle in pixels; right and bottom are exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) left: u32,
    pub(super) top: u32,
    pub(super) right: u32,
    pub(super) bottom: u32,
}

/// The shapes that questions ask about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Circle,
    Square,
    Triangle,
}

impl Shape {
    pub(super) const ALL: [Shape; 3] = [Shape::Circle, Shape::Square, Shape::Triangle];

    pub(super) fn name(self) -> &'static str {
        match self {
            Shape::Circle => "circle",
            Shape::Square => "square",
            Shape::Triangle => "triangle",
        }
    }

    /// Whether the point, from -1 to 1 in both directions with y down, is inside.
    fn holds(self, x: f32, y: f32) -> bool {
        match self {
            Shape::Circle => x * x + y * y <= 1.0,
            Shape::Square => x.abs() <= 0.9 && y.abs() <= 0.9,
            Shape::Triangle => y <= 0.9 && x.abs() <= (y + 0.9) / 1.8,
        }
    }
}

/// The colours that questions ask about, far enough apart to stay so after degradation and repair.
pub(super) const COLOURS: [(&str, [u8; 3]); 8] = [
    ("red", [215, 35, 35]),
    ("green", [35, 150, 55]),
    ("blue", [40, 80, 215]),
    ("yellow", [245, 225, 45]),
    ("orange", [245, 140, 25]),
    ("purple", [135, 50, 170]),
    ("black", [15, 15, 15]),
    ("brown", [120, 72, 35]),
];

/// A light background, brighter at the top as outdoors, so that it shows which way is up.
pub(super) fn background(rng: &mut Rng, width: u32, height: u32, grain: f32) -> RgbImage {
    let tint = [0; 3].map(|_| rng.float([-14.0, 14.0]));
    let (top, bottom) = (rng.float([215.0, 238.0]), rng.float([140.0, 175.0]));
    let slant = rng.float([-18.0, 18.0]);
    RgbImage::from_fn(width, height, |x, y| {
        let (u, v) = (x as f32 / width as f32 - 0.5, y as f32 / height as f32);
        let light = top + (bottom - top) * v + slant * u;
        let speck = if grain > 0.0 { rng.float([-grain, grain]) } else { 0.0 };
        Rgb(tint.map(|t| (light + t + speck).round().clamp(0.0, 255.0) as u8))
    })
}

/// A dark colour, for text on a background of ours.
pub(super) fn ink(rng: &mut Rng) -> [u8; 3] {
    [0; 3].map(|_| rng.int([0, 55]) as u8)
}

/// Writes one line with its left upper corner at (`left`, `top`), `scale` pixels per dot; what falls outside is cut off.
pub(super) fn text(image: &mut RgbImage, text: &str, left: u32, top: u32, scale: u32, colour: [u8; 3]) {
    for (i, c) in text.chars().enumerate() {
        let origin = left + i as u32 * font::ADVANCE * scale;
        for y in 0..font::HEIGHT * scale {
            for x in 0..font::WIDTH * scale {
                if font::dot(c, x / scale, y / scale) {
                    put(image, origin + x, top + y, colour);
                }
            }
        }
    }
}

/// The size in pixels of a line of `n` characters.
pub(super) fn text_size(n: usize, scale: u32) -> (u32, u32) {
    (font::line_width(n) * scale, font::HEIGHT * scale)
}

/// Fills a shape that touches the sides of a square with its left upper corner at (`left`, `top`).
pub(super) fn shape(image: &mut RgbImage, shape: Shape, left: u32, top: u32, size: u32, colour: [u8; 3]) {
    for y in 0..size {
        for x in 0..size {
            let unit = |v: u32| (v as f32 + 0.5) / size as f32 * 2.0 - 1.0;
            if shape.holds(unit(x), unit(y)) {
                put(image, left + x, top + y, colour);
            }
        }
    }
}

/// Fills an area.
pub(super) fn fill(image: &mut RgbImage, area: Area, colour: [u8; 3]) {
    for y in area.top..area.bottom {
        for x in area.left..area.right {
            put(image, x, y, colour);
        }
    }
}

fn put(image: &mut RgbImage, x: u32, y: u32, colour: [u8; 3]) {
    if let Some(pixel) = image.get_pixel_mut_checked(x, y) {
        *pixel = Rgb(colour);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_drawn_at_its_scale_and_cut_at_the_edge() {
        let mut image = RgbImage::new(20, 20);
        text(&mut image, "L", 1, 2, 2, [9, 9, 9]);
        let set = |x, y| image.get_pixel(x, y).0 == [9; 3];
        assert!(set(1, 2) && set(2, 3) && !set(3, 2) && set(10, 15) && !set(11, 15) && !set(0, 2));
        text(&mut image, "WWWW", 15, 15, 3, [1; 3]);
        assert_eq!(text_size(4, 3), (69, 21));
    }

    #[test]
    fn shapes_fill_what_their_names_say() {
        let mut counts = Shape::ALL.map(|s| {
            let mut image = RgbImage::new(40, 40);
            shape(&mut image, s, 0, 0, 40, [1; 3]);
            image.pixels().filter(|p| p.0 == [1; 3]).count()
        });
        assert!((counts[0] as f32 / 1600.0 - std::f32::consts::FRAC_PI_4).abs() < 0.02, "{counts:?}");
        counts.sort();
        assert!(counts[0] > 500, "{counts:?}");
    }

    #[test]
    fn backgrounds_are_light_and_lighter_at_the_top() {
        let image = background(&mut Rng::new(&[3]), 64, 48, 6.0);
        let mean = |y: u32| (0..64).map(|x| u32::from(image.get_pixel(x, y).0[1])).sum::<u32>() / 64;
        assert!(mean(0) > mean(24) && mean(24) > mean(47) && mean(47) > 110);
    }
}
