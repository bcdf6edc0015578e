// Atomic operations on shared and global memory. Blocks run on several host threads, so they are real ones.
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {
namespace {

// Replaces `*address` by `f(old)` and returns the old value. W: an integer of T's size.
template <class W, class T, class F>
T update(T* address, F f, Place place) {
  static_assert(sizeof(W) == sizeof(T));
  Thread& t = *current();
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T)) {
    t.block->fail([&](std::string& s) {
      append(s, "misaligned: %s updates %zu bytes at %s, at address %p", Block::name(t).c_str(), sizeof(T),
             describe(place).c_str(), static_cast<void*>(address));
    });
  }
  t.block->check(t, address, sizeof(T), Use::update, place);
  auto* word = reinterpret_cast<W*>(address);
  W seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    T old, fresh;
    W bits;
    std::memcpy(&old, &seen, sizeof old);
    fresh = f(old);
    std::memcpy(&bits, &fresh, sizeof bits);
    if (__atomic_compare_exchange_n(word, &seen, bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
  }
}

}  // namespace

#define EMULATED_ATOMICS(T, W)                                                                                          \
  T atomic_add(T* a, T v) { return update<W>(a, [=](T old) { return static_cast<T>(old + v); }, __builtin_return_address(0)); }     \
  T atomic_max(T* a, T v) { return update<W>(a, [=](T old) { return old < v ? v : old; }, __builtin_return_address(0)); } \
  T atomic_cas(T* a, T expected, T v) {                                                                                 \
    return update<W>(a, [=](T old) { return old == expected ? v : old; }, __builtin_return_address(0));                 \
  }
EMULATED_ATOMICS(int, unsigned)
EMULATED_ATOMICS(unsigned, unsigned)
EMULATED_ATOMICS(unsigned long long, unsigned long long)

unsigned atomic_exchange(unsigned* a, unsigned v) {
  return update<unsigned>(a, [=](unsigned) { return v; }, __builtin_return_address(0));
}

float atomic_add(float* a, float v) {
  return update<unsigned>(a, [=](float old) { return old + v; }, __builtin_return_address(0));
}

}  // namespace emulator
