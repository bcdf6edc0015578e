//! One call: what goes to its process, what comes back, and what that means.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::process::Zygote;
use super::scratch::{Remover, used};
use super::sys;
use crate::tools::{Outcome, ToolCall, ToolResult, Usage, clean};

/// How long the warm process may take to report the end of a call that it was told to kill.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longer limits than this are as good as none, and a clock could not hold them.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why a call has no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The machinery failed in a way that another attempt may mend.
    Again(String),
    /// The machinery failed, and trying again would most likely fail too.
    Final(String),
    /// The call's process was killed, and neither its limits nor the kernel's lack of memory explain it: by somebody outside,
    /// or by its own code. Its own code does so every time.
    Killed,
}

/// What the child reads at the head of its source file.
#[derive(Serialize)]
struct Request<'a> {
    code: &'a str,
    seed: u64,
    scratch: &'a Path,
    images: Vec<[u32; 2]>,
    limits: RequestLimits,
}

#[derive(Serialize)]
struct RequestLimits {
    cpu: u64,
    memory: u64,
    file: u64,
    image: usize,
}

/// What the child writes at the head of its target file, if it gets so far. The model's code has run in that process, so
/// nothing in here is believed without a check.
#[derive(Deserialize)]
struct Answer {
    outcome: String,
    detail: String,
    size: Option<[u32; 2]>,
}

/// What the warm process says about a child that ended.
struct Ended {
    status: i32,
    cpu: Duration,
    peak_memory: u64,
    out_of_memory: bool,
}

impl Ended {
    /// `done`, i32 wait status, u64 CPU microseconds, u64 peak KiB, i32 flag; standard sizes, no padding.
    fn parse(message: &[u8]) -> Option<Self> {
        let rest = message.strip_prefix(b"done")?;
        let (status, rest) = rest.split_first_chunk()?;
        let (cpu, rest) = rest.split_first_chunk()?;
        let (peak, rest) = rest.split_first_chunk()?;
        Some(Ended {
            status: i32::from_ne_bytes(*status),
            cpu: Duration::from_micros(u64::from_ne_bytes(*cpu)),
            peak_memory: u64::from_ne_bytes(*peak) * 1024,
            out_of_memory: i32::from_ne_bytes(rest.try_into().ok()?) != 0,
        })
    }
}

/// Why we had the child killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stopped {
    Output,
    Cpu,
    /// Its files together are too large.
    Scratch,
    /// At the limit by the clock, and it was not the machine that held it up.
    Resting,
    Wall,
}

/// The seconds at which the kernel itself ends a call. [`Watch`] does so at the limit, by the exact clock; this is for the
/// case that nobody watches. The kernel counts whole ticks and on a busy machine is off by a quarter, so it is far above.
fn cpu_backstop(limit: Duration) -> u64 {
    limit.as_secs().saturating_mul(2).saturating_add(2).min(1 << 40)
}

/// How often the files of a running call are added up.
const LOOK: Duration = Duration::from_millis(250);

/// The bytes that all files of a call may take: four of the largest, and the images that it finds there.
fn scratch_limit(call: &ToolCall) -> u64 {
    let images: u64 = call.images.iter().map(|i| i.as_raw().len() as u64 + (8 << 10)).sum();
    // Disks count in blocks, which a smaller limit would be lost in.
    (call.limits.file.min(1 << 46) * 4).max(1 << 20) + images
}

/// A folder that goes when this does.
struct Scratch<'a> {
    folder: PathBuf,
    remover: &'a Remover,
}

impl<'a> Scratch<'a> {
    fn new(folder: PathBuf, remover: &'a Remover) -> std::io::Result<Self> {
        match std::fs::create_dir(&folder) {
            // The folder around it is old when a run is, and whoever tidies up temporary files may have removed it.
            Err(e) if e.kind() == ErrorKind::NotFound => std::fs::create_dir_all(&folder)?,
            made => made?,
        }
        Ok(Scratch { folder, remover })
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if std::fs::remove_dir(&self.folder).is_err() {
            self.remover.remove(std::mem::take(&mut self.folder));
        }
    }
}

