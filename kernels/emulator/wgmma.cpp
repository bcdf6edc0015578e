// wgmma.mma_async m64nNk16: A from shared memory or registers, B from shared memory, both K-major, any swizzle.
//
// Nothing happens before the wait that covers an operation: until then its accumulators are NaN, its operands can still be
// spoiled, and its registers, which are words of the thread's stack here, are nobody else's. The four warps of a group each
// compute their 16 rows.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {

void Registers::fence() {
  if (touched_.empty()) touched_.resize(STACK_BYTES / 4);
  if (now_ == 0 || now_ == UINT16_MAX) std::fill(touched_.begin(), touched_.end(), 0), now_ = 0;
  now_++;
}

void Registers::touch(std::size_t offset, std::size_t bytes) {
  for (std::size_t word = offset / 4; word * 4 < offset + bytes && word < touched_.size(); word++) touched_[word] = now_;
}

bool Registers::touched(std::size_t offset, std::size_t bytes) const {
  for (std::size_t word = offset / 4; word * 4 < offset + bytes; word++)
    if (touched_[word] == now_) return true;
  return false;
}

void Block::check_registers(Thread& t, const void* address, std::size_t bytes, bool write, Place place) {
  auto* begin = static_cast<const char*>(address);
  auto meets = [&](const void* registers, std::size_t size) {
    auto* first = static_cast<const char*>(registers);
    return begin < first + size && first < begin + bytes;
  };
  for (auto& m : t.multiplies.pending) {
    const bool sums = meets(m.d, m.n / 2 * sizeof(float));
    if (!sums && !(write && m.from && meets(m.from, sizeof m.registers))) continue;
    fail([&](std::string& s) {
      append(s, "%s %s %s of the wgmma that it started at %s before it waited for it, at %s", name(t).c_str(), write ? "writes" : "reads",
             sums ? "an accumulator" : "operand A", describe(m.place).c_str(), describe(place).c_str());
    });
  }
  t.multiplies.registers.touch(begin - static_cast<const char*>(t.context.low), bytes);
}

namespace {

constexpr int K = 16;

// What a descriptor says, by the PTX manual's "Matrix Descriptor Format".
struct Operand {
  std::uint32_t start, leading, stride, swizzle;

  explicit Operand(std::uint64_t descriptor)
      : start((descriptor & 0x3FFF) << 4),
        leading((descriptor >> 16 & 0x3FFF) << 4),
        stride((descriptor >> 32 & 0x3FFF) << 4),
        swizzle(descriptor >> 62 ? 256 >> (descriptor >> 62) : 0) {}

