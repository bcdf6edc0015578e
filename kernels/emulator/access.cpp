// Every access of memory that a kernel makes comes through here.
//
// Kernels are compiled with -fsanitize=thread, which makes the compiler call a function before each load and store; the
// functions are ours, not the sanitizer's. So a kernel's ordinary C++ is checked as it stands, for bounds, alignment, data
// that is still on its way, races, and registers that wgmma has.
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {

namespace {

const char* verb(Use use) { return use == Use::read ? "reads" : use == Use::update ? "updates" : "writes"; }

}  // namespace

void Block::check(Thread& t, const void* address, std::size_t bytes, Use use, Place place) {
  if (static_cast<std::size_t>(static_cast<const char*>(address) - static_cast<const char*>(t.context.low)) < STACK_BYTES) {
    if (t.multiplies.registers.fenced()) check_registers(t, address, bytes, use != Use::read, place);
    return;
  }
  if (shared.covers(address)) {
    if (!shared.in_bounds(address, bytes)) {
      fail([&](std::string& s) {
        append(s, "out of bounds of shared memory: %s %s %zu bytes at %s, %s", name(t).c_str(), verb(use), bytes,
               describe(place).c_str(), shared.nearest(address).c_str());
      });
    }
    if (shared.in_flight(address, bytes)) copy_in_flight(t, address, bytes, use != Use::read, place);
    Access other;
    if (shared.record(address, bytes, t.linear, use, place, other)) return;
    fail([&](std::string& s) {
      append(s, "race on shared memory: %s %s byte %u at %s; %s %s it at %s, and no barrier is between", name(t).c_str(), verb(use),
             shared.offset(address), describe(place).c_str(), name(threads[other.thread]).c_str(),
             other.write ? "wrote" : "read", describe(other.place).c_str());
    });
  }
  check_global(t, address, bytes, use, place);
}

void Block::check_global(Thread& t, const void* address, std::size_t bytes, Use use, Place place) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const Allocation* allocation = bounds_->find(at, bytes);
  if (!allocation) {
    if (use == Use::read && in_image(address)) return;
    fail([&](std::string& s) {
      append(s, "out of bounds of global memory: %s %s %zu bytes at %s, %s", name(t).c_str(), verb(use), bytes,
             describe(place).c_str(), bounds_->nearest(at).c_str());
    });
  }
  const std::uint64_t linear = index.x + launch.grid.x * (index.y + static_cast<std::uint64_t>(launch.grid.y) * index.z);
  Meeting other;
  if (allocation->record(at, bytes, launch.number, linear, use, other)) return;
  fail([&](std::string& s) {
    append(s, "race on global memory: %s %s %zu bytes at %s, %zu bytes into an allocation of %zu bytes; ", name(t).c_str(), verb(use),
           bytes, describe(place).c_str(), static_cast<std::size_t>(at - allocation->begin),
           static_cast<std::size_t>(allocation->end - allocation->begin));
    const std::uint64_t blocks = static_cast<std::uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (other.block < blocks && blocks <= BLOCKS_TOLD_APART) {
      const auto b = static_cast<unsigned>(other.block);
      append(s, "block (%u,%u,%u)", b % launch.grid.x, b / launch.grid.x % launch.grid.y, b / launch.grid.x / launch.grid.y);
    } else {
      s += "another block";
    }
    append(s, " %s it in the same launch, and nothing orders blocks", other.wrote ? "wrote" : "read");
  });
}

namespace {

inline void access(const void* address, std::size_t bytes, bool write, Place place) {
  if (Thread* t = current()) t->block->check(*t, address, bytes, write ? Use::write : Use::read, place);
}

// What lies on a thread's own stack, the host's compiler may move as it likes: several small variables at once.
inline bool on_its_stack(const Thread& t, const void* address) {
  const auto low = reinterpret_cast<std::uintptr_t>(t.context.low), at = reinterpret_cast<std::uintptr_t>(address);
  return at >= low && at - low < t.context.bytes;
}

inline void aligned_access(const void* address, std::size_t bytes, bool write, Place place) {
  Thread* t = current();
  if (t && reinterpret_cast<std::uintptr_t>(address) % bytes && !on_its_stack(*t, address)) {
    t->block->fail([&](std::string& s) {
      append(s, "misaligned: %s %s %zu bytes at %s, at address %p", Block::name(*t).c_str(), write ? "writes" : "reads",
             bytes, describe(place).c_str(), address);
    });
  }
  access(address, bytes, write, place);
}

}  // namespace

Bits16 load16(const void* from) {
  aligned_access(from, 16, false, __builtin_return_address(0));
  Bits16 bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

void store16(void* to, Bits16 bits) {
  aligned_access(to, 16, true, __builtin_return_address(0));
  std::memcpy(to, &bits, sizeof bits);
}

std::uint32_t load4(const void* from) {
  aligned_access(from, 4, false, __builtin_return_address(0));
  std::uint32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

void store4(void* to, std::uint32_t bits) {
  aligned_access(to, 4, true, __builtin_return_address(0));
  std::memcpy(to, &bits, sizeof bits);
}

}  // namespace emulator

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define ALIGNED(n)                                                                                                      \
  void __tsan_read##n(void* a) { emulator::aligned_access(a, n, false, __builtin_return_address(0)); }                  \
  void __tsan_write##n(void* a) { emulator::aligned_access(a, n, true, __builtin_return_address(0)); }
// What the compiler takes for unaligned is a copy through memcpy, byte by byte as far as CUDA is concerned.
#define UNALIGNED(n)                                                                                                    \
  void __tsan_unaligned_read##n(void* a) { emulator::access(a, n, false, __builtin_return_address(0)); }                \
  void __tsan_unaligned_write##n(void* a) { emulator::access(a, n, true, __builtin_return_address(0)); }
ALIGNED(1)
ALIGNED(2)
ALIGNED(4)
ALIGNED(8)
ALIGNED(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)

void __tsan_read_range(void* a, unsigned long n) { emulator::access(a, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* a, unsigned long n) { emulator::access(a, n, true, __builtin_return_address(0)); }

}  // extern "C"
