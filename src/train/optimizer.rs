//! AdamW over the flat parameters: clipping by global norm, and no step where a gradient is not finite.

use super::config::Optim;
use crate::device::{Buffer, DType, Stream};
use crate::model::{ParamStore, Segment};
use crate::ops::adamw::{self, AdamW, Params};
use crate::ops::cast;
use crate::{Error, Result};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// So many skipped updates in a row are not bad luck.
const SKIPS_ALLOWED: u64 = 10;
/// Of the noise that rounds weights without masters. One for all runs: it depends on the update and the element, too.
const ROUNDING_SEED: u64 = 0x5EED;

/// The moments of AdamW, mirroring the trainable front of the parameters, and f32 masters of parameters that are bf16.
pub struct Optimizer {
    m: Buffer,
    v: Buffer,
    /// Begin as the weights are, rounded to bf16 when they were loaded. `None` where the parameters are f32 themselves, or are
    /// rounded at random in every update.
    master: Option<Buffer>,
    norm: Buffer,
    updates: u64,
    skipped_in_a_row: u64,
}

/// What became of an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// The global norm of the gradients, before clipping.
    pub grad_norm: f32,
    /// Whether the parameters moved: not when the norm is not finite.
    pub applied: bool,
}

impl Optimizer {
    /// Bytes of masters, gradients and moments for `moved` elements that training moves, of type `float`.
    pub fn bytes_for(float: DType, moved: usize, masters: bool) -> [usize; 3] {
        let mirror = moved * DType::F32.size();
        [if keeps_masters(float, masters) { mirror } else { 0 }, mirror, 2 * mirror + DType::F32.size()]
    }

    /// For `params`, before the first update. `masters`: keeps f32 masters of parameters that are bf16 (`optim.masters`); they are
    /// submitted to `s` as copies.
    pub fn new(params: &ParamStore, s: &Stream, masters: bool) -> Optimizer {
        let device = s.device();
        let mirror = || params.mirror(device);
        let master = keeps_masters(params.flat.dtype(), masters).then(|| {
            let master = mirror();
            cast::cast(s, &params.flat, &master, master.len());
            master
        });
        let norm = device.zeros(DType::F32, 1);
        Optimizer { m: mirror(), v: mirror(), master, norm, updates: 0, skipped_in_a_row: 0 }
    }

    /// Updates taken so far; the count rises before any parameter moves.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Whether so many updates in a row could not be taken that the last one was an error: the parameters, though
    /// they did not move, are then nothing to go on from.
    pub fn has_diverged(&self) -> bool {
        self.skipped_in_a_row >= SKIPS_ALLOWED
    }

