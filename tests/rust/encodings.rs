//! Which stored tensors make up a quantised one: every variant of names is found, every malformed one refused by name.

use crate::fixtures::{Tensor, write, write_raw};
use safemerge_fast::checkpoint::{Blocks, Checkpoint, Encoding, Format};
use safemerge_fast::code::{Code, ScaleType};
use safetensors::tensor::Dtype;
use std::path::Path;
use tempfile::TempDir;

use Dtype::{BF16, F8_E4M3, F8_E5M2, F8_E8M0, F16, F32, F64, I8, I32, I64, U8};

/// A tensor of zeros: only names, dtypes and shapes count.
fn zeros(name: &str, dtype: Dtype, shape: &[usize]) -> Tensor {
    let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    Tensor::new(name, dtype, shape, vec![0; bytes])
}

type Stored<'a> = &'a [(&'a str, Dtype, &'a [usize])];

fn checkpoint(directory: &Path, tensors: Stored<'_>) -> Checkpoint {
    let tensors: Vec<Tensor> = tensors.iter().map(|(n, d, s)| zeros(n, *d, s)).collect();
    write(&directory.join("model.safetensors"), &tensors);
    Checkpoint::open(directory).unwrap()
}

/// The only tensor of a checkpoint, and the names that it is stored under.
fn only(tensors: Stored<'_>) -> (Encoding, Vec<String>) {
    let directory = TempDir::new().unwrap();
    let checkpoint = checkpoint(directory.path(), tensors);
    let listed: Vec<_> = checkpoint.logical().unwrap().collect();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(listed[0].encoded);
    let found = checkpoint.encoding(listed[0].name).unwrap().unwrap();
    assert_eq!(found.name, listed[0].name);
    assert_eq!(found.codes, listed[0].id);
    assert_eq!(checkpoint.encoding_of(listed[0].id).unwrap().as_ref(), Some(&found));
    let names = found.stored().map(|id| checkpoint.entry(id).1.name.to_owned()).collect();
    (found, names)
}

/// Codes, scales: format, blocks, grid, type of the scales. Names are `m.weight` and this one.
fn fp8(
    shape: &[usize],
    name: &str,
    dtype: Dtype,
    scales: &[usize],
) -> (Format, Blocks, [usize; 2], ScaleType) {
    let (found, names) = only(&[("m.weight", F8_E4M3, shape), (name, dtype, scales)]);
    assert_eq!(names, ["m.weight", name]);
    assert_eq!((found.name.as_str(), found.shape.as_slice()), ("m.weight", shape));
    assert_eq!((found.code, found.global), (Code::E4M3, None));
    let scales = found.scales.unwrap();
    (found.format, scales.blocks, scales.grid, scales.scale_type)
}

fn blocks(rows: usize, columns: usize) -> Blocks {
    Blocks { rows, columns }
}

#[test]
fn fp8_in_blocks_is_found_under_all_its_names() {
    let usual = blocks(128, 128);
    let format = Format::BlockFp8(usual);
    for (name, dtype, scale_type) in [
        ("m.weight_scale_inv", F32, ScaleType::F32),
        ("m.weight_scale", BF16, ScaleType::BF16),
        ("m.weight_scale", F16, ScaleType::F16),
        ("m.scale", F8_E8M0, ScaleType::E8M0),
        ("m.scale", F32, ScaleType::F32),
        ("m.weight_scale_inv", U8, ScaleType::E8M0),
    ] {
        let found = fp8(&[576, 300], name, dtype, &[5, 3]);
        assert_eq!(found, (format, usual, [5, 3], scale_type), "{name} {dtype}");
    }
    assert_eq!(fp8(&[256, 300], "m.weight_scale", F32, &[2, 1, 3, 1]).2, [2, 3]);
    assert_eq!(format.to_string(), "FP8 in blocks of 128 x 128");
}

