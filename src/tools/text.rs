//! Makes what a program printed fit to be shown.

/// Decodes `bytes` as UTF-8 and leaves out what could steer a terminal or hide text: escape sequences (CSI, OSC and the
/// other string controls, in their 7-bit and 8-bit forms), all control characters but newline and tab, and the characters that
/// change the direction of writing. `\r\n` becomes `\n`, and a lone `\r` (a progress bar going back) becomes `\n` too.
/// Bytes that are not UTF-8 become U+FFFD.
pub fn clean(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\n' | '\t' => out.push(c),
            '\r' => {
                if chars.peek() == Some(&'\n') {
                    chars.next();
                }
                out.push('\n');
            }
            '\x1b' => match chars.next() {
                Some('[') => skip_csi(&mut chars),
                Some(']' | 'P' | 'X' | '^' | '_') => skip_string(&mut chars),
                // Two-character sequences; those with an intermediate byte (charset selection) have a third.
                Some(' '..='/') => {
                    chars.next();
                }
                _ => {}
            },
            '\u{9b}' => skip_csi(&mut chars),
            '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => skip_string(&mut chars),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' => {}
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// Parameters and intermediates are 0x20..=0x3f; the byte after them ends the sequence.
fn skip_csi(chars: &mut Chars) {
    while chars.next_if(|c| (' '..='?').contains(c)).is_some() {}
    chars.next_if(|c| ('@'..='~').contains(c));
}

/// Ends at BEL, at ST (`ESC \` or U+009C), or, so that an unterminated one hides one line and not everything, at a newline.
fn skip_string(chars: &mut Chars) {
    while let Some(c) = chars.next_if(|&c| c != '\n') {
        match c {
            '\x07' | '\u{9c}' => return,
            '\x1b' => {
                chars.next_if(|&c| c == '\\');
                return;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::clean;
    use proptest::prelude::*;

    #[test]
    fn plain_text_is_kept() {
        assert_eq!(clean("a\tb\nçé 图\n".as_bytes()), "a\tb\nçé 图\n");
    }

    #[test]
    fn escapes_are_left_out() {
        assert_eq!(clean(b"\x1b[31mred\x1b[0m \x1b]0;title\x07x\x1b]8;;http://a\x1b\\link\x1b(Bz\x1bc"), "red xlinkz");
        assert_eq!(clean("\u{9b}2Jx\u{9d}0;t\u{9c}y".as_bytes()), "xy");
        assert_eq!(clean(b"a\x00\x07\x08b\x1b"), "ab");
        assert_eq!(clean("a\u{202e}b".as_bytes()), "ab");
    }

    #[test]
    fn carriage_returns_become_lines_and_an_open_string_ends_with_its_line() {
        assert_eq!(clean(b"10%\r20%\r\ndone"), "10%\n20%\ndone");
        assert_eq!(clean(b"\x1b]0;never closed\nnext"), "\nnext");
    }

    #[test]
    fn broken_utf8_is_replaced() {
        assert_eq!(clean(b"a\xffb"), "a\u{fffd}b");
    }

    proptest! {
        #[test]
        fn nothing_that_controls_a_terminal_is_left(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(clean(&bytes).chars().all(|c| c == '\n' || c == '\t' || !c.is_control()));
        }
    }
}
