//! Requests to stores: one client for each bucket, two threads that wait for all of them.

use super::failure::{Failure, NO_OBJECT, OTHER_ETAG, credentials, told};
use super::location::{Location, Scheme};
use crate::{Error, Result};
use bytes::Bytes;
use futures::StreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path as Key;
use object_store::{
    ClientConfigKey, ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, RetryConfig,
};
use std::collections::HashMap;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Threads that wait for answers. They copy bytes from sockets and decrypt them, and do nothing else.
const THREADS: usize = 2;
/// Seconds that one answer may take. The crate's own 30 are too few for 8 MiB over a slow line.
const ANSWER: &str = "300s";
/// How long to look for credentials that the environment does not give.
const LOOKING: Duration = Duration::from_secs(10);
/// How often an answer that ends early, though the server said that it is whole, is asked for.
const SHORT_ANSWERS: usize = 3;

/// How long a first contact is tried again, seconds of growing pauses in all some six: an address may be wrong. What is
/// read later is tried as long as the crate does by itself, three minutes.
const FIRST_RETRIES: usize = 6;

type Store = Arc<dyn ObjectStore>;

/// The clients of one bucket, which differ in their patience.
#[derive(Debug, Clone)]
struct Stores {
    first: Store,
    later: Store,
}

struct Client {
    process: u32,
    runtime: Runtime,
    stores: Mutex<HashMap<(String, u64), Stores>>,
}

static CLIENT: Mutex<Option<Arc<Client>>> = Mutex::new(None);

/// Stores that stand in for those of an address.
static MOUNTED: Mutex<Vec<(String, Store)>> = Mutex::new(Vec::new());

/// Lets a store answer in place of the one at an address such as `s3://bucket`, in this process. For tests.
pub fn mount_store(root: &str, store: Store) {
    MOUNTED.lock().unwrap_or_else(PoisonError::into_inner).push((root.to_owned(), store));
}

/// The client of this process; a child that was forked has none of its parent's threads.
fn client() -> Result<Arc<Client>> {
    let process = std::process::id();
    let mut known = CLIENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(client) = known.as_ref().filter(|client| client.process == process) {
        return Ok(Arc::clone(client));
    }
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("safemerge-store")
        .enable_all()
        .build()
        .map_err(|error| {
            Error::Option(format!("no thread can be started for requests: {error}"))
        })?;
    let client = Arc::new(Client { process, runtime, stores: Mutex::default() });
    // Not dropped: its threads are not here.
    std::mem::forget(known.replace(Arc::clone(&client)));
    Ok(client)
}

/// Starts a request; its threads run it.
pub(super) fn start(request: impl Future<Output = ()> + Send + 'static) -> Result<()> {
    client()?.runtime.spawn(request);
    Ok(())
}

/// Waits for a request.
fn wait<T>(request: impl Future<Output = T>) -> Result<T> {
    Ok(client()?.runtime.block_on(request))
}

/// An object and the store that has it.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub location: Location,
    stores: Stores,
    pub key: Key,
}

impl Target {
    pub(super) fn of(location: Location) -> Result<Self> {
        let key = match location.scheme {
            // What is written %20 there means a space.
            Scheme::Http | Scheme::Https => Key::from_url_path(&location.key),
            _ => Key::parse(&location.key),
        };
        let key = key.map_err(|_| {
            Error::unusable(&location.url(), "its path is none that an object can have; correct it")
        })?;
        Ok(Self { stores: stores(&location)?, location, key })
    }

    fn told<T>(&self, result: object_store::Result<T>) -> Result<T> {
        told(result, &self.location)
    }

    /// What the store says of the object, without its bytes; for long, if it was read before.
    pub(super) fn head(&self, known: bool) -> Result<ObjectMeta> {
        let options = GetOptions { head: true, ..GetOptions::default() };
        let store = if known { &self.stores.later } else { &self.stores.first };
        let found = wait(store.get_opts(&self.key, options))?;
        Ok(self.told(found)?.meta)
    }

    /// The first bytes, at most so many, and what the store says of the object; none if it is empty.
    pub(super) fn beginning(&self, most: u64) -> Result<Option<(ObjectMeta, Bytes)>> {
        let options =
            GetOptions { range: Some(GetRange::Bounded(0..most)), ..GetOptions::default() };
        let answer = wait(async {
            let answer = self.stores.first.get_opts(&self.key, options).await?;
            let (meta, range) = (answer.meta.clone(), answer.range.clone());
            Ok::<_, object_store::Error>((meta, range, answer.bytes().await?))
        })?;
        if let Err(error) = &answer
            && (error.to_string().contains("status code: 416")
                || matches!(self.head(false), Ok(meta) if meta.size == 0))
        {
            return Ok(None);
        }
        let (meta, range, bytes) = self.told(answer)?;
        if bytes.len() as u64 != range.end - range.start || range != (0..most.min(meta.size)) {
            return Err(
                short(bytes.len() as u64, &(0..most.min(meta.size))).error(&self.location.url())
            );
        }
        Ok(Some((meta, bytes)))
    }

