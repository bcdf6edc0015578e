// Launches by name: the blocks of a grid over host threads, and the functions that the host program calls.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "block.h"
#include "device.h"
#include "launch.h"

namespace emulator {
namespace {

const Kernel* kernels = nullptr;  // filled before main, by one thread

// Blocks that no launch uses at the moment: their stacks and shared memory are expensive to make.
class Idle {
 public:
  std::unique_ptr<Block> take() {
    std::lock_guard guard(lock_);
    if (blocks_.empty()) return std::make_unique<Block>();
    auto block = std::move(blocks_.back());
    blocks_.pop_back();
    return block;
  }
  void give(std::unique_ptr<Block> block) {
    std::lock_guard guard(lock_);
    blocks_.push_back(std::move(block));
  }

 private:
  std::mutex lock_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

Idle& idle() {
  static auto& it = *new Idle;
  return it;
}

struct Run {
  Run(const Launch& what)
      : launch(what), blocks(static_cast<std::uint64_t>(what.grid.x) * what.grid.y * what.grid.z) {}
  const Launch& launch;
  const std::uint64_t blocks;
  std::atomic<std::uint64_t> next{0};
  std::mutex lock;
  std::uint64_t failed = ~0ull;  // the lowest block that failed: what is reported does not depend on the host's threads
  std::string failure;
};

void work(Run& run) {
  auto block = idle().take();
  Bounds bounds;
  const Index grid = run.launch.grid;
  for (;;) {
    const std::uint64_t i = run.next.fetch_add(1);
    if (i >= run.blocks) break;
    const Index index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)};
    if (block->run(run.launch, index, bounds)) continue;
    std::lock_guard guard(run.lock);
    if (i < run.failed) run.failed = i, run.failure = block->failure;
    run.next = run.blocks;  // blocks below `i` have been handed out already
  }
  idle().give(std::move(block));
}

std::string launch(const Launch& what, unsigned workers) {
  Run run(what);
  std::vector<std::thread> others;
  for (std::uint64_t i = 1; i < std::min<std::uint64_t>(workers, run.blocks); i++) {
    try {
      others.emplace_back(work, std::ref(run));
    } catch (const std::system_error&) {
      break;  // fewer threads do the same work
    }
  }
  work(run);
  for (auto& t : others) t.join();
  return run.failure;
}

const Kernel* find(const char* name) {
  for (auto* k = kernels; k; k = k->next)
    if (!std::strcmp(k->name, name)) return k;
  return nullptr;
}

// What is wrong with a launch before it starts; empty: nothing.
std::string refuse(const Kernel* kernel, const varft_emulator_launch& l) {
  std::string s;
  if (!kernel) {
    append(s, "no kernel is named %s", l.kernel);
    return s;
  }
  const bool agree = kernel->parameters == l.arguments && std::equal(l.types, l.types + l.arguments, kernel->types,
                                                                      [](auto a, auto b) { return !std::strcmp(a, b); });
  if (!agree) {
    append(s, "kernel %s takes (", l.kernel);
    for (unsigned i = 0; i < kernel->parameters; i++) append(s, "%s%s", i ? ", " : "", kernel->types[i]);
    s += "), not (";
    for (unsigned i = 0; i < l.arguments; i++) append(s, "%s%s", i ? ", " : "", l.types[i]);
    s += ")";
    return s;
  }
  const std::uint64_t threads = static_cast<std::uint64_t>(l.block[0]) * l.block[1] * l.block[2];
  if (l.block[0] > MAX_THREADS || l.block[1] > MAX_THREADS || l.block[2] > 64 || threads == 0 || threads > MAX_THREADS) {
    append(s, "kernel %s: a block of %u x %u x %u threads; it must have 1 to %u", l.kernel, l.block[0], l.block[1], l.block[2],
           MAX_THREADS);
  } else if (kernel->threads && threads != kernel->threads) {
    append(s, "kernel %s: a block of %u threads; it is written for %u", l.kernel, static_cast<unsigned>(threads), kernel->threads);
  } else if (l.grid[0] == 0 || l.grid[1] == 0 || l.grid[2] == 0 || l.grid[0] > 0x7FFFFFFF || l.grid[1] > 65535 ||
             l.grid[2] > 65535) {
    append(s, "kernel %s: a grid of %u x %u x %u blocks; it must have at least one, and at most 2147483647 x 65535 x 65535",
           l.kernel, l.grid[0], l.grid[1], l.grid[2]);
  } else if (l.shared_bytes > SHARED_LIMIT) {
    append(s, "kernel %s: %zu bytes of dynamic shared memory; a block has at most %zu", l.kernel, l.shared_bytes, SHARED_LIMIT);
  }
  return s;
}

}  // namespace

void register_kernel(Kernel& kernel) {
  kernel.next = kernels;
  kernels = &kernel;
}

Index thread_index() { return current()->index; }
Index block_index() { return current()->block->index; }
Index block_size() { return current()->block->launch.block; }
Index grid_size() { return current()->block->launch.grid; }

void* dynamic_shared() { return current()->block->shared.dynamic(); }

void* shared_array(const void* tag, std::size_t bytes, std::size_t align) {
  Place place = __builtin_return_address(0);
  Thread& t = *current();
  if (void* array = t.block->shared.array(tag, bytes, align)) return array;
  t.block->fail([&](std::string& s) {
    append(s, "%s needs %zu more bytes of shared memory at %s than the %zu of a block", Block::name(t).c_str(), bytes,
           describe(place).c_str(), SHARED_LIMIT);
  });
}

void sync_threads() {
  Thread& t = *current();
  t.block->block_barrier(t, __builtin_return_address(0));
}

void named_barrier_sync(unsigned id, unsigned threads) {
  Thread& t = *current();
  t.block->named_barrier(t, id, threads, true, __builtin_return_address(0));
}

void named_barrier_arrive(unsigned id, unsigned threads) {
  Thread& t = *current();
  t.block->named_barrier(t, id, threads, false, __builtin_return_address(0));
}

}  // namespace emulator

void* varft_emulator_allocate(std::size_t bytes) { return emulator::allocate(bytes); }

void varft_emulator_release(void* memory) { emulator::release(memory); }

const char* const* varft_emulator_parameters(const char* name) {
  const auto* kernel = emulator::find(name);
  return kernel ? kernel->types : nullptr;
}

int varft_emulator_run(const varft_emulator_launch* l, char* message, std::size_t capacity) {
  std::string failure;
  try {
    const auto* kernel = emulator::find(l->kernel);
    failure = emulator::refuse(kernel, *l);
    if (failure.empty()) {
      emulator::Launch what{l->kernel, kernel->call, l->values, {l->grid[0], l->grid[1], l->grid[2]},
                            {l->block[0], l->block[1], l->block[2]}, l->shared_bytes, l->seed, emulator::next_launch()};
      failure = emulator::launch(what, l->workers);
    }
  } catch (const std::exception& e) {
    failure = std::string("the emulator failed: ") + e.what();
  }
  if (failure.empty()) return 0;
  std::size_t n = std::min(failure.size(), capacity - 1);
  std::memcpy(message, failure.data(), n);
  message[n] = 0;
  return 1;
}
