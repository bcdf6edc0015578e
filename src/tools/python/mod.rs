//! The `python` tool: runs a model's Python/OpenCV code on images, a few milliseconds a call.
//!
//! A *warm process* has imported numpy, OpenCV and Pillow; each call is a fork of it, so that no call pays for starting
//! an interpreter (a quarter of a second) or sees what another one did. Images go over as raw pixels in
//! memory files, in both directions; no call encodes or decodes a PNG.
//!
//! # What the code finds
//! | name | what it is |
//! |---|---|
//! | `image` | the image being worked on (the last of the call's), height x width x 3, `uint8`, **BGR** as OpenCV has it |
//! | `image_path` | a file with the same image |
//! | `images`, `image_paths` | all images of the call, in the order in which the model saw them |
//! | `np`, `cv2`, `Image` | numpy, OpenCV, `PIL.Image` |
//!
//! So the shortest useful call is `image = cv2.rotate(image, cv2.ROTATE_180)`.
//!
//! # What becomes the result image
//! The first of these that there is, taken as BGR where it is an array (uint8; other types are clipped to 0..255):
//! 1. what the code last saved, by `cv2.imwrite` or Pillow's `save`;
//! 2. the variable `result`, if it holds an image;
//! 3. the variable `image`, if it is no longer the image that came in.
//!
//! Code that names files of its own invention, as that of the published data does (`cv2.imread('path_to_input_image.jpg')` ...
//! `cv2.imwrite('path_to_output_image.jpg', x)`), works as its author meant it: OpenCV and Pillow read a path that does not exist as
//! the image being worked on, and write a path outside the scratch folder inside it. What `cv2.imwrite` writes is kept
//! as it is, without loss from JPEG.
//!
//! # What holds a call
//! Limits on processor time, address space, file size (of one, and four times that of all), output and open files; no further processes or threads; a
//! scratch folder of its own, removed afterwards; an empty environment; no descriptors but its own; the end of its process group when
//! it ends. `time.sleep` returns at once, as only processor time is limited; code that waits in another way until the limit by
//! the clock has failed, while code that the machine left no time to run is a failure of the machinery. Where varft runs as root, each call runs as a user of its
//! own without root's rights, except to read files, and where it may, the process has System V memory of its own. **Not yet
//! held**: reading files and using the network as the user that runs varft, writing to folders that everybody may write to (what
//! a call leaves in `/tmp` or `/dev/shm` stays there), and where that user is not root also writing files and signalling
//! processes as that user. That takes namespaces, Landlock and seccomp, behind the same interface.

mod call;
pub mod environment;
mod process;
mod scratch;
mod sys;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use self::call::Failure;
use self::process::Zygote;
use self::scratch::Remover;
use super::{Outcome, Tool, ToolCall, ToolResult, Usage};
use crate::{Error, Result};

/// How often a call is tried when the machinery fails in a way that another attempt may mend.
const ATTEMPTS: u32 = 3;
/// Calls that one warm process serves at once before a second one pays for itself.
const CALLS_PER_PROCESS: usize = 8;

/// How to set up a [`PythonTool`].
#[derive(Clone, Debug)]
pub struct PythonOptions {
    /// Where the Python environment is found or made.
    pub search: environment::Search,
    /// Calls that run at once; more wait. Default: one per core.
    pub concurrency: usize,
    /// Where the scratch folders of calls are made. Default: the system's temporary folder.
    pub scratch: PathBuf,
}

impl Default for PythonOptions {
    fn default() -> Self {
        PythonOptions {
            search: environment::Search::default(),
            concurrency: std::thread::available_parallelism().map_or(1, |n| n.get()),
            scratch: std::env::temp_dir(),
        }
    }
}

/// What the warm process has imported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// Python's version.
    pub python: String,
    /// numpy's.
    pub numpy: String,
    /// OpenCV's.
    pub cv2: String,
    /// Pillow's.
    pub pillow: String,
}

/// The `python` tool. See the [module](self) for what code finds and gives back.
///
/// Dropping it ends its processes; so does the end of this process, however it ends.
pub struct PythonTool {
    zygotes: Vec<Zygote>,
    remover: Remover,
    free: Mutex<usize>,
    freed: Condvar,
    next: AtomicU64,
    root: PathBuf,
    python: PathBuf,
}

