//! Quantised tensors of every format, with a decoder in f64 from the definitions of their codes.

use crate::fixtures::{Tensor, encode, noise, random_values};
use half::bf16;
use safetensors::Dtype;

/// The number of a code, from the definition of its format.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    E4M3,
    E2M1,
    Int4,
}

impl Kind {
    pub fn number(self, code: u8) -> f64 {
        let float = |code: u8, exponent_bits: u32, mantissa_bits: u32, bias: i32| {
            let mantissa =
                f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
            let exponent = i32::from((code >> mantissa_bits) & ((1 << exponent_bits) - 1));
            let sign = if code >> (exponent_bits + mantissa_bits) & 1 == 1 { -1.0 } else { 1.0 };
            sign * if exponent == 0 {
                mantissa * 2_f64.powi(1 - bias)
            } else {
                (1.0 + mantissa) * 2_f64.powi(exponent - bias)
            }
        };
        match self {
            Self::E4M3 => float(code, 4, 3, 7),
            Self::E2M1 => float(code & 15, 2, 1, 1),
            Self::Int4 => f64::from(code & 15) - 8.0,
        }
    }

    /// The numbers that are written, ascending.
    pub fn all(self) -> Vec<f64> {
        let codes = if self == Self::E4M3 { 0..=255 } else { 0..=15 };
        let finite = codes.filter(|code| self != Self::E4M3 || code & 0x7F != 0x7F);
        let mut all: Vec<f64> = finite.map(|code| self.number(code)).collect();
        all.sort_by(f64::total_cmp);
        all
    }
}

/// A quantised tensor: what it is called, the tensors that it is stored as, and how to decode it.
#[derive(Clone)]
pub struct Quantised {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub kind: Kind,
    pub blocks: [usize; 2],
    pub codes: &'static str,
    pub scales: Option<&'static str>,
    pub stored: Vec<Tensor>,
    pub global: f64,
}

impl Quantised {
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.stored.iter().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn matrix(&self) -> [usize; 2] {
        [self.shape[self.shape.len() - 2], self.shape[self.shape.len() - 1]]
    }

    /// Number of the scale of an element.
    pub fn scale(&self, element: usize) -> usize {
        let [rows, columns] = self.matrix();
        let grid = [rows.div_ceil(self.blocks[0]), columns.div_ceil(self.blocks[1])];
        let (matrix, row, column) =
            (element / columns / rows, element / columns % rows, element % columns);
        (matrix * grid[0] + row / self.blocks[0]) * grid[1] + column / self.blocks[1]
    }

    /// Decodes stored tensors like its own.
    pub fn decode(&self, codes: &[u8], scales: &[f64]) -> Vec<f64> {
        (0..self.shape.iter().product())
            .map(|element| {
                let code = match self.kind {
                    Kind::E4M3 => codes[element],
                    _ => codes[element / 2] >> (4 * (element % 2)) & 15,
                };
                let scale = if self.scales.is_some() { scales[self.scale(element)] } else { 1.0 };
                self.kind.number(code) * scale * self.global
            })
            .collect()
    }

    pub fn values(&self) -> Vec<f64> {
        let scales = self.scales.map_or(vec![], |name| numbers(self.tensor(name)));
        self.decode(&self.tensor(self.codes).bytes, &scales)
    }
}

/// Scales as numbers.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype {
        Dtype::F32 => {
            tensor.bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
        }
        Dtype::BF16 => {
            tensor.bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect()
        }
        Dtype::F8_E4M3 => tensor.bytes.iter().map(|&code| Kind::E4M3.number(code)).collect(),
        _ => tensor.bytes.iter().map(|&code| 2_f64.powi(i32::from(code) - 127)).collect(),
    }
}