#[test]
fn the_size_of_blocks_follows_from_their_number() {
    let found = |shape: &[usize], grid: &[usize]| fp8(shape, "m.weight_scale_inv", F32, grid).1;
    assert_eq!(found(&[200, 300], &[4, 5]), blocks(64, 64));
    assert_eq!(found(&[64, 64], &[1, 1]), blocks(128, 128), "one ragged block");
    assert_eq!(found(&[256, 100], &[2, 100]), blocks(128, 1));
    assert_eq!(found(&[90, 100], &[3, 4]), blocks(32, 32), "a power of two goes before a divisor");
    assert_eq!(found(&[120, 72], &[5, 3]), blocks(24, 24), "no power of two fits");
}

#[test]
fn fp8_with_one_scale_or_one_a_row_is_found() {
    let whole = (Format::TensorFp8, blocks(300, 200), [1, 1], ScaleType::F32);
    for shape in [&[] as &[usize], &[1], &[1, 1, 1]] {
        assert_eq!(fp8(&[300, 200], "m.weight_scale", F32, shape), whole, "{shape:?}");
    }
    assert_eq!(fp8(&[300, 200], "m.weight_scale_inv", F32, &[]), whole);
    assert_eq!(fp8(&[300, 200], "m.weight_scale", F32, &[1, 1]).0, Format::TensorFp8);
    let rows = (Format::ChannelFp8, blocks(1, 200), [300, 1], ScaleType::BF16);
    assert_eq!(fp8(&[300, 200], "m.weight_scale", BF16, &[300]), rows);
    assert_eq!(fp8(&[300, 200], "m.weight_scale", BF16, &[300, 1]), rows);
    let (found, _) = only(&[("m.weight", F8_E5M2, &[7]), ("m.weight_scale", F32, &[])]);
    assert_eq!((found.rows(), found.columns(), found.code), (1, 7, Code::E5M2));
}

#[test]
fn mxfp8_has_powers_of_two_for_groups_of_32() {
    for dtype in [U8, F8_E8M0] {
        let found = fp8(&[48, 160], "m.weight_scale", dtype, &[48, 5]);
        assert_eq!(found, (Format::Mxfp8, blocks(1, 32), [48, 5], ScaleType::E8M0));
    }
}

#[test]
fn experts_have_scales_of_their_own() {
    let (found, names) = only(&[
        ("experts.gate_up_proj", F8_E4M3, &[4, 256, 300]),
        ("experts.gate_up_proj_scale_inv", F32, &[4, 2, 3]),
        ("experts.gate_up_proj_activation_scale", F32, &[]),
    ]);
    assert_eq!(found.format, Format::BlockFp8(blocks(128, 128)));
    assert_eq!(names[2], "experts.gate_up_proj_activation_scale");
    assert_eq!((found.matrices(), found.rows(), found.columns()), (4, 256, 300));
    assert_eq!(found.scale_range(2, 130), (2 * 6 + 3) * 4..(2 * 6 + 6) * 4);
    assert_eq!(found.code_range(10..20), 10..20);
    let one = |scales: &[usize]| {
        let stored = [
            ("e.down_proj", F8_E4M3, &[4_usize, 256, 300] as &[usize]),
            ("e.down_proj_scale", F32, scales),
        ];
        only(&stored).0
    };
    for scales in [&[4_usize] as &[usize], &[4, 1], &[4, 1, 1]] {
        assert_eq!(one(scales).format, Format::TensorFp8, "{scales:?}");
        assert_eq!(one(scales).scale_range(3, 200), 12..16);
    }
    assert_eq!(one(&[4, 256, 1]).format, Format::ChannelFp8);
}

