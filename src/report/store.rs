use super::view::{EpisodeView, ImageRef, Phase};
use crate::{Error, Result};
use image::{ExtendedColorType, ImageEncoder, codecs::png};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The `trajectories/` folder of a run: episodes as JSON lines, images once each.
///
/// Shared by threads: images may be put from wherever they are made.
pub struct TrajectoryStore {
    dir: PathBuf,
    images: PathBuf,
    known: Mutex<HashSet<ImageRef>>,
}

/// One file of episodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrajectoryFile {
    /// Training or evaluation.
    pub phase: Phase,
    /// Completed optimizer steps when its episodes were rolled out.
    pub step: u64,
    /// Where it is.
    pub path: PathBuf,
}

impl TrajectoryStore {
    /// The store of the run in `run_dir`; folders are made if missing.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be made.
    pub fn open(run_dir: &Path) -> Result<TrajectoryStore> {
        let dir = run_dir.join("trajectories");
        let images = dir.join("images");
        std::fs::create_dir_all(&images).map_err(|e| Error::io("create the folder", &images, e))?;
        Ok(TrajectoryStore { dir, images, known: Mutex::default() })
    }

    /// Writes an image (RGB rows, `width * height * 3` bytes) unless it is there already, and gives its name.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn image(&self, width: u32, height: u32, rgb: &[u8]) -> Result<ImageRef> {
        assert_eq!(rgb.len(), width as usize * height as usize * 3, "an RGB image of {width} x {height}");
        let mut hasher = blake3::Hasher::new();
        hasher.update(&width.to_le_bytes()).update(&height.to_le_bytes()).update(rgb);
        let name = ImageRef(hasher.finalize().to_hex()[..32].to_string());
        if self.known.lock().is_ok_and(|k| k.contains(&name)) {
            return Ok(name);
        }
        let path = self.images.join(format!("{}.png", name.0));
        if !path.exists() {
            let mut bytes = Vec::new();
            png::PngEncoder::new_with_quality(&mut bytes, png::CompressionType::Fast, png::FilterType::Adaptive)
                .write_image(rgb, width, height, ExtendedColorType::Rgb8)
                .map_err(|e| Error::internal(format!("encoding a PNG of {width} x {height}: {e}")))?;
            replace(&path, &bytes)?;
        }
        if let Ok(mut known) = self.known.lock() {
            known.insert(name.clone());
        }
        Ok(name)
    }

    /// Writes the episodes of one step, all of `phase`, in place of any that were there.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be written.
    pub fn write(&self, phase: Phase, step: u64, episodes: &[EpisodeView]) -> Result<()> {
        let mut bytes = Vec::new();
        for e in episodes {
            serde_json::to_writer(&mut bytes, e).map_err(|e| Error::internal(format!("an episode as JSON: {e}")))?;
            bytes.push(b'\n');
        }
        replace(&self.dir.join(format!("{}-{step:06}.jsonl", phase.name())), &bytes)
    }

    /// Drops episodes of steps after `step`, which a session wrote that was lost after its last checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be removed.
    pub fn cut(&self, step: u64) -> Result<()> {
        for file in self.files()?.into_iter().filter(|f| f.step > step) {
            std::fs::remove_file(&file.path).map_err(|e| Error::io("remove", &file.path, e))?;
        }
        Ok(())
    }

    /// The files of episodes: evaluation first, each phase by ascending step.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be read.
    pub fn files(&self) -> Result<Vec<TrajectoryFile>> {
        let mut out = Vec::new();
        let bad = |e| Error::io("list", &self.dir, e);
        for entry in std::fs::read_dir(&self.dir).map_err(bad)? {
            let path = entry.map_err(bad)?.path();
            let stem = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".jsonl"));
            let Some((phase, step)) = stem.and_then(|s| s.split_once('-')) else { continue };
            let Some(phase) = [Phase::Eval, Phase::Train].into_iter().find(|p| p.name() == phase) else { continue };
            if let Ok(step) = step.parse() {
                out.push(TrajectoryFile { phase, step, path });
            }
        }
        out.sort();
        Ok(out)
    }

    /// How many episodes are in a file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read.
    pub fn count(&self, file: &TrajectoryFile) -> Result<usize> {
        let failed = |e| Error::io("read", &file.path, e);
        let f = crate::files::open(&file.path).map_err(failed)?;
        BufReader::new(f).split(b'\n').try_fold(0, |n, line| line.map(|_| n + 1)).map_err(failed)
    }

    /// The episodes of a file from its start, in whole groups, at most `max` of them; but a first group that is larger, cut to
    /// `max`. And how many there are in the file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Input`] when a line is not an episode.
    pub fn read(&self, file: &TrajectoryFile, max: usize) -> Result<(Vec<EpisodeView>, usize)> {
        let f = crate::files::open(&file.path).map_err(|e| Error::io("open", &file.path, e))?;
        let mut out: Vec<EpisodeView> = Vec::new();
        let mut all = 0;
        for (n, line) in BufReader::new(f).lines().enumerate() {
            let line = line.map_err(|e| Error::io("read", &file.path, e))?;
            all += 1;
            // One more than is wanted shows whether the last group is whole.
            if out.len() > max {
                continue;
            }
            out.push(serde_json::from_str(&line).map_err(|e| {
                Error::input(
                    format!("{}, line {}: not an episode: {e}", file.path.display(), n + 1),
                    "delete that file; the rest of the run can be shown without it",
                )
            })?);
        }
        if let Some(next) = out.get(max) {
            let group = next.group;
            let whole = out[..max].iter().rposition(|e| e.group != group).map_or(max, |last| last + 1);
            out.truncate(whole);
        }
        Ok((out, all))
    }

    /// Where an image lies; none when `name` is not a name that [`image`](Self::image) gives.
    pub fn image_path(&self, name: &ImageRef) -> Option<PathBuf> {
        let sound = name.0.len() == 32 && name.0.bytes().all(|b| b.is_ascii_hexdigit());
        sound.then(|| self.images.join(format!("{}.png", name.0)))
    }
}

/// Writes a file beside `path` and renames it there: readers see the old or the new one, whole.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("file");
    let tmp = path.with_file_name(format!(".{name}.{:?}.tmp", std::thread::current().id()));
    let written = File::create(&tmp).and_then(|mut f| f.write_all(bytes)).and_then(|()| std::fs::rename(&tmp, path));
    written.map_err(|e| {
        // A disk that is full should not stay full of halves.
        let _ = std::fs::remove_file(&tmp);
        Error::io("write", path, e)
    })
}
