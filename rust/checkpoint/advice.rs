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
            "it is a distributed checkpoint (.distcp); consolidate it with `accelerate merge-weights {here} OUT` \
             and give OUT"
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
    let pickles = [".bin", ".pth", ".pt", ".ckpt"];
    if let Some(name) = pickles.iter().find_map(|suffix| ending(suffix)) {
        return format!(
            "{} is a pickle, which is not opened; load the model with transformers and save_pretrained it",
            printable(name)
        );
    }
    if let Some(name) = ending(".gguf") {
        return format!("{} is in GGUF; give the model that it was made of", printable(name));
    }
    "give the directory that holds model.safetensors or its shards".to_owned()
}

/// The step of a directory that a trainer wrote.
fn step(name: &str) -> Option<u64> {
    name.strip_prefix("checkpoint-")?.parse().ok()
}
