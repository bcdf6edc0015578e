use std::fmt::{Display, Formatter, Result, Write};

/// Text made safe to stand in HTML, between tags or in a quoted attribute.
///
/// The five special characters become entities. Characters that act without being seen (control characters but
/// newline and tab, and those that turn the direction of text) are written out as `\u{..}`, so that output cannot
/// disguise itself.
pub(super) struct Escaped<'a>(pub &'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                '\n' | '\t' => f.write_char(c)?,
                _ if c.is_control() || is_invisible(c) => write!(f, "\\u{{{:x}}}", c as u32)?,
                _ => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Direction marks and overrides, zero-width characters, line and paragraph separators, tags.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{2069}' | '\u{FEFF}'
        | '\u{E0000}'..='\u{E007F}')
}

/// `text` cut to at most `max` characters, with the number of characters left out.
pub(super) fn cut(text: &str, max: usize) -> (&str, usize) {
    match text.char_indices().nth(max) {
        Some((at, _)) => (&text[..at], text[at..].chars().count()),
        None => (text, 0),
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 with padding (RFC 4648, section 4), for data URIs.
pub(super) fn base64(data: &[u8]) -> String {
    let mut out = String::with_capacity(data.len().div_ceil(3) * 4);
    for chunk in data.chunks(3) {
        let n = chunk.iter().fold(0u32, |n, &b| n << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let six = (n >> (18 - 6 * i) & 63) as usize;
            out.push(if i <= chunk.len() { ALPHABET[six] as char } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn base64_vectors() {
        // RFC 4648, section 10
        for (a, b) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(a.as_bytes()), b);
        }
    }

    #[test]
    fn what_acts_unseen_is_shown() {
        assert_eq!(Escaped("a\u{202e}b\x1b[31m\n").to_string(), "a\\u{202e}b\\u{1b}[31m\n");
    }

    proptest! {
        #[test]
        fn nothing_escapes(text in any::<String>()) {
            let html = Escaped(&text).to_string();
            prop_assert!(!html.contains(['<', '>', '"', '\'']));
            for (at, _) in html.match_indices('&') {
                prop_assert!(["&amp;", "&lt;", "&gt;", "&quot;", "&#39;"].iter().any(|e| html[at..].starts_with(e)));
            }
        }

        #[test]
        fn cut_counts(text in any::<String>(), max in 0usize..20) {
            let (head, rest) = cut(&text, max);
            prop_assert_eq!(head.chars().count() + rest, text.chars().count());
            prop_assert!(head.chars().count() <= max && text.starts_with(head));
        }
    }
}
