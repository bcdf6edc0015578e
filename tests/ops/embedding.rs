//! [`varft::ops::embedding`].

use super::{Noise, devices, read};
use half::bf16;
use varft::device::DType;
use varft::ops::embedding::{NO_TOKEN, Table, backward, forward};
use varft::ops::linear::Weight;

#[test]
fn rows_are_read_and_gradients_are_added_in_ascending_order_of_position() {
    let mut rng = Noise::fresh();
    // Vocabulary, width, tokens, and how many ids occur: all different or nearly, a few often (in more than one piece of the
    // search), one everywhere; one token, none.
    let shapes = [
        (500, 64, 40, 500),
        (37, 300, 90, 37),
        (9, 1031, 30, 3),
        (50, 16, 1300, 5),
        (3, 8, 700, 1),
        (5, 3, 1, 5),
        (5, 8, 0, 5),
    ];
    for d in devices() {
        let s = d.stream();
        for (v, h, t, different) in shapes {
            let ids: Vec<u32> =
                (0..t)
                    .map(|i| {
                        if i % 7 == 3 {
                            NO_TOKEN
                        } else {
                            (rng.next() % different) as u32 + v as u32 - different as u32
                        }
                    })
                    .collect();
            let (table, dout, base) = (rng.bf16s(v * h, 1.0), rng.bf16s(t * h, 1.0), rng.f32s(v * h, 1.0));
            let (mut want, mut dwant) = (vec![bf16::ZERO; t * h], base.clone());
            for (i, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NO_TOKEN) {
                let from = id as usize * h;
                want[i * h..][..h].copy_from_slice(&table[from..][..h]);
                (0..h).for_each(|c| dwant[from + c] += dout[i * h + c].to_f32());
            }
            let what = format!("{d:?}, {t} tokens of {different} ids, table [{v}, {h}]");
            let (ib, tb, db) = (d.upload(&ids), d.upload(&table), d.upload(&dout));
            let tied = Weight { data: tb.clone(), n: v, k: h };
            for table in [Table::Rows(&tb), Table::Packed(&tied)] {
                let out = d.alloc(DType::BF16, t * h);
                forward(&s, &ib, table, &out, t, h);
                assert_eq!(read::<bf16>(&s, &out), want, "{what}");
            }
            let dtable = d.upload(&base);
            backward(&s, &ib, &db, Table::Rows(&dtable), t, h);
            assert_eq!(read::<f32>(&s, &dtable), dwant, "the gradient of {what}");
        }
    }
}
