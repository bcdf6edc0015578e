#include "block.h"

namespace emulator {
namespace {

thread_local Thread* running = nullptr;

std::uint64_t mix(std::uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

}  // namespace

Thread* current() { return running; }

std::string Block::name(const Thread& t) {
  std::string text;
  append(text, "thread (%u,%u,%u)", t.index.x, t.index.y, t.index.z);
  return text;
}

std::uint32_t Block::random() {  // xorshift64*
  random_ ^= random_ >> 12;
  random_ ^= random_ << 25;
  random_ ^= random_ >> 27;
  return (random_ * 0x2545F4914F6CDD1D) >> 32;
}

bool Block::run(const Launch& what, Index at, Bounds& bounds) {
  launch = what, index = at, bounds_ = &bounds;
  const Index size = launch.block;
  const unsigned n = size.x * size.y * size.z;
  const std::uint64_t linear = at.x + launch.grid.x * (at.y + static_cast<std::uint64_t>(launch.grid.y) * at.z);
  random_ = mix(launch.seed ^ mix(linear)) | 1;
  failure.clear();
  shared.start(n, launch.shared_bytes);
  threads.resize(n);
  at_block_barrier_ = 0, runnable_warps_ = 0, live = n;
  for (auto& b : named_) b.count = b.arrived = 0;
  mbarriers_.clear(), bulk_copies_.clear(), landed_.clear();
  for (auto& w : warps) w.runnable = w.live = 0, w.gatherings.clear(), w.released.clear();
  for (unsigned i = 0; i < n; i++) {
    Thread& t = threads[i];
    t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.linear = i, t.lane = i % WARP, t.warp = &warps[i / WARP], t.block = this, t.wait = {};
    t.queue.copies.clear(), t.queue.groups.clear();
    t.multiplies.pending.clear(), t.multiplies.groups.clear(), t.multiplies.registers.forget();
    if (t.lane == 0) t.warp->lanes = &t;
    t.warp->live |= 1u << t.lane;
    char* stack = stacks_.get(i);
    if (!stack) {
      append(failure, "kernel %s: no memory for the stacks of %u threads", launch.kernel, n);
      return false;
    }
    prepare(t.context, stack, i, thread_main);
    wake(t);
  }
  turn();
  running = next();
  switch_to(host_, running->context);
  running = nullptr;
  if (failure.empty()) check_end();
  return failure.empty();
}

// A block must not end with work under way that nobody has waited for.
void Block::check_end() {
  const auto& copies = bulk_copies_.empty() ? landed_ : bulk_copies_;
  for (auto& copy : copies) {
    begin_failure();
    append(failure, "the block ended before anybody waited for the tensor copy that %s started at %s",
           name(threads[copy.thread]).c_str(), describe(copy.place).c_str());
    return end_failure();
  }
  for (auto& b : mbarriers_) {
    if (b.bytes == 0) continue;
    begin_failure();
    append(failure, "the block ended while the mbarrier at byte %u of shared memory waits for %lld more bytes", b.offset,
           static_cast<long long>(b.bytes));
    return end_failure();
  }
}

void Block::thread_main() {
  entered(running->block->host_);
  running->block->launch.call(running->block->launch.arguments);
  running->block->exit(*running);
}

void Block::wake(Thread& t) {
  t.wait.at = Wait::At::nothing;
  t.warp->runnable |= 1u << t.lane;
  runnable_warps_ |= 1u << (t.warp - warps);
}

// Chooses the next warp, one that can run, and the order of its lanes: ascending or descending from any of them.
void Block::turn() {
  const unsigned by = random() % MAX_WARPS;
  const std::uint32_t turned = runnable_warps_ >> by | static_cast<std::uint64_t>(runnable_warps_) << (MAX_WARPS - by);
  warp_ = (__builtin_ctz(turned) + by) % MAX_WARPS;
  first_lane_ = random() % WARP;
  descending_ = random() & 1;
}

// A warp runs until all its lanes wait.
Thread* Block::next() {
  if (!runnable_warps_) return nullptr;
  if (!warps[warp_].runnable) turn();
  std::uint32_t lanes = warps[warp_].runnable;
  std::uint32_t turned = lanes >> first_lane_ | static_cast<std::uint64_t>(lanes) << (WARP - first_lane_);
  unsigned lane = descending_ ? WARP - 1 - __builtin_clz(turned) : __builtin_ctz(turned);
  return &warps[warp_].lanes[(lane + first_lane_) % WARP];
}

// Switches from the current thread, which is not runnable any more, to the next that is.
void Block::go_on() {
  Thread& me = *running;
  const bool last = me.wait.at == Wait::At::exited;
  Thread* to = next();
  while (!to && live) {
    if (bulk_copies_.empty()) deadlock();
    land_bulk_copy();
    to = next();
  }
  if (to == &me) return;
  if (to) {
    running = to;
    switch_to(me.context, to->context, last);
  } else {
    switch_to(me.context, host_, last);
  }
}

void Block::wait(Thread& t, Wait what) {
  t.wait = what;
  t.warp->runnable &= ~(1u << t.lane);
  if (!t.warp->runnable) runnable_warps_ &= ~(1u << (t.warp - warps));
  go_on();
}

// Whoever has ended takes part in nothing: barriers of the block and collectives go on without it.
void Block::exit(Thread& t) {
  unfinished(t);
  t.wait.at = Wait::At::exited;
  t.warp->live &= ~(1u << t.lane);
  t.warp->runnable &= ~(1u << t.lane);
  if (!t.warp->runnable) runnable_warps_ &= ~(1u << (t.warp - warps));
  live--;
  if (live && at_block_barrier_ == live) release_block_barrier();
  for (std::size_t i = 0; i < t.warp->gatherings.size();) {
    const Gathering& g = t.warp->gatherings[i];
    if (g.mask >> t.lane & 1 && g.what->whole_warp) {
      const Thread& other = t.warp->lanes[__builtin_ctz(g.arrived)];
      fail([&](std::string& s) {
        append(s, "divergent warp: %s ended, while %s waits in %s, which needs all 32 lanes, at %s", name(t).c_str(),
               name(other).c_str(), g.what->name, describe(other.wait.place).c_str());
      });
    }
    if (!complete(*t.warp, i)) i++;
  }
  go_on();
  __builtin_unreachable();
}

// The same of a thread and its own.
void Block::unfinished(Thread& t) {
  if (!t.queue.copies.empty()) {
    fail([&](std::string& s) {
      append(s, "%s ended before it waited for the copy by cp.async that it started at %s", name(t).c_str(),
             describe(t.queue.copies[0].place).c_str());
    });
  }
  if (!t.multiplies.pending.empty()) {
    fail([&](std::string& s) {
      append(s, "%s ended before it waited for the wgmma that it started at %s", name(t).c_str(),
             describe(t.multiplies.pending[0].place).c_str());
    });
  }
}

void Block::begin_failure() {
  append(failure, "kernel %s, block (%u,%u,%u): ", launch.kernel, index.x, index.y, index.z);
}

void Block::end_failure() {
  append(failure, "\n  the order of warps came from seed %llu", static_cast<unsigned long long>(launch.seed));
}

void Block::leave() {
  end_failure();
  switch_to(running->context, host_, true);
  __builtin_unreachable();
}

}  // namespace emulator