    /// All bytes of a small object, which has at most so many; none if there is no such object.
    pub(super) fn whole(&self, most: u64) -> Result<Option<Bytes>> {
        wait(self.fetch(most))?.map_err(|failure| failure.error(&self.location.url()))
    }

    async fn fetch(&self, most: u64) -> Result<Option<Bytes>, Failure> {
        let failed = |error| Failure::of(&error, &self.location);
        let answer = match self.stores.first.get_opts(&self.key, GetOptions::default()).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            answer => answer.map_err(failed)?,
        };
        let size = answer.meta.size;
        if size > most {
            return Err(Failure::Refused(format!(
                "it has {size} bytes, {most} are the most allowed"
            )));
        }
        let mut bytes = Vec::new();
        let mut parts = answer.into_stream();
        while let Some(part) = parts.next().await {
            bytes.extend_from_slice(&part.map_err(failed)?);
            if bytes.len() as u64 > size {
                break;
            }
        }
        if bytes.len() as u64 != size {
            return Err(short(bytes.len() as u64, &(0..size)));
        }
        Ok(Some(bytes.into()))
    }
}

/// The whole of several small objects at a time; none in place of one that is not there.
pub(super) fn fetch_all(targets: &[Target], most: u64) -> Result<Vec<Option<Bytes>>> {
    let requests = futures::stream::iter(targets).map(|target| async move {
        target.fetch(most).await.map_err(|failure| failure.error(&target.location.url()))
    });
    wait(requests.buffered(8).collect::<Vec<_>>())?.into_iter().collect()
}

/// The objects of a directory, with their sizes: names may hold slashes.
pub(super) fn list(target: &Target, most: usize) -> Result<Vec<(String, u64)>> {
    let prefix = (!target.key.as_ref().is_empty()).then_some(&target.key);
    let listed = wait(async {
        let here = target.stores.first.list_with_delimiter(prefix).await?;
        let mut found = here.objects;
        for folder in here.common_prefixes {
            if folder.filename() == Some(TEMPLATES) {
                found.extend(target.stores.first.list_with_delimiter(Some(&folder)).await?.objects);
            }
        }
        Ok(found)
    })?;
    let objects = target.told(listed)?;
    let url = target.location.url();
    if objects.len() > most {
        return Err(Error::unusable(
            &url,
            format!(
                "it holds {} objects, {most} are the most allowed; give the directory of one model",
                objects.len()
            ),
        ));
    }
    let below = target.key.as_ref().len() + usize::from(prefix.is_some());
    let named = |object: &ObjectMeta| {
        Some((object.location.as_ref().get(below..)?.to_owned(), object.size))
    };
    Ok(objects.iter().filter_map(named).filter(|(name, _)| !name.is_empty()).collect())
}

/// A folder of a model's directory whose files belong to it.
const TEMPLATES: &str = "additional_chat_templates";

/// Bytes of the object that has this ETag and size, all of the range.
///
/// # Errors
/// A failure if the object is another by now, and those of the store.
pub(super) async fn get_range(
    target: &Target,
    range: Range<u64>,
    etag: &str,
    size: u64,
) -> Result<Bytes, Failure> {
    let failed = |error| Failure::of(&error, &target.location);
    // A weak ETag matches nothing, by the letter of HTTP; the answer's is compared in any case.
    let if_match = (!etag.starts_with("W/")).then(|| etag.to_owned());
    let mut got = 0;
    for _ in 0..SHORT_ANSWERS {
        let options = GetOptions {
            if_match: if_match.clone(),
            range: Some(GetRange::Bounded(range.clone())),
            ..GetOptions::default()
        };
        let answer = target.stores.later.get_opts(&target.key, options).await.map_err(failed)?;
        if answer.meta.e_tag.as_deref() != Some(etag) {
            return Err(Failure::Changed(OTHER_ETAG));
        }
        if answer.meta.size != size {
            return Err(Failure::Changed("its size differs"));
        }
        let wanted = usize::try_from(range.end - range.start).unwrap_or_default();
        let mut bytes = Vec::with_capacity(wanted);
        let mut parts = answer.into_stream();
        while let Some(part) = parts.next().await {
            bytes.extend_from_slice(&part.map_err(failed)?);
            if bytes.len() > wanted {
                break;
            }
        }
        if bytes.len() == wanted {
            return Ok(bytes.into());
        }
        got = bytes.len();
    }
    Err(short(got as u64, &range))
}

/// As [`get_range`], waited for.
pub(super) fn read_range(
    target: &Target,
    range: Range<u64>,
    etag: &str,
    size: u64,
) -> Result<Bytes> {
    wait(get_range(target, range, etag, size))?
        .map_err(|failure| failure.error(&target.location.url()))
}