pub fn quantised(seed: u64) -> Vec<Quantised> {
    // Without the codes of NaN, and so that every block has its largest code.
    let e4m3 = |count: usize| -> Vec<u8> {
        noise(seed, count)
            .into_iter()
            .map(|code| if code & 0x7F == 0x7F { 0x7E } else { code })
            .collect()
    };
    let near = |count: usize| {
        random_values(seed + 1, count).map(|value| (value.abs() + 0.1) * 0.01).collect::<Vec<f32>>()
    };
    let floats = |count: usize| encode(Dtype::F32, near(count).into_iter());
    let halves = |count: usize| encode(Dtype::BF16, near(count).into_iter());
    let powers =
        |count: usize| noise(seed + 2, count).into_iter().map(|b| 118 + b % 4).collect::<Vec<u8>>();
    let small = |count: usize| {
        noise(seed + 2, count).into_iter().map(|b| 0x28 + b % 16).collect::<Vec<u8>>()
    };
    let tensor = Tensor::new;
    let single =
        |name: &str, value: f32| Tensor::new(name, Dtype::F32, &[], value.to_le_bytes().to_vec());
    vec![
        Quantised {
            name: "block.weight",
            shape: vec![300, 200],
            kind: Kind::E4M3,
            blocks: [128, 128],
            codes: "block.weight",
            scales: Some("block.weight_scale_inv"),
            global: 1.0,
            stored: vec![
                tensor("block.weight", Dtype::F8_E4M3, &[300, 200], e4m3(60_000)),
                tensor("block.weight_scale_inv", Dtype::F32, &[3, 2], floats(6)),
            ],
        },
        Quantised {
            name: "row.weight",
            shape: vec![150, 96],
            kind: Kind::E4M3,
            blocks: [1, 96],
            codes: "row.weight",
            scales: Some("row.weight_scale"),
            global: 1.0,
            stored: vec![
                tensor("row.weight", Dtype::F8_E4M3, &[150, 96], e4m3(14_400)),
                tensor("row.weight_scale", Dtype::BF16, &[150, 1], halves(150)),
            ],
        },
        Quantised {
            name: "all.weight",
            shape: vec![130, 70],
            kind: Kind::E4M3,
            blocks: [130, 70],
            codes: "all.weight",
            scales: Some("all.weight_scale"),
            global: 1.0,
            stored: vec![
                tensor("all.weight", Dtype::F8_E4M3, &[130, 70], e4m3(9_100)),
                tensor("all.weight_scale", Dtype::F32, &[], floats(1)),
            ],
        },
        Quantised {
            name: "mx8.weight",
            shape: vec![60, 160],
            kind: Kind::E4M3,
            blocks: [1, 32],
            codes: "mx8.weight",
            scales: Some("mx8.weight_scale"),
            global: 1.0,
            stored: vec![
                tensor("mx8.weight", Dtype::F8_E4M3, &[60, 160], e4m3(9_600)),
                tensor("mx8.weight_scale", Dtype::F8_E8M0, &[60, 5], powers(300)),
            ],
        },
        Quantised {
            name: "experts.gate_up_proj",
            shape: vec![3, 40, 96],
            kind: Kind::E2M1,
            blocks: [1, 32],
            codes: "experts.gate_up_proj_blocks",
            scales: Some("experts.gate_up_proj_scales"),
            global: 1.0,
            stored: vec![
                tensor(
                    "experts.gate_up_proj_blocks",
                    Dtype::U8,
                    &[3, 40, 3, 16],
                    noise(seed, 5_760),
                ),
                tensor("experts.gate_up_proj_scales", Dtype::U8, &[3, 40, 3], powers(360)),
            ],
        },
        Quantised {
            name: "int.weight",
            shape: vec![70, 128],
            kind: Kind::Int4,
            blocks: [1, 32],
            codes: "int.weight_packed",
            scales: Some("int.weight_scale"),
            global: 1.0,
            stored: vec![
                tensor("int.weight_packed", Dtype::I32, &[70, 16], noise(seed, 4_480)),
                tensor("int.weight_scale", Dtype::BF16, &[70, 4], halves(280)),
                tensor(
                    "int.weight_shape",
                    Dtype::I32,
                    &[2],
                    [70_i32, 128].iter().flat_map(|n| n.to_le_bytes()).collect(),
                ),
            ],
        },
        Quantised {
            name: "nv.weight",
            shape: vec![50, 96],
            kind: Kind::E2M1,
            blocks: [1, 16],
            codes: "nv.weight",
            scales: Some("nv.weight_scale"),
            global: 0.125,
            stored: vec![
                tensor("nv.weight", Dtype::U8, &[50, 48], noise(seed, 2_400)),
                tensor("nv.weight_scale", Dtype::F8_E4M3, &[50, 6], small(300)),
                single("nv.weight_scale_2", 0.125),
            ],
        },
        Quantised {
            name: "packed.weight",
            shape: vec![50, 96],
            kind: Kind::E2M1,
            blocks: [1, 16],
            codes: "packed.weight_packed",
            scales: Some("packed.weight_scale"),
            global: 0.125,
            stored: vec![
                tensor("packed.weight_packed", Dtype::U8, &[50, 48], noise(seed, 2_400)),
                tensor("packed.weight_scale", Dtype::F8_E4M3, &[50, 6], small(300)),
                single("packed.weight_global_scale", 8.0),
            ],
        },
    ]
}
