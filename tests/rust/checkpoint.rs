//! Headers and indices, valid and hostile.

use crate::fixtures::{Tensor, noise, write, write_raw};
use proptest::prelude::*;
use safemerge_fast::Error;
use safemerge_fast::checkpoint::{Checkpoint, Header};
use safetensors::Dtype;
use std::path::Path;

fn message(result: safemerge_fast::Result<Checkpoint>) -> String {
    result.expect_err("must be refused").to_string()
}

#[test]
fn tensors_come_in_the_order_of_their_bytes_with_absolute_ranges() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let header = r#"{"b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"a":{"dtype":"F32","shape":[],"data_offsets":[3,7]},"empty":{"dtype":"BF16","shape":[0,5],"data_offsets":[7,7]}}"#;
    write_raw(&path, header, &[1, 2, 3, 0, 0, 128, 63]);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let found: Vec<_> = checkpoint
        .tensors()
        .map(|(shard, tensor)| {
            let bytes = std::fs::read(&shard.path).unwrap()[tensor.range.clone()].to_vec();
            (tensor.name, tensor.shape.to_vec(), bytes)
        })
        .collect();
    assert_eq!(
        found,
        [
            ("b", vec![3], vec![1, 2, 3]),
            ("a", vec![], 1.0_f32.to_le_bytes().to_vec()),
            ("empty", vec![0, 5], vec![]),
        ]
    );
}

#[test]
fn the_identity_changes_with_the_header_and_not_with_the_data() {
    let directory = tempfile::tempdir().unwrap();
    let digest = |name: &str, values: &[f32]| {
        let path = directory.path().join("x.safetensors");
        write(&path, &[Tensor::f32(name, values)]);
        Header::read(&path).unwrap().identity.header_digest
    };
    let first = digest("a", &[1.0, 2.0]);
    assert_eq!(first, digest("a", &[3.0, 4.0]));
    assert_ne!(first, digest("b", &[1.0, 2.0]));
    let bytes = std::fs::read(directory.path().join("x.safetensors")).unwrap();
    let end = bytes.len() - 8;
    assert_eq!(digest("b", &[0.0, 0.0]), blake3::hash(&bytes[..end]).to_hex().to_string());
}

