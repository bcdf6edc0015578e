//! `varft inspect`.

use super::{picture, stderr, stdout, varft};
use std::path::Path;

#[test]
fn inspect_writes_what_the_model_makes_of_a_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    picture(&dir.path().join("a.png"), 84, 56);
    picture(&dir.path().join("b.png"), 56, 56);
    let show = |name: &str| format!(r#"{{"type": "image", "image": "{name}"}}"#);
    let talk = format!(
        r#"[{{"role": "user", "content": [{}, {}, {}, {{"type": "text", "text": "Which?"}}]}}]"#,
        show("a.png"),
        show("b.png"),
        show("a.png")
    );
    std::fs::write(at("talk.json"), talk).unwrap();
    let o = varft(&["inspect", "--model", &at("model"), &at("talk.json"), "--out", &at("out.safetensors")]);
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stdout(&o).contains("3 images"), "{}", stdout(&o));

    let bytes = std::fs::read(at("out.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape = |name: &str| file.tensor(name).unwrap().shape().to_vec();
    let floats = |name: &str| bytemuck::pod_collect_to_vec::<u8, f32>(file.tensor(name).unwrap().data());
    let whole = |name: &str| bytemuck::pod_collect_to_vec::<u8, i64>(file.tensor(name).unwrap().data());
    let ids = whole("input_ids");
    let t = ids.len();
    assert_eq!(shape("position_ids"), [3, 1, t]);
    assert_eq!(shape("logits"), [1, t, 544]);
    assert_eq!(whole("image_grid_thw"), [1, 4, 6, 1, 4, 4, 1, 4, 6]);
    assert_eq!(shape("pixel_values"), [64, 1176]);
    assert_eq!(shape("image_embeds"), [16, 64]);
    // The image that is shown twice is the same both times; the one between is another.
    let embeds = floats("image_embeds");
    assert!(embeds[..6 * 64] == embeds[10 * 64..] && embeds[..64] != embeds[6 * 64..7 * 64]);
    // The log-probabilities are those of the logits, by a plain log-softmax in f64.
    let (logits, log_probs) = (floats("logits"), floats("log_probs"));
    assert_eq!(log_probs.len(), t - 1);
    for (i, lp) in log_probs.iter().enumerate() {
        let row = &logits[i * 544..(i + 1) * 544];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        let want = f64::from(row[ids[i + 1] as usize]) - sum.ln();
        assert!((f64::from(*lp) - want).abs() < 1e-5, "{i}: {lp} {want}");
    }
}

#[test]
fn inspect_names_what_it_cannot_read() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &at("model")]).status.success());
    let says = |talk: &str, parts: &[&str]| {
        std::fs::write(at("talk.json"), talk).unwrap();
        let o = varft(&["inspect", "--model", &at("model"), &at("talk.json"), "--out", &at("out")]);
        let e = stderr(&o);
        assert!(o.status.code() == Some(1) && parts.iter().all(|p| e.contains(p)), "{e}");
        assert!(!Path::new(&at("out")).exists());
    };
    says("{", &["talk.json", "list of messages"]);
    says(r#"[{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]"#, &["gone.png"]);
    says(r#"[{"role": "user", "content": [{"type": "image"}]}]"#, &["names no file"]);
    let long = "word ".repeat(4000);
    says(&format!(r#"[{{"role": "user", "content": "{long}"}}]"#), &["talk.json", "context is 4096"]);
    let o = varft(&["inspect", "--model", &at("model"), &at("talk.json"), "--out", &at("model/../talk.json")]);
    assert!(o.status.code() == Some(1) && stderr(&o).contains("overwrite the conversation"), "{}", stderr(&o));
    std::fs::remove_file(at("model/tokenizer.json")).unwrap();
    says(r#"[{"role": "user", "content": "x"}]"#, &["tokenizer.json"]);
}