#[test]
fn mxfp4_is_found_in_its_four_forms() {
    let described = |found: &Encoding| {
        let scales = found.scales.unwrap();
        assert_eq!((found.format, found.code), (Format::Mxfp4, Code::E2M1));
        assert_eq!((scales.blocks, scales.scale_type), (blocks(1, 32), ScaleType::E8M0));
        (found.name.clone(), found.shape.clone(), scales.grid)
    };
    let (found, names) = only(&[
        ("m.experts.gate_up_proj_blocks", U8, &[2, 6, 3, 16]),
        ("m.experts.gate_up_proj_scales", U8, &[2, 6, 3]),
    ]);
    assert_eq!(described(&found), ("m.experts.gate_up_proj".into(), vec![2, 6, 96], [6, 3]));
    assert_eq!(names, ["m.experts.gate_up_proj_blocks", "m.experts.gate_up_proj_scales"]);
    assert_eq!(found.code_range(33..64), 16..32);
    let (found, _) = only(&[("m.weight", I8, &[6, 32]), ("m.scale", F8_E8M0, &[6, 2])]);
    assert_eq!(described(&found), ("m.weight".into(), vec![6, 64], [6, 2]));
    for dtype in [U8, F8_E8M0] {
        let (found, _) =
            only(&[("m.weight_packed", U8, &[6, 32]), ("m.weight_scale", dtype, &[6, 2])]);
        assert_eq!(described(&found), ("m.weight".into(), vec![6, 64], [6, 2]));
        let (found, _) = only(&[("m.weight", U8, &[6, 32]), ("m.weight_scale", dtype, &[6, 2])]);
        assert_eq!(described(&found), ("m.weight".into(), vec![6, 64], [6, 2]));
    }
}

#[test]
fn packed_integers_are_found_and_their_groups_deduced() {
    for (dtype, scale_type) in
        [(BF16, ScaleType::BF16), (F16, ScaleType::F16), (F32, ScaleType::F32)]
    {
        for (across, group) in [(8, 32), (2, 128), (1, 256), (4, 64)] {
            let (found, names) = only(&[
                ("m.weight_packed", I32, &[6, 32]),
                ("m.weight_scale", dtype, &[6, across]),
                ("m.weight_shape", I64, &[2]),
            ]);
            assert_eq!((found.name.as_str(), found.shape.as_slice()), ("m.weight", &[6, 256][..]));
            let scales = found.scales.unwrap();
            assert_eq!((scales.blocks, scales.grid), (blocks(1, group), [6, across]));
            assert_eq!((scales.scale_type, found.code), (scale_type, Code::Int4));
            assert_eq!(names, ["m.weight_packed", "m.weight_scale", "m.weight_shape"]);
            assert_eq!(found.format.to_string(), "INT4 (pack-quantized)");
        }
    }
}

#[test]
fn what_is_not_symmetric_or_reordered_is_not_claimed() {
    for other in ["m.weight_zero_point", "m.weight_g_idx"] {
        let directory = TempDir::new().unwrap();
        let stored: Stored<'_> = &[
            ("m.weight_packed", I32, &[6, 32]),
            ("m.weight_scale", BF16, &[6, 8]),
            (other, I32, &[6, 1]),
        ];
        let checkpoint = checkpoint(directory.path(), stored);
        assert!(checkpoint.logical().unwrap().all(|tensor| !tensor.encoded));
        assert_eq!(checkpoint.logical().unwrap().count(), 3);
    }
}

#[test]
fn nvfp4_is_found_with_its_global_scale() {
    let (found, names) = only(&[
        ("m.weight", U8, &[6, 32]),
        ("m.weight_scale", F8_E4M3, &[6, 4]),
        ("m.weight_scale_2", F32, &[]),
        ("m.input_scale", F32, &[]),
    ]);
    assert_eq!((found.format, found.shape.as_slice()), (Format::Nvfp4, &[6, 64][..]));
    assert_eq!(found.scales.unwrap().blocks, blocks(1, 16));
    assert!(!found.global.unwrap().divides);
    assert_eq!(names, ["m.weight", "m.weight_scale", "m.weight_scale_2", "m.input_scale"]);
    let (found, names) = only(&[
        ("m.weight_packed", U8, &[6, 32]),
        ("m.weight_scale", F8_E4M3, &[6, 4]),
        ("m.weight_global_scale", F32, &[1]),
        ("m.input_global_scale", F32, &[1]),
    ]);
    assert!(found.global.unwrap().divides);
    assert_eq!((found.name.as_str(), names.len()), ("m.weight", 4));
    let (found, _) = only(&[
        ("e.down_proj", U8, &[3, 6, 32]),
        ("e.down_proj_scale", F8_E4M3, &[3, 6, 4]),
        ("e.down_proj_scale_2", F32, &[3]),
    ]);
    assert!(found.global.unwrap().each);
}