  // Where elements [row, half * 8 .. half * 8 + 8] start: 16 bytes. Rows come in groups of eight; with a swizzle each is as
  // long as the pattern, without one a group is a core matrix of 16-byte rows.
  std::uint32_t chunk(int row, int half) const {
    const std::uint32_t group = start + row / 8 * stride;
    if (!swizzle) return group + half * leading + row % 8 * 16;
    const std::uint32_t at = group + row % 8 * swizzle + half * 16;
    return at ^ ((at >> 7 & (swizzle / 16 - 1)) << 4);
  }
};

void load_rows(Block& block, Thread& t, std::uint64_t descriptor, int first, int rows, float (*to)[K], Place place) {
  const Operand operand(descriptor);
  const char* arena = static_cast<const char*>(block.shared.dynamic());
  for (int r = 0; r < rows; r++) {
    for (int half = 0; half < 2; half++) {
      const char* from = arena + operand.chunk(first + r, half);
      block.check(t, from, 16, Use::read, place);
      std::uint16_t bits[8];
      std::memcpy(bits, from, 16);
      for (int i = 0; i < 8; i++) to[r][half * 8 + i] = bf16_to_float(bits[i]);
    }
  }
}

// What is wrong with an operand as it is when the instruction is issued: `rows` rows from `first`.
void check_operand(Block& block, Thread& t, std::uint64_t descriptor, int first, int rows, Place place) {
  const Operand operand(descriptor);
  auto fail = [&](auto&& say) {
    block.fail([&](std::string& s) {
      append(s, "%s starts a wgmma at %s: its operand at byte %u of shared memory ", Block::name(t).c_str(), describe(place).c_str(),
             operand.start);
      say(s);
    });
  };
  if (operand.swizzle && operand.start % (8 * operand.swizzle) >= operand.swizzle) {
    fail([&](std::string& s) {
      append(s, "is swizzled over %u bytes, and is not in the first row of a pattern, which repeats after %u bytes", operand.swizzle,
             8 * operand.swizzle);
    });
  }
  if (descriptor >> 49 & 7) fail([](std::string& s) { s += "has a base offset, which is not emulated"; });
  const char* arena = static_cast<const char*>(block.shared.dynamic());
  for (int r = first; r < first + rows; r++) {
    for (int half = 0; half < 2; half++) {
      const char* from = arena + operand.chunk(r, half);
      if (!block.shared.covers(from + 15)) continue;  // out of bounds, as its reading will say
      if (const Written* w = block.shared.unfenced(from, 16, t.linear)) {
        fail([&](std::string& s) {
          append(s, "was written by %s at %s, and no fence.proxy.async is between", Block::name(block.threads[w->thread]).c_str(),
                 describe(w->place).c_str());
        });
      }
      const int swizzle = block.shared.swizzle(from);
      if (swizzle >= 0 && swizzle != static_cast<int>(operand.swizzle)) {
        fail([&](std::string& s) {
          append(s, "is described with a swizzle of %u bytes, and a tensor copy has brought it with one of %d", operand.swizzle, swizzle);
        });
      }
    }
  }
}

// Column-wise, so that the inner loop runs over neighbouring outputs.
__attribute__((target_clones("avx2", "default"))) void multiply(const float (&a)[16][K], const float (*b)[256], int n, float (*d)[256]) {
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++)
      for (int j = 0; j < n; j++) d[i][j] += a[i][k] * b[k][j];
}

