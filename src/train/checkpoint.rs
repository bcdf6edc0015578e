//! Checkpoints: folders `step-N` that are whole or not there, and found again after a crash.
//!
//! A checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed. So a run that is killed,
//! or whose disk is full, has the checkpoints it had before. `train_state.json`, written last, lists every file with
//! its size and BLAKE3 hash; a folder that does not match its list (copied half, or damaged since) is passed over for an
//! earlier one. Checkpoints of before there were hashes are told by sizes alone.
//!
//! What lies in it: the model as a Hugging Face folder (transformers loads it as it is), `optimizer.safetensors`, and
//! `train_state.json`. All noise in this program is drawn by counter (seed, episode, position), and the order of the data is a
//! function of the seed, so the number of completed steps says where both go on.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Where training stands, apart from the weights and the optimizer's moments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainState {
    /// The command it belongs to: `sft` or `train`.
    pub kind: String,
    /// Completed steps.
    pub step: u64,
    /// Updates that the optimizer has taken; fewer than asked for if some were skipped.
    pub updates: u64,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    #[serde(flatten)]
    state: TrainState,
    /// Every other file of the checkpoint, with its bytes.
    files: BTreeMap<String, u64>,
    /// BLAKE3 of each of them, and, under this file's own name, of the state and the list above.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    blake3: BTreeMap<String, String>,
}

impl StateFile {
    fn own_hash(&self) -> Result<String> {
        let text = serde_json::to_vec(&(&self.state, &self.files))
            .map_err(|e| Error::internal(format!("the training state as JSON: {e}")))?;
        Ok(blake3::hash(&text).to_string())
    }
}

const STATE_FILE: &str = "train_state.json";

/// A complete checkpoint on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Where training stood.
    pub state: TrainState,
}

/// The checkpoints of a run.
pub struct Checkpoints {
    dir: PathBuf,
    keep_last: usize,
}

impl Checkpoints {
    /// Those in `run_dir/checkpoints`, of which the newest `keep_last` are kept (0: all). Nothing is touched yet.
    pub fn new(run_dir: &Path, keep_last: usize) -> Checkpoints {
        Checkpoints { dir: run_dir.join("checkpoints"), keep_last }
    }