#[test]
fn fp8_without_any_scales_is_what_it_says() {
    let directory = TempDir::new().unwrap();
    let stored: Stored<'_> =
        &[("a.weight", F8_E4M3, &[3, 5]), ("b.bias", F8_E5M2, &[7]), ("c.weight", BF16, &[2])];
    let checkpoint = checkpoint(directory.path(), stored);
    let listed: Vec<_> = checkpoint.logical().unwrap().map(|t| (t.name, t.encoded)).collect();
    assert_eq!(listed.len(), 3);
    assert!(listed.contains(&("a.weight", true)) && listed.contains(&("c.weight", false)));
    let found = checkpoint.encoding("b.bias").unwrap().unwrap();
    assert_eq!((found.format, found.scales, found.code), (Format::Fp8, None, Code::E5M2));
    assert_eq!(checkpoint.encoding("c.weight").unwrap(), None);
    assert_eq!(checkpoint.encoding("nothing").unwrap(), None);
}

#[test]
fn one_checkpoint_mixes_formats_and_keeps_the_order_of_its_files() {
    let directory = TempDir::new().unwrap();
    write(
        &directory.path().join("model-1.safetensors"),
        &[zeros("b.weight", F8_E4M3, &[8, 8]), zeros("a.scale", F8_E8M0, &[4, 1])],
    );
    write(
        &directory.path().join("model-2.safetensors"),
        &[
            zeros("a.weight", I8, &[4, 16]),
            zeros("b.weight_scale_inv", F32, &[1, 1]),
            zeros("norm.weight", BF16, &[8]),
            zeros("tid2eid", I64, &[4, 2]),
        ],
    );
    let index = r#"{"weight_map": {"b.weight": "model-1.safetensors", "a.scale": "model-1.safetensors",
        "a.weight": "model-2.safetensors", "b.weight_scale_inv": "model-2.safetensors",
        "norm.weight": "model-2.safetensors", "tid2eid": "model-2.safetensors"}}"#;
    std::fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let listed: Vec<_> = checkpoint.logical().unwrap().map(|tensor| tensor.name).collect();
    assert_eq!(listed[0], "b.weight");
    let place = |name| checkpoint.ids().position(|id| checkpoint.entry(id).1.name == name);
    let mut by_place = listed.clone();
    by_place.sort_by_key(|name| place(*name));
    assert_eq!(listed, by_place);
    assert_eq!(listed.len(), 4);
    // Scales lie in the other shard.
    let found = checkpoint.encoding("a.weight").unwrap().unwrap();
    assert_eq!(checkpoint.shard_of(found.codes), 1);
    assert_eq!(checkpoint.shard_of(found.scales.unwrap().tensor), 0);
    assert!(checkpoint.logical_tensor("a.scale").unwrap().is_none());
    assert!(checkpoint.logical_tensor("norm.weight").unwrap().is_some());
    assert_eq!((checkpoint.len(), checkpoint.id("a.scale").is_some()), (6, true));
}

#[test]
fn names_of_the_storage_are_not_names_of_tensors() {
    let directory = TempDir::new().unwrap();
    let stored: Stored<'_> =
        &[("m.weight_packed", I32, &[6, 4]), ("m.weight_scale", BF16, &[6, 1])];
    let checkpoint = checkpoint(directory.path(), stored);
    assert!(checkpoint.logical_tensor("m.weight").unwrap().is_some());
    assert!(checkpoint.logical_tensor("m.weight_packed").unwrap().is_none());
    assert!(checkpoint.logical_tensor("m.weight_scale").unwrap().is_none());
}

