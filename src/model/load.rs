//! Reading a checkpoint: one safetensors file or shards with an index, f32, bf16 or f16, under the hub's tensor names or
//! those of transformers 5, memory-mapped.

use super::config::Config;
use super::params::{ParamStore, Tensor, plan};
use super::stripes;
use crate::device::Stream;
use crate::{Error, Result};
use half::slice::HalfFloatSliceExt;
use indicatif::{ProgressBar, ProgressStyle};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

/// The file that says which shard holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The file of a checkpoint in one piece.
pub(super) const SINGLE: &str = "model.safetensors";

const FETCH: &str = "fetch that file again from where the model came from";

/// One mapped file.
struct Shard {
    path: PathBuf,
    map: Mmap,
    /// Where the tensors' bytes begin.
    data: usize,
    metadata: Metadata,
}

/// The tensors of a folder, by the hub's names.
pub(super) struct Checkpoint {
    shards: Vec<Shard>,
    /// Hub name -> (shard, name in the file).
    tensors: HashMap<String, (usize, String)>,
}

/// The hub's name for a tensor, whichever of the two schemes a file uses.
fn hub_name(name: &str) -> String {
    for (from, to) in [("model.visual.", "visual."), ("model.language_model.", "model.")] {
        if let Some(rest) = name.strip_prefix(from) {
            return format!("{to}{rest}");
        }
    }
    name.to_string()
}

