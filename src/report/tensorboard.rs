use crate::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes scalar summaries that TensorBoard reads: TFRecord framing around `Event` protocol buffers, by hand.
///
/// Every writer opens a file of its own. On resume the new file begins with a session mark at the step that was
/// resumed, at which TensorBoard drops what earlier files hold for later steps.
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Opens a new event file in `dir` (made if missing). `resumed_at` is the last completed step of the run that is
    /// continued, 0 for a new one.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder or the file cannot be made or written.
    pub fn create(dir: &Path, resumed_at: u64) -> Result<EventWriter> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io("create the folder", dir, e))?;
        let now = wall_time();
        // TensorBoard reads a folder's files in the order of their names: seconds first, then a count.
        let mut count = 0;
        let (file, path) = loop {
            let name = format!("events.out.tfevents.{}.{count:04}.{}.varft", now as u64, std::process::id());
            let path = dir.join(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (file, path),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => count += 1,
                Err(e) => return Err(Error::io("create the event file", &path, e)),
            }
        };
        let mut writer = EventWriter { file, path };
        let mut event = event(now, 0);
        field_bytes(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        if resumed_at > 0 {
            writer.session_start(now, resumed_at + 1)?;
        }
        Ok(writer)
    }

    /// Writes one event with the given scalars at `step` (TensorBoard stores f32).
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut v = Vec::new();
            field_bytes(&mut v, 1, tag.as_bytes());
            v.push(2 << 3 | 5); // simple_value, 32 bits
            v.extend((*value as f32).to_le_bytes());
            field_bytes(&mut summary, 1, &v);
        }
        let mut event = event(wall_time(), step);
        field_bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    /// The file being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Event.session_log with status START: readers discard events of step `step` and later that came before it.
    fn session_start(&mut self, now: f64, step: u64) -> Result<()> {
        let mut event = event(now, step);
        field_bytes(&mut event, 7, &[1 << 3, 1]);
        self.record(&event)
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        let mut out = Vec::with_capacity(data.len() + 16);
        let len = (data.len() as u64).to_le_bytes();
        out.extend(len);
        out.extend(masked_crc(&len).to_le_bytes());
        out.extend(data);
        out.extend(masked_crc(data).to_le_bytes());
        // One write per record: a crash can cut only the last one, and readers stop at a cut record.
        self.file.write_all(&out).map_err(|e| Error::io("write the event file", &self.path, e))
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// An `Event` message with its first two fields: wall_time (seconds, double) and step (int64).
fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(wall_time.to_le_bytes());
    out.push(2 << 3);
    varint(&mut out, step);
    out
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// A length-delimited field (string, bytes or message); `number` below 16.
fn field_bytes(out: &mut Vec<u8>, number: u8, data: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, data.len() as u64);
    out.extend(data);
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut c = i as u32;
        let mut bit = 0;
        while bit < 8 {
            c = if c & 1 == 1 { c >> 1 ^ 0x82F6_3B78 } else { c >> 1 }; // Castagnoli, reflected
            bit += 1;
        }
        table[i] = c;
        i += 1;
    }
    table
};

pub(super) fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |c, &b| c >> 8 ^ CRC_TABLE[((c ^ b as u32) & 0xFF) as usize])
}

/// TFRecord stores CRCs rotated and offset, so that a CRC of data which holds CRCs stays strong.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields of a protocol-buffer message: (number, wire type, payload).
    fn fields(mut m: &[u8]) -> Vec<(u64, u8, Vec<u8>)> {
        fn varint(m: &mut &[u8]) -> u64 {
            let mut n = 0;
            for shift in (0..).step_by(7) {
                let b = m[0];
                *m = &m[1..];
                n |= u64::from(b & 0x7F) << shift;
                if b < 0x80 {
                    break;
                }
            }
            n
        }
        let mut out = Vec::new();
        while !m.is_empty() {
            let key = varint(&mut m);
            let len = match key & 7 {
                0 => {
                    let v = varint(&mut m);
                    out.push((key >> 3, 0, v.to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => varint(&mut m) as usize,
                5 => 4,
                w => panic!("wire type {w}"),
            };
            out.push((key >> 3, (key & 7) as u8, m[..len].to_vec()));
            m = &m[len..];
        }
        out
    }

    fn records(mut b: &[u8]) -> Vec<Vec<u8>> {
        let u32_at = |b: &[u8], i: usize| u32::from_le_bytes(b[i..i + 4].try_into().unwrap());
        // The inverse of the mask, then an independent bit-by-bit CRC.
        let unmask = |m: u32| m.wrapping_sub(0xA282_EAD8).rotate_left(15);
        let slow = |d: &[u8]| {
            let mut c = !0u32;
            for &x in d {
                c ^= u32::from(x);
                for _ in 0..8 {
                    c = if c & 1 == 1 { c >> 1 ^ 0x82F6_3B78 } else { c >> 1 };
                }
            }
            !c
        };
        let mut out = Vec::new();
        while !b.is_empty() {
            let len = u64::from_le_bytes(b[..8].try_into().unwrap()) as usize;
            assert_eq!(unmask(u32_at(b, 8)), slow(&b[..8]));
            let data = &b[12..12 + len];
            assert_eq!(unmask(u32_at(b, 12 + len)), slow(data));
            out.push(data.to_vec());
            b = &b[16 + len..];
        }
        out
    }

    #[test]
    fn crc_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283); // the catalogue's check value of CRC-32C
    }

    #[test]
    fn reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = EventWriter::create(dir.path(), 0).unwrap();
        w.scalars(1, &[("reward", 0.25), ("kl", f64::NAN)]).unwrap();
        w.scalars(300, &[("reward", -1.5)]).unwrap();
        let events = records(&std::fs::read(w.path()).unwrap());
        assert_eq!(events.len(), 3);
        assert_eq!(fields(&events[0])[2], (3, 2, b"brain.Event:2".to_vec()));
        let scalars = |e: &[u8]| -> (u64, Vec<(String, f32)>) {
            let f = fields(e);
            assert_eq!((f[0].0, f[1].0, f[2].0), (1, 2, 5));
            let values = fields(&f[2].2).into_iter().map(|(n, _, v)| {
                assert_eq!(n, 1);
                let v = fields(&v);
                (String::from_utf8(v[0].2.clone()).unwrap(), f32::from_le_bytes(v[1].2[..].try_into().unwrap()))
            });
            (u64::from_le_bytes(f[1].2[..].try_into().unwrap()), values.collect())
        };
        let (step, v) = scalars(&events[1]);
        assert_eq!((step, v[0].clone(), v[1].0.as_str()), (1, ("reward".into(), 0.25), "kl"));
        assert!(v[1].1.is_nan());
        assert_eq!(scalars(&events[2]), (300, vec![("reward".into(), -1.5)]));
    }

    #[test]
    fn resume_opens_a_second_file_that_marks_the_session() {
        let dir = tempfile::tempdir().unwrap();
        let a = EventWriter::create(dir.path(), 0).unwrap();
        let b = EventWriter::create(dir.path(), 7).unwrap();
        assert!(a.path() < b.path());
        let events = records(&std::fs::read(b.path()).unwrap());
        let f = fields(&events[1]);
        assert_eq!(f[1].2, 8u64.to_le_bytes());
        assert_eq!((f[2].0, f[2].2.clone()), (7, vec![8, 1]));
    }
}
