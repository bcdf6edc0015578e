//! Random numbers that depend on nothing but a key.

/// SplitMix64 (Steele, Lea and Flood 2014): small, and the same on every machine for ever.
pub(super) struct Rng(u64);

impl Rng {
    /// The stream of the given key.
    pub(super) fn new(key: &[u64]) -> Self {
        let mut rng = Rng(0x7661_7266_7473_796e);
        for part in key {
            rng.0 ^= part.wrapping_mul(0xff51_afd7_ed55_8ccd);
            rng.0 = rng.next();
        }
        rng
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 (inclusive) to 1 (exclusive).
    pub(super) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Between both ends.
    pub(super) fn float(&mut self, [low, high]: [f32; 2]) -> f32 {
        low + (high - low) * self.unit()
    }

    /// Between both ends, inclusive.
    pub(super) fn int(&mut self, [low, high]: [u32; 2]) -> u32 {
        low + (self.next() % (u64::from(high - low) + 1)) as u32
    }

    /// One of the choices.
    pub(super) fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.int([0, choices.len() as u32 - 1]) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::Rng;

    #[test]
    fn streams_depend_on_every_part_of_the_key_and_stay_in_range() {
        let first = |key: &[u64]| Rng::new(key).next();
        assert_eq!(first(&[1, 2]), first(&[1, 2]));
        let all = [first(&[1, 2]), first(&[2, 1]), first(&[1, 3]), first(&[1]), first(&[])];
        assert!((0..5).all(|i| (0..i).all(|j| all[i] != all[j])));
        let mut rng = Rng::new(&[7]);
        let mut seen = [0; 4];
        for _ in 0..4000 {
            seen[rng.int([0, 3]) as usize] += 1;
            assert!((0.5..2.0).contains(&rng.float([0.5, 2.0])));
        }
        assert!(seen.iter().all(|n| (800..1200).contains(n)), "{seen:?}");
    }
}
