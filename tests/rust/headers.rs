//! Headers beside the crate `safetensors`: what it accepts we accept, with the same tensors, and nothing else.

use crate::fixtures::{Tensor, write, write_raw};
use proptest::prelude::*;
use safemerge_fast::Error;
use safemerge_fast::checkpoint::{Checkpoint, Header, StatedIdentity};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;

/// One entry of a header, before it is text.
#[derive(Debug, Clone)]
struct Entry {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    offsets: (u64, u64),
    /// Written as a list instead of a map; the crate takes both.
    as_list: bool,
    extra: bool,
}

/// A header, before it is text.
#[derive(Debug, Clone)]
struct Draft {
    entries: Vec<Entry>,
    metadata: Option<Value>,
    padding: usize,
    /// Bytes of the file behind the header.
    data: u64,
}

impl Draft {
    fn text(&self) -> String {
        let mut parts = Vec::new();
        if let Some(metadata) = &self.metadata {
            parts.push(format!(r#""__metadata__":{metadata}"#));
        }
        for entry in &self.entries {
            let Entry { name, dtype, shape, offsets, as_list, extra } = entry;
            let (start, end) = offsets;
            let mut text = json!(name).to_string();
            if *as_list {
                write!(text, r#":[{},{shape:?},[{start},{end}]]"#, json!(dtype)).unwrap();
            } else {
                let more = if *extra { r#","note":{"k":[null,true,"x"]}"# } else { "" };
                let dtype = json!(dtype);
                let offsets = format!("[{start}, {end}]");
                write!(
                    text,
                    r#":{{"dtype":{dtype},"shape":{shape:?},"data_offsets":{offsets}{more}}}"#
                )
                .unwrap();
            }
            parts.push(text);
        }
        format!("{{{}}}{}", parts.join(","), " ".repeat(self.padding))
    }
}

/// A change that may leave a header valid, or not.
#[derive(Debug, Clone)]
enum Mutation {
    Start(usize, i64),
    End(usize, i64),
    Dimension(usize, usize, u64),
    MoreDimensions(usize, Vec<u64>),
    Dtype(usize, &'static str),
    Rename(usize, String),
    Swap(usize, usize),
    Drop(usize),
    Repeat(usize),
    List(usize),
    Extra(usize),
    Metadata(Option<Value>),
    Padding(usize),
    Data(i64),
    /// One character of the text becomes another.
    Text(usize, char),
    /// The text ends earlier.
    Cut(usize),
}

const DTYPES: [&str; 22] = [
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
];

fn mutation() -> impl Strategy<Value = Mutation> {
    let place = 0_usize..8;
    let large = prop::sample::select(vec![0, 1, 2, 3, 8, 1 << 31, 1 << 32, 1 << 62, u64::MAX]);
    let dtypes = [&DTYPES[..], &["F33", "f32", "", "BOOL "]].concat();
    let metadata = prop::sample::select(vec![
        None,
        Some(Value::Null),
        Some(json!({})),
        Some(json!({"format": "pt"})),
        Some(json!({"a": 1})),
        Some(json!({"a": null})),
        Some(json!([])),
        Some(json!("text")),
    ]);
    let characters: Vec<char> = "{}[]\",:0123456789-.eE\\u \nanulltrue".chars().collect();
    prop_oneof![
        (place.clone(), -9_i64..9).prop_map(|(at, by)| Mutation::Start(at, by)),
        (place.clone(), -9_i64..9).prop_map(|(at, by)| Mutation::End(at, by)),
        (place.clone(), 0_usize..3, large.clone())
            .prop_map(|(at, dimension, to)| Mutation::Dimension(at, dimension, to)),
        (place.clone(), prop::collection::vec(large, 0..4))
            .prop_map(|(at, more)| Mutation::MoreDimensions(at, more)),
        (place.clone(), prop::sample::select(dtypes)).prop_map(|(at, to)| Mutation::Dtype(at, to)),
        (place.clone(), "[a-c\\\\\"\u{1b}é]{0,3}").prop_map(|(at, to)| Mutation::Rename(at, to)),
        (place.clone(), place.clone()).prop_map(|(a, b)| Mutation::Swap(a, b)),
        place.clone().prop_map(Mutation::Drop),
        place.clone().prop_map(Mutation::Repeat),
        place.clone().prop_map(Mutation::List),
        place.prop_map(Mutation::Extra),
        metadata.prop_map(Mutation::Metadata),
        (0_usize..20).prop_map(Mutation::Padding),
        (-2_i64..3).prop_map(Mutation::Data),
        (any::<usize>(), prop::sample::select(characters))
            .prop_map(|(at, to)| Mutation::Text(at, to)),
        any::<usize>().prop_map(Mutation::Cut),
    ]
}

/// A valid header of tensors that follow each other.
fn valid() -> impl Strategy<Value = Draft> {
    let tensor =
        ("[a-z.]{1,8}", prop::sample::select(&DTYPES[..]), prop::collection::vec(0_u64..5, 0..4));
    prop::collection::vec(tensor, 0..6).prop_map(|tensors| {
        let mut end = 0;
        let mut entries = Vec::new();
        for (number, (name, dtype, mut shape)) in tensors.into_iter().enumerate() {
            // Eight elements of any dtype fill whole bytes.
            shape.push(8);
            let bits: usize = match serde_json::from_value::<Dtype>(json!(dtype)) {
                Ok(dtype) => dtype.bitsize(),
                Err(_) => unreachable!("a dtype of the crate"),
            };
            let bytes = shape.iter().product::<u64>() * bits as u64 / 8;
            entries.push(Entry {
                name: format!("{number}{name}"),
                dtype: dtype.to_owned(),
                shape,
                offsets: (end, end + bytes),
                as_list: false,
                extra: false,
            });
            end += bytes;
        }
        Draft { entries, metadata: None, padding: 0, data: end }
    })
}

fn mutate(draft: &mut Draft, mutation: &Mutation) {
    let count = draft.entries.len();
    let entry = |draft: &mut Draft, at: usize, change: &mut dyn FnMut(&mut Entry)| {
        if let Some(entry) = draft.entries.get_mut(at) {
            change(entry);
        }
    };
    match mutation {
        Mutation::Start(at, by) => entry(draft, *at, &mut |entry| {
            entry.offsets.0 = entry.offsets.0.saturating_add_signed(*by);
        }),
        Mutation::End(at, by) => entry(draft, *at, &mut |entry| {
            entry.offsets.1 = entry.offsets.1.saturating_add_signed(*by);
        }),
        Mutation::Dimension(at, dimension, to) => entry(draft, *at, &mut |entry| {
            if let Some(place) = entry.shape.get_mut(*dimension) {
                *place = *to;
            }
        }),
        Mutation::MoreDimensions(at, more) => {
            entry(draft, *at, &mut |entry| entry.shape.extend(more));
        }
        Mutation::Dtype(at, to) => entry(draft, *at, &mut |entry| entry.dtype = (*to).to_owned()),
        Mutation::Rename(at, to) => entry(draft, *at, &mut |entry| entry.name.clone_from(to)),
        Mutation::Swap(a, b) if *a < count && *b < count => draft.entries.swap(*a, *b),
        Mutation::Drop(at) if *at < count => drop(draft.entries.remove(*at)),
        Mutation::Repeat(at) if *at < count => draft.entries.push(draft.entries[*at].clone()),
        Mutation::List(at) => entry(draft, *at, &mut |entry| entry.as_list = true),
        Mutation::Extra(at) => entry(draft, *at, &mut |entry| entry.extra = true),
        Mutation::Metadata(to) => draft.metadata.clone_from(to),
        Mutation::Padding(to) => draft.padding = *to,
        Mutation::Data(by) => draft.data = draft.data.saturating_add_signed(*by),
        _ => {}
    }
}

/// Name, dtype, shape and bytes of each tensor, by name.
type Contents = Vec<(String, String, Vec<usize>, std::ops::Range<usize>)>;

fn by_the_crate(bytes: &[u8]) -> Option<Contents> {
    let (length, metadata) = SafeTensors::read_metadata(bytes).ok()?;
    let mut found: Contents = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let (start, end) = info.data_offsets;
            let start_of_data = length + 8;
            let range = start_of_data + start..start_of_data + end;
            (name, info.dtype.to_string(), info.shape.clone(), range)
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Some(found)
}

fn by_us(path: &Path) -> Result<Contents, String> {
    let header = Header::read(path).map_err(|e| e.to_string())?;
    let mut found: Contents = header
        .tensors()
        .map(|t| (t.name.to_owned(), t.dtype.to_string(), t.shape.to_vec(), t.range))
        .collect();
    assert_eq!(found.len(), header.len());
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn nearly_valid_headers_are_accepted_as_by_the_crate(
        draft in valid(),
        mutations in prop::collection::vec(mutation(), 0..4),
    ) {
        let mut draft = draft;
        mutations.iter().for_each(|mutation| mutate(&mut draft, mutation));
        let mut text = draft.text();
        for mutation in &mutations {
            let length = text.chars().count();
            text = match mutation {
                Mutation::Text(at, to) => {
                    let at = at % length.max(1);
                    text.chars().enumerate().map(|(n, c)| if n == at { *to } else { c }).collect()
                }
                Mutation::Cut(at) => text.chars().take(at % (length + 1)).collect(),
                _ => text,
            };
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        write_raw(&path, &text, &vec![0; usize::try_from(draft.data).unwrap()]);
        let expected = by_the_crate(&std::fs::read(&path).unwrap());
        match (by_us(&path), expected) {
            (Ok(found), Some(expected)) => prop_assert_eq!(found, expected, "{}", text),
            (Err(_), None) => {}
            // The crate takes the last of them.
            (Err(error), Some(_)) if error.contains("stands twice") => {}
            (found, expected) => {
                prop_assert!(false, "{text}: {found:?}, by the crate {expected:?}");
            }
        }
    }

    #[test]
    fn no_byte_string_makes_the_parser_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        length in 0_u64..200,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let mut file = length.to_le_bytes().to_vec();
        file.extend(bytes);
        std::fs::write(&path, &file).unwrap();
        prop_assert_eq!(by_us(&path).ok(), by_the_crate(&file));
    }
}

fn refusal(header: &str, data: usize) -> Error {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    write_raw(&path, header, &vec![0; data]);
    Header::read(&path).expect_err("must be refused")
}

#[test]
fn a_name_that_stands_twice_is_refused() {
    let entry =
        |offsets: &str| format!(r#""a":{{"dtype":"U8","shape":[1],"data_offsets":{offsets}}}"#);
    let header = format!("{{{},{}}}", entry("[0,1]"), entry("[1,2]"));
    assert!(refusal(&header, 2).to_string().contains("tensor `a` stands twice"));
}

#[test]
fn an_error_names_the_tensor_and_what_is_wrong_with_it() {
    for (entry, fault) in [
        (r#"{"dtype":"F33","shape":[1],"data_offsets":[0,1]}"#, "F33"),
        (r#"{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}"#, "-1"),
        (r#"{"dtype":"U8","shape":[1]}"#, "data_offsets"),
        (r#"{"dtype":"U8","shape":[3],"data_offsets":[0,1]}"#, "has 1 bytes"),
        (r#"{"dtype":"U8","shape":[1],"data_offsets":[1,2]}"#, "leave a hole"),
        (r#"{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,1]}"#, "overflows"),
        (r#"{"dtype":"F4","shape":[1],"data_offsets":[0,1]}"#, "F4"),
    ] {
        let message = refusal(&format!(r#"{{"model.norm":{entry}}}"#), 2).to_string();
        assert!(message.contains("`model.norm`") && message.contains(fault), "{message}");
    }
}

#[test]
fn limits_are_named_and_hold() {
    let dimensions = |count: usize| {
        let ones = vec!["1"; count].join(",");
        format!(r#"{{"deep":{{"dtype":"U8","shape":[{ones}],"data_offsets":[0,1]}}}}"#)
    };
    let error = refusal(&dimensions(65), 1);
    assert!(matches!(error, Error::Unusable { .. }), "{error}");
    assert!(error.to_string().contains("`deep` has more than 64 dimensions"), "{error}");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    write_raw(&path, &dimensions(64), &[0]);
    assert_eq!(Header::read(&path).unwrap().tensor(0).shape, [1; 64]);

    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let header =
        format!(r#"{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{nested}}}}}"#);
    assert!(refusal(&header, 1).to_string().contains("recursion"));
}

/// The header of a file of so many tensors without bytes, from this number on.
fn empty_tensors(first: usize, count: usize) -> String {
    let mut header = String::from("{");
    for number in first..first + count {
        let comma = if number == first { "" } else { "," };
        write!(header, r#"{comma}"{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)
            .unwrap();
    }
    header + "}"
}

#[test]
fn a_million_tensors_are_read_and_not_one_more() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    write_raw(&path, &empty_tensors(0, 1_000_000), &[]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.len(), 1_000_000);
    for name in ["0", "123456", "999999"] {
        assert_eq!(checkpoint.get(name).unwrap().1.name, name);
    }
    assert!(checkpoint.find("1000000").is_none());

    write_raw(&path, &empty_tensors(0, 1_000_001), &[]);
    let error = Header::read(&path).expect_err("too many");
    assert!(error.to_string().contains("more than 1000000 tensors"), "{error}");

    // Two files that have too many together.
    let halves = directory.path().join("halves");
    std::fs::create_dir(&halves).unwrap();
    write_raw(&halves.join("a.safetensors"), &empty_tensors(0, 500_000), &[]);
    write_raw(&halves.join("b.safetensors"), &empty_tensors(500_000, 500_001), &[]);
    let files = ["a.safetensors".to_owned(), "b.safetensors".to_owned()];
    let backend = safemerge_fast::checkpoint::ReadBackend::Auto;
    let error = Checkpoint::open_files(&halves, &files, backend).expect_err("too many");
    assert!(error.to_string().contains("more than 1000000 tensors"), "{error}");
}

#[test]
fn an_input_that_changes_after_it_was_opened_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    write(&path, &[Tensor::f32("a", &[1.0, 2.0])]);
    let open = || Checkpoint::open(&path).unwrap();
    let changed =
        |checkpoint: &Checkpoint| checkpoint.check_unchanged().expect_err("changed").to_string();

    let checkpoint = open();
    checkpoint.check_unchanged().unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.set_modified(time + std::time::Duration::from_secs(1)).unwrap();
    assert!(changed(&checkpoint).contains("it was modified"));

    // The modification time put back: ctime tells.
    let checkpoint = open();
    std::thread::sleep(std::time::Duration::from_millis(20));
    file.set_modified(time).unwrap();
    file.set_modified(time + std::time::Duration::from_secs(1)).unwrap();
    assert!(changed(&checkpoint).contains("ctime"));

    let checkpoint = open();
    let copy = directory.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    std::fs::rename(&copy, &path).unwrap();
    assert!(changed(&checkpoint).contains("another file has taken its place"));

    let checkpoint = open();
    write(&path, &[Tensor::f32("a", &[1.0, 2.0, 3.0])]);
    assert!(changed(&checkpoint).contains("its size differs"));
    std::fs::remove_file(&path).unwrap();
    assert!(changed(&checkpoint).contains("model.safetensors"));
}

#[test]
fn plans_state_times_and_inode_or_leave_them_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    write(&path, &[Tensor::f32("a", &[1.0])]);
    let identity = Header::read(&path).unwrap().identity;
    let full = json!(identity);
    let keys: Vec<_> = full.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["ctime_ns", "header_digest", "inode", "mtime_ns", "size"]);
    let short =
        json!({"size": identity.size, "mtime_ns": 0, "header_digest": identity.header_digest});
    for stated in [full, short.clone()] {
        let stated: StatedIdentity = serde_json::from_value(stated).unwrap();
        identity.check_stated(&path, &stated).unwrap();
    }
    let mut other: StatedIdentity = serde_json::from_value(short.clone()).unwrap();
    other.header_digest.push('0');
    assert!(
        identity.check_stated(&path, &other).unwrap_err().to_string().contains("header differs")
    );
    let mut unknown = short;
    unknown["device"] = json!(1);
    assert!(serde_json::from_value::<StatedIdentity>(unknown).is_err());
}
