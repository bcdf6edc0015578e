use crate::device::{DType, Device};
use crate::input::Tokenizer;
use crate::model::{LoadOptions, Model, Preset, SaveOptions, write_atomically};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Write a model with random weights as a Hugging Face folder
#[derive(clap::Args)]
#[command(after_help = "Example:\n  varft init tiny models/tiny --seed 1\n\n\
                        Presets: tiny (0.3 M parameters; with a tokenizer), mid (43.5 M), and the shapes of Qwen2.5-VL: 3b, 7b. \
                        All but tiny need a tokenizer.json of your own before they can be talked to.")]
pub(super) struct Args {
    /// tiny, mid, 3b or 7b
    preset: Preset,
    /// The folder to write; made if missing
    dir: PathBuf,
    /// The same seed gives the same weights on every machine
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = super::seed)]
    seed: u64,
    /// What the weights are stored as
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16"])]
    dtype: String,
    /// A tokenizer.json to copy beside the weights
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Write into a folder that already holds a model
    #[arg(long)]
    force: bool,
}

/// The first 512 tokens of Qwen2.5's vocabulary (Apache-2.0) and its control tokens, for the `tiny` preset.
pub(super) const TINY_TOKENIZER: &[u8] = include_bytes!("tiny/tokenizer.json");

pub(super) fn run(args: &Args) -> Result<()> {
    if args.dir.join("config.json").exists() && !args.force {
        return Err(Error::input(
            format!("{}: there is a model in this folder", args.dir.display()),
            "choose another folder, or replace the model with --force",
        ));
    }
    let tokenizer = match &args.tokenizer {
        Some(path) => {
            let bytes = crate::files::read(path).map_err(|e| Error::io("read the tokenizer", path, e))?;
            // What no command could use is told now.
            args.preset.config().check_tokenizer(&Tokenizer::from_bytes(&bytes, &path.display().to_string())?)?;
            Some(bytes)
        }
        None if args.preset == Preset::Tiny => Some(TINY_TOKENIZER.to_vec()),
        None => None,
    };
    let device = Device::cpu(0);
    let model = Model::random(args.preset.config(), args.seed, &device, &LoadOptions::default())?;
    let dtype = match args.dtype.as_str() {
        "bf16" => DType::BF16,
        "f16" => DType::F16,
        _ => DType::F32,
    };
    model.save(&device.stream(), &args.dir, &SaveOptions { dtype, ..SaveOptions::default() })?;
    if let Some(bytes) = &tokenizer {
        let path: &Path = &args.dir.join("tokenizer.json");
        write_atomically(path, |out| out.write_all(bytes).map_err(|e| Error::io("write", path, e)))?;
    }
    say!("{}: {} parameters, {}", args.dir.display(), grouped(model.params.count()), args.dtype);
    if tokenizer.is_none() {
        say!("it has no tokenizer.json yet: copy the one of Qwen/Qwen2.5-VL-3B-Instruct into it");
    }
    Ok(())
}

/// `1234567` as `1,234,567`.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn grouped() {
        assert_eq!([0, 12, 999, 1000, 1234567].map(super::grouped), ["0", "12", "999", "1,000", "1,234,567"]);
    }
}
