//! What the machine can do: multiply-adds per second, and bytes read or copied per second.

#![allow(dead_code)] // a bench takes what it needs of it

use std::hint::black_box;
use std::time::Instant;
use varft::Result;
use varft::device::{Buffer, DType, Device, Pool};
use varft::ops::linear::{Weight, backward_input};

/// Steps of the probe of the multiply-add rate, and its operations per step.
const STEPS: usize = 20_000;
const STEP_FLOPS: usize = 2 * 16 * 8;

/// Independent multiply-adds in registers.
fn multiply_adds() {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f")]
        fn avx512() {
            let x = _mm512_set1_ps(black_box(0.999));
            let mut acc = [x; 8];
            for _ in 0..STEPS {
                for a in &mut acc {
                    *a = _mm512_fmadd_ps(*a, x, x);
                }
            }
            black_box(acc);
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2() {
            let x = _mm256_set1_ps(black_box(0.999));
            let mut acc = [x; 8];
            for _ in 0..2 * STEPS {
                for a in &mut acc {
                    *a = _mm256_fmadd_ps(*a, x, x);
                }
            }
            black_box(acc);
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            return unsafe { avx512() };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: just detected.
            return unsafe { avx2() };
        }
    }
    let x = black_box(0.999f32);
    let mut acc = [[x; 16]; 8];
    for _ in 0..STEPS {
        acc.iter_mut().flatten().for_each(|a| *a = a.mul_add(x, x));
    }
    black_box(acc);
}

/// Reads `data` once, as `streams` parts side by side.
fn read(data: &[f32], streams: usize) {
    #[inline(always)]
    fn sum(data: &[f32], streams: usize) -> [f32; 16] {
        let part = data.len() / streams / 64 * 64;
        let mut acc = [[0f32; 16]; 4];
        for at in (0..part).step_by(64) {
            for s in 0..streams {
                let line = &data[s * part + at..][..64];
                for (a, line) in acc.iter_mut().zip(line.chunks_exact(16)) {
                    a.iter_mut().zip(line).for_each(|(a, v)| *a += v);
                }
            }
        }
        std::array::from_fn(|l| acc[0][l] + acc[1][l] + acc[2][l] + acc[3][l])
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2(data: &[f32], streams: usize) -> [f32; 16] {
            sum(data, streams)
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: just detected.
            black_box(unsafe { avx2(data, streams) });
            return;
        }
    }
    black_box(sum(data, streams));
}

/// Floats that a thread reads at a time: a panel of 4096 inputs four times.
const CHUNK: usize = 4 * 16 * 4096;

/// Floats that a [`Probe`] reads at a time, and of how many such pieces: together four times the last cache.
const PIECE: usize = 4 << 20;
const PIECES: usize = 8;

/// How long `f` takes.
fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// Operations of one run of [`arithmetic`].
fn arithmetic_flops(pool: &Pool) -> usize {
    pool.threads() * STEPS * STEP_FLOPS
}

/// Independent multiply-adds in the registers of all threads.
fn arithmetic(pool: &Pool) {
    pool.run(pool.threads(), |_| multiply_adds());
}

/// Reads `data` once on all threads, each part of it as `streams` parts side by side.
fn reads(pool: &Pool, data: &[f32], streams: usize) {
    let chunk = CHUNK.min(data.len() / (4 * pool.threads()));
    pool.run(data.len() / chunk, |i| read(&data[i * chunk..][..chunk], streams));
}

/// Copies `from` to `to` on all threads; past the caches if `streaming`, where the processor can.
fn copies(pool: &Pool, from: &[f32], to: &mut [f32], streaming: bool) {
    let part = |i: usize, to: &mut [f32]| {
        let from = &from[i * CHUNK..][..to.len()];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::*;
            #[target_feature(enable = "avx2")]
            fn stream(from: &[f32], to: &mut [f32]) {
                for (from, to) in from.chunks_exact(8).zip(to.chunks_exact_mut(8)) {
                    // SAFETY: eight floats each; `to` was checked to begin at a multiple of 32 bytes.
                    unsafe { _mm256_stream_ps(to.as_mut_ptr(), _mm256_loadu_ps(from.as_ptr())) }
                }
                _mm_sfence();
            }
            if streaming && to.as_ptr().addr().is_multiple_of(32) && is_x86_feature_detected!("avx2") {
                // SAFETY: just detected.
                return unsafe { stream(from, to) };
            }
        }
        to.copy_from_slice(from);
    };
    pool.chunks_mut(to, CHUNK, part);
}

/// What the machine does a second.
#[derive(Clone, Copy)]
pub struct Rates {
    /// Operations of independent multiply-adds, two each.
    pub flops: f64,
    /// Bytes read.
    pub reads: f64,
    /// Bytes read and bytes written by a copy, together.
    pub copies: f64,
}

