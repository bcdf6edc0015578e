//! The operations of `benches/work.toml`, which says at which shapes they run and what work each cannot do without: what runs them.

mod attention;
mod products;
mod rows;

use crate::harness::Place;
use crate::limits::Rates;
use minijinja::{Environment, Value};
use serde::Deserialize;
use std::collections::HashMap;
use varft::device::{Buffer, DType, Device, Stream};
use varft::{Error, Result};

const TABLE: &str = include_str!("../work.toml");

/// Bytes of operands that a case goes through before it comes back to the first: several times the last cache.
const COLD: f64 = (160 << 20) as f64;
/// A measurement runs the operation for about so long.
const BURST: f64 = 0.02;
/// The same on a card, and the most runs of one.
const CARD_BURST: f64 = 0.005;
const MOST_RUNS: f64 = 200.0;
/// Bytes that take the place of all else in a card's cache.
const FLUSH: usize = 512 << 20;
/// Random numbers that there are before they come again: no number of rows of usual widths.
const PERIOD: usize = 1_000_008;

/// An operation, as the table has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dims: String,
    flops: String,
    reads: String,
    writes: String,
    /// For `scripts/kernels.py`.
    #[serde(rename = "kernels", default)]
    _kernels: String,
    cpu: Vec<String>,
    gpu: Vec<String>,
    emulated: Vec<String>,
}

/// What an operation cannot do without: see the table.
#[derive(Clone, Copy)]
pub struct Work {
    pub flops: f64,
    /// Bytes that no cache holds. They are made not to: each run takes another set. In the model some come from the operation
    /// before and lie in the last cache, so that it may be faster there than here.
    pub reads: f64,
    pub writes: f64,
}

impl Work {
    fn seconds(&self, r: &Rates) -> (f64, f64) {
        let copied = 2.0 * self.reads.min(self.writes);
        (self.flops / r.flops, copied / r.copies + (self.reads - self.writes).abs() / r.reads)
    }

    pub fn bytes(&self) -> f64 {
        self.reads + self.writes
    }

    /// The least time: arithmetic and memory go on side by side.
    pub fn limit(&self, r: &Rates) -> f64 {
        let (arithmetic, memory) = self.seconds(r);
        arithmetic.max(memory)
    }

    /// What takes the least time.
    pub fn name(&self, r: &Rates) -> String {
        let (arithmetic, memory) = self.seconds(r);
        match arithmetic > memory {
            true => format!("{:.1} MFLOP", self.flops / 1e6),
            false => format!("{:.2} MB", self.bytes() / 1e6),
        }
    }
}

/// Where operands are made.
struct Maker {
    device: Device,
    stream: Stream,
    base: HashMap<DType, Buffer>,
}

impl Maker {
    fn new(device: &Device) -> Maker {
        let stream = device.stream();
        let values = random(PERIOD);
        let base = [DType::F32, DType::BF16].map(|dtype| {
            let b = device.alloc(dtype, PERIOD);
            stream.write_floats(&b, &values);
            (dtype, b)
        });
        Maker { device: device.clone(), stream, base: base.into() }
    }

    fn of(&self, dtype: DType, n: usize) -> Buffer {
        let (b, base) = (self.device.alloc(dtype, n), &self.base[&dtype]);
        for start in (0..n).step_by(PERIOD) {
            let len = PERIOD.min(n - start);
            self.stream.copy(&base.view(0, len), &b.view(start, len));
        }
        b
    }

    /// Random numbers between -1 and 1 as operations hand them on.
    fn random(&self, n: usize) -> Buffer {
        self.of(self.device.float(), n)
    }

    /// The same in f32, as gradients of weights and figures of rows are.
    fn random_f32(&self, n: usize) -> Buffer {
        self.of(DType::F32, n)
    }

    fn zeros(&self, n: usize) -> Buffer {
        self.device.zeros(self.device.float(), n)
    }

    fn zeros_f32(&self, n: usize) -> Buffer {
        self.device.zeros(DType::F32, n)
    }

    fn stream(&self) -> Stream {
        self.stream.clone()
    }
}

/// `n` numbers between -1 and 1.
fn random(n: usize) -> Vec<f32> {
    let mut x = 1u32;
    let next = |_| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

/// `n` ids below `end`.
fn ids(n: usize, end: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) % end as u32).collect()
}

type Run = Box<dyn Fn()>;
type Make = Box<dyn Fn(&Maker) -> Run>;

/// What makes a set of operands of an operation, and gives what runs it on them. `None` where the operation is unknown, or has other numbers.
fn maker(op: &str, shape: &[usize]) -> Option<Make> {
    products::maker(op, shape).or_else(|| attention::maker(op, shape)).or_else(|| rows::maker(op, shape))
}

/// A [`Make`] of a function of a shape with so many numbers.
fn made<const N: usize, F: Fn() + 'static>(
    shape: &[usize],
    make: impl Fn(&Maker, [usize; N]) -> F + 'static,
) -> Option<Make> {
    let shape: [usize; N] = shape.try_into().ok()?;
    Some(Box::new(move |d| Box::new(make(d, shape))))
}

/// An operation at one shape.
pub struct Case {
    pub op: String,
    /// Numbers joined by x: what they are is said in the table.
    pub shape: String,
    pub work: Work,
    make: Make,
}