// One operation for the 16 rows of a warp.
void execute(Block& block, Warp& warp, std::size_t which) {
  const AsyncMultiply& first = warp.lanes[0].multiplies.pending[which];
  // Not on the fiber's stack, which is small; no other fiber of this host thread runs before the end.
  static thread_local float a[16][K], rows[256][K], b[K][256], d[16][256];
  const int n = first.n;
  if (!first.from) load_rows(block, warp.lanes[0], first.a, warp.lanes[0].linear / WARP % 4 * 16, 16, a, first.place);
  load_rows(block, warp.lanes[0], first.b, 0, n, rows, first.place);
  for (int j = 0; j < n; j++)
    for (int k = 0; k < K; k++) b[k][j] = rows[j][k];
  // Lane l holds, of rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next of every eight.
  auto fragments = [&](auto each) {
    for (unsigned lane = 0; lane < WARP; lane++) {
      AsyncMultiply& m = warp.lanes[lane].multiplies.pending[which];
      for (int i = 0; i < n / 2; i++) each(m, i, d[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
      if (!first.from) continue;
      for (int i = 0; i < 8; i++) {
        const std::uint16_t bits = m.registers[i / 2] >> i % 2 * 16;
        a[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = bf16_to_float(bits);
      }
    }
  };
  fragments([](AsyncMultiply& m, int i, float& d) { d = m.accumulate ? m.before[i] : 0.0f; });
  multiply(a, b, n, d);
  fragments([](AsyncMultiply& m, int i, float& d) { m.before[i] = d; });
}

struct WaitArgument {
  std::size_t operations;
  Place place;
};

void finish_operations(Block& block, Warp& warp, std::uint32_t) {
  const std::size_t n = static_cast<WaitArgument*>(warp.lanes[0].argument)->operations;
  for (unsigned lane = 1; lane < WARP; lane++) {
    bool agree = static_cast<WaitArgument*>(warp.lanes[lane].argument)->operations == n;
    for (std::size_t i = 0; agree && i < n; i++) {
      const AsyncMultiply &x = warp.lanes[0].multiplies.pending[i], &y = warp.lanes[lane].multiplies.pending[i];
      agree = x.n == y.n && x.a == y.a && x.b == y.b && x.accumulate == y.accumulate && !x.from == !y.from;
    }
    if (agree) continue;
    block.fail([&](std::string& s) {
      append(s, "divergent warp: %s and %s wait for different wgmma operations at %s", Block::name(warp.lanes[0]).c_str(),
             Block::name(warp.lanes[lane]).c_str(), describe(static_cast<WaitArgument*>(warp.lanes[lane].argument)->place).c_str());
    });
  }
  for (std::size_t i = 0; i < n; i++) {
    execute(block, warp, i);
    for (unsigned lane = 0; lane < WARP; lane++) {
      auto& pending = warp.lanes[lane].multiplies.pending;
      AsyncMultiply& done = pending[i];
      std::size_t next = i + 1;
      while (next < pending.size() && pending[next].d != done.d) next++;
      if (next < pending.size()) std::memcpy(pending[next].before, done.before, sizeof done.before);
      else std::memcpy(done.d, done.before, done.n / 2 * sizeof(float));
    }
  }
}

const Collective WAIT = {"wgmma.wait_group", finish_operations, true};

}  // namespace

void wgmma(float* d, unsigned n, const std::uint32_t* registers, std::uint64_t a, std::uint64_t b, bool accumulate) {
  Place place = __builtin_return_address(0);
  Thread& t = *current();
  const Registers& touched = t.multiplies.registers;
  const auto offset = [&](const void* p) { return static_cast<std::size_t>(static_cast<const char*>(p) - static_cast<const char*>(t.context.low)); };
  const char* unfenced = nullptr;
  if (!touched.fenced()) unfenced = "no wgmma.fence is before the block's first";
  else if (touched.touched(offset(d), n / 2 * sizeof(float))) unfenced = "its accumulators were touched after the last wgmma.fence";
  else if (registers && touched.touched(offset(registers), 16)) unfenced = "operand A was written after the last wgmma.fence";
  if (unfenced) {
    t.block->fail([&](std::string& s) {
      append(s, "%s starts a wgmma at %s: %s", Block::name(t).c_str(), describe(place).c_str(), unfenced);
    });
  }
  if (t.lane == 0) {
    if (!registers) check_operand(*t.block, t, a, t.linear / WARP % 4 * 16, 16, place);
    check_operand(*t.block, t, b, 0, n, place);
  }
  AsyncMultiply m{d, static_cast<int>(n), registers, accumulate, a, b, {}, {}, place};
  if (registers) std::memcpy(m.registers, registers, sizeof m.registers);
  std::memcpy(m.before, d, n / 2 * sizeof(float));  // of use to the first operation on these accumulators
  t.multiplies.pending.push_back(m);
  for (unsigned i = 0; i < n / 2; i++) d[i] = NAN;
}

void wgmma_fence() { current()->multiplies.registers.fence(); }

void fence_proxy_async() {
  Thread& t = *current();
  t.block->shared.order.proxy_fence(t.linear);
}

void wgmma_commit() {
  auto& q = current()->multiplies;
  q.groups.push_back(q.pending.size());
}

void wgmma_wait(unsigned pending) {
  Thread& t = *current();
  auto& q = t.multiplies;
  const std::size_t done = q.groups.size() > pending ? q.groups.size() - pending : 0;
  Place place = __builtin_return_address(0);
  WaitArgument argument{done ? q.groups[done - 1] : 0, place};
  t.block->rendezvous(t, WAIT, ~0u, &argument, place);
  q.pending.erase(q.pending.begin(), q.pending.begin() + argument.operations);
  q.groups.erase(q.groups.begin(), q.groups.begin() + done);
  for (auto& g : q.groups) g -= argument.operations;
}

std::uint32_t shared_address(const void* address) {
  Place place = __builtin_return_address(0);
  Thread& t = *current();
  if (t.block->shared.covers(address)) return t.block->shared.offset(address);
  t.block->fail([&](std::string& s) {
    append(s, "%s takes the shared address of %p at %s, which is not in shared memory", Block::name(t).c_str(), address,
           describe(place).c_str());
  });
}

}  // namespace emulator
