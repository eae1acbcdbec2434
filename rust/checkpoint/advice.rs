//! What to do with a directory that holds no weights in safetensors, by what it holds instead.

use crate::error::printable;
use std::collections::BTreeSet;
use std::path::Path;

/// Advice on a directory with these entries, as the rest of a sentence.
pub(super) fn advice(directory: &Path, names: &BTreeSet<String>) -> String {
    let path = |name: &str| printable(&directory.join(name));
    let here = printable(directory);
    let ending = |ending: &str| names.iter().find(|name| name.ends_with(ending));
    if let Some((_, newest)) = names.iter().filter_map(|name| Some((step(name)?, name))).max() {
        // A trainer's output, which may hold its state beside.
        return format!(
            "it holds a trainer's checkpoints; give one of them, such as {}",
            path(newest)
        );
    }
    if ending(".distcp").is_some() {
        return format!(
            "it is a distributed checkpoint (.distcp); consolidate it with `accelerate merge-weights {here} OUT` (or \
             `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {here} OUT.pt`) and give OUT"
        );
    }
    if let Some(sharded) = names.iter().find(|name| name.starts_with("pytorch_model_fsdp")) {
        return format!(
            "{} is FSDP's; consolidate it with `accelerate merge-weights {} OUT` and give OUT",
            printable(sharded),
            path(sharded)
        );
    }
    if names.contains("zero_to_fp32.py") || ending("_optim_states.pt").is_some() {
        return format!(
            "it is a checkpoint of DeepSpeed ZeRO; consolidate it with `python zero_to_fp32.py {here} OUT \
             --safe_serialization` and give OUT"
        );
    }
    if let Some(step) = names.iter().find(|name| name.starts_with("global_step")) {
        return format!(
            "{} is a checkpoint of DeepSpeed without its zero_to_fp32.py; consolidate it with `python -m \
             deepspeed.utils.zero_to_fp32 {here} OUT --safe_serialization` and give OUT",
            printable(step)
        );
    }
    if let Some(part) =
        names.iter().find(|name| name.starts_with("mp_rank_") || numbered(name, "iter_").is_some())
    {
        return format!(
            "{} is Megatron's; convert it to the format of transformers (with Megatron-Bridge's export, or the \
             converter that its framework has) and give the result",
            printable(part)
        );
    }
    if let Some(name) =
        names.iter().find(|name| name.starts_with("consolidated.") && name.ends_with(".pth"))
    {
        return format!(
            "{} is in Meta's own format; convert it with transformers 4's convert_llama_weights_to_hf.py (--input_dir \
             {here} --output_dir OUT) and give OUT",
            printable(name)
        );
    }
    if names.contains("model_index.json") {
        let parts = ["transformer", "unet", "text_encoder"];
        return match parts.iter().find(|part| names.contains(**part)) {
            Some(part) => {
                format!(
                    "it is a pipeline of diffusers; give one of its models, such as {}",
                    path(part)
                )
            }
            None => "it is a pipeline of diffusers; give one of its models".to_owned(),
        };
    }
    let pickles = [".bin", ".pth", ".pt", ".ckpt"];
    if let Some(name) = pickles.iter().find_map(|suffix| ending(suffix)) {
        return format!(
            "{} is a pickle, which is not opened; convert it: load the model with transformers and save_pretrained it",
            printable(name)
        );
    }
    if let Some(name) = ending(".gguf") {
        return format!("{} is in GGUF; give the model that it was made of", printable(name));
    }
    for (suffix, what) in OTHERS {
        if let Some(name) = ending(suffix) {
            return format!(
                "{} is {what}; convert it: load the model with a transformers that still reads it, and \
                 save_pretrained it as safetensors, or give the release for PyTorch",
                printable(name)
            );
        }
    }
    "give the directory that holds model.safetensors or its shards".to_owned()
}

/// Endings of weights that other frameworks write.
const OTHERS: [(&str, &str); 6] = [
    (".h5", "of TensorFlow or Keras"),
    (".keras", "of Keras"),
    (".msgpack", "of Flax"),
    (".onnx", "a graph in ONNX"),
    (".nemo", "an archive of NeMo"),
    (".pb", "a graph of TensorFlow"),
];

/// The step of a directory that a trainer wrote.
fn step(name: &str) -> Option<u64> {
    numbered(name, "checkpoint-")
}

fn numbered(name: &str, prefix: &str) -> Option<u64> {
    name.strip_prefix(prefix)?.parse().ok()
}