#[test]
fn malformed_ones_are_refused_by_name() {
    let cases: &[(Stored<'_>, &[&str])] = &[
        (&[("m.weight", F8_E4M3, &[300, 300]), ("m.weight_scale", F32, &[3, 2])], &["F32 [3, 2]"]),
        (
            &[("m.weight", F8_E4M3, &[300, 300]), ("m.weight_scale_inv", F32, &[3, 4])],
            &[
                "`m.weight` (F8_E4M3 [300, 300])",
                "[3, 3] (128 x 128)",
                "`m.weight_scale_inv` is F32 [3, 4]",
            ],
        ),
        (
            &[("m.weight", F8_E4M3, &[300, 300]), ("m.weight_scale", F32, &[299])],
            &["shape [300]", "[299]"],
        ),
        (&[("m.weight", F8_E4M3, &[30, 30]), ("m.weight_scale", F64, &[])], &["dtype F32, BF16"]),
        (
            &[("m.weight", F8_E4M3, &[30, 30]), ("m.weight_scale", F8_E4M3, &[])],
            &["dtype F32, BF16"],
        ),
        (&[("m.weight", F8_E4M3, &[9]), ("m.weight_scale", F32, &[9])], &["one number"]),
        (&[("m.w", F8_E4M3, &[3, 30, 30]), ("m.w_scale", F32, &[])], &["`m.w`", "after [3]"]),
        (
            &[("m.weight", F8_E4M3, &[9, 9]), ("m.weight_scale", F32, &[]), ("m.scale", F32, &[])],
            &["two tensors of scales", "`m.weight_scale` and `m.scale`"],
        ),
        (
            &[
                ("m.weight", F8_E4M3, &[9, 9]),
                ("m.weight_scale_inv", F32, &[]),
                ("n.weight", F8_E4M3, &[9, 9]),
            ],
            &["`n.weight`", "no scales", "`n.weight_scale_inv` is expected"],
        ),
        (
            &[
                ("m.weight", F8_E4M3, &[9, 9]),
                ("m.scale", F32, &[]),
                ("n.weight", F8_E4M3, &[9, 9]),
            ],
            &["`n.scale` is expected"],
        ),
        (
            &[("m.weight", F8_E4M3, &[48, 160]), ("m.weight_scale", U8, &[128, 8])],
            &["padded or swizzled", "[48, 5] are expected"],
        ),
        (
            &[("m_blocks", U8, &[6, 3, 8]), ("m_scales", U8, &[6, 3])],
            &["`m_blocks`", "should have 16 as its last"],
        ),
        (
            &[("m_blocks", U8, &[6, 3, 16]), ("m_scales", U8, &[6, 2])],
            &["shape [6, 3]", "U8 [6, 2]"],
        ),
        (&[("m_blocks", U8, &[6, 3, 16]), ("m_scales", F32, &[6, 3])], &["dtype U8", "F32 [6, 3]"]),
        (&[("m.weight", I8, &[6, 24]), ("m.scale", F8_E8M0, &[6, 1])], &["48 numbers a row", "32"]),
        (&[("m.weight", I8, &[6, 32]), ("m.scale", F8_E8M0, &[5, 2])], &["shape [6, 2]", "[5, 2]"]),
        (&[("m.weight_packed", I32, &[6, 4])], &["needs `m.weight_scale`", "does not hold"]),
        (
            &[("m.weight_packed", I32, &[6, 4]), ("m.weight_scale", BF16, &[5, 1])],
            &["`m.weight_packed` (I32 [6, 4])", "[6]", "32 columns", "BF16 [5, 1]"],
        ),
        (
            &[("m.weight_packed", I32, &[6, 4]), ("m.weight_scale", I32, &[6, 1])],
            &["dtype BF16, F16 or F32"],
        ),
        (
            &[("m.weight", U8, &[6, 32]), ("m.weight_scale", F8_E4M3, &[6, 4])],
            &["needs `m.weight_scale_2`"],
        ),
        (
            &[("m.weight_packed", U8, &[6, 32]), ("m.weight_scale", F8_E4M3, &[6, 4])],
            &["needs `m.weight_global_scale`"],
        ),
        (
            &[
                ("m.weight", U8, &[6, 32]),
                ("m.weight_scale", F8_E4M3, &[128, 4]),
                ("m.weight_scale_2", F32, &[]),
            ],
            &["padded or swizzled", "[6, 4] are expected", "export the checkpoint"],
        ),
        (
            &[
                ("m.weight", U8, &[6, 32]),
                ("m.weight_scale", F8_E4M3, &[6, 4]),
                ("m.weight_scale_2", F32, &[2]),
            ],
            &["`m.weight_scale_2` is F32 [2]"],
        ),
        (
            &[
                ("m.weight_packed", I32, &[6, 4]),
                ("m.weight_scale", BF16, &[6, 1]),
                ("m.weight", BF16, &[6, 32]),
            ],
            &["`m.weight_packed`", "beside a tensor `m.weight`"],
        ),
    ];
    for (stored, words) in cases {
        let directory = TempDir::new().unwrap();
        let checkpoint = checkpoint(directory.path(), stored);
        let error = checkpoint.logical().err().unwrap_or_else(|| panic!("{stored:?}")).to_string();
        assert!(error.contains("model.safetensors cannot be used: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
        for word in *words {
            assert!(error.contains(word), "{word} in {error}");
        }
    }
}

#[test]
fn a_shape_that_is_stored_must_be_the_one_that_is_found() {
    let stored = |shape: [i32; 2]| {
        let directory = TempDir::new().unwrap();
        let bytes = shape.iter().flat_map(|side| side.to_le_bytes()).collect();
        let tensors = [
            zeros("m.weight_packed", I32, &[6, 4]),
            zeros("m.weight_scale", BF16, &[6, 1]),
            Tensor::new("m.weight_shape", I32, &[2], bytes),
        ];
        write(&directory.path().join("model.safetensors"), &tensors);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let found = checkpoint.encoding("m.weight").unwrap().unwrap();
        checkpoint.check_encoding(&found).map_err(|error| error.to_string())
    };
    assert_eq!(stored([6, 32]), Ok(()));
    // Eight bits a number.
    let error = stored([6, 16]).unwrap_err();
    assert!(error.contains("shape [6, 32], but `m.weight_shape` says [6, 16]"), "{error}");
    assert!(stored([-6, 32]).unwrap_err().contains("something else"));
}

#[test]
fn a_global_scale_is_a_positive_number() {
    let stored = |value: f32| {
        let directory = TempDir::new().unwrap();
        let tensors = [
            zeros("m.weight", U8, &[6, 32]),
            zeros("m.weight_scale", F8_E4M3, &[6, 4]),
            Tensor::new("m.weight_scale_2", F32, &[], value.to_le_bytes().to_vec()),
        ];
        write(&directory.path().join("model.safetensors"), &tensors);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let found = checkpoint.encoding("m.weight").unwrap().unwrap();
        checkpoint
            .global_scale(&found, 0)
            .map(|global| global.unwrap().value)
            .map_err(|e| e.to_string())
    };
    assert_eq!(stored(0.25), Ok(0.25));
    for wrong in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-38] {
        let error = stored(wrong).unwrap_err();
        assert!(error.contains("`m.weight_scale_2` of its tensor `m.weight`"), "{error}");
    }
}

#[test]
fn shapes_that_nothing_can_hold_are_refused_and_not_computed() {
    let directory = TempDir::new().unwrap();
    let half = 1_usize << 62;
    let header = format!(
        r#"{{"m_blocks":{{"dtype":"U8","shape":[0,{half},16],"data_offsets":[0,0]}},
            "m_scales":{{"dtype":"U8","shape":[0,{half}],"data_offsets":[0,0]}},
            "n.weight":{{"dtype":"F8_E4M3","shape":[0,{half},{half},3],"data_offsets":[0,0]}},
            "n.weight_scale":{{"dtype":"F32","shape":[0,{half}],"data_offsets":[0,0]}}}}"#
    );
    write_raw(&directory.path().join("model.safetensors"), &header, &[]);
    let error = Checkpoint::open(directory.path()).unwrap().logical().err().unwrap().to_string();
    assert!(error.contains("cannot be used"), "{error}");
}

#[test]
fn many_quantised_tensors_are_listed() {
    let directory = TempDir::new().unwrap();
    let mut header = String::from("{");
    for number in 0..100_000 {
        let start = number * 4;
        header += &format!(
            r#""layers.{number}.weight":{{"dtype":"F8_E4M3","shape":[0,4],"data_offsets":[{start},{start}]}},
            "layers.{number}.weight_scale_inv":{{"dtype":"F32","shape":[1,1],"data_offsets":[{start},{}]}},"#,
            start + 4
        );
    }
    header.pop();
    header.push('}');
    write_raw(&directory.path().join("model.safetensors"), &header, &vec![0; 400_000]);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(checkpoint.logical().unwrap().count(), 100_000);
}
