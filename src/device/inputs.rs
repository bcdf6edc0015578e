use super::{Buffer, DType, Device, Element, Stream};

/// Parts begin at multiples of so many bytes.
const PART_ALIGN: usize = 16;

/// Lists of the host's that go to a device together: one buffer, one copy.
///
/// [`clear`](Self::clear), [`put`](Self::put) every list, [`send`](Self::send); then [`get`](Self::get) gives each as a buffer. The
/// places follow from the lengths alone: the same lengths in the same order have the same addresses, unless the memory had to
/// grow in between.
pub struct Inputs {
    device: Device,
    /// `None` before anything was sent, where there was no room from the start.
    memory: Option<Buffer>,
    staged: Vec<u8>,
}

/// A list in [`Inputs`].
#[derive(Clone, Copy, Debug)]
pub struct Input {
    start: usize,
    len: usize,
    dtype: DType,
}

impl Inputs {
    /// Room for `bytes` bytes on `device`, with up to 16 for each list besides its elements.
    pub fn new(device: &Device, bytes: usize) -> Inputs {
        let memory = (bytes > 0).then(|| device.zeros(DType::U8, bytes));
        Inputs { device: device.clone(), memory, staged: Vec::with_capacity(bytes) }
    }

    /// Forgets all lists.
    pub fn clear(&mut self) {
        self.staged.clear();
    }

    /// Takes a list, followed by as many `pad` as make it `len` long. Panics if it is longer.
    pub fn put<T: Element>(&mut self, values: impl IntoIterator<Item = T>, len: usize, pad: T) -> Input {
        self.staged.resize(self.staged.len().next_multiple_of(PART_ALIGN), 0);
        let start = self.staged.len();
        for value in values {
            self.staged.extend_from_slice(bytemuck::bytes_of(&value));
        }
        let taken = (self.staged.len() - start) / size_of::<T>();
        assert!(taken <= len, "{taken} elements in a list of {len}");
        for _ in taken..len {
            self.staged.extend_from_slice(bytemuck::bytes_of(&pad));
        }
        Input { start, len, dtype: T::DTYPE }
    }

    /// [`put`](Self::put) of a list that is as long as it is.
    pub fn put_all<T: Element>(&mut self, values: &[T]) -> Input {
        self.put(values.iter().copied(), values.len(), T::zeroed())
    }

    /// Submits the copy. The memory grows where it is too small: what earlier buffers name stays as long as they do.
    pub fn send(&mut self, s: &Stream) {
        let memory = match self.memory.take().filter(|memory| memory.len() >= self.staged.len()) {
            Some(memory) => memory,
            None => self.device.alloc(DType::U8, self.staged.len()),
        };
        s.write(&memory, &self.staged);
        self.memory = Some(memory);
    }

    /// A list as it was sent. Panics if there is no such list.
    pub fn get(&self, input: Input) -> Buffer {
        let memory = self.memory.as_ref().expect("lists that were sent, or have room");
        memory.part(input.start, input.dtype, input.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_several_types_come_as_they_were_put() {
        for d in [Device::cpu(1), Device::cpu_deferred(1)].into_iter().chain(Device::emulated(1).ok()) {
            let (s, mut inputs) = (d.stream(), Inputs::new(&d, 64));
            let mut before = None;
            for round in 0..3u32 {
                inputs.clear();
                let a = inputs.put([round, 8, 9], 5, u32::MAX);
                let b = inputs.put_all(&[1.5f32]);
                let c = inputs.put([u64::from(round)], 1, 0);
                inputs.send(&s);
                let (a, b, c) = (inputs.get(a), inputs.get(b), inputs.get(c));
                assert_eq!(s.read::<u32>(&a).wait().unwrap(), [round, 8, 9, u32::MAX, u32::MAX]);
                assert_eq!(s.read::<f32>(&b).wait().unwrap(), [1.5]);
                assert_eq!(s.read::<u64>(&c).wait().unwrap(), [u64::from(round)]);
                let places = [&a, &b, &c].map(|b| b.address() as usize);
                assert_eq!(*before.get_or_insert(places), places, "lists of the same lengths lie where they lay");
            }
            inputs.clear();
            let long = inputs.put(0..1000u32, 1000, 0);
            inputs.send(&s);
            assert_eq!(s.read::<u32>(&inputs.get(long)).wait().unwrap(), (0..1000).collect::<Vec<u32>>());
        }
    }
}