    /// Writes the checkpoint of `state.step`: `fill` puts the files into the folder it is given. Older checkpoints beyond
    /// those to keep are removed once the new one is on the disk.
    ///
    /// # Errors
    /// What `fill` gives, or [`Error::Io`]; the earlier checkpoints are then as they were, and of this one nothing is
    /// left.
    pub fn save(&self, state: &TrainState, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        match fs::create_dir(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io("create the folder", &self.dir, e));
            }
            _ => {}
        }
        self.remove_leftovers();
        let temporary = self.dir.join(format!(".step-{}.tmp", state.step));
        let place = self.dir.join(format!("step-{}", state.step));
        let written = (|| {
            fs::create_dir(&temporary).map_err(|e| Error::io("create the folder", &temporary, e))?;
            fill(&temporary)?;
            seal(&temporary, state)?;
            if place.exists() {
                // A damaged one, or that of a session which went on from an earlier step.
                fs::remove_dir_all(&place).map_err(|e| Error::io("replace", &place, e))?;
            }
            fs::rename(&temporary, &place).map_err(|e| Error::io("rename the checkpoint to", &place, e))?;
            sync_dir(&self.dir)
        })();
        if let Err(e) = written {
            // A full disk should not stay full of half a checkpoint.
            let _ = fs::remove_dir_all(&temporary);
            return Err(e);
        }
        self.prune(state.step)?;
        Ok(place)
    }

    /// The newest complete checkpoint, to go on from, and a line for each newer one that is damaged.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be read.
    pub fn latest(&self) -> Result<(Option<Checkpoint>, Vec<String>)> {
        self.newest(open)
    }

    /// [`latest`](Self::latest) by the names and sizes of files alone, which reads no weights: where a checkpoint is to be
    /// named, or its model loaded, and not a run gone on with.
    ///
    /// # Errors
    /// As [`latest`](Self::latest).
    pub fn latest_listed(&self) -> Result<(Option<Checkpoint>, Vec<String>)> {
        self.newest(|path| list(path).map(|(found, _)| found))
    }

    /// The newest checkpoint that `open` opens, and a line for each newer one that it does not.
    fn newest(&self, open: impl Fn(&Path) -> Result<Checkpoint>) -> Result<(Option<Checkpoint>, Vec<String>)> {
        let mut notes = Vec::new();
        for (step, path) in self.steps()?.into_iter().rev() {
            match open(&path) {
                Ok(found) if found.state.step != step => notes.push(format!(
                    "passed over {}: its {STATE_FILE} is of step {}",
                    path.display(),
                    found.state.step
                )),
                Ok(found) => return Ok((Some(found), notes)),
                Err(e) => notes.push(format!("passed over {}: {e}", path.display())),
            }
        }
        Ok((None, notes))
    }

    /// Folders named `step-N`, ascending.
    fn steps(&self) -> Result<Vec<(u64, PathBuf)>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io("list", &self.dir, e)),
        };
        let mut out = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| Error::io("list", &self.dir, e))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(step) = name.strip_prefix("step-").and_then(|n| n.parse().ok()) {
                out.push((step, path));
            }
        }
        out.sort();
        Ok(out)
    }

    /// Removes what sessions left that were killed while writing.
    fn remove_leftovers(&self) {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for path in entries.map(|e| e.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(".step-") {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }

    fn prune(&self, newest: u64) -> Result<()> {
        let older: Vec<_> = self.steps()?.into_iter().filter(|(step, _)| *step <= newest).collect();
        let excess = if self.keep_last == 0 { 0 } else { older.len().saturating_sub(self.keep_last) };
        for (_, path) in &older[..excess] {
            fs::remove_dir_all(path).map_err(|e| Error::io("remove the old checkpoint", path, e))?;
        }
        Ok(())
    }
}

/// Opens one checkpoint's folder, and reads all of it to see that nothing has changed.
///
/// # Errors
/// [`Error::Input`] when it is no complete checkpoint, naming the file that is missing, short or changed.
pub fn open(path: &Path) -> Result<Checkpoint> {
    // Only once all sizes are right, as this reads everything.
    let (found, hashes) = list(path)?;
    for (name, hash) in hashes.iter().filter(|(name, _)| *name != STATE_FILE) {
        let file = path.join(name);
        let now = crate::files::open(&file).and_then(|f| hash_of(&f));
        if now.map_err(|e| damaged(format!("{}: {e}", file.display())))? != *hash {
            return Err(changed(&file));
        }
    }
    Ok(found)
}

/// A checkpoint whose files are all there and as long as they should be, and the hashes that they should have.
///
/// # Errors
/// As [`open`], but for changed content, of which only the state's is looked at.
fn list(path: &Path) -> Result<(Checkpoint, BTreeMap<String, String>)> {
    let state_path = path.join(STATE_FILE);
    let text =
        crate::files::read(&state_path).map_err(|e| damaged(format!("{}: cannot read: {e}", state_path.display())))?;
    let sealed: StateFile =
        serde_json::from_slice(&text).map_err(|e| damaged(format!("{}: {e}", state_path.display())))?;
    if !sealed.blake3.is_empty() && sealed.blake3.get(STATE_FILE) != Some(&sealed.own_hash()?) {
        return Err(changed(&state_path));
    }
    for (name, &bytes) in &sealed.files {
        let file = path.join(name);
        match fs::metadata(&file) {
            Ok(m) if m.len() == bytes => {}
            Ok(m) => return Err(damaged(format!("{}: {} bytes where {bytes} were written", file.display(), m.len()))),
            Err(e) => return Err(damaged(format!("{}: {e}", file.display()))),
        }
    }
    Ok((Checkpoint { path: path.to_path_buf(), state: sealed.state }, sealed.blake3))
}

fn damaged(what: String) -> Error {
    Error::input(what, "use another checkpoint: `varft train` finds the newest whole one by itself")
}

fn changed(file: &Path) -> Error {
    damaged(format!("{}: its content is not what was written", file.display()))
}

fn hash_of(file: &File) -> std::io::Result<String> {
    Ok(blake3::Hasher::new().update_reader(file)?.finalize().to_string())
}

/// Flushes every file of `dir` to the disk and writes the state with their list.
fn seal(dir: &Path, state: &TrainState) -> Result<()> {
    let list = |e| Error::io("list", dir, e);
    let (mut files, mut hashes) = (BTreeMap::new(), BTreeMap::new());
    for entry in fs::read_dir(dir).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        file.sync_all().map_err(|e| Error::io("write", &path, e))?;
        let bytes = file.metadata().map_err(|e| Error::io("read", &path, e))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hashes.insert(name.clone(), hash_of(&file).map_err(|e| Error::io("read", &path, e))?);
        files.insert(name, bytes);
    }
    let mut sealed = StateFile { state: state.clone(), files, blake3: hashes };
    sealed.blake3.insert(STATE_FILE.into(), sealed.own_hash()?);
    let text =
        serde_json::to_vec_pretty(&sealed).map_err(|e| Error::internal(format!("the training state as JSON: {e}")))?;
    let path = dir.join(STATE_FILE);
    let failed = |e| Error::io("write", &path, e);
    fs::write(&path, text).map_err(failed)?;
    File::open(&path).and_then(|f| f.sync_all()).map_err(failed)?;
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io("flush the folder", dir, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn state(step: u64) -> TrainState {
        TrainState { kind: "train".into(), step, updates: step }
    }

    fn save(c: &Checkpoints, step: u64) -> Result<PathBuf> {
        c.save(&state(step), |dir| {
            fs::write(dir.join("model.safetensors"), vec![step as u8; 1000]).map_err(|e| Error::io("write", dir, e))
        })
    }

    fn names(run: &Path) -> Vec<String> {
        let mut n: Vec<_> = fs::read_dir(run.join("checkpoints"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        n.sort();
        n
    }

    #[test]
    fn the_newest_is_found_and_the_oldest_go() {
        let run = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(run.path(), 2);
        assert_eq!(c.latest().unwrap(), (None, vec![]));
        for step in [5, 9, 10, 100] {
            save(&c, step).unwrap();
        }
        assert_eq!(names(run.path()), ["step-10", "step-100"]);
        let (found, notes) = c.latest().unwrap();
        assert_eq!((found.unwrap().state, notes.len()), (state(100), 0));
        // A session that went on from step 10 writes step 100 again.
        assert_eq!(save(&c, 100).unwrap(), run.path().join("checkpoints/step-100"));
    }

    #[test]
    fn a_damaged_one_is_passed_over() {
        let run = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(run.path(), 0);
        for step in [1, 2, 3, 4] {
            save(&c, step).unwrap();
        }
        let at = |step: u64, file: &str| run.path().join(format!("checkpoints/step-{step}/{file}"));
        fs::write(at(4, STATE_FILE), "{").unwrap();
        File::options().write(true).open(at(3, "model.safetensors")).unwrap().set_len(999).unwrap();
        fs::remove_file(at(2, "model.safetensors")).unwrap();
        let (found, notes) = c.latest().unwrap();
        assert_eq!(found.unwrap().state.step, 1);
        assert_eq!(notes.len(), 3);
        assert!(notes[1].contains("step-3") && notes[1].contains("999 bytes where 1000"), "{}", notes[1]);
        assert_eq!(c.latest_listed().unwrap(), c.latest().unwrap(), "no hash is needed to see this");
    }

    #[test]
    fn a_pipe_in_place_of_a_file_is_not_waited_for() {
        let run = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(run.path(), 0);
        for step in [1, 2] {
            save(&c, step).unwrap();
        }
        let state_file = run.path().join("checkpoints/step-2").join(STATE_FILE);
        fs::remove_file(&state_file).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&state_file).status().unwrap().success());
        let (found, notes) = c.latest().unwrap();
        assert_eq!((found.unwrap().state, notes.len()), (state(1), 1));
        assert!(notes[0].contains("not a regular file"), "{}", notes[0]);
    }

    #[test]
    fn damage_that_keeps_the_size_is_found_and_named() {
        let run = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(run.path(), 0);
        for step in 1..=6 {
            save(&c, step).unwrap();
        }
        let at = |step: u64, file: &str| run.path().join(format!("checkpoints/step-{step}/{file}"));
        let edit = |step: u64, f: &dyn Fn(&mut serde_json::Value)| {
            let mut json = serde_json::from_slice(&fs::read(at(step, STATE_FILE)).unwrap()).unwrap();
            f(&mut json);
            fs::write(at(step, STATE_FILE), json.to_string()).unwrap();
        };
        fs::copy(at(1, "model.safetensors"), at(6, "model.safetensors")).unwrap();
        assert_eq!(c.latest_listed().unwrap().0.unwrap().state, state(6), "what a listing does not look at");
        edit(5, &|json| json["updates"] = 4.into());
        edit(4, &|json| json["step"] = u64::MAX.into());
        // As if of before there were hashes, in another step's folder.
        edit(3, &|json| {
            json["step"] = 9.into();
            json.as_object_mut().unwrap().remove("blake3");
        });
        edit(2, &|json| drop(json.as_object_mut().unwrap().remove("blake3")));
        let (found, notes) = c.latest().unwrap();
        assert_eq!(found.unwrap().state, state(2));
        let named = ["step-6/model.safetensors", "step-5/train_state.json", "step-4/train_state.json", "of step 9"];
        assert!(notes.len() == 4 && notes.iter().zip(named).all(|(note, name)| note.contains(name)), "{notes:?}");
    }

    #[test]
    fn a_full_disk_leaves_what_was_there() {
        let run = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(run.path(), 1);
        save(&c, 1).unwrap();
        let e = c.save(&state(2), |dir| {
            let path = dir.join("model.safetensors");
            fs::write(&path, [0; 500]).unwrap();
            // The system's own word that there is no space.
            let mut full = File::options().write(true).open("/dev/full").unwrap();
            full.write_all(&[0; 500]).map_err(|e| Error::io("write the model's weights", &path, e))
        });
        let text = e.unwrap_err().to_string();
        assert!(text.contains("model.safetensors") && text.contains("free some space"), "{text}");
        assert_eq!(names(run.path()), ["step-1"]);
        assert_eq!(c.latest().unwrap().0.unwrap().state, state(1));
    }

    #[test]
    fn what_a_killed_session_left_is_ignored_and_then_removed() {
        let run = tempfile::tempdir().unwrap();
        let c = Checkpoints::new(run.path(), 0);
        save(&c, 1).unwrap();
        fs::create_dir(run.path().join("checkpoints/.step-2.tmp")).unwrap();
        fs::write(run.path().join("checkpoints/.step-2.tmp/model.safetensors"), "half").unwrap();
        assert_eq!(c.latest().unwrap().0.unwrap().state.step, 1);
        save(&c, 3).unwrap();
        assert_eq!(names(run.path()), ["step-1", "step-3"]);
    }
}
