//! A folder of reference vectors: `models/` (checkpoints) and `vectors/` (`vectors.safetensors`, `vectors.json`).

use super::setting;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use varft::device::Device;
use varft::input::{Image, ImageProcessor, ImageSpan, Picture, Prompt, ResizeOrder};
use varft::model::{Config, LoadOptions, Model};

pub struct Reference {
    root: PathBuf,
    bytes: Vec<u8>,
    pub json: Value,
}

impl Reference {
    /// The folder named by `VARFT_PARITY_DIR`, or the one beside this file.
    pub fn open() -> Reference {
        let own = setting::repository().join("tests/fixtures/reference");
        let root = std::env::var_os("VARFT_PARITY_DIR").map_or(own, PathBuf::from);
        let read = |name: &str| {
            let path = root.join("vectors").join(name);
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let json = serde_json::from_slice(&read("vectors.json")).unwrap();
        Reference { bytes: read("vectors.safetensors"), json, root }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }
    pub fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors().tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).shape().to_vec()
    }
    fn raw(&self, name: &str, dtype: Dtype) -> Vec<u8> {
        let all = self.tensors();
        let t = all.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(t.dtype(), dtype, "{name}");
        t.data().to_vec()
    }
    pub fn f32(&self, name: &str) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(&self.raw(name, Dtype::F32))
    }
    pub fn u8(&self, name: &str) -> Vec<u8> {
        self.raw(name, Dtype::U8)
    }
    pub fn u32(&self, name: &str) -> Vec<u32> {
        let v: Vec<i32> = bytemuck::pod_collect_to_vec(&self.raw(name, Dtype::I32));
        v.into_iter().map(|x| u32::try_from(x).unwrap()).collect()
    }

    /// Names of the tensors that begin with `prefix`, without it.
    pub fn below(&self, prefix: &str) -> Vec<String> {
        let mut names: Vec<String> =
            self.tensors().names().into_iter().filter_map(|n| n.strip_prefix(prefix).map(str::to_string)).collect();
        names.sort();
        names
    }

    /// The single-sequence cases: all that have positions of one sequence.
    pub fn cases(&self) -> Vec<String> {
        let all = self.tensors();
        let mut cases: Vec<String> = all
            .names()
            .into_iter()
            .filter_map(|n| n.strip_suffix(".position_ids"))
            .filter(|c| !self.has(&format!("{c}.attention_mask")))
            .map(str::to_string)
            .collect();
        cases.sort();
        assert!(!cases.is_empty());
        cases
    }

    pub fn model_dirs(&self) -> Vec<PathBuf> {
        let mut dirs: Vec<PathBuf> = std::fs::read_dir(self.root.join("models"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.join("config.json").exists())
            .collect();
        dirs.sort();
        dirs
    }

    /// The base model's folder, whose name is the shortest, or that of a variant, whose name goes on with `_VARIANT`.
    fn named(&self, variant: Option<&str>) -> PathBuf {
        let name = |d: &PathBuf| d.file_name().unwrap().to_string_lossy().into_owned();
        let dirs: Vec<PathBuf> = self.model_dirs().into_iter().filter(|d| !name(d).ends_with("_hub")).collect();
        let base = dirs.iter().map(name).min_by_key(String::len).unwrap();
        let wanted = variant.map_or(base.clone(), |v| format!("{base}_{v}"));
        let fits = |d: &&PathBuf| if variant.is_some() { name(d).starts_with(&wanted) } else { name(d) == wanted };
        let found = dirs.iter().find(fits);
        found.unwrap_or_else(|| panic!("{}: there is no model {wanted}", self.root.display())).clone()
    }
    /// The folder of a case's model: `tied_multi` is the case `multi` on the model `BASE_tied*`, a case without a prefix
    /// is on the base model.
    pub fn model_dir(&self, case: &str) -> PathBuf {
        self.named(case.split_once('_').map(|(variant, _)| variant))
    }
    pub fn model(&self, case: &str, device: &Device) -> Model {
        Model::load(&self.model_dir(case), device, &LoadOptions::default()).unwrap()
    }
    /// The frozen reference policy of the GRPO case.
    pub fn reference_policy(&self, device: &Device) -> Model {
        Model::load(&self.named(Some("refmix")), device, &LoadOptions::default()).unwrap()
    }

    /// The case whose images a case uses: itself, or the one behind the prefix.
    pub fn image_case(&self, case: &str) -> Option<String> {
        let candidates = [Some(case), case.split_once('_').map(|(_, c)| c)];
        candidates.into_iter().flatten().find(|c| self.has(&format!("{c}.pixel_values"))).map(str::to_string)
    }

    /// The images of a case, resized in Pillow 13's order as the reference's were.
    pub fn images(&self, case: &str) -> Vec<Arc<Image>> {
        let Some(case) = self.image_case(case) else { return Vec::new() };
        let count = self.below(&format!("{case}.image.")).len();
        (0..count).map(|i| Arc::new(self.image(&format!("{case}.image.{i}"), &processor()))).collect()
    }
    pub fn image(&self, name: &str, processor: &ImageProcessor) -> Image {
        let shape = self.shape(name);
        let picture = Picture { pixels: self.u8(name), height: shape[0], width: shape[1] };
        processor.process_picture(picture, name).unwrap()
    }

    /// The tokens of `ids` with images at the placeholders.
    pub fn prompt(&self, config: &Config, ids: &[u32], images: &[Arc<Image>]) -> Prompt {
        let mut p = Prompt::from_tokens(ids.to_vec());
        let mut at = 0;
        for image in images {
            let Some(offset) = ids[at..].iter().position(|&id| id == config.tokens.image) else { break };
            let span = ImageSpan { offset: at + offset, len: image.tokens(), image: image.clone() };
            assert!(ids[span.range()].iter().all(|&id| id == config.tokens.image), "placeholders of an image");
            at = span.offset + span.len;
            p.images.push(span);
        }
        assert!(ids[at..].iter().all(|&id| id != config.tokens.image), "more placeholders than images");
        p
    }

    pub fn case_prompt(&self, config: &Config, case: &str) -> Prompt {
        self.prompt(config, &self.u32(&format!("{case}.input_ids")), &self.images(case))
    }
}

pub fn processor() -> ImageProcessor {
    ImageProcessor { order: ResizeOrder::Pillow13, ..ImageProcessor::default() }
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}

/// Norm of the difference over the norm of `want`.
pub fn relative_difference(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |v: f64| v * v;
    let difference: f64 = got.iter().zip(want).map(|(a, b)| square((a - b) as f64)).sum();
    let norm: f64 = want.iter().map(|b| square(*b as f64)).sum();
    (difference / norm).sqrt()
}

pub fn norm(v: &[f32]) -> f64 {
    v.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt()
}
