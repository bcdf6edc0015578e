//! Files to pixels to the size that the model sees.

use super::pictures::png_that_claims;
use super::{mix, picture_cases, pixels, read_json, unhex};
use proptest::prelude::*;
use varft::input::*;

fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().enumerate().fold(0, |sum, (i, &b)| sum.wrapping_add((u64::from(b) + 1).wrapping_mul(mix(i as u64))))
}

#[test]
fn resizing_equals_pillow_to_the_bit() {
    type Case = (usize, usize, usize, usize, u64, u64, String, String);
    let mut orders_differ = 0;
    for (h, w, oh, ow, seed, kind, horizontal, pillow) in read_json::<Vec<Case>>("resize.json") {
        let pixels = pixels(h, w, seed, kind);
        let got = |order| digest(&resize_bicubic(&pixels, (h, w), (oh, ow), order)).to_string();
        assert_eq!(got(ResizeOrder::HorizontalFirst), horizontal, "{w}x{h} to {ow}x{oh}, columns first");
        assert_eq!(got(ResizeOrder::Pillow13), pillow, "{w}x{h} to {ow}x{oh}, Pillow 13's order");
        orders_differ += u32::from(horizontal != pillow);
    }
    assert!(orders_differ > 20, "the cases must tell the two orders apart");
}

#[test]
fn smart_resize_equals_the_reference() {
    for (h, w, min, max, oh, ow) in read_json::<Vec<(usize, usize, usize, usize, usize, usize)>>("smart_resize.json") {
        let processor = ImageProcessor { min_pixels: min, max_pixels: max, ..Default::default() };
        match processor.smart_resize(h, w) {
            Ok(size) => assert_eq!(size, (oh, ow), "{w}x{h} between {min} and {max} pixels"),
            Err(e) => assert!(oh == 0 && e.to_string().contains("200 times"), "{w}x{h}: {e}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_flat_picture_stays_flat(h in 1usize..40, w in 1usize..40, oh in 1usize..40, ow in 1usize..40, v in any::<u8>()) {
        for order in [ResizeOrder::HorizontalFirst, ResizeOrder::Pillow13] {
            prop_assert_eq!(resize_bicubic(&vec![v; h * w * 3], (h, w), (oh, ow), order), vec![v; oh * ow * 3]);
        }
    }
}

#[test]
fn pictures_decode_as_pillow_does() {
    for case in picture_cases() {
        let got = decode_picture(&unhex(&case.file), &case.name, &PictureLimits::default()).unwrap();
        assert_eq!((got.width, got.height), (case.width, case.height), "{}", case.name);
        let worst = got.pixels.iter().zip(unhex(&case.rgb)).map(|(a, b)| a.abs_diff(b)).max().unwrap();
        assert!(worst <= case.tolerance, "{}: off by {worst} levels", case.name);
        assert_eq!(got.pixels.len(), case.width * case.height * 3);
    }
}

#[test]
fn bad_pictures_are_named_with_a_mend() {
    let whole = unhex(&picture_cases()[0].file);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "empty"),
        (b"GIF89a not one of ours".to_vec(), "neither PNG, JPEG nor WebP"),
        (whole[..whole.len() / 2].to_vec(), "cannot be decoded"),
        (whole[..10].to_vec(), "cannot be decoded"),
        (png_that_claims(0, 9), "0x9 pixels"),
        (png_that_claims(13, 0), "13x0 pixels"),
        (png_that_claims(20_000, 9), "20000x9 pixels; a side may have 16384"),
        (png_that_claims(16_000, 16_000), "16000x16000 pixels; 89478485 in all"),
        (png_that_claims(u32::MAX, u32::MAX), "a side may have"),
        (png_that_claims(14, 9), "cannot be decoded"),
    ];
    for (bytes, expected) in cases {
        let said = ImageProcessor::default().process(&bytes, "photo.png").unwrap_err().to_string();
        assert!(said.contains("photo.png") && said.contains(expected) && said.contains("to mend it"), "{said}");
    }
    let long = Picture { pixels: vec![0; 2 * 500 * 3], height: 2, width: 500 };
    let said = ImageProcessor::default().process_picture(long, "strip.png").unwrap_err().to_string();
    assert!(said.contains("strip.png") && said.contains("200 times"), "{said}");
    for (height, width, bytes) in [(0, 5, 0), (5, 5, 74), (1, 20_000, 60_000)] {
        let picture = Picture { pixels: vec![0; bytes], height, width };
        assert!(ImageProcessor::default().process_picture(picture, "raw").is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn damaged_files_never_panic(which in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>(),
                                 changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)) {
        let cases = picture_cases();
        let mut file = unhex(&which.get(&cases).file);
        file.truncate(cut.index(file.len()) + 1);
        for (at, value) in changes {
            let at = at.index(file.len());
            file[at] = value;
        }
        let limits = PictureLimits { max_side: 4000, max_pixels: 1_000_000 };
        if let Ok(picture) = decode_picture(&file, "damaged", &limits) {
            prop_assert!(picture.pixels.len() == picture.width * picture.height * 3 && !picture.pixels.is_empty());
        }
    }

    #[test]
    fn wild_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), magic in 0usize..4) {
        let mut file = [&b"\x89PNG\r\n\x1a\n"[..], b"\xff\xd8\xff\xe0", b"RIFF\x40\0\0\0WEBPVP8 ", b""][magic].to_vec();
        file.extend(bytes);
        prop_assert!(decode_picture(&file, "wild", &PictureLimits::default()).is_err());
    }
}

#[test]
fn settings_come_from_the_model_folder() {
    let dir = tempfile::tempdir().unwrap();
    let load = || ImageProcessor::load(dir.path());
    assert_eq!(load().unwrap(), ImageProcessor::default());
    let write = |name: &str, json: &str| std::fs::write(dir.path().join(name), json).unwrap();
    write("processor_config.json", r#"{"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 50176}}}"#);
    assert_eq!((load().unwrap().min_pixels, load().unwrap().max_pixels), (784, 50176));
    write(
        "preprocessor_config.json",
        r#"{"min_pixels": 3136, "max_pixels": 12845056, "size": {"shortest_edge": 1}, "patch_size": 14, "merge_size": 2,
            "temporal_patch_size": 2, "image_mean": [0.5, 0.25, 0.1], "image_std": [1, 1, 1]}"#,
    );
    let p = load().unwrap();
    assert_eq!((p.min_pixels, p.max_pixels, p.mean, p.std), (3136, 12845056, [0.5, 0.25, 0.1], [1.0; 3]));
    for (json, field) in [
        (r#"{"merge_size": 3}"#, "merge_size"),
        (r#"{"temporal_patch_size": 1}"#, "temporal_patch_size"),
        (r#"{"patch_size": 0}"#, "patch_size"),
        (r#"{"min_pixels": -4}"#, "min_pixels"),
        (r#"{"min_pixels": 4000, "max_pixels": 3000}"#, "min_pixels"),
        (r#"{"do_resize": false}"#, "do_resize"),
        (r#"{"resample": 2}"#, "resample"),
        (r#"{"image_mean": [1, 2]}"#, "image_mean"),
        (r#"{"image_mean": [0, 1e300, 0]}"#, "image_mean"),
        (r#"{"image_std": [1, 0, 1]}"#, "image_std"),
        (r#"{"rescale_factor": 1}"#, "rescale_factor"),
        (r#"{"patch_size": "#, "not valid JSON"),
    ] {
        write("preprocessor_config.json", json);
        let said = load().unwrap_err().to_string();
        assert!(said.contains(field) && said.contains("preprocessor_config.json"), "{said}");
    }
}
