use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Image, ImageProcessor, Picture};
use crate::{Error, Result};

/// Where an image comes from.
#[derive(Clone, Debug)]
pub enum ImageSource {
    /// A PNG, JPEG or WebP file; a leading `file://` is taken off.
    Path(PathBuf),
    /// The contents of such a file, and a name for errors.
    Bytes {
        /// Encoded picture.
        bytes: Arc<[u8]>,
        /// Stands for the picture in errors.
        name: String,
    },
    /// Decoded pixels, and a name for errors.
    Picture {
        /// Decoded picture.
        picture: Arc<Picture>,
        /// Stands for the picture in errors.
        name: String,
    },
}

/// What a [`Preprocessor`] holds and has done, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PreprocessorStats {
    /// Bytes of pixels in the cache.
    pub cached_bytes: usize,
    /// Images in the cache.
    pub cached_images: usize,
    /// Requests that no thread has taken up yet.
    pub queued: usize,
    /// Images decoded and resized, all told.
    pub processed: u64,
    /// Requests answered by the cache or by work that was already under way.
    pub shared: u64,
}

/// Decodes and resizes images on threads of its own, and keeps the results, by content, up to a number of bytes.
///
/// [`submit`](Preprocessor::submit) returns at once; reading, hashing, decoding and resizing all happen on the
/// threads, one image per thread at a time. The same content asked for twice, from whatever path, is processed once,
/// also while the first request is under way. A request whose handle was dropped is skipped. Dropping the
/// preprocessor ends its threads; what is then unfinished is answered with [`Error::Cancelled`].
pub struct Preprocessor {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// The promise of one image.
pub struct ImageHandle {
    slot: Arc<Slot>,
}

struct Slot {
    result: Mutex<Option<Result<Arc<Image>>>>,
    filled: Condvar,
}

/// Hash of a source's content: of the encoded bytes, or of the pixels and their size.
type ContentKey = [u8; 32];

struct Shared {
    processor: ImageProcessor,
    capacity: usize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<(ImageSource, Weak<Slot>)>,
    closed: bool,
    cache: Cache,
    /// Who waits for a content that a thread is working on.
    in_flight: HashMap<ContentKey, Vec<Weak<Slot>>>,
    processed: u64,
    shared: u64,
}

/// Least recently used first out.
#[derive(Default)]
struct Cache {
    images: HashMap<ContentKey, (u64, Arc<Image>)>,
    by_age: BTreeMap<u64, ContentKey>,
    clock: u64,
    bytes: usize,
}

impl Cache {
    fn get(&mut self, key: &ContentKey) -> Option<Arc<Image>> {
        let (age, image) = self.images.get_mut(key)?;
        self.by_age.remove(age);
        self.clock += 1;
        *age = self.clock;
        self.by_age.insert(self.clock, *key);
        Some(image.clone())
    }

    fn insert(&mut self, key: ContentKey, image: Arc<Image>, capacity: usize) {
        let size = image.pixels.len();
        if size > capacity || self.images.contains_key(&key) {
            return;
        }
        self.clock += 1;
        self.bytes += size;
        self.by_age.insert(self.clock, key);
        self.images.insert(key, (self.clock, image));
        while self.bytes > capacity {
            let Some((_, oldest)) = self.by_age.pop_first() else { break };
            if let Some((_, image)) = self.images.remove(&oldest) {
                self.bytes -= image.pixels.len();
            }
        }
    }
}

/// A panic while the lock was held leaves counters and queues that are still whole: nothing here is half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Slot {
    fn fill(&self, result: Result<Arc<Image>>) {
        *lock(&self.result) = Some(result);
        self.filled.notify_all();
    }
}