fn system(what: &'static str) -> impl Fn(std::io::Error) -> Failure {
    move |e| Failure::Again(format!("{what}: {e}"))
}

/// What to say where the disk of `folder` is full; `what` failed.
fn no_space(folder: &Path, what: &str) -> Failure {
    Failure::Final(format!(
        "no space left on the disk of {}, where calls keep their files: {what} \
         (free some, or name a folder on another disk with TMPDIR)",
        folder.display()
    ))
}

/// Runs `call` in a child of `zygote`, with `number` naming its scratch folder, which `remover` removes.
pub(super) fn run(zygote: &Zygote, remover: &Remover, call: &ToolCall, number: u64) -> Result<ToolResult, Failure> {
    let blame = |failure| match failure {
        Failure::Again(what) if sys::disk_full(zygote.folder()) => no_space(zygote.folder(), &what),
        other => other,
    };
    zygote.ensure().map_err(Failure::Again).map_err(blame)?; // makes the folder
    // A process that had to be started first takes nothing from what the call may have.
    let begun = Instant::now();
    let scratch = Scratch::new(zygote.folder().join(number.to_string()), remover);
    let scratch = scratch.map_err(system("its scratch folder")).map_err(blame)?;
    let mut result = run_in(&scratch.folder, zygote, call, begun).map_err(blame)?;
    // Now, while the folder is there: its files may be the last that the disk had room for.
    let limit = scratch_limit(call);
    match &result.outcome {
        Outcome::Ok | Outcome::ProgramError(_) if used(&scratch.folder, limit) > limit => {
            (result.outcome, result.image) = (Outcome::ScratchLimit, None);
        }
        Outcome::ProgramError(what) if sys::disk_full(&scratch.folder) => {
            return Err(no_space(zygote.folder(), what.lines().last().unwrap_or_default()));
        }
        _ => {}
    }
    Ok(result)
}

fn run_in(scratch: &Path, zygote: &Zygote, call: &ToolCall, begun: Instant) -> Result<ToolResult, Failure> {
    let source = write_source(call, scratch).map_err(system("a memory file for the input"))?;
    let target = sys::memory_file().map_err(system("a memory file for the answer"))?;
    let (out, out_write) = sys::pipe().map_err(system("a pipe"))?;
    let (err, err_write) = sys::pipe().map_err(system("a pipe"))?;
    let (socket, theirs) = sys::socket_pair().map_err(system("a socket pair"))?;
    let fds = [theirs.as_fd(), source.as_fd(), target.as_fd(), out_write.as_fd(), err_write.as_fd()];
    let generation = zygote.submit(fds).map_err(Failure::Again)?;
    drop((theirs, source, out_write, err_write));
    let mut watch = Watch {
        socket,
        out: Capture::new(out, call.limits.output),
        err: Capture::new(err, call.limits.output),
        started: false,
        child: None,
        clock: None,
        cpu_limit: call.limits.cpu,
        scratch,
        scratch_limit: scratch_limit(call),
        look: begun + LOOK,
        stopped: None,
    };
    let ended = match watch.wait(begun + call.limits.wall.min(YEAR)) {
        Ok(ended) => ended,
        Err(how) => {
            zygote.died(generation, &how);
            return Err(Failure::Again(how));
        }
    };
    let stderr = watch.err.text();
    if !watch.started && watch.stopped.is_none() {
        return Err(Failure::Again(format!("a call's process could not be set up: {stderr}")));
    }
    zygote.worked();
    let (outcome, image) = interpret(&ended, watch.stopped, &stderr, &target, call)?;
    let usage = Usage { queued: Duration::ZERO, wall: begun.elapsed(), cpu: ended.cpu, peak_memory: ended.peak_memory };
    Ok(ToolResult { outcome, stdout: watch.out.text(), stderr, image, usage })
}

