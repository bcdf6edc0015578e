use super::device::{self, DeviceArgs};
use super::session::model_folder;
use crate::device::{DType, Device};
use crate::input::{
    ChatTemplate, Image, ImageHash, ImageProcessor, ImageSource, Message, Preprocessor, Prompt, ResizeOrder, Tokenizer,
    build_prompt,
};
use crate::model::positions::{self, Positions, Span};
use crate::model::train::{self, Activations, Group, TrainBatch};
use crate::model::{Config, LoadOptions, Model, write_atomically};
use crate::ops::linear::{self, Epilogue};
use crate::ops::patch_embed::{self, Geometry, INPUTS};
use crate::ops::softmax;
use crate::train::RunConfig;
use crate::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Write what the model makes of a conversation to a safetensors file, for comparison with other implementations
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  varft inspect --model models/tiny conversation.json --out inspected.safetensors\n\n\
                        conversation.json is a list of messages as Hugging Face writes them; images are paths, relative to that file:\n  \
                        [{\"role\": \"user\", \"content\": [{\"type\": \"image\", \"image\": \"photo.jpg\"}, {\"type\": \"text\", \"text\": \
                        \"What is this?\"}]}]\n\n\
                        Tensors, named and shaped as in transformers (t tokens, p patches, n images):\n  \
                        input_ids [1, t]          position_ids [3, 1, t]      logits [1, t, vocab]\n  \
                        pixel_values [p, 1176]    image_grid_thw [n, 3]       image_embeds [p / 4, hidden]\n  \
                        log_probs [1, t - 1]: of each token after the first, given those before it (nothing forbidden, temperature 1)"
)]
pub(super) struct Args {
    /// The conversation, in JSON
    conversation: PathBuf,
    /// The model's folder, or that of a run, whose newest checkpoint is then the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Resize images as Pillow 13 does (the pass that shrinks more comes first), not as the model was trained
    #[arg(long)]
    pillow13: bool,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = super::threads)]
    threads: usize,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Rows of logits at a time.
const ROWS: usize = 64;

pub(super) fn run(args: &Args) -> Result<()> {
    let mut config = RunConfig::read(None, &args.device.with(&[]))?;
    let folder = model_folder(&args.model)?;
    (config.model.path, config.run.threads) = (folder.display().to_string(), args.threads);
    // Whatever the names are: links too.
    let same = |a: &Path, b: &Path| a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    if same(&args.out, &args.conversation) {
        return Err(Error::input(
            format!("{}: --out would overwrite the conversation", args.out.display()),
            "name another file with --out",
        ));
    }
    // The file takes the place of what has its name, and a device (/dev/null, say) would be gone with it.
    if args.out.metadata().is_ok_and(|m| !m.is_file()) {
        return Err(Error::input(
            format!("{}: there is a folder, a device or a pipe of this name", args.out.display()),
            "name a file with --out",
        ));
    }
    device::settle(&mut config);
    let device = device::open(&config.run)?;
    let prompt = read_prompt(args, &folder, device.threads())?;
    let model = Model::load(&folder, &device, &LoadOptions { freeze_vision: true, progress: true })?;
    let limit = model.config.max_position_embeddings;
    if prompt.len() > limit {
        return Err(Error::limit(
            format!("{}: {} tokens, and the model's context is {limit}", args.conversation.display(), prompt.len()),
            "shorten the conversation, or show smaller images",
        ));
    }
    let tensors = Inspected::new(&model, &ImageProcessor::load(&folder)?, prompt)?;
    tensors.save(&args.out)?;
    let (t, n) = (tensors.prompt.len(), tensors.prompt.images.len());
    say!("{}: {t} tokens, {n} images", args.out.display());
    Ok(())
}

fn read_prompt(args: &Args, folder: &Path, threads: usize) -> Result<Prompt> {
    let path = &args.conversation;
    let text = crate::files::read(path).map_err(|e| Error::io("read the conversation", path, e))?;
    let messages: Vec<Message> = serde_json::from_slice(&text).map_err(|e| {
        Error::input(
            format!("{}: {e}", path.display()),
            "write a list of messages, [{\"role\": \"user\", \"content\": \"...\"}]; see varft inspect --help",
        )
    })?;
    if messages.is_empty() {
        return Err(Error::input(
            format!("{}: there is no message in the conversation", path.display()),
            "write at least one, [{\"role\": \"user\", \"content\": \"...\"}]",
        ));
    }
    let beside = path.parent().unwrap_or(Path::new(""));
    let mut sources = Vec::new();
    for (i, source) in messages.iter().flat_map(|m| m.image_sources()).enumerate() {
        let source = source.ok_or_else(|| {
            Error::input(
                format!("{}: image {i} (from 0) of the conversation names no file", path.display()),
                "give its path as \"image\"",
            )
        })?;
        let plain = source.strip_prefix("file://").unwrap_or(source);
        sources.push(ImageSource::Path(beside.join(plain)));
    }
    let mut processor = ImageProcessor::load(folder)?;
    if args.pillow13 {
        processor.order = ResizeOrder::Pillow13;
    }
    let images = Preprocessor::new(processor, threads, 0)?.load_all(sources)?;
    let tokenizer = Tokenizer::load(folder)?;
    Config::load(folder)?.check_tokenizer(&tokenizer)?;
    build_prompt(&tokenizer, &ChatTemplate::load(folder)?, &messages, &images)
}

/// All that is written, on the host.
struct Inspected {
    prompt: Prompt,
    positions: Positions,
    pixel_values: Vec<f32>,
    grid: Vec<i64>,
    image_embeds: Vec<f32>,
    hidden_size: usize,
    logits: Vec<f32>,
    vocab: usize,
    log_probs: Vec<f32>,
}