/// All cases of a device, and what they run on.
pub struct Cases {
    maker: Maker,
    place: Place,
    flush: Option<Buffer>,
    pub all: Vec<Case>,
}

impl Cases {
    pub fn new(device: &Device) -> Result<Cases> {
        let table: toml::Table =
            TABLE.parse().map_err(|e| Error::input(format!("benches/work.toml: {e}"), "correct it"))?;
        let place = Place::of(device);
        let mut all = Vec::new();
        for (op, entry) in table {
            let wrong = |what: String| Error::input(format!("benches/work.toml, {op}: {what}"), "correct it");
            let entry: Entry = entry.try_into().map_err(|e| wrong(e.to_string()))?;
            // Those of other devices too: a mistake in them is told without these devices.
            for (at, shapes) in
                [(Place::Cpu, &entry.cpu), (Place::Cuda, &entry.gpu), (Place::Emulated, &entry.emulated)]
            {
                for shape in shapes {
                    let numbers: Option<Vec<usize>> = shape.split('x').map(|n| n.parse().ok()).collect();
                    let numbers = numbers.ok_or_else(|| wrong(format!("{shape:?} is no shape")))?;
                    let work = work(&entry, &numbers, device.float().size()).map_err(&wrong)?;
                    let make = maker(&op, &numbers)
                        .ok_or_else(|| wrong(format!("nothing in benches/op_cases runs a shape like {shape}")))?;
                    if at == place {
                        all.push(Case { op: op.clone(), shape: shape.clone(), work, make });
                    }
                }
            }
        }
        let flush = (place == Place::Cuda).then(|| device.zeros(DType::U8, FLUSH));
        Ok(Cases { maker: Maker::new(device), place, flush, all })
    }

    pub fn find(&self, op: &str, shape: &str) -> Option<&Case> {
        self.all.iter().find(|c| c.op == op && c.shape == shape)
    }

    /// The operands of a case, warmed up; one set of them where only `once` is asked for.
    ///
    /// # Errors
    /// What the device says.
    pub fn prepare(&self, case: &Case, once: bool) -> Result<Prepared> {
        let sets = match once || self.place == Place::Emulated {
            true => 1,
            false => (COLD / case.work.bytes()).ceil().max(1.0) as usize,
        };
        let sets = (0..sets).map(|_| (case.make)(&self.maker)).collect();
        let (stream, flush) = (self.maker.stream(), self.flush.clone());
        let mut prepared = Prepared { sets, next: 0, stream, flush, runs: 1 };
        if once {
            return Ok(prepared);
        }
        // The first runs find scratch memory that is not there yet.
        prepared.time(3)?;
        let seconds = prepared.time(3)? / 3.0;
        prepared.runs = match prepared.flush {
            Some(_) => (CARD_BURST / seconds).ceil().clamp(3.0, MOST_RUNS),
            None => (BURST / seconds).ceil().clamp(2.0, 10_000.0),
        } as u64;
        Ok(prepared)
    }
}

/// The expressions of an entry, for a shape and floats of so many bytes.
fn work(entry: &Entry, shape: &[usize], float: usize) -> std::result::Result<Work, String> {
    let names: Vec<&str> = entry.dims.split(' ').collect();
    if names.len() != shape.len() {
        return Err(format!("{shape:?} for the numbers {:?}", entry.dims));
    }
    let numbers = names.into_iter().zip(shape.iter().copied()).chain([("f", float)]);
    let (numbers, env) = (Value::from_pairs(numbers.map(|(name, n)| (name, n as u64))), Environment::new());
    let value = |expression: &str| -> std::result::Result<f64, String> {
        let found = env.compile_expression(expression).and_then(|e| e.eval(&numbers));
        let number = found.and_then(i64::try_from).map_err(|e| format!("{expression}: {e:#}"))?;
        Ok(number as f64)
    };
    Ok(Work { flops: value(&entry.flops)?, reads: value(&entry.reads)?, writes: value(&entry.writes)? })
}

/// A case that can run.
pub struct Prepared {
    sets: Vec<Run>,
    next: usize,
    stream: Stream,
    flush: Option<Buffer>,
    runs: u64,
}

impl Prepared {
    /// Seconds of so many runs, one after the other.
    ///
    /// # Errors
    /// What the device says.
    pub fn time(&mut self, runs: u64) -> Result<f64> {
        // Nothing is left in a card's cache; and while that goes on, the host gets ahead with its launches.
        if let Some(flush) = &self.flush {
            self.stream.zero(flush);
        }
        let (sets, next) = (&self.sets, &mut self.next);
        self.stream.time(|| {
            for _ in 0..runs {
                *next = (*next + 1) % sets.len();
                sets[*next]();
            }
        })
    }

    /// Seconds of one run: on a card the mean of a burst, otherwise the least of one, since other work can only add to it.
    ///
    /// # Errors
    /// What the device says.
    pub fn seconds(&mut self) -> Result<f64> {
        if self.flush.is_some() {
            return Ok(self.time(self.runs)? / self.runs as f64);
        }
        let mut least = f64::INFINITY;
        for _ in 0..self.runs {
            least = least.min(self.time(1)?);
        }
        Ok(least)
    }
}