fn write_source(call: &ToolCall, scratch: &Path) -> std::io::Result<File> {
    let limits = &call.limits;
    let request = Request {
        code: &call.input,
        seed: call.seed,
        scratch,
        images: call.images.iter().map(|i| [i.width(), i.height()]).collect(),
        limits: RequestLimits {
            cpu: cpu_backstop(limits.cpu),
            // What the kernel takes, with room to add to it.
            memory: limits.memory.min(1 << 46),
            file: limits.file.min(1 << 46),
            image: limits.image.min(1 << 46),
        },
    };
    let head = serde_json::to_vec(&request)?;
    let mut file = sys::memory_file()?;
    file.write_all(&(head.len() as u32).to_le_bytes())?;
    file.write_all(&head)?;
    for image in &call.images {
        file.write_all(image.as_raw())?;
    }
    Ok(file)
}

/// Everything that is listened to while a call runs.
struct Watch<'a> {
    socket: OwnedFd,
    out: Capture,
    err: Capture,
    /// The child's limits hold and the model's code has begun: from then on what happens to it is the code's doing.
    started: bool,
    /// The child's process id, once the model's code has begun, and when that was.
    child: Option<(i32, Instant)>,
    /// The child's processor time.
    clock: Option<sys::CpuClock>,
    cpu_limit: Duration,
    scratch: &'a Path,
    scratch_limit: u64,
    /// When its files are added up again.
    look: Instant,
    stopped: Option<Stopped>,
}

impl Watch<'_> {
    /// Reads output until the warm process reports the end; an error says how the warm process failed.
    fn wait(&mut self, deadline: Instant) -> Result<Ended, String> {
        let mut deadline = deadline;
        loop {
            let mut wake = deadline;
            if let (Some(clock), None) = (&self.clock, self.stopped) {
                // A clock that cannot be read belongs to a child that has just ended.
                let left = self.cpu_limit.saturating_sub(clock.read().unwrap_or_default());
                if left.is_zero() {
                    self.stop(Stopped::Cpu, &mut deadline);
                    wake = deadline;
                } else {
                    // One thread cannot use up what is left any sooner.
                    wake = wake.min(Instant::now() + left.min(YEAR));
                }
            }
            if self.stopped.is_none() {
                let now = Instant::now();
                if now >= self.look {
                    if used(self.scratch, self.scratch_limit) > self.scratch_limit {
                        self.stop(Stopped::Scratch, &mut deadline);
                        wake = deadline;
                    }
                    // However many they are, it is little of the time.
                    self.look = Instant::now() + LOOK.max(10 * now.elapsed());
                }
                wake = wake.min(self.look);
            }
            let fds = [Some(self.socket.as_fd()), self.out.fd(), self.err.fd()];
            let ready = sys::wait_readable(&fds, wake).map_err(|e| format!("poll: {e}"))?;
            if ready == 0 && Instant::now() >= deadline {
                if self.stopped.is_some() {
                    return Err(format!("it did not end a call within {PATIENCE:?} of being told to"));
                }
                let rests = self.child.is_some_and(|(pid, begun)| sys::rests(pid, begun.elapsed()));
                self.stop(if rests { Stopped::Resting } else { Stopped::Wall }, &mut deadline);
            }
            for (bit, capture) in [(2, &mut self.out), (4, &mut self.err)] {
                if ready & bit != 0 {
                    capture.read();
                }
            }
            if (self.out.full() || self.err.full()) && self.stopped.is_none() {
                self.stop(Stopped::Output, &mut deadline);
            }
            if ready & 1 != 0 {
                let mut buffer = [0; 512];
                let n = sys::receive(&self.socket, &mut buffer).map_err(|e| format!("a call's socket: {e}"))?;
                match &buffer[..n] {
                    b"" => return Err("it died during a call".into()),
                    [b's', b't', b'a', b'r', b't', b'e', b'd', pid @ ..] => {
                        self.started = true;
                        let pid = pid.try_into().ok().map(i32::from_ne_bytes);
                        self.child = pid.map(|pid| (pid, Instant::now()));
                        self.clock = pid.and_then(sys::CpuClock::of);
                    }
                    message => match Ended::parse(message) {
                        Some(ended) => {
                            self.out.read();
                            self.err.read();
                            return Ok(ended);
                        }
                        None => return Err(String::from_utf8_lossy(message).into_owned()),
                    },
                }
            }
        }
    }

    fn stop(&mut self, why: Stopped, deadline: &mut Instant) {
        self.stopped = Some(why);
        *deadline = Instant::now() + PATIENCE;
        // If it cannot be told, it is dead, and the next read of the socket says so.
        let _ = sys::send(&self.socket, b"kill");
    }
}

