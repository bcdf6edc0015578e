/// What a turn of the model asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Run this Python program on the image; fences are removed.
    Code(String),
    /// This is the answer.
    Answer(String),
    /// Neither: there is nothing to do with this turn.
    Nothing,
}

/// One assistant turn, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// What `<problem>` named: degradations as MAT-Coding writes them (`rotation90`, `dark`); empty where there is none.
    pub problem: Vec<String>,
    /// What to do.
    pub action: Action,
    /// Whether the turn is, but for white space, exactly: an optional `<think>`, an optional `<problem>`, then one
    /// `<code>` with a fenced Python block or one `<answer>` that is not empty, each closed.
    pub well_formed: bool,
}

/// Tags that end a turn: sampling stops with the token that completes one of them.
pub(super) const CLOSING: [&str; 2] = ["</code>", "</answer>"];

/// Reads a turn. What is not well formed is still acted upon where it can be understood: the first complete `<code>`
/// or `<answer>` counts, so that a model that is learning the format gets to see what its tools do.
pub fn parse_turn(text: &str) -> Turn {
    if let Some(turn) = strict(text) {
        return turn;
    }
    let problem = element(text, "problem").map(|(_, inner, _)| names(inner)).unwrap_or_default();
    let action = match (element(text, "code"), element(text, "answer")) {
        (Some((at, code, _)), answer) if answer.is_none_or(|(b, _, _)| at < b) => Action::Code(unfence(code).0),
        (_, Some((_, answer, _))) => Action::Answer(answer.trim().to_owned()),
        _ => Action::Nothing,
    };
    Turn { problem, action, well_formed: false }
}

fn strict(text: &str) -> Option<Turn> {
    let mut rest = text.trim();
    if let Some((_, after)) = leading(rest, "think") {
        rest = after;
    }
    let mut problem = Vec::new();
    if let Some((inner, after)) = leading(rest, "problem") {
        problem = names(inner);
        if problem.is_empty() {
            return None;
        }
        rest = after;
    }
    let (action, after) = if let Some((code, after)) = leading(rest, "code") {
        let (code, fenced) = unfence(code);
        if !fenced || code.trim().is_empty() {
            return None;
        }
        (Action::Code(code), after)
    } else {
        let (answer, after) = leading(rest, "answer")?;
        let answer = answer.trim();
        if answer.is_empty() {
            return None;
        }
        (Action::Answer(answer.to_owned()), after)
    };
    after.is_empty().then_some(Turn { problem, action, well_formed: true })
}

/// The inside of `<tag>` at the very start of `text`, and what follows it, trimmed.
fn leading<'a>(text: &'a str, tag: &str) -> Option<(&'a str, &'a str)> {
    let (at, inner, after) = element(text, tag)?;
    // A second opening tag inside means that the first was never closed.
    (at == 0 && !inner.contains(&format!("<{tag}>"))).then(|| (inner, after.trim()))
}

/// Where the first complete `<tag>...</tag>` begins, its inside, and what follows it.
fn element<'a>(text: &'a str, tag: &str) -> Option<(usize, &'a str, &'a str)> {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let at = text.find(&open)?;
    let inner = &text[at + open.len()..];
    let end = inner.find(&close)?;
    Some((at, &inner[..end], &inner[end + close.len()..]))
}

/// The program inside a ```` ```python ```` fence, and whether there was a whole fence.
fn unfence(code: &str) -> (String, bool) {
    let code = code.trim();
    let opened =
        code.strip_prefix("```python").or_else(|| code.strip_prefix("```py")).or_else(|| code.strip_prefix("```"));
    match opened {
        Some(body) => match body.strip_suffix("```") {
            Some(body) => (body.trim_matches('\n').to_owned(), true),
            None => (body.trim_matches('\n').to_owned(), false),
        },
        None => (code.to_owned(), false),
    }
}

/// `{'rotation90', 'dark'}`, `['dark']`, `rotation90 + dark` -> names.
fn names(set: &str) -> Vec<String> {
    set.split([',', '+'])
        .map(|n| n.trim_matches(|c: char| c.is_whitespace() || "{}[]'\"".contains(c)))
        .filter(|n| !n.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code(s: &str) -> Action {
        Action::Code(s.into())
    }

    #[test]
    fn well_formed_turns() {
        let t = parse_turn(
            "<think>It is dark.</think>\n<problem> {'dark'} </problem>\n<code>\n```python\nimage = image * 4\n```\n</code>",
        );
        assert_eq!(t, Turn { problem: vec!["dark".into()], action: code("image = image * 4"), well_formed: true });
        let t = parse_turn("<problem>{'rotation90', 'noise'}</problem><code>```python\nx\n```</code>");
        assert_eq!(t.problem, ["rotation90", "noise"]);
        assert!(t.well_formed);
        let t = parse_turn("<answer> 42 </answer>\n");
        assert_eq!(t, Turn { problem: vec![], action: Action::Answer("42".into()), well_formed: true });
        let t = parse_turn("<answer>two\nlines</answer>");
        assert_eq!(t.action, Action::Answer("two\nlines".into()));
        assert!(t.well_formed);
    }

    #[test]
    fn malformed_turns_are_understood_as_far_as_possible() {
        for (text, action) in [
            ("I say <answer>7</answer>", Action::Answer("7".into())),
            ("<answer>7</answer> and more", Action::Answer("7".into())),
            ("<code>image = 1</code>", code("image = 1")),
            ("<code>```python\nimage = 1</code>", code("image = 1")),
            ("<answer></answer>", Action::Answer(String::new())),
            ("<answer>never closed", Action::Nothing),
            ("", Action::Nothing),
            ("<code>```python\na\n```</code><answer>1</answer>", code("a")),
            ("<answer>1</answer><code>```python\na\n```</code>", Action::Answer("1".into())),
            ("<think>never closed <answer>1</answer>", Action::Answer("1".into())),
            ("<problem>{}</problem><answer>1</answer>", Action::Answer("1".into())),
            ("<answer><answer>1</answer>", Action::Answer("<answer>1".into())),
        ] {
            let t = parse_turn(text);
            assert_eq!(t.action, action, "{text}");
            assert!(!t.well_formed, "{text}");
        }
    }

    proptest! {
        #[test]
        fn anything_parses(text in ".*") {
            let t = parse_turn(&text);
            prop_assert!(!t.well_formed || t.action != Action::Nothing);
        }

        #[test]
        fn a_well_formed_turn_stays_one_whatever_it_says(answer in "[^<>]*[^<>\\s][^<>]*", think in "[^<>]*") {
            let t = parse_turn(&format!("<think>{think}</think> <answer>{answer}</answer>"));
            prop_assert!(t.well_formed);
            prop_assert_eq!(t.action, Action::Answer(answer.trim().to_owned()));
        }
    }
}