fn short(got: u64, range: &Range<u64>) -> Failure {
    Failure::Refused(format!(
        "the store gave {got} of the {} bytes that were asked for, and said that this was all; look at the server, or \
         upload the file again",
        range.end - range.start
    ))
}

/// The stores of a location. Credentials are looked for again where the environment has changed.
fn stores(location: &Location) -> Result<Stores> {
    let root = location.root();
    let mounted = MOUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, store)) = mounted.iter().rev().find(|(known, _)| *known == root) {
        return Ok(Stores { first: Arc::clone(store), later: Arc::clone(store) });
    }
    drop(mounted);
    let client = client()?;
    let name = (root, environment());
    if let Some(stores) = client.stores.lock().unwrap_or_else(PoisonError::into_inner).get(&name) {
        return Ok(stores.clone());
    }
    let made = make(&client, location)?;
    client.stores.lock().unwrap_or_else(PoisonError::into_inner).insert(name, made.clone());
    Ok(made)
}

/// A digest of the variables that say how stores are reached.
fn environment() -> u64 {
    let mut hasher = DefaultHasher::new();
    for (name, value) in std::env::vars_os() {
        let of_a_store = ["AWS_", "GOOGLE_", "AZURE_"];
        if name.to_str().is_some_and(|name| of_a_store.iter().any(|it| name.starts_with(it))) {
            (name, value).hash(&mut hasher);
        }
    }
    hasher.finish()
}

macro_rules! both {
    ($location:expr, $builder:expr) => {{
        let builder = $builder;
        let impatient = RetryConfig { max_retries: FIRST_RETRIES, ..RetryConfig::default() };
        let first = told(builder.clone().with_retry(impatient).build(), $location)?;
        let later = told(builder.build(), $location)?;
        Stores { first: Arc::new(first), later: Arc::new(later) }
    }};
}

/// Builds a client of one of the three clouds, and sees to it that there are credentials.
macro_rules! cloud {
    ($client:expr, $location:expr, $builder:expr, $keys:ident, $timeout:literal, $given:expr) => {{
        let location: &Location = $location;
        let mut builder = $builder;
        if std::env::var_os($timeout).is_none() {
            builder = builder.with_config($keys::Client(ClientConfigKey::Timeout), ANSWER);
        }
        let unsigned = builder.get_config_value(&$keys::SkipSignature);
        let unsigned =
            unsigned.is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1");
        if !unsigned && !$given {
            let quick =
                RetryConfig { max_retries: 1, retry_timeout: LOOKING, ..RetryConfig::default() };
            let looking = told(builder.clone().with_retry(quick).build(), location)?;
            let found = $client.runtime.block_on(async {
                tokio::time::timeout(LOOKING, looking.credentials().get_credential()).await
            });
            if !matches!(found, Ok(Ok(_))) {
                let problem = format!(
                    "no usable credentials were found in the environment or from this machine; {}",
                    credentials(location.scheme)
                );
                return Err(Error::remote(&location.url(), problem));
            }
        }
        both!(location, builder)
    }};
}

fn make(client: &Client, location: &Location) -> Result<Stores> {
    let host = location.host.as_str();
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    Ok(match location.scheme {
        Scheme::S3 => {
            let builder = AmazonS3Builder::from_env().with_bucket_name(host);
            let given = set("AWS_ACCESS_KEY_ID") && set("AWS_SECRET_ACCESS_KEY");
            cloud!(client, location, builder, AmazonS3ConfigKey, "AWS_TIMEOUT", given)
        }
        Scheme::Gs => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(host);
            cloud!(client, location, builder, GoogleConfigKey, "GOOGLE_TIMEOUT", false)
        }
        Scheme::Az => {
            if !set("AZURE_STORAGE_ACCOUNT_NAME") && !set("AZURE_STORAGE_USE_EMULATOR") {
                let problem =
                    "nothing says which account it belongs to; set AZURE_STORAGE_ACCOUNT_NAME";
                return Err(Error::remote(&location.url(), problem));
            }
            let builder = MicrosoftAzureBuilder::from_env().with_container_name(host);
            let given = set("AZURE_STORAGE_ACCOUNT_KEY");
            cloud!(client, location, builder, AzureConfigKey, "AZURE_TIMEOUT", given)
        }
        Scheme::Http | Scheme::Https => {
            let plain = location.scheme == Scheme::Http;
            let options =
                ClientOptions::new().with_allow_http(plain).with_timeout(Duration::from_secs(300));
            let builder = HttpBuilder::new().with_url(location.root()).with_client_options(options);
            both!(location, builder)
        }
    })
}

/// Bytes of a small file that lies in a store.
pub(in crate::checkpoint) fn read_small(path: &Path, most: u64) -> Result<Vec<u8>> {
    let target = Target::of(Location::parse(path)?)?;
    let missing = || Failure::Missing(NO_OBJECT.to_owned()).error(path);
    target.whole(most)?.map(Vec::from).ok_or_else(missing)
}
