//! Random weights, the same for a seed on every machine and with any number of threads: each element is a function of
//! the seed, its tensor's name and its index.

use super::params::{Init, ParamStore};
use super::stripes;
use crate::Result;
use crate::device::Stream;

/// Fills every parameter.
pub(super) fn fill(s: &Stream, params: &ParamStore, seed: u64) -> Result<()> {
    stripes::fill(s, params, |segment, tensor, first, out| {
        match segment.init {
            Init::Constant(x) => out.fill(x),
            Init::Normal(std) => {
                let key = mix(seed ^ name_key(&tensor.name));
                for (i, x) in out.iter_mut().enumerate() {
                    *x = std * normal(mix(key.wrapping_add((first + i) as u64)));
                }
            }
        }
        Ok(())
    })
}

/// FNV-1a.
fn name_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3))
}

/// SplitMix64's output function (Steele, Lea and Flood, 2014), on a counter.
fn mix(counter: u64) -> u64 {
    let z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Unit variance, mean zero, bell-shaped: the sum of four uniform variables (Irwin-Hall), which needs no transcendental
/// function. Its tails end at 3.46 standard deviations, which a start for training is better off with.
fn normal(bits: u64) -> f32 {
    let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xFFFF).sum();
    // Four uniforms on [0, 65536) have variance 4 * 65536^2 / 12.
    (sum as f32 - 2.0 * 65_535.0) * (1.732_050_8 / 65_536.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::model::Preset;

    #[test]
    fn a_seed_gives_the_same_weights_and_another_gives_others() {
        let c = Preset::Tiny.config();
        let make = |seed, threads, freeze| {
            let d = Device::cpu(threads);
            let p = ParamStore::new(&c, &d, freeze).unwrap();
            fill(&d.stream(), &p, seed).unwrap();
            p.read(&d.stream(), &p.flat, "model.layers.1.mlp.up_proj.weight").unwrap()
        };
        let a = make(3, 1, false);
        assert_eq!(a, make(3, 2, true));
        assert_ne!(a, make(4, 1, false));
        let n = a.len() as f32;
        let (mean, var) = (a.iter().sum::<f32>() / n, a.iter().map(|x| x * x).sum::<f32>() / n);
        assert!(mean.abs() < 1e-3 && (var.sqrt() - 0.02).abs() < 1e-3, "mean {mean}, std {}", var.sqrt());
    }
}
