//! Filling the parameters from the host, a stripe of rows at a time on all cores: the whole model never exists twice.

use super::params::{ParamStore, Segment, Tensor};
use crate::device::Stream;
use crate::{Error, Result};

/// Fills every segment: `f(segment, tensor, first, out)` writes the row-major elements `[first, first + out.len())` of a
/// tensor. It is called from several threads.
pub(super) fn fill<F>(s: &Stream, params: &ParamStore, f: F) -> Result<()>
where
    F: Fn(&Segment, &Tensor, usize, &mut [f32]) -> Result<()> + Sync,
{
    let mut stripes = Vec::new();
    for segment in params.segments() {
        stripes.extend(segment.stripes().map(|rows| (segment, rows)));
    }
    let f = &f;
    for batch in stripes.chunks(s.device().threads()) {
        let values = std::thread::scope(|scope| {
            let workers: Vec<_> = batch
                .iter()
                .map(|(segment, rows)| {
                    let work = move || -> Result<Vec<f32>> {
                        let k = segment.k;
                        let mut out = vec![0.0; rows.len() * k];
                        for t in &segment.tensors {
                            let (a, b) = (rows.start.max(t.rows.start), rows.end.min(t.rows.end));
                            if a < b {
                                let part = &mut out[(a - rows.start) * k..(b - rows.start) * k];
                                f(segment, t, (a - t.rows.start) * k, part)?;
                            }
                        }
                        Ok(out)
                    };
                    let thread = std::thread::Builder::new().spawn_scoped(scope, work);
                    thread.map_err(|e| Error::no_thread("a thread that fills the weights", e))
                })
                .collect();
            let panicked = |_| Error::internal("a thread that fills the weights panicked");
            workers.into_iter().map(|w| w?.join().map_err(panicked)?).collect::<Vec<_>>()
        });
        for ((segment, rows), values) in batch.iter().zip(values) {
            let values = values?;
            segment.write(s, &params.flat, rows.clone(), &values);
        }
    }
    Ok(())
}
