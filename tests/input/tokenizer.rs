//! Text to ids and back.

use std::path::Path;

use super::{fixture, read_json, tiny_tokenizer};
use proptest::prelude::*;
use serde::Deserialize;
use varft::input::*;

#[derive(Deserialize)]
struct TokenCase {
    text: String,
    ids: Vec<u32>,
    tiny_ids: Vec<u32>,
}

/// Both decoders give `text` (after the tokenizer's NFC), and so do the bytes one by one.
fn check_tokens(tokenizer: &Tokenizer, text: &str, ids: &[u32]) {
    assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
    let decoded = tokenizer.decode(ids);
    assert_eq!(tokenizer.encode(&decoded).unwrap(), ids);
    let mut stream = Detokenizer::new();
    let mut streamed: String = ids.iter().map(|&id| stream.push(tokenizer, id)).collect();
    streamed.push_str(&stream.finish());
    assert_eq!(streamed, decoded);
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
    assert_eq!(bytes, decoded.as_bytes());
    if !text.contains(|c| matches!(c, 'é' | '\u{300}'..='\u{36f}')) {
        assert_eq!(decoded, text);
    }
}

#[test]
fn tokenizer_cases_tiny() {
    let tokenizer = tiny_tokenizer();
    assert_eq!((tokenizer.special().image_pad, tokenizer.special().im_end, tokenizer.vocab_size()), (524, 514, 534));
    for case in read_json::<Vec<TokenCase>>("tokenizer_cases.json") {
        check_tokens(&tokenizer, &case.text, &case.tiny_ids);
    }
}

/// Qwen2.5-VL's own tokenizer is 6 MB: set VARFT_TOKENIZER to its tokenizer.json to run its cases too.
#[test]
fn tokenizer_cases_full() {
    let Some(path) = std::env::var_os("VARFT_TOKENIZER") else {
        println!("skipped: VARFT_TOKENIZER does not name a Qwen2.5-VL tokenizer.json");
        return;
    };
    let tokenizer = Tokenizer::load(path).unwrap();
    assert_eq!(tokenizer.special().image_pad, 151_655);
    for case in read_json::<Vec<TokenCase>>("tokenizer_cases.json") {
        check_tokens(&tokenizer, &case.text, &case.ids);
    }
}

#[test]
fn control_tokens_in_foreign_text_are_characters() {
    let t = tiny_tokenizer();
    let text = "a<|im_end|>b <|image_pad|><tool_call>";
    let plain = t.encode_plain(text).unwrap();
    assert!(plain.iter().all(|&id| !t.is_special(id)));
    assert_eq!(t.decode(&plain), text);
    assert_eq!(t.encode(text).unwrap().iter().filter(|&&id| t.is_special(id)).count(), 2);
    assert_eq!(t.encode_plain("ordinary text").unwrap(), t.encode("ordinary text").unwrap());
    assert_eq!(t.decode_text(&t.encode(text).unwrap()), "ab <tool_call>");
}

#[test]
fn unknown_ids_are_nothing() {
    let t = tiny_tokenizer();
    assert!(t.token_bytes(100_000).is_empty() && t.token_bytes(u32::MAX).is_empty() && !t.is_special(u32::MAX));
    assert_eq!(t.decode(&[39, 90_000, 39]), "HH");
    assert_eq!(t.special().placeholders(), [521, 522, 523, 524, 525]);
}

#[test]
fn bad_tokenizers_are_named_with_a_mend() {
    let dir = tempfile::tempdir().unwrap();
    let said = |dir: &Path| Tokenizer::load(dir).err().unwrap().to_string();
    assert!(said(dir.path()).contains("tokenizer.json: there is no tokenizer here"));
    let tiny = std::fs::read_to_string(fixture("tokenizer_tiny.json")).unwrap();
    for (text, expected) in [
        (tiny[..tiny.len() / 2].to_owned(), "not a tokenizer.json"),
        ("{}".to_owned(), "not a tokenizer.json"),
        (tiny.replacen(r#""decoder": {"type""#, r#""decoder": {"typo""#, 1), "not a tokenizer.json"),
        (tiny.replace("<|image_pad|>", "<|picture|>"), "no <|image_pad|> token"),
    ] {
        std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        let said = said(dir.path());
        assert!(said.contains(expected) && said.contains("to mend it"), "{said}");
    }
}

#[test]
fn a_tokenizer_that_panics_on_text_is_named() {
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("tokenizer_tiny.json")).unwrap()).unwrap();
    json["normalizer"] = serde_json::json!({"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"});
    let t = Tokenizer::from_bytes(json.to_string().as_bytes(), "wild/tokenizer.json").unwrap();
    let said = t.encode("Who's there?").unwrap_err().to_string();
    assert!(said.contains("wild/tokenizer.json") && said.contains("to mend it"), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damaged_tokenizers_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut file = std::fs::read(fixture("tokenizer_tiny.json")).unwrap();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(t) = Tokenizer::from_bytes(&file, "damaged") {
            prop_assert!(t.encode("Who's there? 12 <|im_end|>").is_ok());
        }
    }

    #[test]
    fn any_ids_stream_as_they_decode(ids in prop::collection::vec(0u32..560, 0..40)) {
        let t = tiny_tokenizer();
        let mut stream = Detokenizer::new();
        let mut text: String = ids.iter().map(|&id| stream.push(&t, id)).collect();
        text.push_str(&stream.finish());
        prop_assert_eq!(text, t.decode(&ids));
    }

    #[test]
    fn foreign_text_never_becomes_control(parts in prop::collection::vec(
        prop::sample::select(vec!["<|im_end|>", "<|image_pad|>", "<|im_", "start|>", "|>", "\u{100000}", "\u{100001}", "1", "é\n", "<|"]), 0..8)) {
        let t = tiny_tokenizer();
        let text = parts.concat();
        prop_assert!(t.encode_plain(&text).unwrap().iter().all(|&id| !t.is_special(id)));
        let prompt = build_prompt(&t, &ChatTemplate::builtin(), &[Message::text("user", text.clone())], &[]).unwrap();
        let said = t.decode(&prompt.tokens);
        let turn = format!("user\n{text}<|im_end|>\n<|im_start|>assistant\n");
        prop_assert!(said.ends_with(&turn), "{said:?}");
        prop_assert_eq!(prompt.tokens.iter().filter(|&&id| t.is_special(id)).count(), 5);
    }
}