#[test]
fn invalid_files_are_refused_with_their_name_and_fault() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let tensor = |offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}}}"#)
    };
    let cases: Vec<(String, Vec<u8>, &str)> = vec![
        (tensor("[0,8]"), vec![0; 7], "truncated"),
        (tensor("[0,8]"), vec![0; 9], "longer than its header says"),
        (tensor("[0,4]"), vec![0; 4], "corrupt"),
        (tensor("[4,12]"), vec![0; 12], "corrupt"),
        (tensor("[8,0]"), vec![0; 8], "corrupt"),
        (r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#.into(), vec![0; 8], "corrupt"),
        (
            r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#.into(),
            vec![],
            "corrupt",
        ),
        ("{".into(), vec![], "corrupt"),
        (r#"{"__metadata__":{"x":1}}"#.into(), vec![], "corrupt"),
    ];
    for (header, data, fault) in cases {
        write_raw(&path, &header, &data);
        let message = message(Checkpoint::open(directory.path()));
        assert!(
            message.contains(fault) && message.contains("model.safetensors"),
            "{header}: {message}"
        );
    }
    for (bytes, fault) in [
        (vec![1, 2, 3], "only 3 bytes"),
        (u64::MAX.to_le_bytes().to_vec(), "more than the 100000000"),
        (1000_u64.to_le_bytes().to_vec(), "truncated"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let message = message(Checkpoint::open(directory.path()));
        assert!(message.contains(fault), "{message}");
    }
}

fn index(directory: &Path, weight_map: &str) {
    let text = format!(r#"{{"metadata":{{}},"weight_map":{weight_map}}}"#);
    std::fs::write(directory.join("model.safetensors.index.json"), text).unwrap();
}

#[test]
fn an_index_cannot_lead_out_of_its_directory() {
    let outer = tempfile::tempdir().unwrap();
    let inner = outer.path().join("model");
    std::fs::create_dir(&inner).unwrap();
    write(&outer.path().join("x.safetensors"), &[Tensor::f32("a", &[1.0])]);
    let absolute = outer.path().join("x.safetensors");
    for file in
        ["../x.safetensors", absolute.to_str().unwrap(), "./x.safetensors", "sub/x", "..", ""]
    {
        index(&inner, &format!(r#"{{"a":{file:?}}}"#));
        let message = message(Checkpoint::open(&inner));
        assert!(message.contains("outside its directory") && message.contains(file), "{message}");
    }
}

#[test]
fn the_index_decides_and_must_be_right() {
    let directory = tempfile::tempdir().unwrap();
    let one = Tensor::f32("a", &[1.0]);
    let two = Tensor::f32("b", &[2.0]);
    write(&directory.path().join("x.safetensors"), &[one.clone(), two.clone()]);
    write(&directory.path().join("y.safetensors"), &[two]);
    assert!(
        message(Checkpoint::open(directory.path())).contains("no model.safetensors.index.json")
    );

    index(directory.path(), r#"{"a":"x.safetensors","b":"y.safetensors"}"#);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let places: Vec<_> = checkpoint.tensors().map(|(s, t)| (t.name, s.name.as_str())).collect();
    assert_eq!(places, [("a", "x.safetensors"), ("b", "y.safetensors")]);

    index(directory.path(), r#"{"a":"y.safetensors","b":"y.safetensors"}"#);
    assert!(message(Checkpoint::open(directory.path())).contains("does not hold it"));
    index(directory.path(), r#"{"a":"z.safetensors"}"#);
    assert!(
        message(Checkpoint::open(directory.path())).contains("z.safetensors, which is missing")
    );
    index(directory.path(), "{}");
    assert!(message(Checkpoint::open(directory.path())).contains("empty"));

    // transformers loads this one and never looks at the index.
    write(&directory.path().join("model.safetensors"), &[one]);
    assert_eq!(Checkpoint::open(directory.path()).unwrap().len(), 1);
}

#[test]
fn missing_paths_and_pickles_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let absent = directory.path().join("absent");
    assert!(matches!(Checkpoint::open(&absent), Err(Error::NotFound { .. })));
    std::fs::write(directory.path().join("pytorch_model.bin"), b"").unwrap();
    let message = message(Checkpoint::open(directory.path()));
    assert!(message.contains("pytorch_model.bin is a pickle"), "{message}");
}

/// Tensors of random names, dtypes and shapes, zero-sized ones among them.
fn any_tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let dtype = prop::sample::select(vec![
        Dtype::BF16,
        Dtype::F16,
        Dtype::F32,
        Dtype::F64,
        Dtype::I64,
        Dtype::U8,
        Dtype::BOOL,
    ]);
    let tensor = ("[a-z.]{1,12}", dtype, prop::collection::vec(0_usize..6, 0..4), any::<u64>());
    prop::collection::vec(tensor, 0..8).prop_map(|tensors| {
        let mut seen = std::collections::BTreeSet::new();
        tensors
            .into_iter()
            .filter(|(name, ..)| seen.insert(name.clone()))
            .map(|(name, dtype, shape, seed)| {
                let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                Tensor::new(&name, dtype, &shape, noise(seed, bytes))
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_safetensors_writes_is_read_back(tensors in any_tensors()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        write(&path, &tensors);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        prop_assert_eq!(checkpoint.len(), tensors.len());
        for tensor in &tensors {
            let (shard, entry) = checkpoint.get(&tensor.name).unwrap();
            prop_assert_eq!(entry.dtype, tensor.dtype);
            prop_assert_eq!(entry.shape, &tensor.shape);
            prop_assert_eq!(&std::fs::read(&shard.path).unwrap()[entry.range.clone()], &tensor.bytes[..]);
        }
    }
}
