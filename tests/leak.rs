//! Rollouts leave nothing behind: ten thousand, each with an image of its own, through one preprocessor and one engine.
//!
//! What is measured is what the system counts: resident pages (`/proc/self/statm`), after every thousand rollouts and after
//! `malloc_trim`, so that memory that was freed but that the allocator has not given back does not count (glibc keeps an
//! arena per thread). Beside it the device's own count of live buffers, and what the caches say they hold. This file
//! holds one test, so that no other one's memory is in the process.
#![cfg(target_os = "linux")]

use std::collections::VecDeque;
use std::io::Cursor;
use std::sync::Arc;
use varft::device::Device;
use varft::engine::{Engine, EngineOptions, Generation, Request, Sampling, Session};
use varft::input::{ImageHandle, ImageProcessor, ImageSource, Preprocessor, Prompt};
use varft::model::{LoadOptions, Model, Preset};
use varft::ops::kv_cache::KvCache;

const ROLLOUTS: usize = 10_000;
/// Rollouts whose image is being made or that are being sampled.
const IN_FLIGHT: usize = 24;
const CACHED_IMAGES: usize = 64;

/// Bytes of this process that are in memory, once the allocator has returned what nobody uses.
fn resident() -> usize {
    // SAFETY: both calls only touch the allocator's and the system's own state.
    let page = unsafe {
        libc::malloc_trim(0);
        libc::sysconf(libc::_SC_PAGESIZE)
    } as usize;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * page
}

/// A PNG of 40 x 30 pixels that no other number gives; it becomes six tokens.
fn picture(number: usize) -> ImageSource {
    let (a, b) = (number as u32 * 7 + 3, number as u32 * 13 + 5);
    let of = |x: u32, y: u32| image::Rgb([(x * a) as u8, (y * b) as u8, (x ^ y) as u8]);
    let mut picture = image::RgbImage::from_fn(40, 30, of);
    picture.put_pixel(0, 0, image::Rgb([number as u8, (number >> 8) as u8, 0]));
    let mut file = Cursor::new(Vec::new());
    picture.write_to(&mut file, image::ImageFormat::Png).unwrap();
    ImageSource::Bytes { bytes: file.into_inner().into(), name: format!("picture {number}") }
}

/// `n` tokens, the same for a `kind`.
fn text(kind: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((kind * 31 + i * 7) % 500) as u32).collect()
}

/// A rollout under way: its image, then its samples (and the session they belong to, if it is one of several turns).
enum Rollout {
    Image(usize, ImageHandle),
    First(usize, Session, Generation),
    Last(Vec<Generation>, Option<Session>),
}

/// One step of a rollout; `None` when it has ended.
fn go_on(rollout: Rollout, engine: &Engine, image_pad: u32) -> Option<Rollout> {
    let sampling = |n: usize, max_tokens| Sampling { seed: n as u64, max_tokens, ..Sampling::default() };
    match rollout {
        Rollout::Image(n, image) => {
            let mut prompt = Prompt::from_tokens(text(n % 5, 3));
            prompt.push_image(image.wait().unwrap(), image_pad);
            prompt.tokens.extend(text(n, 2 + n % 30));
            Some(match n % 4 {
                0 => {
                    let mut session = engine.session();
                    session.append(prompt).unwrap();
                    let turn = session.generate(sampling(n, 3)).unwrap();
                    Rollout::First(n, session, turn)
                }
                kind => {
                    let request = Request { prompt, sampling: sampling(n, 2), n: kind };
                    let mut samples = engine.generate(request).unwrap();
                    if n % 50 == 1 {
                        samples.remove(0).cancel(); // somebody lost interest
                    }
                    Rollout::Last(samples, None)
                }
            })
        }
        Rollout::First(n, mut session, turn) => {
            turn.wait().unwrap();
            session.append(Prompt::from_tokens(text(n, 4))).unwrap();
            let fork = (n % 16 == 0).then(|| session.fork().unwrap());
            let mut last = vec![session.generate(sampling(n, 2)).unwrap()];
            last.extend(fork.map(|mut f| f.generate(sampling(n + 1, 2)).unwrap()));
            Some(Rollout::Last(last, Some(session)))
        }
        Rollout::Last(samples, _session) => {
            samples.into_iter().for_each(|g| drop(g.wait().unwrap()));
            None
        }
    }
}