impl Inspected {
    fn new(model: &Model, processor: &ImageProcessor, prompt: Prompt) -> Result<Inspected> {
        let (c, d, s) = (&model.config, model.device(), model.device().stream());
        let t = prompt.len();
        // All logits, once more as bytes, and once more as the file's; all of it the host's.
        Device::cpu(1).check_room(
            t.saturating_mul(3 * c.vocab_size * size_of::<f32>()),
            &format!("the logits of {t} tokens"),
            "shorten the conversation, or show smaller images",
        )?;
        let group = Group { prompt: prompt.clone(), completions: Vec::new() };
        let batch = TrainBatch::pack(c, d, &s, &[group])?;
        let mut acts = Activations::forward_only(model, &batch);
        let hidden = train::forward(model, &s, &batch, &mut acts)?;

        let (mut logits, mut log_probs) = (Vec::with_capacity(t * c.vocab_size), Vec::with_capacity(t));
        let out = d.alloc(DType::F32, ROWS.min(t) * c.vocab_size);
        let allowed = vec![0; softmax::forbidden_words(c.vocab_size)];
        for first in (0..t).step_by(ROWS) {
            let n = ROWS.min(t - first);
            let x = hidden.view(first * c.hidden_size, n * c.hidden_size);
            linear::forward(&s, &x, &model.text.head, Epilogue::None, &out, n);
            let rows = s.read::<f32>(&out.view(0, n * c.vocab_size)).wait()?;
            for (row, next) in rows.chunks(c.vocab_size).zip(&prompt.tokens[first + 1..]) {
                log_probs.push(softmax::log_sum_exp(row, 1.0, &allowed).logp(row[*next as usize]));
            }
            logits.extend(rows);
        }

        let normalize = patch_embed::Normalize::new(processor.mean, processor.std);
        let (mut pixel_values, mut grid, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        for span in &prompt.images {
            let Image { pixels, grid: g, .. } = &*span.image;
            let geometry = Geometry { offset: 0, grid_h: g.h, grid_w: g.w };
            pixel_values.extend(patch_embed::pixel_values(pixels, &geometry, &normalize));
            grid.extend([g.t, g.h, g.w].map(|n| n as i64));
            spans.push(Span { offset: span.offset, grid_h: g.h, grid_w: g.w });
        }
        let mut positions = Positions::default();
        positions::extend(0, t, &spans, &mut positions);
        let image_embeds = vision_output(&s.read_floats(acts.vision_out())?, &prompt, c.hidden_size);
        let (hidden_size, vocab) = (c.hidden_size, c.vocab_size);
        Ok(Inspected { prompt, positions, pixel_values, grid, image_embeds, hidden_size, logits, vocab, log_probs })
    }

    /// Writes the file, in place of an older one.
    fn save(&self, path: &Path) -> Result<()> {
        let t = self.prompt.len();
        let ids: Vec<i64> = self.prompt.tokens.iter().map(|&id| i64::from(id)).collect();
        let positions: Vec<i64> = self.positions.iter().flatten().map(|&p| i64::from(p)).collect();
        let floats =
            |shape: Vec<usize>, data: &'_ [f32]| (Dtype::F32, shape, bytemuck::cast_slice::<_, u8>(data).to_vec());
        let whole = |shape: Vec<usize>, data: &[i64]| (Dtype::I64, shape, bytemuck::cast_slice::<_, u8>(data).to_vec());
        let mut all = vec![
            ("input_ids", whole(vec![1, t], &ids)),
            ("position_ids", whole(vec![3, 1, t], &positions)),
            ("logits", floats(vec![1, t, self.vocab], &self.logits)),
            ("log_probs", floats(vec![1, self.log_probs.len()], &self.log_probs)),
        ];
        if !self.grid.is_empty() {
            all.push(("pixel_values", floats(vec![self.pixel_values.len() / INPUTS, INPUTS], &self.pixel_values)));
            all.push(("image_grid_thw", whole(vec![self.grid.len() / 3, 3], &self.grid)));
            let rows = self.image_embeds.len() / self.hidden_size;
            all.push(("image_embeds", floats(vec![rows, self.hidden_size], &self.image_embeds)));
        }
        let views =
            all.iter().map(|(name, (dtype, shape, data))| Ok((*name, TensorView::new(*dtype, shape.clone(), data)?)));
        let views: Vec<_> = views
            .collect::<std::result::Result<_, safetensors::SafeTensorError>>()
            .map_err(|e| Error::internal(format!("a tensor of the inspection: {e}")))?;
        let bytes = safetensors::serialize(views, None)
            .map_err(|e| Error::internal(format!("the inspection as safetensors: {e}")))?;
        write_atomically(path, |out| out.write_all(&bytes).map_err(|e| Error::io("write", path, e)))
    }
}

/// The vision tower's rows in the order of the prompt; the batch encodes an image that is shown twice only once.
fn vision_output(rows: &[f32], prompt: &Prompt, hidden: usize) -> Vec<f32> {
    let mut first: HashMap<ImageHash, usize> = HashMap::new();
    let mut end = 0;
    let mut out = Vec::new();
    for image in prompt.images.iter().map(|s| &s.image as &Arc<Image>) {
        let at = *first.entry(image.hash).or_insert_with(|| {
            end += image.tokens();
            end - image.tokens()
        });
        out.extend_from_slice(&rows[at * hidden..(at + image.tokens()) * hidden]);
    }
    out
}
