//! Pictures that cannot be shown, and those that only look as if they could not.

use super::pictures::png_that_claims;
use super::tiny::model;
use super::{Folder, options, says};
use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;
use varft::device::Device;
use varft::engine::{Engine, Finish, Request, Sampling};
use varft::input::{ImageProcessor, ImageSource, Picture, Preprocessor, Prompt};

#[test]
fn a_picture_that_cannot_be_shown_is_named_by_the_binary() {
    let f = Folder::new();
    let whole = fs::read(f.path("a.png")).unwrap();
    let strip = |file: &str, width, height| image::GrayImage::new(width, height).save(f.path(file)).unwrap();
    strip("wide.png", 20_000, 2);
    strip("thin.png", 250, 1);
    for (name, bytes, expected) in [
        ("half.png", Some(whole[..whole.len() / 2].to_vec()), "cannot be decoded"),
        ("empty.png", Some(vec![]), "empty"),
        ("text.png", Some(b"not a picture at all".to_vec()), "neither PNG, JPEG nor WebP"),
        ("flat.png", Some(png_that_claims(0, 5)), "0x5 pixels"),
        ("claims.png", Some(png_that_claims(30_000, 30_000)), "30000x30000"),
        ("wide.png", None, "20000x2 pixels; a side may have 16384"),
        ("thin.png", None, "200 times"),
    ] {
        if let Some(bytes) = bytes {
            fs::write(f.path(name), bytes).unwrap();
        }
        f.ask(name, "What is this?");
        f.refused(&[name, expected, "to mend it"]);
    }
    assert!(Command::new("mkfifo").arg(f.path("pipe")).status().unwrap().success());
    for (name, stands_for) in [("pipe", "pipe"), ("zeros", "/dev/zero"), ("folder", "model")] {
        if name != stands_for {
            symlink(stands_for, f.path(name)).unwrap();
        }
        f.ask(name, "What is this?");
        f.refused(&[name, "not a regular file"]);
    }
    f.ask("gone.png", "What is this?");
    f.refused(&["gone.png", "check the path"]);
    f.ask("a.png", &"long ".repeat(5000));
    f.refused(&["talk.json", "context is 4096", "to mend it"]);
}

#[test]
fn pictures_of_odd_shapes_go_through_the_engine() {
    let m = model(&Device::cpu(2));
    let engine = Engine::start(m.clone(), options(&m)).unwrap();
    let processor = ImageProcessor { max_pixels: 16 * 28 * 28, ..ImageProcessor::default() };
    let images = Preprocessor::new(processor, 2, 0).unwrap();
    for (height, width) in [(1, 1), (28, 28), (1, 200), (200, 1), (100, 400), (27, 29), (2000, 3000), (13, 2000)] {
        let pixels = (0..height * width * 3).map(|i| (i * 31) as u8).collect();
        let picture = Arc::new(Picture { pixels, height, width });
        let image = images.submit(ImageSource::Picture { picture, name: "odd".into() }).wait().unwrap();
        let mut prompt = Prompt::default();
        prompt.push_image(image.clone(), m.config.tokens.image); // nothing but the picture
        prompt.push_image(image, m.config.tokens.image);
        let request = Request { prompt, sampling: Sampling { max_tokens: 2, ..Sampling::default() }, n: 1 };
        let c = engine.generate(request).unwrap().remove(0).wait().unwrap();
        assert_eq!((c.tokens.len(), c.finish), (2, Finish::Length), "{width}x{height}");
    }
    for (height, width) in [(1, 201), (4, 1000), (0, 5)] {
        let picture = Arc::new(Picture { pixels: vec![0; height * width * 3], height, width });
        says(images.submit(ImageSource::Picture { picture, name: "odd".into() }).wait().unwrap_err(), &["odd"]);
    }
}

#[test]
fn image_settings_that_do_not_fit_the_tower_are_refused() {
    let f = Folder::new();
    let path = f.path("model/preprocessor_config.json");
    for (text, field) in [
        (r#"{"patch_size": 16}"#, "patch_size"),
        (r#"{"merge_size": 4}"#, "merge_size"),
        (r#"{"min_pixels": "many"}"#, "min_pixels"),
        (r#"{"min_pixels": 99999, "max_pixels": 10}"#, "min_pixels"),
        (r#"{"image_std": [0, 1, 1]}"#, "image_std"),
        (r#"{"image_mean": [1]}"#, "image_mean"),
        ("[", "not valid JSON"),
        ("[]", "not a JSON object"),
    ] {
        fs::write(&path, text).unwrap();
        f.refused(&["preprocessor_config.json", field, "to mend it"]);
    }
}
