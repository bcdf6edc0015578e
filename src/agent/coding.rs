use super::turn::CLOSING;
use crate::input::{Message, Part};
use crate::tools::{Outcome, ToolResult};
use serde::{Deserialize, Serialize};

/// How much a prompt explains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptStyle {
    /// Everything a pretrained model has to know: the steps, the tags, the variables, the kinds of damage.
    #[default]
    Full,
    /// A line: for a small model that learned the steps from examples, where every prompt token costs time.
    Brief,
}

/// The coding protocol: look at a possibly damaged image, name the problem, repair it with Python, look again, answer.
///
/// To the specification of Visual-ARFT's coding agent (arXiv 2505.14246, section 3), as whole episodes: each turn of the
/// model names the problem and gives code, or answers; after code the image is shown again as the code left it. The
/// wording is ours.
#[derive(Clone, Debug, Default)]
pub struct CodingProtocol {
    /// How much the system prompt explains.
    pub style: PromptStyle,
}

const FULL: &str = "\
You answer questions about an image. The image may be damaged or hard to read: rotated (rotation90, rotation180), too \
dark (dark), too bright (overexposure), blurred (blur), noisy (noise), or the part that matters may be small (crop). \
You can run Python on it before you answer.

Every reply has this form and nothing else:
1. Optionally your reasoning: <think> ... </think>
2. What is wrong with the image, as a Python set: <problem> {'dark'} </problem>; {'none'} if nothing is.
3. Then exactly one of:
   - a repair:
<code>
```python
image = cv2.rotate(image, cv2.ROTATE_180)
```
</code>
   - your final answer, as short as possible: <answer> ... </answer>

In the code, `image` is the current image (a BGR numpy array), and `cv2`, `np` and `Image` (Pillow) are imported. What \
you leave in `image` is shown to you in the next turn, with what the program printed. Boxes in a question are \
[x1, y1, x2, y2], normalised to 0..1000 by the width and height of the image. Repair as often as you need to, then answer.";

const BRIEF: &str = "Repair the image, then answer.";

impl CodingProtocol {
    /// The conversation before the model's first turn; the user's turn holds one image, which the caller hands over.
    pub fn opening(&self, question: &str) -> Vec<Message> {
        let system = match self.style {
            PromptStyle::Full => FULL,
            PromptStyle::Brief => BRIEF,
        };
        let user = vec![Part::Image { image: None }, Part::Text { text: question.trim().to_owned() }];
        vec![Message::text("system", system), Message::parts("user", user)]
    }

    /// Sampling ends with the token that completes one of these.
    pub fn stop_strings(&self) -> Vec<String> {
        CLOSING.iter().map(|s| s.to_string()).collect()
    }

    /// The user's turn after a tool call: what was printed, what failed, and the image, which the caller hands over.
    pub fn observation(&self, result: &ToolResult, max_chars: usize) -> Message {
        let mut text = String::new();
        let printed = tail(result.stdout.trim(), max_chars);
        if !printed.is_empty() {
            text.push_str(&format!("Output:\n{printed}\n"));
        }
        match &result.outcome {
            Outcome::Ok => {}
            failed => text.push_str(&format!(
                "The code failed, and the image is as before:\n{}\n",
                tail(&failed.message(), max_chars)
            )),
        }
        match self.style {
            PromptStyle::Full => text.push_str("This is the image now. Go on in the same form."),
            PromptStyle::Brief => {}
        }
        let mut parts = Vec::new();
        if !text.is_empty() {
            parts.push(Part::Text { text });
        }
        parts.insert(0, Part::Image { image: None });
        Message::parts("user", parts)
    }

    /// The user's turn after a reply that asked for nothing.
    pub fn nudge(&self) -> Message {
        Message::text("user", "That reply had no complete <code> or <answer>. Reply in the form that was asked for.")
    }
}

/// The last `max` characters: the end of a traceback says most.
fn tail(text: &str, max: usize) -> &str {
    match text.char_indices().rev().nth(max.saturating_sub(1)) {
        Some((at, _)) if max > 0 => &text[at..],
        _ if max == 0 => "",
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_whole_characters() {
        assert_eq!(tail("añb", 2), "ñb");
        assert_eq!(tail("añb", 9), "añb");
        assert_eq!(tail("abc", 0), "");
    }
}
