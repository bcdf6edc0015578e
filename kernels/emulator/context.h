// A fiber: a stack of its own and a saved stack pointer. Switching costs about ten nanoseconds, so that a block of a
// thousand CUDA threads can be a thousand fibers of one host thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

constexpr std::size_t STACK_BYTES = 64 << 10;

// The stacks of one host thread's fibers. Each has a page below it that faults: a kernel that overflows its stack must
// not go on in its neighbour's.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();
  // The lowest address of stack `i`, made at first use; null when the system gives no more memory.
  char* get(unsigned i);

 private:
  std::vector<char*> stacks_;
};

// Where a fiber, or the host thread itself, stopped.
struct Context {
  void* stack_pointer = nullptr;
  const void* low = nullptr;   // of its stack
  std::size_t bytes = 0;       // of its stack
  void* sanitizer = nullptr;   // AddressSanitizer's own record of a stopped stack
};

// Makes `context` start in `entry`, which must never return, on the given stack. `colour` spreads the tops of stacks over
// cache sets: at equal offsets the frames of a hundred fibers would push each other out.
void prepare(Context& context, char* low, unsigned colour, void (*entry)());

// Stops `from` here and goes on in `to`. With `last`, `from` will never be resumed.
void switch_to(Context& from, Context& to, bool last = false);

// The first thing a fiber calls; `from` is the context that it was started from.
void entered(Context& from);

}  // namespace emulator
