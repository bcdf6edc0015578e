// Every access of memory that a kernel makes comes through here.
//
// Kernels are compiled with -fsanitize=thread, which makes the compiler call a function before each load and store; the
// functions are ours, not the sanitizer's. So a kernel's ordinary C++ is checked as it stands, for bounds, alignment, data
// that is still on its way and races on shared memory.
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {

void Block::check(Thread& t, const void* address, std::size_t bytes, bool write, bool atomic, Place place) {
  if (static_cast<std::size_t>(static_cast<const char*>(address) - static_cast<const char*>(t.context.low)) < STACK_BYTES) return;
  const char* verb = write ? (atomic ? "updates" : "writes") : "reads";
  if (shared.covers(address)) {
    if (!shared.in_bounds(address, bytes)) {
      fail([&](std::string& s) {
        append(s, "out of bounds of shared memory: %s %s %zu bytes at %s, %s", name(t).c_str(), verb, bytes,
               describe(place).c_str(), shared.nearest(address).c_str());
      });
    }
    if (shared.in_flight(address, bytes)) copy_in_flight(t, address, bytes, write, place);
    Access other;
    if (shared.record(address, bytes, t.linear, write, atomic, place, other)) return;
    fail([&](std::string& s) {
      append(s, "race on shared memory: %s %s byte %u at %s; %s %s it at %s, and no barrier is between", name(t).c_str(), verb,
             shared.offset(address), describe(place).c_str(), name(threads[other.thread]).c_str(),
             other.write ? "wrote" : "read", describe(other.place).c_str());
    });
  }
  if (bounds_->contains(reinterpret_cast<std::uintptr_t>(address), bytes)) return;
  if (!write && in_image(address)) return;
  fail([&](std::string& s) {
    append(s, "out of bounds of global memory: %s %s %zu bytes at %s, %s", name(t).c_str(), verb, bytes,
           describe(place).c_str(), bounds_->nearest(reinterpret_cast<std::uintptr_t>(address)).c_str());
  });
}

namespace {

inline void access(const void* address, std::size_t bytes, bool write, Place place) {
  if (Thread* t = current()) t->block->check(*t, address, bytes, write, false, place);
}

inline void aligned_access(const void* address, std::size_t bytes, bool write, Place place) {
  Thread* t = current();
  if (t && reinterpret_cast<std::uintptr_t>(address) % bytes) {
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