/// What is read from one of the child's outputs, up to a limit; what goes beyond is thrown away.
struct Capture {
    pipe: Option<File>,
    bytes: Vec<u8>,
    limit: usize,
    over: bool,
}

impl Capture {
    fn new(pipe: File, limit: usize) -> Self {
        Capture { pipe: Some(pipe), bytes: Vec::new(), limit, over: false }
    }

    fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.pipe.as_ref().map(|p| p.as_fd())
    }

    fn full(&self) -> bool {
        self.over
    }

    /// Takes what is there, without waiting. It stops at the first byte over the limit: the writer is killed then.
    fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut buffer = [0; 16384];
        while !self.over {
            match pipe.read(&mut buffer) {
                Ok(n) if n > 0 => {
                    let room = self.limit - self.bytes.len();
                    self.bytes.extend_from_slice(&buffer[..n.min(room)]);
                    self.over = n > room;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                _ => break,
            }
        }
        self.pipe = None;
    }

    fn text(&self) -> String {
        let mut text = clean(&self.bytes);
        // A replaced byte is three: cut back to the limit at a character.
        let mut end = text.len().min(self.limit);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text
    }
}

/// What an ended call means: the model's doing or the machinery's.
fn interpret(
    ended: &Ended,
    stopped: Option<Stopped>,
    stderr: &str,
    target: &File,
    call: &ToolCall,
) -> Result<(Outcome, Option<RgbImage>), Failure> {
    let used_up = ended.cpu >= call.limits.cpu;
    let none = |outcome| Ok((outcome, None));
    let killed = libc::WIFSIGNALED(ended.status) && libc::WTERMSIG(ended.status) == libc::SIGKILL;
    match stopped {
        Some(Stopped::Output) => return none(Outcome::OutputLimit),
        Some(_) if !killed => {} // it ended by itself just before it was to be stopped
        Some(Stopped::Cpu) => return none(Outcome::CpuLimit),
        Some(Stopped::Scratch) => return none(Outcome::ScratchLimit),
        Some(Stopped::Wall | Stopped::Resting) if used_up => return none(Outcome::CpuLimit),
        // Else code could wait until its episode counts nowhere, rather than fail.
        Some(Stopped::Resting) => {
            let what = format!("The code waited without computing and was stopped after {:?}.", call.limits.wall);
            return none(Outcome::ProgramError(what));
        }
        Some(Stopped::Wall) => {
            return Err(Failure::Final(format!(
                "a call was not done after {:?} by the clock, of which {:?} were processor time: \
                 the machine is too busy or hangs (lower the concurrency, or raise the wall limit)",
                call.limits.wall, ended.cpu
            )));
        }
        None => {}
    }
    if libc::WIFSIGNALED(ended.status) {
        return match libc::WTERMSIG(ended.status) {
            libc::SIGXCPU => none(Outcome::CpuLimit),
            libc::SIGKILL if used_up => none(Outcome::CpuLimit),
            // With less than half of what it may have, the call is not the one to blame.
            libc::SIGKILL if ended.out_of_memory && ended.peak_memory < call.limits.memory / 2 => {
                Err(Failure::Final("the machine ran out of memory, and the kernel killed a call".into()))
            }
            libc::SIGKILL if ended.out_of_memory => none(Outcome::MemoryLimit),
            libc::SIGKILL => Err(Failure::Killed),
            libc::SIGXFSZ => none(Outcome::FileSizeLimit),
            libc::SIGABRT if stderr.contains("bad_alloc") => none(Outcome::MemoryLimit),
            signal => none(Outcome::ProgramError(format!("The interpreter crashed ({}).", signal_name(signal)))),
        };
    }
    let Some((answer, at)) = read_answer(target) else {
        let code = libc::WEXITSTATUS(ended.status);
        let what = format!("The code ended the interpreter (exit status {code}) before its result could be read.");
        return none(Outcome::ProgramError(what));
    };
    let outcome = match answer.outcome.as_str() {
        "ok" => Outcome::Ok,
        "memory_limit" => Outcome::MemoryLimit,
        "file_size_limit" => Outcome::FileSizeLimit,
        "output_limit" => Outcome::OutputLimit,
        _ => Outcome::ProgramError(clean(answer.detail.as_bytes())),
    };
    match (outcome, answer.size) {
        (Outcome::Ok, Some(size)) => match read_image(target, at, size, call.limits.image) {
            Some(image) => Ok((Outcome::Ok, Some(image))),
            None => none(Outcome::ProgramError("The resulting image could not be read.".into())),
        },
        (outcome, _) => Ok((outcome, None)),
    }
}