#[test]
fn ten_thousand_rollouts_leave_nothing_behind() {
    // The model is too small for a second thread; the other core makes images.
    let device = Device::cpu(1);
    let m = Arc::new(Model::random(Preset::Tiny.config(), 7, &device, &LoadOptions::default()).unwrap());
    let c = &m.config;
    let weights = device.allocated_bytes();
    // Small caches: full within the first rollouts, and replaced many times over by all that follow.
    let options = EngineOptions {
        kv_bytes: 96 * KvCache::bytes_per_block(c.layers, c.kv_heads, c.head_dim()),
        vision_bytes: CACHED_IMAGES * 32 * c.hidden_size * 4,
        max_context: 256,
        max_sequences: 32,
        step_tokens: 256,
        step_patches: 256,
        ..EngineOptions::default()
    };
    let engine = Engine::start(m.clone(), options).unwrap();
    let planned = device.allocated_bytes();
    let pixels = 56 * 84 * 3;
    let images = Preprocessor::new(ImageProcessor::default(), 1, CACHED_IMAGES * pixels).unwrap();

    let mut under_way = VecDeque::new();
    let mut marks = Vec::new();
    for n in 0..ROLLOUTS {
        under_way.push_back(Rollout::Image(n, images.submit(picture(n))));
        while under_way.len() > IN_FLIGHT || (n + 1) % 1000 == 0 && !under_way.is_empty() {
            let oldest = under_way.pop_front();
            under_way.extend(oldest.and_then(|r| go_on(r, &engine, c.tokens.image)));
        }
        if (n + 1) % 1000 == 0 {
            let (s, p) = (engine.stats(), images.stats());
            assert_eq!(device.allocated_bytes(), planned, "no rollout allocates device memory");
            assert!(s.images_cached <= CACHED_IMAGES && s.vision_bytes_used <= s.vision_bytes, "{s:?}");
            assert!(s.pages_held + s.pages_cached <= s.pages, "{s:?}");
            assert_eq!((p.queued, p.cached_images <= CACHED_IMAGES), (0, true), "{p:?}");
            marks.push(resident());
        }
    }
    let grown: Vec<isize> = marks.iter().map(|&m| (m as isize - marks[0] as isize) / 1024).collect();
    println!("resident after the first thousand: {} MiB; KiB more after each that followed: {grown:?}", marks[0] >> 20);
    for (thousands, &kib) in grown.iter().enumerate() {
        assert!(kib <= thousands as isize * 1000, "{kib} KiB more after {thousands} thousand: {grown:?}");
    }

    // What has gone through is all that there was, each image once, and nothing is held any more.
    engine.session().append(Prompt::from_tokens(vec![1])).unwrap();
    let request = Request { prompt: Prompt::from_tokens(vec![1, 2]), sampling: Sampling::greedy(1), n: 1 };
    engine.generate(request).unwrap().remove(0).wait().unwrap();
    let s = engine.stats();
    assert_eq!((s.sequences, s.pages_held), (0, 0), "{s:?}");
    // A request that nobody waits for any more may end before its image is looked at.
    assert!(s.images_encoded + ROLLOUTS as u64 / 50 >= ROLLOUTS as u64, "{s:?}");
    assert_eq!(images.stats().processed, ROLLOUTS as u64);
    drop((engine, images));
    assert_eq!(device.allocated_bytes(), weights, "the engine gives everything back");
    assert_eq!(Arc::strong_count(&m), 1);
}
