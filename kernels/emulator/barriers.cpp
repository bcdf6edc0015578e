// Barriers of the block, rendezvous of lanes, and what is said when they can't be reached.
#include "block.h"

namespace emulator {

using At = Wait::At;

void Block::block_barrier(Thread& t, Place place) {
  if (++at_block_barrier_ == live) return release_block_barrier();
  wait(t, {At::block_barrier, place});
}

void Block::release_block_barrier() {
  at_block_barrier_ = 0;
  shared.order.block_barrier();
  for (auto& t : threads)
    if (t.wait.at == At::block_barrier) wake(t);
}

void Block::named_barrier(Thread& t, unsigned id, unsigned count, bool wait_too, Place place) {
  if (id == 0 || id >= NAMED_BARRIERS || count == 0 || count % WARP || count > MAX_THREADS) {
    fail([&](std::string& s) {
      append(s, "%s uses barrier %u for %u threads at %s: there are barriers 1 to 15 beside that of __syncthreads, for a multiple of 32 threads",
             name(t).c_str(), id, count, describe(place).c_str());
    });
  }
  NamedBarrier& b = named_[id];
  if (b.arrived && b.count != count) {
    fail([&](std::string& s) {
      append(s, "%s arrives at barrier %u for %u threads at %s, %s arrived at it for %u threads at %s", name(t).c_str(), id,
             count, describe(place).c_str(), name(threads[b.thread]).c_str(), b.count, describe(b.place).c_str());
    });
  }
  if (!b.arrived) b.count = count, b.place = place, b.thread = t.linear, b.released.clear();
  shared.order.release(t.linear, b.released);
  if (++b.arrived == count) {
    if (wait_too) shared.order.acquire(t.linear, b.released);
    return release_named_barrier(id);
  }
  if (wait_too) wait(t, {At::named_barrier, place, nullptr, 0, id, count});
}

void Block::release_named_barrier(unsigned id) {
  named_[id].arrived = 0;
  for (auto& t : threads) {
    if (t.wait.at != At::named_barrier || t.wait.id != id) continue;
    shared.order.acquire(t.linear, named_[id].released);
    wake(t);
  }
}

void Block::rendezvous(Thread& t, const Collective& what, std::uint32_t mask, void* argument, Place place) {
  Warp& warp = *t.warp;
  if (!(mask >> t.lane & 1)) {
    fail([&](std::string& s) {
      append(s, "%s calls %s at %s with mask %#x, which lacks its own lane %u", name(t).c_str(), what.name,
             describe(place).c_str(), mask, t.lane);
    });
  }
  if (what.whole_warp && warp.live != ~0u) {
    fail([&](std::string& s) {
      append(s, "%s calls %s at %s, which needs all 32 lanes; lanes %#x have ended or never were", name(t).c_str(),
             what.name, describe(place).c_str(), ~warp.live);
    });
  }
  std::size_t mine = warp.gatherings.size();
  for (std::size_t i = 0; i < warp.gatherings.size(); i++) {
    const Gathering& g = warp.gatherings[i];
    if (g.what == &what && g.mask == mask) {
      mine = i;
    } else if (g.mask >> t.lane & 1 && (g.arrived & mask)) {  // each waits for the other: neither can ever go on
      const Thread& other = warp.lanes[__builtin_ctz(g.arrived & mask)];
      fail([&](std::string& s) {
        append(s, "divergent warp: %s calls %s with mask %#x at %s, while %s waits in %s with mask %#x at %s",
               name(t).c_str(), what.name, mask, describe(place).c_str(), name(other).c_str(), g.what->name, g.mask,
               describe(other.wait.place).c_str());
      });
    }
  }
  if (mine == warp.gatherings.size()) warp.gatherings.push_back({&what, mask, 0});
  warp.gatherings[mine].arrived |= 1u << t.lane;
  t.argument = argument;
  if (!complete(warp, mine)) wait(t, {At::collective, place, &what, mask});
}

// Finishes a collective if all lanes of its mask that have not ended are there.
bool Block::complete(Warp& warp, std::size_t gathering) {
  const Gathering g = warp.gatherings[gathering];
  if (g.arrived != (g.mask & warp.live)) return false;
  warp.gatherings.erase(warp.gatherings.begin() + gathering);
  g.what->finish(*this, warp, g.arrived);
  for (std::uint32_t rest = g.arrived; rest; rest &= rest - 1) wake(warp.lanes[__builtin_ctz(rest)]);
  return true;
}

// Threads that wait at one place for one thing are one line of the report.
void Block::deadlock() {
  fail([&](std::string& s) {
    s += "deadlock, no thread can go on:";
    std::vector<bool> told(threads.size());
    for (auto& first : threads) {
      if (told[first.linear]) continue;
      const Wait& w = first.wait;
      unsigned count = 0, last = 0;
      for (auto& t : threads) {
        if (t.wait.at != w.at) continue;
        if (w.at != At::exited && (t.wait.place != w.place || t.wait.mask != w.mask || t.wait.id != w.id)) continue;
        told[t.linear] = true, count++, last = t.linear;
      }
      append(s, "\n    %s", name(first).c_str());
      if (count > 1) append(s, " to %s, %u in all,", name(threads[last]).c_str(), count);
      switch (w.at) {
        case At::block_barrier: s += " at __syncthreads"; break;
        case At::named_barrier: append(s, " at barrier %u for %u threads", w.id, w.count); break;
        case At::collective: append(s, " in %s with mask %#x", w.collective->name, w.mask); break;
        case At::mbarrier:
          append(s, " at the mbarrier at byte %u of shared memory", w.id);
          for (auto& b : mbarriers_) {
            if (b.offset == w.id) append(s, ", which lacks %u arrivals and %lld bytes,", b.pending, static_cast<long long>(b.bytes));
          }
          break;
        default: s += " ended"; continue;
      }
      append(s, " at %s", describe(w.place).c_str());
    }
  });
}

}  // namespace emulator
