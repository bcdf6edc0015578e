//! How fast a device computes products, measured now.

use crate::Result;
use crate::device::Device;
use crate::ops::linear::{self, Epilogue, Weight};
use std::time::{Duration, Instant};

/// A product that takes longer is not made larger.
const LONG: Duration = Duration::from_millis(100);
/// How long the last one is repeated, at least, unless a single one takes longer.
const ENOUGH: Duration = Duration::from_millis(400);
/// Elements that are written at a time.
const STRIPE: usize = 1 << 20;

/// A product that was measured: `[rows, inputs]` times a weight `[outputs, inputs]`.
pub(super) struct Rate {
    rows: usize,
    inputs: usize,
    outputs: usize,
    /// Operations a second, a multiplication and an addition counted as two.
    pub flops: f64,
}

impl Rate {
    /// What was measured, for a person.
    pub fn told(&self) -> String {
        let (unit, flops) =
            if self.flops >= 1e12 { ("TFLOP/s", self.flops / 1e12) } else { ("GFLOP/s", self.flops / 1e9) };
        format!("{} rows times {} x {}: {flops:.3} {unit}", self.rows, self.inputs, self.outputs)
    }
}

/// Measures a product of that size; of a smaller one where the device is so slow that this one would take long.
///
/// # Errors
/// Where the device fails.
pub(super) fn product(device: &Device, rows: usize, inputs: usize, outputs: usize) -> Result<Rate> {
    let sizes = [(16, 64), (64, 512), (usize::MAX, usize::MAX)];
    let mut sizes =
        sizes.map(|(most, wide)| [rows.min(most), inputs.min(wide), outputs.min(wide)]).into_iter().peekable();
    loop {
        let Some([rows, inputs, outputs]) = sizes.next() else {
            return Err(crate::Error::internal("a product of no size"));
        };
        let s = device.stream();
        let float = device.float();
        let len = if device.packs_weights() { linear::packed_len(outputs, inputs) } else { outputs * inputs };
        let pattern: Vec<f32> = (0..STRIPE).map(|i| ((i * 2_654_435_761) % 1021) as f32 / 510.0 - 1.0).collect();
        let filled = |len: usize| {
            let b = device.alloc(float, len);
            for first in (0..len).step_by(STRIPE) {
                let n = STRIPE.min(len - first);
                s.write_floats(&b.view(first, n), &pattern[..n]);
            }
            b
        };
        let weight = Weight { data: filled(len), n: outputs, k: inputs };
        let (x, y) = (filled(rows * inputs), device.alloc(float, rows * outputs));
        let time = |times: u32| -> Result<Duration> {
            let begun = Instant::now();
            (0..times).for_each(|_| linear::forward(&s, &x, &weight, Epilogue::None, &y, rows));
            s.synchronize()?;
            Ok(begun.elapsed())
        };
        s.synchronize()?;
        // The first one finds cold caches, and kernels that are not loaded yet.
        let first = time(1)?;
        if sizes.peek().is_some() && first < LONG {
            continue;
        }
        let again = if first < ENOUGH { time(1)? } else { first };
        let times = (ENOUGH.as_secs_f64() / again.as_secs_f64().max(1e-6)).ceil().clamp(1.0, 1000.0) as u32;
        let took = if first < ENOUGH { time(times)? / times } else { first };
        let flops = 2.0 * (rows * inputs * outputs) as f64 / took.as_secs_f64().max(1e-9);
        return Ok(Rate { rows, inputs, outputs, flops });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_measured_and_named() {
        let rate = product(&Device::cpu(2), 32, 96, 160).unwrap();
        assert!(rate.flops > 0.0 && rate.told().starts_with("32 rows times 96 x 160: "), "{}", rate.told());
    }
}
