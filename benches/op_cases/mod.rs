//! The operations of preset `mid`, each at the shapes at which the model runs it, and the work that each cannot do
//! without.

mod attention;
mod products;
mod rows;

use crate::harness::operands;
use crate::limits::{Rates, seconds};
use varft::Result;
use varft::device::{Buffer, Device, Stream};
use varft::model::{Config, Preset};

/// Bytes of operands that a case goes through before it comes back to the first: several times the last cache.
const COLD: f64 = (160 << 20) as f64;
/// A measurement runs the operation for about so long.
const BURST: f64 = 0.02;

/// Rows of a batch for training: 4 sequences of 512 tokens.
const ROWS: usize = 2048;
const SEQUENCE: usize = 512;
/// Images that go through the vision tower together, their sides and numbers of patches.
const IMAGES: usize = 8;
const GRID: usize = 20;
const PATCHES: usize = GRID * GRID;
/// Sequences of a decoding step, and the tokens that each has so far.
const DECODING: usize = 32;
const CONTEXT: usize = 365;
/// Tokens whose loss is taken.
const SCORED: usize = 1024;

/// What an operation cannot do without.
#[derive(Clone, Copy)]
pub struct Work {
    /// Multiply-adds of products and of attention, two operations each. Exponentials, roots and the like are not counted.
    flops: f64,
    /// Bytes that come from memory and go to it, once each, where no cache holds the operands. They are made not to:
    /// each run takes another set. In the model some come from the operation before and lie in the last cache (the rows of
    /// norms, activations and rope in training: 4 to 23 MB), so that it may be faster there than here.
    reads: f64,
    writes: f64,
}

impl Work {
    /// Reads and writes in numbers of 4 bytes.
    fn new(flops: usize, reads: usize, writes: usize) -> Work {
        Work { flops: flops as f64, reads: 4.0 * reads as f64, writes: 4.0 * writes as f64 }
    }

    fn seconds(&self, r: &Rates) -> (f64, f64) {
        let copied = 2.0 * self.reads.min(self.writes);
        (self.flops / r.flops, copied / r.copies + (self.reads - self.writes).abs() / r.reads)
    }

    /// The least time: arithmetic and memory go on side by side.
    pub fn floor(&self, r: &Rates) -> f64 {
        let (arithmetic, memory) = self.seconds(r);
        arithmetic.max(memory)
    }

    /// What takes the floor's time.
    pub fn name(&self, r: &Rates) -> String {
        let (arithmetic, memory) = self.seconds(r);
        match arithmetic > memory {
            true => format!("{:.0} MFLOP", self.flops / 1e6),
            false => format!("{:.1} MB", (self.reads + self.writes) / 1e6),
        }
    }
}

/// Where operands are made.
struct Maker {
    device: Device,
    stream: Stream,
    config: Config,
}

impl Maker {
    fn random(&self, n: usize) -> Buffer {
        operands::random(&self.device, n)
    }
    fn zeros(&self, n: usize) -> Buffer {
        operands::zeros(&self.device, n)
    }
    fn stream(&self) -> Stream {
        self.stream.clone()
    }
}

type Run = Box<dyn Fn()>;

/// An operation at one shape.
pub struct Case {
    pub op: &'static str,
    /// Numbers joined by x; what they are is said where the case is made.
    pub shape: String,
    pub work: Work,
    make: Box<dyn Fn(&Maker) -> Run>,
}

/// `make` makes a set of operands, and gives what runs the operation on it.
fn case<F: Fn() + 'static>(
    op: &'static str,
    shape: &[usize],
    work: Work,
    make: impl Fn(&Maker) -> F + 'static,
) -> Case {
    let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    Case { op, shape, work, make: Box::new(move |m| Box::new(make(m))) }
}

/// All cases, and what they run on.
pub struct Cases {
    maker: Maker,
    pub all: Vec<Case>,
}

impl Cases {
    pub fn new(device: &Device) -> Result<Cases> {
        let maker = Maker { device: device.clone(), stream: device.stream(), config: Preset::Mid.config() };
        let c = &maker.config;
        let all = [products::cases(c), attention::cases(c), rows::cases(c, device)?].into_iter().flatten().collect();
        Ok(Cases { maker, all })
    }

    pub fn find(&self, op: &str, shape: &str) -> Option<&Case> {
        self.all.iter().find(|c| c.op == op && c.shape == shape)
    }

    /// The operands of a case, warmed up.
    pub fn prepare(&self, case: &Case) -> Prepared {
        let sets = (COLD / (case.work.reads + case.work.writes)).ceil().max(1.0) as usize;
        let sets = (0..sets).map(|_| (case.make)(&self.maker)).collect();
        // The first runs find scratch memory that is not there yet.
        let mut prepared = Prepared { sets, next: 0, stream: self.maker.stream(), runs: 3 };
        let once = prepared.seconds();
        prepared.runs = (BURST / once).ceil().clamp(2.0, 10_000.0) as usize;
        prepared
    }
}

/// A case that can run.
pub struct Prepared {
    sets: Vec<Run>,
    next: usize,
    stream: Stream,
    runs: usize,
}

impl Prepared {
    /// Seconds of one run: the least of a burst, since other work can only add to it.
    pub fn seconds(&mut self) -> f64 {
        let one = || {
            self.next = (self.next + 1) % self.sets.len();
            seconds(|| {
                self.sets[self.next]();
                self.stream.synchronize().expect("the CPU device finishes its work");
            })
        };
        std::iter::repeat_with(one).take(self.runs).fold(f64::INFINITY, f64::min)
    }
}