    /// One update at rate `lr` from `grads` (a mirror of the trainable parameters): they are scaled down to
    /// `max_grad_norm` as `torch.nn.utils.clip_grad_norm_` does, then [`adamw::step`] moves the parameters; weight decay
    /// applies to matrices only. Where the norm is not finite nothing moves, and moments and count stay as they were.
    /// Waits for the norm. The caller holds the weights ([`Model::take_weights`](crate::model::Model::take_weights)).
    ///
    /// # Errors
    /// [`Error::Limit`] after ten updates in a row that could not be taken.
    pub(crate) fn step(
        &mut self,
        s: &Stream,
        params: &ParamStore,
        grads: &Buffer,
        o: &Optim,
        lr: f64,
    ) -> Result<Update> {
        adamw::grad_norm(s, grads, &self.norm);
        let grad_norm = s.read::<f32>(&self.norm).wait()?[0];
        if !grad_norm.is_finite() {
            self.skipped_in_a_row += 1;
            if self.skipped_in_a_row >= SKIPS_ALLOWED {
                return Err(Error::limit(
                    format!(
                        "{SKIPS_ALLOWED} updates in a row had gradients that are not finite: training has diverged"
                    ),
                    "begin a new run (another run.name) with an earlier checkpoint's folder as model.path and a smaller optim.lr",
                ));
            }
            return Ok(Update { grad_norm, applied: false });
        }
        self.skipped_in_a_row = 0;
        self.updates += 1;
        let scale = if o.max_grad_norm > 0.0 { (o.max_grad_norm as f32 / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        for (range, weight_decay) in [(params.decayed(), o.weight_decay), (params.not_decayed(), 0.0)] {
            let view = |b: &Buffer| b.view(range.start, range.len());
            let (weights, master) = (view(&params.flat), self.master.as_ref().map(view));
            let target = match &master {
                Some(master) => Params::Masters(master, &weights),
                None if weights.dtype() == DType::F32 => Params::Float(&weights),
                None => Params::Rounded { weights: &weights, seed: ROUNDING_SEED, first: range.start as u64 },
            };
            let hyper = AdamW { lr, beta1: o.beta1, beta2: o.beta2, eps: o.eps, weight_decay };
            adamw::step(s, target, &view(grads), &view(&self.m), &view(&self.v), hyper, self.updates, scale);
        }
        Ok(Update { grad_norm, applied: true })
    }

    /// Writes the moments as a safetensors file: `m.NAME` and `v.NAME` for each trainable segment, row-major whatever
    /// the device's layout; and `master.NAME` where there are masters.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn save(&self, s: &Stream, params: &ParamStore, path: &Path) -> Result<()> {
        let failed = |e| Error::io("write the optimizer's state", path, e);
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ "updates": self.updates.to_string() }));
        let mut end = 0;
        for (name, g, _) in self.tensors(params) {
            let start = end;
            end += g.n * g.k * 4;
            header.insert(name, json!({ "dtype": "F32", "shape": [g.n, g.k], "data_offsets": [start, end] }));
        }
        let mut header = Value::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed)?);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(header.as_bytes()).map_err(failed)?;
        for (_, g, flat) in self.tensors(params) {
            for rows in g.stripes() {
                out.write_all(bytemuck::cast_slice(&g.read(s, flat, rows)?)).map_err(failed)?;
            }
        }
        out.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
    }

    /// Reads what [`save`](Self::save) wrote, for the same model and the same choice of frozen parts.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Input`] when it is damaged or belongs to another model.
    pub fn load(&mut self, s: &Stream, params: &ParamStore, path: &Path) -> Result<()> {
        let file = crate::files::open(path).map_err(|e| Error::io("open the optimizer's state", path, e))?;
        // SAFETY: nobody writes a checkpoint's files once they are named.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
        let bad = |what: String| {
            Error::input(
                format!("{}: {what}", path.display()),
                "resume from the checkpoint that belongs to this model, with the same device, model.freeze_vision and optim.masters",
            )
        };
        let (_, metadata) = SafeTensors::read_metadata(&map).map_err(|e| bad(e.to_string()))?;
        let updates = metadata.metadata().as_ref().and_then(|m| m.get("updates")?.parse().ok());
        let updates = updates.ok_or_else(|| bad("no count of updates".into()))?;
        let file = SafeTensors::deserialize(&map).map_err(|e| bad(e.to_string()))?;
        if file.len() != self.tensors(params).count() {
            return Err(bad(format!("{} tensors where the model needs {}", file.len(), self.tensors(params).count())));
        }
        for (name, g, flat) in self.tensors(params) {
            let tensor = file.tensor(&name).map_err(|e| bad(e.to_string()))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [g.n, g.k] {
                let shape = tensor.shape();
                return Err(bad(format!("{name:?} is {:?} {shape:?}, not F32 [{}, {}]", tensor.dtype(), g.n, g.k)));
            }
            for rows in g.stripes() {
                let bytes = &tensor.data()[rows.start * g.k * 4..rows.end * g.k * 4];
                g.write(s, flat, rows, &bytemuck::pod_collect_to_vec::<u8, f32>(bytes));
            }
        }
        s.synchronize()?;
        self.updates = updates;
        Ok(())
    }

    /// Both moments and the master of every trainable segment: the name in a file, the segment, the buffer.
    fn tensors<'a>(&'a self, params: &'a ParamStore) -> impl Iterator<Item = (String, &'a Segment, &'a Buffer)> {
        let master = self.master.as_ref().map(|master| ("master", master));
        [("m", &self.m), ("v", &self.v)].into_iter().chain(master).flat_map(move |(which, flat)| {
            let segments = params.segments().iter().filter(|g| g.trainable);
            segments.map(move |g| (format!("{which}.{}", g.name), g, flat))
        })
    }
}

