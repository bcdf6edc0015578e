//! The threads that prepare images, and their cache.

use std::sync::Arc;
use std::time::Duration;

use super::{picture, picture_cases, unhex};
use varft::Error;
use varft::input::*;

fn raw(picture: &Arc<Picture>) -> ImageSource {
    ImageSource::Picture { picture: picture.clone(), name: "raw".into() }
}

#[test]
fn same_content_is_processed_once() {
    let pre = Preprocessor::new(ImageProcessor::default(), 3, 1 << 20).unwrap();
    let file: Arc<[u8]> = unhex(&picture_cases()[0].file).into();
    let dir = tempfile::tempdir().unwrap();
    let sources = (0..20).map(|n| match n % 3 {
        0 => ImageSource::Bytes { bytes: file.clone(), name: format!("copy {n}") },
        1 => {
            let path = dir.path().join(format!("{n}.png"));
            std::fs::write(&path, &file).unwrap();
            ImageSource::Path(path)
        }
        _ => ImageSource::Path(format!("file://{}", dir.path().join(format!("{}.png", n - 1)).display()).into()),
    });
    let images = pre.load_all(sources.collect::<Vec<_>>()).unwrap();
    assert!(images.iter().all(|i| Arc::ptr_eq(i, &images[0])));
    let alone = ImageProcessor::default().process(&file, "alone").unwrap();
    assert_eq!(*images[0], alone);
    assert_eq!((alone.original, alone.tokens()), ((13, 9), alone.grid.h * alone.grid.w / 4));
    let stats = pre.stats();
    assert_eq!((stats.processed, stats.shared, stats.queued, stats.cached_images), (1, 19, 0, 1));
    assert_eq!(stats.cached_bytes, alone.pixels.len());
}

#[test]
fn the_cache_forgets_what_was_used_longest_ago() {
    // Each picture becomes 56x56: 9,408 bytes; three fit.
    let pre = Preprocessor::new(ImageProcessor::default(), 1, 3 * 9_408 + 100).unwrap();
    let p: Vec<_> = (0..4).map(|seed| picture(20, 20, seed)).collect();
    let load = |i: usize| pre.load_all([raw(&p[i])]).unwrap();
    for i in [0, 1, 2, 0, 3] {
        load(i);
        assert!(pre.stats().cached_bytes <= 3 * 9_408 + 100);
    }
    assert_eq!((pre.stats().processed, pre.stats().cached_images), (4, 3));
    load(0);
    assert_eq!(pre.stats().processed, 4, "0 was used after 1, so 1 made room for 3");
    load(1);
    assert_eq!(pre.stats().processed, 5);
    // What is larger than the whole cache passes through it.
    let small = Preprocessor::new(ImageProcessor::default(), 1, 100).unwrap();
    assert_eq!(small.load_all([raw(&p[0]), raw(&p[0])]).unwrap()[0].grid, Grid { t: 1, h: 4, w: 4 });
    assert_eq!((small.stats().cached_bytes, small.stats().cached_images), (0, 0));
}

#[test]
fn many_images_leave_nothing_behind() {
    let cap = 100_000;
    let pre = Preprocessor::new(ImageProcessor::default(), 2, cap).unwrap();
    for round in 0..20 {
        let sources = (0..25).map(|n| raw(&picture(10 + n as usize % 7, 12, round * 25 + n))).collect::<Vec<_>>();
        pre.load_all(sources).unwrap();
        assert!(pre.stats().cached_bytes <= cap);
    }
    assert_eq!((pre.stats().processed, pre.stats().queued), (500, 0));
}

#[test]
fn failures_reach_everyone_who_asked() {
    let pre = Preprocessor::new(ImageProcessor::default(), 2, 1 << 20).unwrap();
    let broken: Arc<[u8]> = b"\x89PNG\r\n\x1a\nbroken".to_vec().into();
    let handles: Vec<_> =
        (0..6).map(|n| pre.submit(ImageSource::Bytes { bytes: broken.clone(), name: format!("p{n}") })).collect();
    for handle in handles {
        assert!(matches!(handle.wait(), Err(Error::Input { .. })));
    }
    let missing = pre.submit(ImageSource::Path("/nowhere/at/all.png".into())).wait();
    assert!(missing.unwrap_err().to_string().contains("/nowhere/at/all.png"));
    // A failure is not kept: the file may be mended.
    assert_eq!(pre.stats().cached_images, 0);
    assert!(pre.load_all([raw(&picture(30, 30, 1))]).is_ok());
    assert!(pre.submit(raw(&picture(30, 30, 2))).wait_timeout(Duration::MAX).ok().unwrap().is_ok());
}

#[test]
fn shutting_down_answers_what_is_left() {
    let pre = Preprocessor::new(ImageProcessor::default(), 1, 0).unwrap();
    let handles: Vec<_> = (0..30).map(|n| pre.submit(raw(&picture(300, 300, n)))).collect();
    drop(pre);
    for handle in handles {
        assert!(handle.is_ready());
        match handle.wait_timeout(Duration::ZERO).ok().unwrap() {
            Ok(image) => assert_eq!(image.original, (300, 300)),
            Err(e) => assert!(matches!(e, Error::Cancelled(_)), "{e}"),
        }
    }
}

#[test]
fn dropped_requests_are_skipped() {
    let pre = Preprocessor::new(ImageProcessor::default(), 1, 1 << 20).unwrap();
    let first = pre.submit(raw(&picture(400, 400, 1)));
    (2..40).for_each(|n| drop(pre.submit(raw(&picture(30, 30, n)))));
    first.wait().unwrap();
    let last = pre.submit(raw(&picture(30, 30, 99)));
    let last = last.wait_timeout(Duration::from_secs(60)).ok().unwrap().unwrap();
    assert_eq!(last.original, (30, 30));
    assert!(pre.stats().processed < 40);
}