impl Checkpoint {
    /// Maps the files of `dir` and reads their headers.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let files = files(dir)?;
        let mut it = Checkpoint { shards: Vec::new(), tensors: HashMap::new() };
        for path in files {
            let file = crate::files::open(&path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Error::input(
                    format!("{}: this shard of the checkpoint is missing ({INDEX} names it)", path.display()),
                    FETCH,
                ),
                _ => Error::io("read the model's weights", &path, e),
            })?;
            // SAFETY: the file is only read; as with any mapping, cutting it short while it is being loaded is an error of
            // whoever does that.
            let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map the model's weights", &path, e))?;
            let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
                Error::input(
                    format!("{}: not a whole safetensors file ({} bytes): {e}", path.display(), map.len()),
                    format!("it was probably cut short on its way here; {FETCH}"),
                )
            })?;
            for name in metadata.tensors().into_keys() {
                let hub = hub_name(&name);
                if let Some((other, _)) = it.tensors.insert(hub.clone(), (it.shards.len(), name)) {
                    let other: &Path = it.shards.get(other).map_or(&path, |s| &s.path);
                    return Err(Error::input(
                        format!("the tensor {hub} is both in {} and in {}", other.display(), path.display()),
                        "remove the files that do not belong to this checkpoint",
                    ));
                }
            }
            it.shards.push(Shard { path, map, data: header + 8, metadata });
        }
        Ok(it)
    }

    /// Copies every tensor into `params`, which has the shape that [`Checkpoint::check`] has found good.
    pub fn read_into(&self, s: &Stream, dir: &Path, params: &ParamStore, progress: bool) -> Result<()> {
        let bar = if progress { ProgressBar::new(4 * params.count() as u64) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("loading {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}") {
            bar.set_style(style);
        }
        stripes::fill(s, params, |_, tensor, first, out| {
            let (shard, dtype, bytes) = self.bytes(&tensor.name).ok_or_else(|| self.absent(dir, tensor))?;
            let bytes = &bytes[first * size(dtype)..][..out.len() * size(dtype)];
            match dtype {
                Dtype::F32 => {
                    out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b))
                }
                Dtype::BF16 => out
                    .iter_mut()
                    .zip(bytes.as_chunks().0)
                    .for_each(|(x, b)| *x = half::bf16::from_le_bytes(*b).to_f32()),
                Dtype::F16 => {
                    let halves: Vec<half::f16> =
                        bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b)).collect();
                    halves.convert_to_f32_slice(out);
                }
                other => return Err(unreadable(shard, tensor, other)),
            }
            if let Some(i) = out.iter().position(|x| !x.is_finite()) {
                return Err(Error::input(
                    format!(
                        "{}: element {} of the tensor {} is {}",
                        shard.path.display(),
                        first + i,
                        tensor.name,
                        out[i]
                    ),
                    "these weights are broken: use an earlier checkpoint, or fetch the file again",
                ));
            }
            bar.inc(4 * out.len() as u64);
            Ok(())
        })?;
        bar.finish_and_clear();
        Ok(())
    }

    fn bytes(&self, hub: &str) -> Option<(&Shard, Dtype, &[u8])> {
        let (i, name) = self.tensors.get(hub)?;
        let shard = &self.shards[*i];
        let info = shard.metadata.info(name)?;
        let (a, b) = info.data_offsets;
        Some((shard, info.dtype, &shard.map[shard.data + a..shard.data + b]))
    }

    fn absent(&self, dir: &Path, tensor: &Tensor) -> Error {
        let files = if self.shards.len() == 1 { self.shards[0].path.display() } else { dir.display() };
        Error::input(
            format!("{files}: the tensor {} (shape {:?}) is missing", tensor.name, tensor.shape),
            format!(
                "config.json and the weights do not belong together, or the checkpoint is incomplete; fetch both again into {}",
                dir.display()
            ),
        )
    }

    /// That the files hold exactly the tensors that the config asks for. Nothing is allocated before this is known: a
    /// config may ask for any amount.
    pub fn check(&self, dir: &Path, config: &Config) -> Result<()> {
        let mut wanted = HashSet::new();
        for segment in plan(config) {
            for t in &segment.tensors {
                wanted.insert(t.name.clone());
                let Some((i, name)) = self.tensors.get(&t.name) else { return Err(self.absent(dir, t)) };
                let shard = &self.shards[*i];
                let Some(info) = shard.metadata.info(name) else { return Err(self.absent(dir, t)) };
                if info.shape != t.shape {
                    return Err(Error::input(
                        format!(
                            "{}: the tensor {name} has shape {:?}, and by {} it should have {:?}",
                            shard.path.display(),
                            info.shape,
                            dir.join("config.json").display(),
                            t.shape
                        ),
                        "config.json and the weights do not belong together; fetch both from the same place",
                    ));
                }
                if !matches!(info.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                    return Err(unreadable(shard, t, info.dtype));
                }
            }
        }
        let extra = self.tensors.iter().find(|(hub, _)| {
            // A tied checkpoint may carry its head all the same, and old ones carry the rotary frequencies.
            let tolerated = (config.tie_word_embeddings && *hub == "lm_head.weight") || hub.ends_with(".inv_freq");
            !wanted.contains(*hub) && !tolerated
        });
        if let Some((_, (i, name))) = extra {
            return Err(Error::input(
                format!(
                    "{}: the tensor {name} has no place in the model that {} describes",
                    self.shards[*i].path.display(),
                    dir.join("config.json").display()
                ),
                "config.json and the weights do not belong together (another number of layers?); fetch both from the same place",
            ));
        }
        Ok(())
    }
}

fn size(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
}

fn unreadable(shard: &Shard, tensor: &Tensor, dtype: Dtype) -> Error {
    Error::input(
        format!(
            "{}: the tensor {} is stored as {dtype:?}, and only F32, BF16 and F16 can be read",
            shard.path.display(),
            tensor.name
        ),
        "use the checkpoint as it was published, not a quantized one",
    )
}

/// The safetensors files of a checkpoint, each once.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (index, single) = (dir.join(INDEX), dir.join(SINGLE));
    if !index.exists() {
        if single.exists() {
            return Ok(vec![single]);
        }
        return Err(Error::input(
            format!("{}: there are no weights: neither {SINGLE} nor {INDEX}", dir.display()),
            "fetch the checkpoint's *.safetensors files into this folder, or make a model with `varft init`",
        ));
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = crate::files::read_to_string(&index).map_err(|e| Error::io("read the list of shards", &index, e))?;
    let parsed: Index = serde_json::from_str(&text)
        .map_err(|e| Error::input(format!("{}: not a list of shards: {e}", index.display()), FETCH))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if let Some(bad) = names.iter().find(|n| Path::new(n).file_name().is_none_or(|f| f != n.as_str())) {
        return Err(Error::input(format!("{}: {bad:?} is not the name of a file beside it", index.display()), FETCH));
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}
