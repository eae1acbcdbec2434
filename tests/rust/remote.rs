//! Checkpoints in a store in memory: what is read equals what lies on disk, and a change is noticed by the read itself.

use crate::fixtures::{Tensor, noise, write};
use futures::executor::block_on;
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};
use safemerge_fast::Error;
use safemerge_fast::checkpoint::{Checkpoint, mount_store};
use safetensors::Dtype;
use std::path::Path;
use std::sync::Arc;

const MEBI: usize = 1 << 20;

/// Puts the files of a directory into a new store at this address.
fn upload(root: &str, directory: &Path) -> Arc<dyn ObjectStore> {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        put(&store, path.file_name().unwrap().to_str().unwrap(), std::fs::read(&path).unwrap());
    }
    mount_store(root, Arc::clone(&store));
    store
}

fn put(store: &Arc<dyn ObjectStore>, name: &str, bytes: Vec<u8>) {
    block_on(store.put(&format!("some/model/{name}").into(), bytes.into())).unwrap();
}

/// Tensors of more than two blocks of 8 MiB, and small ones around their borders.
fn tensors() -> Vec<Tensor> {
    let f32 = |name: &str, count: usize, seed| {
        Tensor::new(name, Dtype::F32, &[count], noise(seed, 4 * count))
    };
    vec![
        f32("a", 3, 1),
        f32("b", 5 * MEBI, 2),
        f32("c", 1, 3),
        f32("d", 1000, 4),
        f32("e", MEBI, 5),
        f32("f", 0, 6),
    ]
}

#[test]
fn every_range_is_that_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("model.safetensors"), &tensors());
    upload("s3://every-range", directory.path());
    let here = Checkpoint::open(directory.path()).unwrap();
    let there = Checkpoint::open(Path::new("s3://every-range/some/model/")).unwrap();
    assert!(there.is_remote() && !here.is_remote());
    assert_eq!(there.path(), Path::new("s3://every-range/some/model"));
    let identity = |it: &Checkpoint| it.shards()[0].header.identity.clone();
    assert_eq!(identity(&here).header_digest, identity(&there).header_digest);
    assert_eq!(identity(&here).size, identity(&there).size);
    let (file, object) = (here.file(0).unwrap(), there.file(0).unwrap());
    assert!(object.is_remote() && object.mapped().is_none());
    let size = usize::try_from(file.size()).unwrap();
    let whole = file.mapped().unwrap();
    let mut seed = 7_usize;
    // Short and long ones, at hand or not, across borders and up to the end.
    for number in 0..200 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let start = (seed >> 20) % size;
        let longest = if number % 3 == 0 { 12 * MEBI } else { 9000 };
        let end = size.min(start + (seed >> 7) % longest);
        let mut bytes = vec![0; end - start];
        if number % 5 == 0 {
            object.prefetch(start..end);
        }
        object.read(start..end, &mut bytes).unwrap();
        assert!(bytes == whole[start..end], "{start}..{end}");
    }
    there.check_unchanged().unwrap();
}

#[test]
fn many_threads_read_one_object() {
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("model.safetensors"), &tensors());
    upload("s3://many-threads", directory.path());
    let bytes = std::fs::read(directory.path().join("model.safetensors")).unwrap();
    let there = Checkpoint::open(Path::new("s3://many-threads/some/model")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (there, bytes) = (&there, &bytes);
            scope.spawn(move || {
                let file = there.file(0).unwrap();
                for start in (thread * 1000..bytes.len()).step_by(3 * MEBI) {
                    let end = bytes.len().min(start + 4 * MEBI);
                    file.prefetch(start..end);
                    let mut read = vec![0; end - start];
                    file.read(start..end, &mut read).unwrap();
                    assert!(read == bytes[start..end]);
                }
            });
        }
    });
}

#[test]
fn a_change_is_noticed_by_the_read() {
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("model.safetensors"), &tensors());
    let store = upload("s3://a-change", directory.path());
    let there = Checkpoint::open(Path::new("s3://a-change/some/model")).unwrap();
    let mut bytes = std::fs::read(directory.path().join("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    put(&store, "model.safetensors", bytes);
    for length in [10, 3 * MEBI] {
        let error = there.file(0).unwrap().read(1000..1000 + length, &mut vec![0; length]);
        let Err(Error::InputChanged { what, .. }) = &error else { panic!("{error:?}") };
        assert_eq!(*what, "its ETag differs");
    }
    assert!(matches!(there.check_unchanged(), Err(Error::InputChanged { .. })));
    block_on(store.delete(&"some/model/model.safetensors".into())).unwrap();
    assert!(matches!(there.check_unchanged(), Err(Error::Remote { missing: true, .. })));
}

#[test]
fn shards_and_their_index_are_found() {
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("one.safetensors"), &[Tensor::f32("x", &[1.0, 2.0])]);
    write(&directory.path().join("two.safetensors"), &[Tensor::f32("y", &[3.0])]);
    let index = r#"{"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}"#;
    std::fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    let store = upload("gs://shards", directory.path());
    let there = Checkpoint::open(Path::new("gs://shards/some/model")).unwrap();
    assert_eq!(there.shards().len(), 2);
    let (shard, entry) = there.locate("y").unwrap();
    let mut bytes = [0; 4];
    there.file(shard).unwrap().read(entry.range, &mut bytes).unwrap();
    assert_eq!(f32::from_le_bytes(bytes), 3.0);
    let single = Checkpoint::open(Path::new("gs://shards/some/model/one.safetensors")).unwrap();
    assert_eq!(single.len(), 1);
    block_on(store.delete(&"some/model/two.safetensors".into())).unwrap();
    let error = Checkpoint::open(Path::new("gs://shards/some/model")).unwrap_err();
    assert!(error.to_string().contains("gs://shards/some/model/two.safetensors"), "{error}");
    let error = Checkpoint::open(Path::new("gs://shards/nobody")).unwrap_err();
    assert!(error.to_string().contains("nothing is listed below it"), "{error}");
}

#[test]
fn what_is_no_weights_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("model.safetensors"), b"").unwrap();
    let store = upload("az://no-weights", directory.path());
    let open =
        || Checkpoint::open(Path::new("az://no-weights/some/model")).unwrap_err().to_string();
    assert!(open().contains("it has only 0 bytes"), "{}", open());
    put(&store, "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid".to_vec());
    assert!(open().contains("git-lfs pointer"), "{}", open());
    put(&store, "model.safetensors", b"{}".to_vec());
    assert!(open().contains("it has only 2 bytes"), "{}", open());
    put(&store, "model.safetensors", [&1000_u64.to_le_bytes()[..], b"{}"].concat());
    assert!(open().contains("truncated"), "{}", open());
}

#[test]
fn addresses_with_secrets_are_refused_without_quoting_them() {
    for address in [
        "s3://user:hidden@bucket/model",
        "https://user:hidden@host/model",
        "https://host/model.safetensors?X-Amz-Signature=hidden",
        "s3://bucket/model#hidden",
        "https://user:hid/hidden@host/model?hidden",
    ] {
        let error = Checkpoint::open(Path::new(address)).unwrap_err().to_string();
        assert!(!error.contains("hidden"), "{error}");
    }
}