impl ImageHandle {
    /// Waits for the image.
    ///
    /// # Errors
    /// What [`ImageProcessor::process`] says, a file that cannot be read, or [`Error::Cancelled`].
    pub fn wait(self) -> Result<Arc<Image>> {
        let mut result = lock(&self.slot.result);
        loop {
            if let Some(result) = result.take() {
                return result;
            }
            result = self.slot.filled.wait(result).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Waits for at most `timeout`; gives the handle back where the image is not ready by then.
    ///
    /// # Errors
    /// Of the inner result: the image's, as [`wait`](Self::wait).
    pub fn wait_timeout(self, timeout: Duration) -> std::result::Result<Result<Arc<Image>>, ImageHandle> {
        // `None`: later than a clock can say.
        let until = Instant::now().checked_add(timeout);
        let mut result = lock(&self.slot.result);
        loop {
            if let Some(result) = result.take() {
                return Ok(result);
            }
            let left = until.map_or(timeout, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                drop(result);
                return Err(self);
            }
            result = match self.slot.filled.wait_timeout(result, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Whether [`wait`](ImageHandle::wait) would return at once.
    pub fn is_ready(&self) -> bool {
        lock(&self.slot.result).is_some()
    }
}

impl Preprocessor {
    /// Starts `threads` threads (at least one) that keep up to `cache_bytes` bytes of resized pixels.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(processor: ImageProcessor, threads: usize, cache_bytes: usize) -> Result<Self> {
        let shared = Arc::new(Shared {
            processor,
            capacity: cache_bytes,
            state: Mutex::new(State::default()),
            work: Condvar::new(),
        });
        let mut this = Preprocessor { shared: shared.clone(), threads: Vec::new() };
        for n in 0..threads.max(1) {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name(format!("image-{n}")).spawn(move || work(&shared));
            this.threads.push(thread.map_err(|e| {
                Error::limit(
                    format!("the system gives no thread for images: {e}"),
                    "raise the limit on threads (ulimit -u)",
                )
            })?);
        }
        Ok(this)
    }

    /// The settings images are made with.
    pub fn processor(&self) -> &ImageProcessor {
        &self.shared.processor
    }

    /// Asks for an image; returns at once. Drop the handle to let it be.
    pub fn submit(&self, source: ImageSource) -> ImageHandle {
        let slot = Arc::new(Slot { result: Mutex::new(None), filled: Condvar::new() });
        lock(&self.shared.state).queue.push_back((source, Arc::downgrade(&slot)));
        self.shared.work.notify_one();
        ImageHandle { slot }
    }

    /// Asks for all `sources` and waits: their images in order, or the first error.
    pub fn load_all(&self, sources: impl IntoIterator<Item = ImageSource>) -> Result<Vec<Arc<Image>>> {
        let handles: Vec<ImageHandle> = sources.into_iter().map(|s| self.submit(s)).collect();
        handles.into_iter().map(ImageHandle::wait).collect()
    }

    /// What is held and was done up to now.
    pub fn stats(&self) -> PreprocessorStats {
        let state = lock(&self.shared.state);
        PreprocessorStats {
            cached_bytes: state.cache.bytes,
            cached_images: state.cache.images.len(),
            queued: state.queue.len(),
            processed: state.processed,
            shared: state.shared,
        }
    }
}

impl Drop for Preprocessor {
    fn drop(&mut self) {
        let left = {
            let mut state = lock(&self.shared.state);
            state.closed = true;
            std::mem::take(&mut state.queue)
        };
        self.shared.work.notify_all();
        for (_, slot) in left {
            if let Some(slot) = slot.upgrade() {
                slot.fill(Err(Error::Cancelled("the image preprocessor was shut down".into())));
            }
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to hand over.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared) {
    let mut state = lock(&shared.state);
    loop {
        if state.closed {
            return;
        }
        let Some((source, slot)) = state.queue.pop_front() else {
            state = shared.work.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
            continue;
        };
        drop(state);
        if slot.strong_count() > 0 {
            serve(shared, source, slot);
        }
        state = lock(&shared.state);
    }
}

/// Answers one request, and all others that came for the same content meanwhile.
fn serve(shared: &Shared, source: ImageSource, slot: Weak<Slot>) {
    let content = match Content::read(source) {
        Ok(content) => content,
        Err(e) => {
            if let Some(slot) = slot.upgrade() {
                slot.fill(Err(e));
            }
            return;
        }
    };
    let key = content.key();
    {
        let mut state = lock(&shared.state);
        if let Some(image) = state.cache.get(&key) {
            state.shared += 1;
            drop(state);
            if let Some(slot) = slot.upgrade() {
                slot.fill(Ok(image));
            }
            return;
        }
        if let Some(waiting) = state.in_flight.get_mut(&key) {
            waiting.push(slot);
            state.shared += 1;
            return;
        }
        state.in_flight.insert(key, vec![slot]);
    }
    // Whatever happens in there, the others who wait for this content must hear of it.
    let result = catch_unwind(AssertUnwindSafe(|| content.process(&shared.processor).map(Arc::new)))
        .unwrap_or_else(|_| Err(Error::internal("an image thread panicked")));
    let waiting = {
        let mut state = lock(&shared.state);
        state.processed += 1;
        if let Ok(image) = &result {
            state.cache.insert(key, image.clone(), shared.capacity);
        }
        state.in_flight.remove(&key).unwrap_or_default()
    };
    for slot in waiting.iter().filter_map(Weak::upgrade) {
        slot.fill(match &result {
            Ok(image) => Ok(image.clone()),
            Err(e) => Err(copy(e)),
        });
    }
}

/// A source with its bytes at hand.
enum Content {
    Encoded { bytes: Arc<[u8]>, name: String },
    Decoded { picture: Arc<Picture>, name: String },
}

impl Content {
    fn read(source: ImageSource) -> Result<Self> {
        Ok(match source {
            ImageSource::Path(path) => {
                let path = path.to_str().and_then(|p| p.strip_prefix("file://")).map(PathBuf::from).unwrap_or(path);
                let bytes = crate::files::read(&path).map_err(|e| Error::io("read the picture", &path, e))?;
                Content::Encoded { bytes: bytes.into(), name: path.display().to_string() }
            }
            ImageSource::Bytes { bytes, name } => Content::Encoded { bytes, name },
            ImageSource::Picture { picture, name } => Content::Decoded { picture, name },
        })
    }

    fn key(&self) -> ContentKey {
        let mut hasher = blake3::Hasher::new();
        match self {
            Content::Encoded { bytes, .. } => hasher.update(b"encoded").update(bytes),
            Content::Decoded { picture, .. } => hasher
                .update(b"decoded")
                .update(&(picture.height as u64).to_le_bytes())
                .update(&(picture.width as u64).to_le_bytes())
                .update(&picture.pixels),
        };
        *hasher.finalize().as_bytes()
    }

    fn process(self, processor: &ImageProcessor) -> Result<Image> {
        match self {
            Content::Encoded { bytes, name } => processor.process(&bytes, &name),
            Content::Decoded { picture, name } => processor.process_picture(Arc::unwrap_or_clone(picture), &name),
        }
    }
}

/// One failure may answer several requests.
fn copy(error: &Error) -> Error {
    match error {
        Error::Input { what, mend } => Error::input(what.clone(), mend.clone()),
        Error::Limit { what, mend } => Error::limit(what.clone(), mend.clone()),
        other => Error::internal(other.to_string()),
    }
}
