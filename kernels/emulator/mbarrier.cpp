// mbarrier objects: barriers in shared memory that count arrivals of threads and bytes of asynchronous copies. Their state is
// kept beside the shared memory, by address; the eight bytes themselves only take part in the search for races, so that a
// thread that uses a barrier before it has seen its initialisation is found.
#include "block.h"
#include "device.h"

namespace emulator {

MBarrier& Block::mbarrier(Thread& t, const void* address, bool initialise, Place place) {
  if (!shared.covers(address) || reinterpret_cast<std::uintptr_t>(address) % 8) {
    fail([&](std::string& s) {
      append(s, "%s uses an mbarrier at %s that is not eight aligned bytes of shared memory", name(t).c_str(),
             describe(place).c_str());
    });
  }
  check(t, address, 8, initialise ? Use::write : Use::update, place);
  const unsigned offset = shared.offset(address);
  for (auto& b : mbarriers_)
    if (b.offset == offset) return b;
  if (!initialise) {
    fail([&](std::string& s) {
      append(s, "%s uses the mbarrier at byte %u of shared memory at %s, which nobody has initialised", name(t).c_str(), offset,
             describe(place).c_str());
    });
  }
  mbarriers_.push_back({offset, 0, 0, 0, 0, {}, {}});
  return mbarriers_.back();
}

void Block::mbarrier_init(Thread& t, const void* address, unsigned count, Place place) {
  MBarrier& b = mbarrier(t, address, true, place);
  b = {b.offset, count, count, 0, 0, {}, std::vector<std::int32_t>(threads.size(), MBarrier::NEVER)};
}

void Block::mbarrier_arrive(Thread& t, const void* address, std::int64_t bytes, Place place) {
  MBarrier& b = mbarrier(t, address, false, place);
  shared.order.release(t.linear, b.released);
  b.bytes += bytes;
  if (b.pending == 0) {
    fail([&](std::string& s) {
      append(s, "%s arrives at the mbarrier at byte %u of shared memory at %s, at which all %u arrivals of this phase have been",
             name(t).c_str(), b.offset, describe(place).c_str(), b.count);
    });
  }
  b.pending--;
  mbarrier_advance(b);
}

void Block::mbarrier_advance(MBarrier& b) {
  if (b.pending || b.bytes > 0) return;
  if (b.bytes < 0) {
    fail([&](std::string& s) {
      append(s, "the mbarrier at byte %u of shared memory was told of %lld bytes fewer than came in this phase", b.offset,
             static_cast<long long>(-b.bytes));
    });
  }
  b.phase++;
  b.pending = b.count;
  for (auto& t : threads)
    if (t.wait.at == Wait::At::mbarrier && t.wait.id == b.offset) wake(t);
}

// The phase of that parity has ended when the one under way has the other. So a thread must not be two phases behind: it would
// wait for one that comes after the one that it means, which is the one after its last, or that again.
void Block::mbarrier_wait(Thread& t, const void* address, unsigned parity, Place place) {
  std::int32_t meant = mbarrier(t, address, false, place).seen[t.linear];
  const bool known = meant != MBarrier::NEVER;
  if (known && (meant & 1) != static_cast<int>(parity)) meant++;
  for (;;) {
    MBarrier& b = mbarrier(t, address, false, place);
    const std::int32_t ended = b.phase - 1;
    if (known && ended > meant) {
      fail([&](std::string& s) {
        append(s, "%s waits at the mbarrier at byte %u of shared memory at %s for the end of phase %d, and phase %d has ended too: a wait by parity cannot tell",
               name(t).c_str(), b.offset, describe(place).c_str(), meant, ended);
      });
    }
    if ((ended & 1) == static_cast<int>(parity)) {
      b.seen[t.linear] = ended;
      show_bulk_copies(b.offset, ended);
      return shared.order.acquire(t.linear, b.released);
    }
    wait(t, {Wait::At::mbarrier, place, nullptr, 0, b.offset});
  }
}

void mbarrier_init(void* barrier, unsigned count) {
  Thread& t = *current();
  t.block->mbarrier_init(t, barrier, count, __builtin_return_address(0));
}

void mbarrier_arrive(void* barrier) {
  Thread& t = *current();
  t.block->mbarrier_arrive(t, barrier, 0, __builtin_return_address(0));
}

void mbarrier_arrive_expect_tx(void* barrier, unsigned bytes) {
  Thread& t = *current();
  t.block->mbarrier_arrive(t, barrier, bytes, __builtin_return_address(0));
}

void mbarrier_wait_parity(void* barrier, unsigned parity) {
  Thread& t = *current();
  t.block->mbarrier_wait(t, barrier, parity, __builtin_return_address(0));
}

}  // namespace emulator