impl Rates {
    /// The median of each.
    pub fn median(all: &[Rates]) -> Rates {
        let of = |f: fn(&Rates) -> f64| median(all.iter().map(f).collect());
        Rates { flops: of(|r| r.flops), reads: of(|r| r.reads), copies: of(|r| r.copies) }
    }
}

impl std::fmt::Display for Rates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [flops, reads, copies] = [self.flops, self.reads, self.copies].map(|r| r / 1e9);
        write!(f, "{flops:.0} GFLOP/s, reads {reads:.1} GB/s, copies {copies:.1} GB/s (read and written)")
    }
}

/// The middle one of `values`, of which there is at least one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What a device can do at most.
pub enum Limits {
    /// The host's cores, whose rates change with what else the machine does.
    Host(Probe),
    /// A card, whose rates were measured at the start.
    Card(Rates),
}

impl Limits {
    /// # Errors
    /// What the device says.
    pub fn measure(device: &Device) -> Result<Limits> {
        match device.packs_weights() {
            true => Ok(Limits::Host(Probe::new(device))),
            false => card(device).map(Limits::Card),
        }
    }

    /// The rates of this moment.
    pub fn rates(&mut self) -> Rates {
        match self {
            Limits::Host(probe) => probe.rates(),
            Limits::Card(rates) => *rates,
        }
    }
}

/// Bytes of the copy, and side of the product, that a card's rates come from; and how often, of which the best counts.
const CARD: (usize, usize, usize) = (1 << 30, 8192, 5);
/// The same for a card that is not there.
const EMULATED: (usize, usize, usize) = (1 << 20, 64, 1);

/// The rates of copies from memory to memory, and of the vendor's matrix product of random numbers.
fn card(device: &Device) -> Result<Rates> {
    let (bytes, side, times) = if device.card().is_some() { CARD } else { EMULATED };
    let s = device.stream();
    let best = |work: &dyn Fn()| -> Result<f64> {
        s.time(work)?; // the first one loads what it needs
        (0..times).try_fold(f64::INFINITY, |least, _| Ok(least.min(s.time(work)?)))
    };
    let (from, to) = (device.zeros(DType::U8, bytes), device.zeros(DType::U8, bytes));
    let copies = 2.0 * bytes as f64 / best(&|| s.copy(&from, &to))?;
    let noise = || -> Vec<f32> { (0..side * side).map(|i| (i * 7919 % 1021) as f32 / 510.0 - 1.0).collect() };
    let matrix = || {
        let b = device.alloc(device.float(), side * side);
        s.write_floats(&b, &noise());
        b
    };
    let (dy, w, dx) = (matrix(), Weight { data: matrix(), n: side, k: side }, matrix());
    let flops = 2.0 * (side as f64).powi(3) / best(&|| backward_input(&s, &dy, &w, &dx, side, false))?;
    Ok(Rates { flops, reads: copies, copies })
}

/// Measures [`Rates`] of the host's cores: each time the best of a few ways and bursts.
pub struct Probe {
    pool: Pool,
    /// No cache holds either. In huge pages, as the weights are.
    from: Buffer,
    to: Buffer,
}

impl Probe {
    /// On as many threads as `device` has.
    pub fn new(device: &Device) -> Probe {
        let memory = || device.upload(&vec![1f32; PIECES * PIECE]);
        Probe { pool: Pool::new(device.threads()), from: memory(), to: memory() }
    }

    /// The rates of this moment.
    pub fn rates(&mut self) -> Rates {
        let pool = &self.pool;
        // SAFETY: nobody else has these buffers.
        let (from, to) = unsafe { (self.from.get::<f32>(), self.to.get_mut::<f32>()) };
        let least =
            |times: usize, f: &mut dyn FnMut(usize)| (0..times).map(|i| seconds(|| f(i))).fold(f64::INFINITY, f64::min);
        let arithmetic = least(200, &mut |_| arithmetic(pool));
        // Piece after piece, so that a moment without other work is long enough for one.
        let piece = |i: usize| i % PIECES * PIECE..(i % PIECES + 1) * PIECE;
        let read = least(4 * PIECES, &mut |i| reads(pool, &from[piece(i)], [1, 4][i / PIECES % 2]));
        let copy = least(4 * PIECES, &mut |i| {
            copies(pool, &from[piece(i)], &mut to[piece(i)], (i / PIECES).is_multiple_of(2))
        });
        let bytes = 4.0 * PIECE as f64;
        Rates { flops: arithmetic_flops(pool) as f64 / arithmetic, reads: bytes / read, copies: 2.0 * bytes / copy }
    }
}
