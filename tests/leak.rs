//! Rollouts leave nothing behind: ten thousand, each with an image of its own, through one preprocessor and one engine.
//!
//! Two things are measured after every thousand rollouts. *What the program holds*: bytes that it got from the allocator and has
//! not given back, exact, so that a leak of ten bytes a rollout shows. *What the system counts*: resident pages
//! (`/proc/self/statm`) after `malloc_trim`, which also sees what is mapped past the allocator, but which goes up and down
//! by a megabyte with where glibc's arenas happen to be cut, so that its trend counts: the slope of the line through all
//! marks. Beside them the device's own count of live buffers, and what the caches say they hold. This file holds one test,
//! so that no other one's memory is in the process.
#![cfg(target_os = "linux")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::VecDeque;
use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, Ordering};
use varft::device::Device;
use varft::engine::{Engine, EngineOptions, Generation, Request, Sampling, Session};
use varft::input::{ImageHandle, ImageProcessor, ImageSource, Preprocessor, Prompt};
use varft::model::{LoadOptions, Model, Preset};
use varft::ops::kv_cache::KvCache;

/// The system's allocator, which counts what it has handed out and not got back.
struct Counting;
static HELD: AtomicIsize = AtomicIsize::new(0);
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        HELD.fetch_add(size as isize - layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(p, layout, size) }
    }
}
#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ROLLOUTS: usize = 10_000;
/// Rollouts whose image is being made or that are being sampled.
const IN_FLIGHT: usize = 24;
const CACHED_IMAGES: usize = 64;

/// Bytes of this process that are in memory, once the allocator has returned what nobody uses.
fn resident() -> isize {
    // SAFETY: both calls only touch the allocator's and the system's own state.
    let page = unsafe {
        libc::malloc_trim(0);
        libc::sysconf(libc::_SC_PAGESIZE)
    } as isize;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<isize>().unwrap() * page
}

/// The slope of the least-squares line through values that lie one apart.
fn slope(values: &[isize]) -> f64 {
    let n = values.len() as f64;
    let centre = (n - 1.0) / 2.0;
    let mean = values.iter().sum::<isize>() as f64 / n;
    let (mut xy, mut xx) = (0.0, 0.0);
    for (i, &y) in values.iter().enumerate() {
        let x = i as f64 - centre;
        xy += x * (y as f64 - mean);
        xx += x * x;
    }
    xy / xx
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
        kv_bytes: 96 * KvCache::bytes_per_block(device.float(), c.layers, c.kv_heads, c.head_dim()),
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
    let mut resident_pages = Vec::new();
    let mut held = Vec::new();
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
            resident_pages.push(resident());
            held.push(HELD.load(Ordering::Relaxed));
        }
    }
    let since_first = |marks: &[isize]| marks.iter().map(|m| m - marks[0]).collect::<Vec<_>>();
    let (held, grown) = (since_first(&held), since_first(&resident_pages));
    println!("bytes held since the first thousand: {held:?}\nbytes resident: {grown:?}");
    for (thousands, bytes) in held.iter().enumerate() {
        assert!(*bytes < 64 << 10, "{bytes} bytes more are held after {thousands} thousand: {held:?}");
    }
    let slope = slope(&grown);
    assert!(slope < 1e6, "{slope:.0} bytes more are resident with every thousand rollouts: {grown:?}");

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