impl PythonTool {
    /// Finds or makes the Python environment and starts the first warm process.
    ///
    /// # Errors
    /// Those of [`environment::Search::find`]; [`Error::Tool`] where the interpreter does not start or lacks a module.
    pub fn new(options: PythonOptions) -> Result<Self> {
        let python = options.search.find()?;
        let n = options.concurrency.max(1);
        // A name that no other process, living or dead, has: the number of this one may come again.
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = options.scratch.join(format!("varft-{}-{count}-{nanos:x}", std::process::id()));
        let zygotes = (0..n.div_ceil(CALLS_PER_PROCESS)).map(|i| Zygote::new(python.clone(), root.join(i.to_string())));
        let tool = PythonTool {
            zygotes: zygotes.collect(),
            remover: Remover::new()?,
            free: Mutex::new(n),
            freed: Condvar::new(),
            next: AtomicU64::new(0),
            root,
            python,
        };
        tool.versions()?;
        Ok(tool)
    }

    /// What the warm process has imported; starts it if it does not run.
    ///
    /// # Errors
    /// [`Error::Tool`] where it does not start.
    pub fn versions(&self) -> Result<Versions> {
        self.zygotes[0].ensure().map_err(failed)
    }

    /// The interpreter in use.
    pub fn interpreter(&self) -> &std::path::Path {
        &self.python
    }

    /// Runs a small program through the whole of the machinery.
    ///
    /// # Errors
    /// [`Error::Tool`] where any part of it does not work.
    pub fn check(&self) -> Result<Usage> {
        let image = image::RgbImage::from_fn(3, 2, |x, y| image::Rgb([x as u8, y as u8, 7]));
        let turned = image::imageops::rotate180(&image);
        let code = "image = cv2.rotate(image, cv2.ROTATE_180)\nprint('works')";
        let result = self.run(ToolCall::new(code).image(image.into()))?;
        if result.outcome != Outcome::Ok || result.stdout != "works\n" || result.image != Some(turned) {
            return Err(failed(format!("a check gave the wrong result: {result:?}")));
        }
        Ok(result.usage)
    }

    /// The process ids of the warm processes that run.
    pub fn processes(&self) -> Vec<u32> {
        self.zygotes.iter().filter_map(Zygote::pid).collect()
    }

    fn attempt(&self, call: &ToolCall) -> Result<ToolResult> {
        let mut killed = false;
        let mut attempt = 0;
        loop {
            attempt += 1;
            // The least busy; the choice may be stale by the time it is used, which costs nothing but balance.
            let least = self.zygotes.iter().min_by_key(|z| z.in_flight.load(Ordering::Relaxed));
            let Some(zygote) = least else { return Err(Error::internal("a python tool without a process")) };
            zygote.in_flight.fetch_add(1, Ordering::Relaxed);
            let result = call::run(zygote, &self.remover, call, self.next.fetch_add(1, Ordering::Relaxed));
            zygote.in_flight.fetch_sub(1, Ordering::Relaxed);
            match result {
                Ok(result) => return Ok(result),
                Err(Failure::Final(what)) => return Err(failed(what)),
                Err(Failure::Again(what)) if attempt >= ATTEMPTS => {
                    return Err(failed(format!("{what} ({attempt} attempts)")));
                }
                Err(Failure::Again(_)) => {}
                Err(Failure::Killed) if killed => {
                    let outcome = Outcome::ProgramError("The code killed its own process.".into());
                    let (stdout, stderr, usage) = Default::default();
                    return Ok(ToolResult { outcome, stdout, stderr, image: None, usage });
                }
                Err(Failure::Killed) => killed = true,
            }
        }
    }
}

fn failed(what: String) -> Error {
    Error::Tool { tool: "python".into(), what }
}

impl Tool for PythonTool {
    fn name(&self) -> &str {
        "python"
    }

    fn run(&self, call: ToolCall) -> Result<ToolResult> {
        let begun = Instant::now();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        drop(free);
        let queued = begun.elapsed();
        let _slot = Slot(self);
        let mut result = self.attempt(&call)?;
        result.usage.queued = queued;
        Ok(result)
    }
}

/// A place among the calls that run at once.
struct Slot<'a>(&'a PythonTool);

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

impl Drop for PythonTool {
    fn drop(&mut self) {
        self.remover.finish();
        self.zygotes.clear(); // ends the processes, which remove their folders
        let _ = std::fs::remove_dir(&self.root);
    }
}
