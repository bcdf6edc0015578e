//! Writing a checkpoint that transformers (and everything that reads the hub's layout) loads: `config.json` and one or more
//! safetensors files under the hub's names.
//!
//! Each file is written beside its name, flushed to the disk and then renamed, so that no reader and no crash ever meets
//! half a file under a real name; the config comes last.

use super::load::{INDEX, SINGLE};
use super::params::{ParamStore, Segment, Tensor};
use crate::device::{DType, Stream};
use crate::ops::linear::PANEL;
use crate::{Error, Result};
use half::slice::HalfFloatSliceExt;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// How to write a checkpoint.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// Element type of the tensors: f32, bf16 or f16.
    pub dtype: DType,
    /// A file holds at most this many bytes of tensors; a larger model is split.
    pub shard_bytes: usize,
    /// Further files to copy beside the weights: the tokenizer's, the image processor's.
    pub copy: Vec<PathBuf>,
}

impl Default for SaveOptions {
    /// f32, shards of 5 GB as on the hub, nothing to copy.
    fn default() -> Self {
        SaveOptions { dtype: DType::F32, shard_bytes: 5_000_000_000, copy: Vec::new() }
    }
}

/// The name of a dtype in a safetensors header and in a config.
fn dtype_names(dtype: DType) -> Result<(&'static str, &'static str)> {
    match dtype {
        DType::F32 => Ok(("F32", "float32")),
        DType::BF16 => Ok(("BF16", "bfloat16")),
        DType::F16 => Ok(("F16", "float16")),
        other => Err(Error::input(format!("weights cannot be saved as {other:?}"), "choose f32, bf16 or f16")),
    }
}

/// Writes `params` and the config into `dir`, which is made if it is not there.
pub(super) fn save(
    s: &Stream,
    params: &ParamStore,
    config: &super::Config,
    dir: &Path,
    options: &SaveOptions,
) -> Result<()> {
    let (_, config_dtype) = dtype_names(options.dtype)?;
    fs::create_dir_all(dir).map_err(|e| Error::io("create the model's folder", dir, e))?;
    let mut all: Vec<(&Segment, &Tensor)> =
        params.segments().iter().flat_map(|g| g.tensors.iter().map(move |t| (g, t))).collect();
    all.sort_by(|a, b| a.1.name.cmp(&b.1.name));
    let bytes = |(g, t): &(&Segment, &Tensor)| t.rows.len() * g.k * options.dtype.size();
    let mut shards: Vec<Vec<(&Segment, &Tensor)>> = vec![Vec::new()];
    let mut filled = 0;
    for it in all.iter().copied() {
        if filled > 0 && filled + bytes(&it) > options.shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes(&it);
        if let Some(last) = shards.last_mut() {
            last.push(it);
        }
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    let mut written = vec!["config.json".to_string()];
    for (i, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let path = dir.join(&name);
        write_atomically(&path, |out| write_tensors(s, params, shard, options.dtype, &path, out))?;
        weight_map.extend(shard.iter().map(|(_, t)| (t.name.clone(), name.clone())));
        written.push(name);
    }
    if count > 1 {
        let total: usize = all.iter().map(bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_json(&dir.join(INDEX), &index)?;
        written.push(INDEX.to_string());
    }
    for from in &options.copy {
        let Some(name) = from.file_name() else { continue };
        let to = dir.join(name);
        let data = fs::read(from).map_err(|e| Error::io("read", from, e))?;
        write_atomically(&to, |out| out.write_all(&data).map_err(|e| Error::io("write", &to, e)))?;
    }
    write_json(&dir.join("config.json"), &config.to_json(config_dtype))?;
    remove_stale(dir, &written)
}

/// Removes weights that an earlier model left in the folder under other names.
fn remove_stale(dir: &Path, written: &[String]) -> Result<()> {
    let entries = fs::read_dir(dir).map_err(|e| Error::io("read the folder", dir, e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io("read the folder", dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ours = name == INDEX || name == SINGLE || (name.starts_with("model-") && name.ends_with(".safetensors"));
        if ours && !written.contains(&name) {
            fs::remove_file(&path).map_err(|e| Error::io("remove the earlier weights", &path, e))?;
        }
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    write_atomically(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("write", path, e)))
}

/// Writes a file under a temporary name, flushes it to the disk and renames it. On failure nothing is left behind, and a
/// file that was there before is as it was.
pub fn write_atomically(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let result = (|| {
        let failed = |e| Error::io("write", path, e);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&temporary).map_err(failed)?);
        fill(&mut out)?;
        let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        fs::rename(&temporary, path).map_err(failed)?;
        // The rename itself is safe only once the folder is on the disk.
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|d| d.sync_all()).map_err(failed)
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// One safetensors file: the length of the header, the header, the tensors' bytes.
fn write_tensors(
    s: &Stream,
    params: &ParamStore,
    tensors: &[(&Segment, &Tensor)],
    dtype: DType,
    path: &Path,
    out: &mut dyn Write,
) -> Result<()> {
    let (dtype_name, _) = dtype_names(dtype)?;
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut end = 0;
    for (g, t) in tensors {
        let start = end;
        end += t.rows.len() * g.k * dtype.size();
        header.insert(t.name.clone(), json!({ "dtype": dtype_name, "shape": t.shape, "data_offsets": [start, end] }));
    }
    let mut header = Value::Object(header).to_string();
    // Padded, so that the tensors' bytes are aligned in a mapping.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let failed = |e| Error::io("write the model's weights", path, e);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(header.as_bytes()).map_err(failed)?;
    for (g, t) in tensors {
        let step = ((1 << 20) / g.k / PANEL).max(1) * PANEL;
        for first in t.rows.clone().step_by(step) {
            let values = g.read(s, &params.flat, first..t.rows.end.min(first + step))?;
            match dtype {
                DType::BF16 => {
                    let mut halves = vec![half::bf16::ZERO; values.len()];
                    halves.convert_from_f32_slice(&values);
                    out.write_all(bytemuck::cast_slice(&halves))
                }
                DType::F16 => {
                    let mut halves = vec![half::f16::ZERO; values.len()];
                    halves.convert_from_f32_slice(&values);
                    out.write_all(bytemuck::cast_slice(&halves))
                }
                _ => out.write_all(bytemuck::cast_slice(&values)),
            }
            .map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_leaves_the_old_file_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        fs::write(&path, "before").unwrap();
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let e = write_atomically(&path, |out| {
            out.write_all(&[0; 3 << 20]).unwrap();
            Err(Error::io("write", &path, full()))
        });
        let text = e.unwrap_err().to_string();
        assert!(text.contains("free some space") && text.contains("model.safetensors"), "{text}");
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
