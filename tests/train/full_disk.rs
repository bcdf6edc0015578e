//! A disk without room for a checkpoint.

use super::Job;
use super::school::{school, stderr, text};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use varft::report::read_metrics;
use varft::train::Checkpoints;

#[test]
fn a_full_disk_at_a_checkpoint_costs_no_more_than_the_steps_since_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let keys = ["optim.lr=1e-3", "log.eval_every=0", "log.checkpoint_every=2", "algo.mask_truncated=false"];
    let calm = Job::train(school(), &dir.path().join("calm"), 4, &keys);
    calm.finish();
    let run = dir.path().join("full");
    Job::train(school(), &run, 2, &keys).finish();
    let job = Job::train(school(), &run, 4, &keys);
    let mut command = job.command();
    // No file may grow beyond 100 kB, which the system says as it says that a disk is full: a write fails half-way.
    // SAFETY: only calls that are allowed between fork and exec.
    unsafe {
        use std::os::unix::process::CommandExt;
        command.pre_exec(|| {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: 100_000, rlim_max: libc::RLIM_INFINITY };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
            Ok(())
        });
    }
    let o = command.output().unwrap();
    let said = stderr(&o);
    assert_eq!(o.status.code(), Some(1), "{said}");
    assert!(said.contains("model.safetensors") && said.contains("--resume") && !said.contains("panicked"), "{said}");
    let checkpoints = std::fs::read_dir(run.join("checkpoints")).unwrap().count();
    assert_eq!(checkpoints, 1, "half a checkpoint was left");
    assert_eq!(Checkpoints::new(&run, 0).latest().unwrap().0.unwrap().state.step, 2);
    job.finish();
    assert!(job.result() == calm.result());
}

/// A disk of its own with little room, in memory.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> std::io::Result<SmallDisk> {
        std::fs::create_dir(&at)?;
        mount(&at, 0, 64 << 20).map(|()| SmallDisk(at))
    }

    fn used(&self) -> u64 {
        let path = std::ffi::CString::new(text(&self.0)).unwrap();
        // SAFETY: plain old data, filled in by the call.
        let stat = unsafe {
            let mut stat: libc::statvfs = std::mem::zeroed();
            assert_eq!(libc::statvfs(path.as_ptr(), &mut stat), 0, "{}", std::io::Error::last_os_error());
            stat
        };
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    }

    /// Makes it so large that just this many bytes are free.
    fn leave(&self, bytes: u64) {
        mount(&self.0, libc::MS_REMOUNT, self.used() + bytes).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let path = std::ffi::CString::new(text(&self.0)).unwrap();
        // SAFETY: a path that ends in zero.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

fn mount(at: &Path, flags: libc::c_ulong, bytes: u64) -> std::io::Result<()> {
    let path = std::ffi::CString::new(text(at)).unwrap();
    let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
    let kind = c"tmpfs".as_ptr();
    // SAFETY: strings that end in zero.
    match unsafe { libc::mount(kind, path.as_ptr(), kind, flags, size.as_ptr().cast()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The files below a folder and what they hold.
fn files(dir: &Path) -> HashMap<PathBuf, Vec<u8>> {
    let mut all = HashMap::new();
    for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => drop(all.insert(path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    all
}

#[test]
fn a_disk_that_a_checkpoint_fills_keeps_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let disk = match SmallDisk::mount(dir.path().join("disk")) {
        Ok(disk) => disk,
        Err(e) => return println!("skipped: a small disk cannot be mounted here (that takes root's rights): {e}"),
    };
    let keys = ["optim.lr=1e-3", "log.eval_every=0", "log.checkpoint_every=2", "algo.mask_truncated=false"];
    let calm = Job::train(school(), &dir.path().join("calm"), 4, &keys);
    calm.finish();
    let run = disk.0.join("run");
    Job::train(school(), &run, 2, &keys).finish();
    let job = Job::train(school(), &run, 4, &keys);
    let checkpoint = files(&run.join("checkpoints/step-2"));
    let bytes: u64 = checkpoint.values().map(|f| f.len() as u64).sum();
    let before = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let episodes = files(&run.join("trajectories"));
    // Full in the first of the large files, and in the second.
    for (room, file) in [(bytes / 5, "model.safetensors"), (bytes / 2, "optimizer.safetensors")] {
        disk.leave(room);
        let o = job.command().output().unwrap();
        let said = stderr(&o);
        assert_eq!(o.status.code(), Some(1), "{said}");
        for part in [text(&run.join("checkpoints")), file, "free some space on that disk", "--resume"] {
            assert!(said.contains(part), "{part:?} is missing from: {said}");
        }
        assert!(!said.contains("panicked"), "{said}");
        let left: Vec<_> =
            std::fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["step-2"], "half a checkpoint was left");
        assert!(files(&run.join("checkpoints/step-2")) == checkpoint, "the earlier checkpoint was touched");
        assert_eq!(Checkpoints::new(&run, 0).latest().unwrap().0.unwrap().state.step, 2);
        // Steps 3 and 4 were written down before their checkpoint failed.
        assert!(std::fs::read_to_string(run.join("metrics.jsonl")).unwrap().starts_with(&before));
        assert_eq!(read_metrics(&run).unwrap().iter().map(|r| r.step).collect::<Vec<_>>(), [1, 2, 3, 4]);
        let now = files(&run.join("trajectories"));
        assert!(episodes.iter().all(|(path, bytes)| now.get(path) == Some(bytes)), "episodes were lost");
    }
    disk.leave(64 << 20);
    job.finish();
    assert!(job.result() == calm.result());
}