/// Whether there are masters of parameters of type `float`.
fn keeps_masters(float: DType, masters: bool) -> bool {
    masters && float != DType::F32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::model::{LoadOptions, Model, Preset};

    fn model(d: &Device, freeze_vision: bool) -> Model {
        let options = LoadOptions { freeze_vision, ..Default::default() };
        Model::random(Preset::Tiny.config(), 1, d, &options).unwrap()
    }

    /// Gradients for every real element (padded lanes stay zero), all `scale` times a fixed pattern.
    fn grads(m: &Model, d: &Device, scale: f32) -> Buffer {
        let p = &m.params;
        let (s, flat) = (d.stream(), p.mirror(d));
        for g in p.segments().iter().filter(|g| g.trainable) {
            for rows in g.stripes() {
                let v: Vec<f32> = (0..rows.len() * g.k).map(|i| scale * ((i * 37 % 101) as f32 / 50.0 - 1.0)).collect();
                g.write(&s, &flat, rows, &v);
            }
        }
        s.synchronize().unwrap();
        flat
    }

    fn read(s: &Stream, b: &Buffer) -> Vec<f32> {
        s.read::<f32>(b).wait().unwrap()
    }

    #[test]
    fn clipping_decay_and_frozen_parts() {
        for d in [Device::cpu(2), Device::cpu_deferred(2)] {
            let (m, s) = (model(&d, true), d.stream());
            let p = &m.params;
            let before = read(&s, &p.flat);
            let g = grads(&m, &d, 3.0);
            let o = Optim { weight_decay: 0.1, max_grad_norm: 0.5, ..Default::default() };
            let mut opt = Optimizer::new(p, &d.stream(), true);
            let got = opt.step(&s, p, &g, &o, 1e-2).unwrap();
            assert!(got.applied && opt.updates() == 1);
            let (after, g) = (read(&s, &p.flat), read(&s, &g));
            let norm = g.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            assert!((f64::from(got.grad_norm) / norm - 1.0).abs() < 1e-6);
            assert_eq!(after[p.trainable().end..], before[p.trainable().end..], "what is frozen moved");
            for (range, decay) in [(p.decayed(), 0.1), (p.not_decayed(), 0.0)] {
                for i in range {
                    let g = f64::from(g[i]) * 0.5 / norm;
                    let moved = if g == 0.0 { 0.0 } else { 1e-2 * g / (g.abs() + 1e-8) };
                    let want = f64::from(before[i]) * (1.0 - 1e-2 * decay) - moved;
                    assert!((f64::from(after[i]) - want).abs() < 1e-5, "{i}: {} {want}", after[i]);
                }
            }
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_moves_nothing() {
        let d = Device::cpu(2);
        let (m, s) = (model(&d, true), d.stream());
        let mut opt = Optimizer::new(&m.params, &d.stream(), true);
        let bad = grads(&m, &d, 1.0);
        s.write(&bad.view(1000, 1), &[f32::NAN]);
        let before = read(&s, &m.params.flat);
        for _ in 1..SKIPS_ALLOWED {
            let got = opt.step(&s, &m.params, &bad, &Optim::default(), 1.0).unwrap();
            assert!(!got.applied && got.grad_norm.is_nan());
        }
        assert_eq!((opt.updates(), read(&s, &m.params.flat)), (0, before));
        let e = opt.step(&s, &m.params, &bad, &Optim::default(), 1.0).unwrap_err().to_string();
        assert!(e.contains("optim.lr") && e.contains("model.path"), "{e}");
        assert!(opt.step(&s, &m.params, &grads(&m, &d, 1.0), &Optim::default(), 1e-3).unwrap().applied);
    }

    #[test]
    fn saved_moments_go_on_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let d = Device::cpu(2);
        let o = Optim::default();
        let run = |stop: Option<u64>| {
            let (m, s) = (model(&d, false), d.stream());
            let mut opt = Optimizer::new(&m.params, &d.stream(), true);
            for i in 0..4 {
                if stop == Some(i) {
                    opt.save(&s, &m.params, &path).unwrap();
                    opt = Optimizer::new(&m.params, &d.stream(), true);
                    opt.load(&s, &m.params, &path).unwrap();
                }
                opt.step(&s, &m.params, &grads(&m, &d, 1.0 + i as f32), &o, 1e-3).unwrap();
            }
            assert_eq!(opt.updates(), 4);
            read(&s, &m.params.flat)
        };
        assert_eq!(run(Some(2)), run(None));
    }

    #[cfg(emulator)]
    #[test]
    fn without_masters_weights_are_rounded_at_random_and_what_is_saved_belongs_to_that() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let d = Device::emulated(3).unwrap();
        let s = d.stream();
        let o = Optim { masters: false, ..Optim::default() };
        let run = |stop: bool| {
            let m = model(&d, true);
            let p = &m.params;
            let before = s.read_floats(&p.flat).unwrap();
            let mut opt = Optimizer::new(p, &s, o.masters);
            let g = grads(&m, &d, 1.0);
            for i in 0..2 {
                // So small that rounding to the nearest would move no weight that is not smaller still.
                opt.step(&s, p, &g, &o, 1e-6).unwrap();
                if stop && i == 0 {
                    opt.save(&s, p, &path).unwrap();
                    opt = Optimizer::new(p, &s, o.masters);
                    opt.load(&s, p, &path).unwrap();
                }
            }
            (before, s.read_floats(&p.flat).unwrap())
        };
        let (before, after) = run(false);
        assert!(run(true).1 == after, "it goes on bit for bit");
        let moved: Vec<f64> = (before.iter().zip(&after))
            .filter(|(b, _)| b.abs() > 1e-3)
            .map(|(b, a)| f64::from(b.signum() * (a - b)))
            .filter(|d| *d != 0.0)
            .collect();
        assert!(moved.len() > 20 && moved.iter().all(|d| d.abs() < 0.01), "{}", moved.len());
        let e = Optimizer::new(&model(&d, true).params, &s, true).load(&s, &model(&d, true).params, &path);
        assert!(e.unwrap_err().to_string().contains("optim.masters"));
    }

    #[test]
    fn the_moments_of_another_model_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let d = Device::cpu(1);
        let (frozen, whole, s) = (model(&d, true), model(&d, false), d.stream());
        Optimizer::new(&frozen.params, &d.stream(), true).save(&s, &frozen.params, &path).unwrap();
        let mut opt = Optimizer::new(&whole.params, &d.stream(), true);
        let e = opt.load(&s, &whole.params, &path).unwrap_err().to_string();
        assert!(e.contains("optimizer.safetensors") && e.contains("freeze_vision"), "{e}");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let mut opt = Optimizer::new(&frozen.params, &d.stream(), true);
        assert!(opt.load(&s, &frozen.params, &path).unwrap_err().to_string().contains("optimizer.safetensors"));
    }
}
