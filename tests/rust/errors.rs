//! Messages quote names from files that anybody may have made: each is one line that a terminal only prints.

use safemerge_fast::Error;
use safemerge_fast::error::printable;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Newlines, a terminal's escape, a null, a C1 control, marks that reverse text or have no width.
const HOSTILE: &str = "a\nb\r\u{1b}[2J\u{1b}]0;title\u{7}\0\u{9b}31m\u{202e}\u{2028}\u{200b}é";

fn every_error(name: &str) -> Vec<Error> {
    let path = || PathBuf::from(name);
    let text = || name.to_owned();
    let source = || io::Error::from_raw_os_error(2);
    vec![
        Error::NotFound { path: path() },
        Error::NoWeights { path: path(), problem: text() },
        Error::Read { path: path(), source: source() },
        Error::Header { path: path(), problem: text() },
        Error::Unusable { path: path(), problem: text() },
        Error::Length { path: path(), expected: 2, found: 1 },
        Error::Index { path: path(), problem: text() },
        Error::NoTensor { path: path(), tensor: text() },
        Error::Plan(text()),
        Error::InputChanged { path: path(), what: "its size differs" },
        Error::NonFiniteResult { file: text(), tensor: text(), element: 0, dtype: "BF16".into() },
        Error::Merge { file: text(), tensor: text(), problem: text() },
        Error::NonFiniteInput { path: path(), tensor: text(), element: 0, adapted: true },
        Error::Option(text()),
        Error::Output { path: path(), problem: text() },
        Error::DiskFull { path: path(), needed: 1 },
        Error::Write { path: path(), source: source() },
        Error::Verification { path: path(), problem: text() },
    ]
}

#[test]
fn every_message_is_one_line_of_plain_text_whatever_it_quotes() {
    for error in every_error(HOSTILE) {
        let message = error.to_string();
        assert!(message.chars().all(|c| !c.is_control()), "{message:?}");
        for mark in ['\u{202e}', '\u{2028}', '\u{200b}'] {
            assert!(!message.contains(mark), "{message:?}");
        }
        assert!(message.contains(r"a\nb\r\x1b[2J\x1b]0;title\x07\x00\x9b31m\u{202e}"), "{message}");
        assert!(message.contains('é'));
    }
}

#[test]
fn every_message_is_short_whatever_it_quotes() {
    for error in every_error(&"n".repeat(1 << 20)) {
        let message = error.to_string();
        assert!(message.len() < 4000, "{} bytes", message.len());
        assert!(message.contains('…'), "{message}");
    }
}

#[test]
fn names_are_quoted_as_they_are_where_that_is_safe() {
    for name in ["model.layers.0.mlp.down_proj.weight", "/home/Ü ñ/模型", r"C:\x", "a`b\"c"] {
        assert_eq!(printable(name), name);
    }
    assert_eq!(printable(OsStr::from_bytes(b"a\xffb\xc3\x28")), r"a\xffb\xc3(");
    // Twice is as good as once: a message may quote another.
    assert_eq!(printable(&printable(HOSTILE)), printable(HOSTILE));
    let long = format!("{}{}", "a".repeat(1000), "b".repeat(1000));
    let short = printable(&long);
    assert!(short.starts_with("aaa") && short.ends_with("bbb"));
    assert_eq!(short.chars().count(), 301);
}
