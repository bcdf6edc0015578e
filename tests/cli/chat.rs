//! `varft chat`.

use super::{picture, stderr, stdout, varft};
use std::path::Path;
use std::process::{Command, Output};

/// Talks to a model through a pipe.
pub fn chat(args: &[&str], said: &str) -> Output {
    use std::io::Write;
    use std::process::Stdio;
    let mut child = Command::new(env!("CARGO_BIN_EXE_varft"))
        .arg("chat")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A chat that refused to begin does not listen.
    let _ = child.stdin.take().unwrap().write_all(said.as_bytes());
    child.wait_with_output().unwrap()
}

#[test]
fn chat_answers_through_a_pipe_and_remembers_until_it_is_reset() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (model, photo) = (at("model"), at("a.png"));
    assert!(varft(&["init", "tiny", &model]).status.success());
    picture(Path::new(&photo), 84, 56);
    let args = [&model[..], "--max-tokens", "8", "--context", "1024"];
    let o = chat(&args, "hello\n\nhello\n/reset\nhello\n");
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stderr(&o).contains("--max-tokens") || stdout(&o).lines().count() == 3, "{}", stderr(&o));
    // Greedy: the first reply and the one after a reset are the same text.
    let whole = stdout(&o);
    let first = stdout(&chat(&args, "hello\n"));
    assert!(
        whole.starts_with(&first) && whole.ends_with(&first) && whole.len() > 2 * first.len(),
        "{whole:?} {first:?}"
    );
    // An image is shown either way; one that is not there is named.
    let seen = chat(&[&args[..], &["--image", &photo]].concat(), "hello\n");
    assert!(seen.status.success(), "{}", stderr(&seen));
    assert_eq!(stdout(&chat(&args, &format!("/image {photo}\nhello\n"))), stdout(&seen));
    let o = chat(&args, "/image\nhello\n");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("/image FILE"), "{}", stderr(&o));
    let o = chat(&args, "/image gone.png\nhello\n");
    assert!(o.status.code() == Some(1) && stderr(&o).contains("gone.png"), "{}", stderr(&o));
    let o = chat(&[&args[..], &["--context", "32"]].concat(), "hello\n");
    assert_eq!(o.status.code(), Some(2), "given twice");
    for (context, hint) in [("32", "--context"), ("1000000", "all that the model takes")] {
        let o = chat(&[&model, "--context", context], &"hello ".repeat(5000));
        let said = stderr(&o);
        assert!(o.status.code() == Some(1) && said.contains(hint) && said.contains("/reset"), "{said}");
        assert!(!said.contains("EngineOptions"), "{said}");
    }
    assert_eq!(chat(&[&model, "--context", "1"], "").status.code(), Some(2));
}
