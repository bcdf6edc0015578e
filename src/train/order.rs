//! The order of the data: every pass is its own permutation, decided by the seed.

/// The item that comes `at`-th (from 0) in an endless sequence of passes over `items` items. Nothing has to be
/// remembered to go on in the middle.
pub fn item_at(seed: u64, items: u64, at: u64) -> u64 {
    assert!(items > 0, "an order of no items");
    let (pass, position) = (at / items, at % items);
    // A Feistel network over the next even number of bits is a permutation; values beyond the items are walked through
    // again until one falls within (Black & Rogaway 2002, cycle walking).
    let half = (u64::BITS - (items - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let key = mix(seed ^ mix(pass.wrapping_add(0x9E37_79B9)));
    let mut x = position;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..4u64 {
            (left, right) = (right, left ^ (mix(key ^ mix(round ^ (right << 8))) & mask));
        }
        x = left << half | right;
        if x < items {
            return x;
        }
    }
}

/// SplitMix64's finaliser.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_has_every_item_once_in_an_order_of_its_own() {
        for items in [1u64, 2, 3, 7, 64, 100, 1000] {
            let pass = |seed, n: u64| (0..items).map(|i| item_at(seed, items, n * items + i)).collect::<Vec<_>>();
            let mut seen = pass(5, 0);
            seen.sort_unstable();
            assert_eq!(seen, (0..items).collect::<Vec<_>>());
            if items >= 64 {
                assert_ne!(pass(5, 0), pass(5, 1));
                assert_ne!(pass(5, 0), pass(6, 0));
                assert_ne!(pass(5, 0), (0..items).collect::<Vec<_>>());
            }
            assert_eq!(pass(5, 3), pass(5, 3));
        }
    }
}
