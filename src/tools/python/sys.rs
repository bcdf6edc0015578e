//! The few system calls that the standard library lacks: memory files, socket pairs of messages, descriptors as messages, poll.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

fn check(r: libc::c_int) -> Result<libc::c_int> {
    if r < 0 { Err(Error::last_os_error()) } else { Ok(r) }
}

/// A file without a name, in memory, closed on exec.
pub(super) fn memory_file() -> Result<File> {
    // SAFETY: the name is a C string; the descriptor returned is new and ours.
    unsafe { Ok(File::from_raw_fd(check(libc::memfd_create(c"varft-call".as_ptr(), libc::MFD_CLOEXEC))?)) }
}

/// Two ends of a connection that keeps messages apart, closed on exec.
pub(super) fn socket_pair() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `fds` has room for two descriptors, which are new and ours when the call succeeds.
    unsafe {
        check(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// A pipe: the end to read from, which does not block, and the end to write to. Both are closed on exec.
pub(super) fn pipe() -> Result<(File, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: as in `socket_pair`.
    let (read, write) = unsafe {
        check(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC))?;
        (File::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    };
    set_nonblocking(&read)?;
    Ok((read, write))
}

/// Makes reads return [`ErrorKind::WouldBlock`] instead of waiting.
pub(super) fn set_nonblocking(fd: &impl AsRawFd) -> Result<()> {
    // SAFETY: these take no pointers.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    }
    Ok(())
}

/// Sends one message.
pub(super) fn send(socket: &impl AsRawFd, message: &[u8]) -> Result<()> {
    // SAFETY: pointer and length are those of a slice.
    let n = unsafe { libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), libc::MSG_NOSIGNAL) };
    if n < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

const FDS: usize = 5;

/// Sends one message together with descriptors, which the receiver gets copies of.
pub(super) fn send_fds(socket: &impl AsRawFd, message: &[u8], fds: &[BorrowedFd<'_>; FDS]) -> Result<()> {
    let raw: [RawFd; FDS] = fds.map(|fd| fd.as_raw_fd());
    let bytes = size_of_val(&raw) as u32;
    // Control messages must be aligned as their header is; u64 is at least that.
    let mut space = [0u64; 8];
    let mut part = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
    // SAFETY: `space` holds CMSG_SPACE(20) = 40 bytes, zeroed; the header's fields are set before the macros that need them;
    // everything that the message points to outlives the call.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &mut part;
        header.msg_iovlen = 1;
        header.msg_control = space.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(bytes) as _;
        assert!(libc::CMSG_SPACE(bytes) as usize <= size_of_val(&space));
        let control = libc::CMSG_FIRSTHDR(&header);
        (*control).cmsg_level = libc::SOL_SOCKET;
        (*control).cmsg_type = libc::SCM_RIGHTS;
        (*control).cmsg_len = libc::CMSG_LEN(bytes) as _;
        std::ptr::copy_nonoverlapping(raw.as_ptr().cast::<u8>(), libc::CMSG_DATA(control), bytes as usize);
        let n = libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL);
        if n < 0 { Err(Error::last_os_error()) } else { Ok(()) }
    }
}

/// Receives one message; 0 bytes when the other end is closed.
pub(super) fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> Result<usize> {
    loop {
        // SAFETY: pointer and length are those of a slice.
        let n = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if n >= 0 {
            return Ok(n as usize);
        }
        let e = Error::last_os_error();
        match e.kind() {
            // A reset means that the other end was closed with messages of ours unread. It is reported once, ahead of
            // messages to us that are still there to be read.
            ErrorKind::Interrupted | ErrorKind::ConnectionReset => {}
            _ => return Err(e),
        }
    }
}

/// The same with a deadline: [`ErrorKind::TimedOut`] when it has passed.
pub(super) fn receive_within(socket: &OwnedFd, buffer: &mut [u8], time: Duration) -> Result<usize> {
    match wait_readable(&[Some(socket.as_fd())], Instant::now() + time)? {
        0 => Err(ErrorKind::TimedOut.into()),
        _ => receive(socket, buffer),
    }
}

/// Waits until a descriptor can be read or is closed at its other end, or until the deadline; `None` entries are passed over.
/// Bit `i` of the result is set where entry `i` is ready; 0 means that the deadline has passed.
pub(super) fn wait_readable(fds: &[Option<BorrowedFd<'_>>], deadline: Instant) -> Result<u32> {
    // poll passes over negative descriptors.
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events: libc::POLLIN, revents: 0 })
        .collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the deadline has passed when the wait has.
        let ms = left.as_millis().saturating_add(1).min(i32::MAX as u128) as i32;
        let ms = if left.is_zero() { 0 } else { ms };
        // SAFETY: pointer and length are those of a Vec.
        match check(unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as _, ms) }) {
            Ok(_) => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(polls.iter().enumerate().filter(|(_, p)| p.revents != 0).fold(0, |ready, (i, _)| ready | 1 << i))
}