fn signal_name(signal: i32) -> String {
    match signal {
        libc::SIGSEGV => "segmentation fault".into(),
        libc::SIGABRT => "aborted".into(),
        libc::SIGBUS => "bus error".into(),
        libc::SIGFPE => "arithmetic error".into(),
        libc::SIGILL => "illegal instruction".into(),
        n => format!("signal {n}"),
    }
}

/// The head of the target file and where the image begins. Its size is bounded, whatever the file says.
fn read_answer(target: &File) -> Option<(Answer, u64)> {
    let mut length = [0; 4];
    target.read_exact_at(&mut length, 0).ok()?;
    let length = u32::from_le_bytes(length);
    if length > 1 << 16 {
        return None;
    }
    let mut head = vec![0; length as usize];
    target.read_exact_at(&mut head, 4).ok()?;
    Some((serde_json::from_slice(&head).ok()?, 4 + u64::from(length)))
}

fn read_image(target: &File, at: u64, [width, height]: [u32; 2], limit: usize) -> Option<RgbImage> {
    let bytes = (width as usize).checked_mul(height as usize)?.checked_mul(3)?;
    if bytes == 0 || bytes > limit {
        return None;
    }
    let mut pixels = vec![0; bytes];
    target.read_exact_at(&mut pixels, at).ok()?;
    RgbImage::from_raw(width, height, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: i32, cpu: u64, peak: u64, out_of_memory: bool) -> Ended {
        Ended { status, cpu: Duration::from_secs(cpu), peak_memory: peak, out_of_memory }
    }

    fn target(head: &str, pixels: &[u8]) -> File {
        let mut file = sys::memory_file().unwrap();
        file.write_all(&(head.len() as u32).to_le_bytes()).unwrap();
        file.write_all(head.as_bytes()).unwrap();
        file.write_all(pixels).unwrap();
        file
    }

    fn outcome(ended: Ended, stopped: Option<Stopped>, stderr: &str) -> Result<Outcome, Failure> {
        let empty = sys::memory_file().unwrap();
        interpret(&ended, stopped, stderr, &empty, &ToolCall::new("")).map(|(outcome, _)| outcome)
    }

    // A wait status holds the signal in its low seven bits, or the exit status in the next byte.
    #[test]
    fn kills_are_told_apart() {
        let kill = libc::SIGKILL;
        assert_eq!(outcome(ended(libc::SIGXCPU, 10, 0, false), None, "").unwrap(), Outcome::CpuLimit);
        assert_eq!(outcome(ended(kill, 11, 0, false), None, "").unwrap(), Outcome::CpuLimit);
        assert_eq!(outcome(ended(kill, 1, 900 << 20, true), None, "").unwrap(), Outcome::MemoryLimit);
        assert!(matches!(outcome(ended(kill, 1, 90 << 20, true), None, ""), Err(Failure::Final(_))));
        assert!(matches!(outcome(ended(kill, 1, 0, false), None, ""), Err(Failure::Killed)));
        assert_eq!(outcome(ended(libc::SIGXFSZ, 1, 0, false), None, "").unwrap(), Outcome::FileSizeLimit);
        assert_eq!(outcome(ended(libc::SIGABRT, 1, 0, false), None, "std::bad_alloc").unwrap(), Outcome::MemoryLimit);
        let crash = outcome(ended(libc::SIGSEGV, 1, 0, false), None, "").unwrap();
        assert_eq!(crash, Outcome::ProgramError("The interpreter crashed (segmentation fault).".into()));
        let left = outcome(ended(3 << 8, 1, 0, false), None, "").unwrap();
        assert!(left.message().contains("exit status 3"), "{left:?}");
    }

    #[test]
    fn the_clock_alone_is_never_the_models_fault() {
        let wall = Some(Stopped::Wall);
        assert!(matches!(outcome(ended(libc::SIGKILL, 2, 0, false), wall, ""), Err(Failure::Final(_))));
        assert_eq!(outcome(ended(libc::SIGKILL, 10, 0, false), wall, "").unwrap(), Outcome::CpuLimit);
        let rested = outcome(ended(libc::SIGKILL, 0, 0, false), Some(Stopped::Resting), "").unwrap();
        assert_eq!(rested.message(), "The code waited without computing and was stopped after 120s.");
        assert_eq!(
            outcome(ended(libc::SIGKILL, 0, 0, false), Some(Stopped::Output), "").unwrap(),
            Outcome::OutputLimit
        );
        assert_eq!(outcome(ended(libc::SIGKILL, 9, 0, false), Some(Stopped::Cpu), "").unwrap(), Outcome::CpuLimit);
    }

    #[test]
    fn an_end_that_comes_before_the_kill_counts() {
        let file = target(r#"{"outcome":"ok","detail":""}"#, &[]);
        for stopped in [Stopped::Cpu, Stopped::Wall] {
            let (outcome, _) = interpret(&ended(0, 0, 0, false), Some(stopped), "", &file, &ToolCall::new("")).unwrap();
            assert_eq!(outcome, Outcome::Ok);
        }
    }

    #[test]
    fn forged_answers_are_not_believed() {
        let read = |file: File| interpret(&ended(0, 0, 0, false), None, "", &file, &ToolCall::new("")).unwrap();
        let ok = |size: &str| format!(r#"{{"outcome":"ok","detail":"","size":{size}}}"#);
        let (outcome, image) = read(target(&ok("[2,1]"), &[1, 2, 3, 4, 5, 6]));
        assert_eq!((outcome, image.unwrap().into_raw()), (Outcome::Ok, vec![1, 2, 3, 4, 5, 6]));
        for (size, pixels) in [("[2,1]", 5), ("[0,9]", 0), ("[4294967295,4294967295]", 6), ("[60000,60000]", 6)] {
            let (outcome, image) = read(target(&ok(size), &vec![0; pixels]));
            assert!(image.is_none() && outcome.kind() == "program_error", "{size}: {outcome:?}");
        }
        for head in ["", "{}", "no json", r#"{"outcome":"new","detail":"\u001b[2Jx"}"#, &"x".repeat(1 << 17)] {
            let (outcome, image) = read(target(head, &[]));
            assert!(image.is_none() && outcome.kind() == "program_error", "{head:.20}: {outcome:?}");
            assert!(!outcome.message().contains('\x1b'));
        }
    }

    #[test]
    fn reports_are_parsed_whole_or_not_at_all() {
        let mut message = b"done".to_vec();
        message.extend(9i32.to_ne_bytes());
        message.extend(1_500_000u64.to_ne_bytes());
        message.extend(7u64.to_ne_bytes());
        message.extend(1i32.to_ne_bytes());
        let e = Ended::parse(&message).unwrap();
        assert_eq!((e.status, e.cpu, e.peak_memory, e.out_of_memory), (9, Duration::from_millis(1500), 7 << 10, true));
        assert!(Ended::parse(&message[..20]).is_none() && Ended::parse(b"failed x").is_none());
    }
}
