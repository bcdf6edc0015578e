//! Rollouts: several answers to one question about an image, with the log-probability of every token.
//!
//! ```text
//! cargo run --release --example rollouts -- MODEL_FOLDER picture.jpg "What does the sign say?"
//! cargo run --release --example rollouts            # a tiny model with random weights, and a grey square
//! ```

use std::sync::Arc;
use varft::device::Device;
use varft::engine::{Engine, EngineOptions, Request, Sampling};
use varft::input::{ChatTemplate, Image, ImageProcessor, Message, Part, Prompt, Tokenizer, build_prompt};
use varft::model::{LoadOptions, Model, Preset};

fn main() -> varft::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let device = Device::cpu(0); // all cores
    let (model, tokenizer, prompt) = match &arguments[..] {
        [folder, picture, question] => from_folder(&device, folder, picture, question)?,
        [] => from_nothing(&device)?,
        _ => {
            eprintln!("usage: rollouts [MODEL_FOLDER PICTURE QUESTION]");
            eprintln!("  all three (the question in quotes), or none for a tiny model with random weights");
            std::process::exit(2);
        }
    };

    // One engine serves any number of requests and sessions, from any thread.
    let engine = Engine::start(Arc::new(model), EngineOptions { tokenizer: tokenizer.clone(), ..Default::default() })?;

    // Four samples; the prompt and its image are computed once.
    let stop_ids = tokenizer.iter().map(|t| t.special().im_end).collect();
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, max_tokens: 64, stop_ids, seed: 42, ..Default::default() };
    for (i, generation) in engine.generate(Request { prompt, sampling, n: 4 })?.into_iter().enumerate() {
        let completion = generation.wait()?; // or iterate over it, token by token
        let total: f32 = completion.logprobs.iter().sum();
        println!("sample {i}: {} tokens, log-probability {total:.2}, {:?}", completion.tokens.len(), completion.finish);
        match &tokenizer {
            Some(t) => println!("  {}", t.decode_text(&completion.tokens)),
            None => println!("  {:?}", completion.tokens),
        }
    }

    // An agent keeps a session: what a tool answers is appended, and only that is computed.
    let mut session = engine.session();
    session.append(Prompt::from_tokens(vec![1, 2, 3]))?;
    session.generate(Sampling::greedy(8))?.wait()?;
    session.append(Prompt::from_tokens(vec![4, 5]))?;
    let second = session.generate(Sampling::greedy(8))?.wait()?;
    println!("second turn of a session: {:?}", second.tokens);
    println!("{:#?}", engine.stats());
    Ok(())
}

/// A checkpoint in Hugging Face's layout, and a question about a picture.
fn from_folder(
    device: &Device,
    folder: &str,
    picture: &str,
    question: &str,
) -> varft::Result<(Model, Option<Arc<Tokenizer>>, Prompt)> {
    let model = Model::load(folder.as_ref(), device, &LoadOptions { progress: true, ..Default::default() })?;
    let tokenizer = Tokenizer::load(folder)?;
    let bytes = std::fs::read(picture).map_err(|e| varft::Error::io("read", picture, e))?;
    let image = Arc::new(ImageProcessor::load(folder)?.process(&bytes, picture)?);
    let message =
        Message::parts("user", vec![Part::Image { image: Some(picture.into()) }, Part::Text { text: question.into() }]);
    let prompt = build_prompt(&tokenizer, &ChatTemplate::load(folder)?, &[message], &[image])?;
    Ok((model, Some(Arc::new(tokenizer)), prompt))
}

/// Needs no files: random weights, a grey square of 4 x 4 tokens between words.
fn from_nothing(device: &Device) -> varft::Result<(Model, Option<Arc<Tokenizer>>, Prompt)> {
    let model = Model::random(Preset::Tiny.config(), 0, device, &LoadOptions::default())?;
    let grey = Image::from_resized(vec![128; 112 * 112 * 3], 112, 112, 14, (112, 112))?;
    let mut prompt = Prompt::from_tokens((0..20).collect());
    prompt.push_image(Arc::new(grey), model.config.tokens.image);
    prompt.tokens.extend(30..40);
    Ok((model, None, prompt))
}