/// Whether the file system that holds `path`, or would, has next to nothing left for ordinary users: bytes or files.
pub(super) fn disk_full(path: &std::path::Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: all zeros are a valid value of this plain struct.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    let found = path.ancestors().any(|p| {
        let name = std::ffi::CString::new(p.as_os_str().as_bytes());
        // SAFETY: the name is a C string, and `stat` has room for the answer.
        name.is_ok_and(|name| unsafe { libc::statvfs(name.as_ptr(), &mut stat) } == 0)
    });
    // Some file systems make room for files as they come and say 0 of 0.
    found && (stat.f_bavail * stat.f_frsize < 1 << 20 || stat.f_files > 0 && stat.f_favail < 8)
}

/// The processor time of another process, to the nanosecond.
pub(super) struct CpuClock(libc::clockid_t);

impl CpuClock {
    pub(super) fn of(pid: libc::pid_t) -> Option<Self> {
        let mut id = 0;
        // SAFETY: `id` has room for the answer.
        (unsafe { libc::clock_getcpuclockid(pid, &mut id) } == 0).then_some(CpuClock(id))
    }

    /// `None` once the process is gone.
    pub(super) fn read(&self) -> Option<Duration> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` has room for the answer.
        (unsafe { libc::clock_gettime(self.0, &mut time) } == 0)
            .then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }
}

/// Whether process `pid` is at rest by its own doing: it sleeps or has stopped itself, and of the `wall` time that it has had,
/// it spent less than half computing or waiting for a processor. One that a busy machine keeps from running, or a disk,
/// is not; nor one that cannot be looked at.
pub(super) fn rests(pid: libc::pid_t, wall: Duration) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name stands in parentheses and may hold anything; the state follows the last one.
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    let times = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    let mut times = times.split_whitespace().map_while(|t| t.parse().ok()).map(Duration::from_nanos);
    let (Some(state), Some(computing), Some(waiting)) = (state, times.next(), times.next()) else { return false };
    matches!(state, 'S' | 'T') && computing + waiting < wall / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_is_told_from_a_lack_of_processor_time() {
        use std::process::{Command, Stdio};
        let sh = |code: &str| Command::new("sh").args(["-c", code]).stdin(Stdio::piped()).spawn().unwrap();
        let begun = Instant::now();
        let (mut asleep, mut busy, mut stopped) = (sh("read x"), sh("while :; do :; done"), sh("kill -STOP $$"));
        let second = Duration::from_secs(1);
        std::thread::sleep(second);
        let state = |c: &std::process::Child| rests(c.id() as i32, begun.elapsed());
        // On a busy machine even the start of a process takes its time.
        while !(state(&asleep) && state(&stopped)) && begun.elapsed() < 60 * second {
            std::thread::sleep(second / 10);
        }
        assert!(state(&asleep) && state(&stopped) && !state(&busy));
        // As if it had been kept waiting for a processor all the time.
        assert!(!rests(asleep.id() as i32, Duration::ZERO));
        for child in [&mut asleep, &mut busy, &mut stopped] {
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(!rests(child.id() as i32, second), "gone");
        }
    }

    #[test]
    fn the_processor_time_of_a_process_grows_with_its_work() {
        let clock = CpuClock::of(std::process::id() as i32).unwrap();
        let before = clock.read().unwrap();
        let sum = (0..1_000_000u64).fold(0, |a, b| std::hint::black_box(a ^ b));
        assert!(clock.read().unwrap() > before, "{sum}");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let gone = CpuClock::of(child.id() as i32);
        child.wait().unwrap();
        assert!(gone.is_none_or(|clock| clock.read().is_none()));
    }
    use std::io::{Read, Seek, Write};

    #[test]
    fn a_disk_with_room_is_not_full() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!disk_full(dir.path()) && !disk_full(&dir.path().join("not/there")));
        // This one has no room, ever.
        assert!(disk_full(std::path::Path::new("/proc/self")));
    }

    #[test]
    fn descriptors_travel_and_a_closed_end_is_noticed() {
        let (a, b) = socket_pair().unwrap();
        let file = memory_file().unwrap();
        send_fds(&a, b"hi", &[file.as_fd(); 5]).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(receive_within(&b, &mut buffer, Duration::from_secs(5)).unwrap(), 2);
        assert_eq!(&buffer[..2], b"hi");
        let e = receive_within(&b, &mut buffer, Duration::from_millis(1)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TimedOut);
        drop(a);
        assert_eq!(receive(&b, &mut buffer).unwrap(), 0);
        assert!(send(&b, b"x").is_err(), "and no signal kills us");

        let (a, b) = socket_pair().unwrap();
        send(&a, b"unread").unwrap();
        send(&b, b"last").unwrap();
        drop(b);
        assert_eq!(receive(&a, &mut buffer).unwrap(), 4, "a message is not lost with the connection");
        assert_eq!(receive(&a, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn pipes_and_memory_files_hold_what_was_written() {
        let (mut read, write) = pipe().unwrap();
        assert_eq!(read.read(&mut [0; 4]).unwrap_err().kind(), ErrorKind::WouldBlock);
        File::from(write).write_all(b"abc").unwrap();
        assert_eq!(wait_readable(&[None, Some(read.as_fd())], Instant::now()).unwrap(), 0b10);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
        let mut file = memory_file().unwrap();
        file.write_all(b"xyz").unwrap();
        file.rewind().unwrap();
        text.clear();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "xyz");
    }
}
