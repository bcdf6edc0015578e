#include "context.h"

#include <sys/mman.h>

#if !defined(__x86_64__) || defined(_WIN32)
#error "the emulator's context switch is written for x86-64 with the System V calling convention"
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Only what the calling convention says a callee keeps: everything else is dead at a call.
extern "C" void varft_emulator_switch(void** save, void* load);
asm(R"(
.pushsection .text
.globl varft_emulator_switch
.hidden varft_emulator_switch
.type varft_emulator_switch, @function
varft_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size varft_emulator_switch, . - varft_emulator_switch
.popsection
)");

namespace emulator {

constexpr std::size_t GUARD_BYTES = 4096;

char* Stacks::get(unsigned i) {
  while (stacks_.size() <= i) {
    void* map = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    mprotect(map, GUARD_BYTES, PROT_NONE);
    stacks_.push_back(static_cast<char*>(map) + GUARD_BYTES);
  }
  return stacks_[i];
}

Stacks::~Stacks() {
  for (char* low : stacks_) munmap(low - GUARD_BYTES, GUARD_BYTES + STACK_BYTES);
}

void prepare(Context& context, char* low, unsigned colour, void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(low, STACK_BYTES);  // the fiber before may have been abandoned in the middle
#endif
  auto** top = reinterpret_cast<void**>(low + STACK_BYTES - colour % 16 * 256);
  *--top = nullptr;                        // the end, for those who walk the stack
  *--top = reinterpret_cast<void*>(entry);  // 16-byte aligned, as a function expects it before its return address is popped
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context = {top, low, STACK_BYTES, nullptr};
}

void switch_to(Context& from, Context& to, bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer, to.low, to.bytes);
#else
  (void)last;
#endif
  varft_emulator_switch(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

void entered(Context& from) {
#ifdef __SANITIZE_ADDRESS__
  const void* low;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &low, &bytes);
  if (!from.low) from.low = low, from.bytes = bytes;
#else
  (void)from;
#endif
}

}  // namespace emulator
