// One block in execution: its threads as fibers, in warps, and what they wait for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "global_memory.h"
#include "index.h"
#include "order.h"
#include "report.h"
#include "shared_memory.h"
#include "tensor_map.h"

namespace emulator {

constexpr unsigned WARP = 32, MAX_WARPS = MAX_THREADS / WARP, NAMED_BARRIERS = 16;

class Block;
struct Warp;

// An operation in which the lanes of a mask take part together. The last lane to arrive runs `finish` for all of them: it
// reads and writes the arguments, which lie on the stacks of the lanes that wait.
struct Collective {
  const char* name;
  void (*finish)(Block&, Warp&, std::uint32_t mask);
  bool whole_warp = false;  // PTX's .aligned: every lane must be there
};

struct Wait {
  enum class At { nothing, block_barrier, named_barrier, collective, mbarrier, exited } at = At::nothing;
  Place place = nullptr;
  const Collective* collective = nullptr;
  std::uint32_t mask = 0;           // of a collective
  unsigned id = 0, count = 0;       // of a named barrier; id also the offset of an mbarrier
};

// One asynchronous copy of a thread.
struct Copy {
  void* to;
  const void* from;
  unsigned bytes, zeros;  // zeros follow the bytes
  Place place;
};

// A thread's cp.async copies in the order of issue; `groups` holds how many copies the groups up to each one have.
struct CopyQueue {
  std::vector<Copy> copies;
  std::vector<std::size_t> groups;
};

// A wgmma operation that nobody has waited for. `before`: the accumulators' values, kept here while they read as NaN.
struct AsyncMultiply {
  float* d;
  int n;
  const std::uint32_t* from;  // A's registers, or null
  bool accumulate;
  std::uint64_t a, b;
  std::uint32_t registers[4];
  float before[128];
  Place place;
};

// Which words of its stack a thread has touched since its last wgmma.fence: what may be an instruction's registers.
class Registers {
 public:
  bool fenced() const { return now_ != 0; }  // was there a fence in this block
  void forget() { now_ = 0; }
  void fence();
  void touch(std::size_t offset, std::size_t bytes);
  bool touched(std::size_t offset, std::size_t bytes) const;

 private:
  std::uint16_t now_ = 0;
  std::vector<std::uint16_t> touched_;  // `now_` of the last touch, per word
};

struct MultiplyQueue {
  std::vector<AsyncMultiply> pending;
  std::vector<std::size_t> groups;
  Registers registers;
};

struct Thread {
  Context context;
  Index index;
  unsigned linear, lane;
  Warp* warp;
  Block* block;
  Wait wait;
  void* argument = nullptr;  // of the collective that it waits in
  CopyQueue queue;
  MultiplyQueue multiplies;
};

// The lanes that wait in one collective.
struct Gathering {
  const Collective* what;
  std::uint32_t mask, arrived;
};

struct Warp {
  std::uint32_t runnable = 0, live = 0;
  std::vector<Gathering> gatherings;  // several where the lanes' masks are apart
  Thread* lanes = nullptr;
  Released released;  // by the lanes at a __syncwarp
};

struct NamedBarrier {
  unsigned count = 0, arrived = 0;
  Place place = nullptr;  // of the first arrival
  unsigned thread = 0;
  Released released;
};

struct MBarrier {
  unsigned offset, count, pending;  // pending: arrivals that the phase under way still needs
  std::int64_t bytes;               // and bytes
  std::int32_t phase;               // under way, the first is 0
  Released released;
  std::vector<std::int32_t> seen;   // by each thread: the last phase whose end it waited for, or NEVER
  static constexpr std::int32_t NEVER = -2;
};

// A copy of a tensor's box that has not landed, or for whose landing nobody has waited.
struct BulkCopy {
  void* to;
  const void* barrier;
  TensorMap map;
  int corner[3];
  unsigned thread;
  Place place;
  std::int32_t phase = 0;  // of the barrier, once landed
  unsigned bytes() const;  // of the box
};

// What a launch is, for all its blocks.
struct Launch {
  const char* kernel;
  void (*call)(void* const* arguments);
  void* const* arguments;
  Index grid, block;
  std::size_t shared_bytes;
  std::uint64_t seed;
  std::uint32_t number;  // of the launch
};

class Block {
 public:
  Block() = default;
  // Runs one block from start to end. False: `failure` says why it could not end.
  bool run(const Launch& launch, Index index, Bounds& bounds);
  std::string failure;

  // Stops the current thread until somebody makes it runnable.
  void wait(Thread& thread, Wait what);
  void wake(Thread& thread);
  // Ends the block with what `write` appends to the failure. The fibers are abandoned as they are: nothing on their stacks
  // owns memory outside the emulator's calls, and `write` has returned before the switch.
  template <class F>
  [[noreturn]] void fail(F&& write) {
    begin_failure();
    std::forward<F>(write)(failure);
    leave();
  }

  // A kernel's access of memory; fails the block where there is none, or another thread is in the way.
  void check(Thread& thread, const void* address, std::size_t bytes, Use use, Place place);
  // The same of a thread's own stack, where wgmma's registers are.
  void check_registers(Thread& thread, const void* address, std::size_t bytes, bool write, Place place);

  void block_barrier(Thread& thread, Place place);
  void named_barrier(Thread& thread, unsigned id, unsigned count, bool wait_too, Place place);
  void rendezvous(Thread& thread, const Collective& what, std::uint32_t mask, void* argument, Place place);

  void mbarrier_init(Thread& thread, const void* address, unsigned count, Place place);
  void mbarrier_arrive(Thread& thread, const void* address, std::int64_t bytes, Place place);
  void mbarrier_wait(Thread& thread, const void* address, unsigned parity, Place place);
  void start_bulk_copy(Thread& thread, const BulkCopy& copy);

  static std::string name(const Thread& thread);

  Launch launch{};
  Index index{};
  unsigned live = 0;
  std::vector<Thread> threads;
  Warp warps[MAX_WARPS];
  SharedMemory shared;

 private:
  static void thread_main();
  void exit(Thread& thread);
  void turn();
  Thread* next();
  void go_on();
  void check_end();
  void begin_failure();
  void end_failure();
  [[noreturn]] void leave();
  [[noreturn]] void deadlock();
  [[noreturn]] void copy_in_flight(Thread& thread, const void* address, std::size_t bytes, bool write, Place place);
  void check_global(Thread& thread, const void* address, std::size_t bytes, Use use, Place place);
  void unfinished(Thread& thread);
  void release_block_barrier();
  void release_named_barrier(unsigned id);
  bool complete(Warp& warp, std::size_t gathering);
  MBarrier& mbarrier(Thread& thread, const void* address, bool initialise, Place place);
  void mbarrier_advance(MBarrier& barrier);
  void land_bulk_copy();
  void show_bulk_copies(unsigned barrier, std::int32_t phase);
  std::uint32_t random();

  Stacks stacks_;
  Context host_;
  Bounds* bounds_ = nullptr;
  unsigned at_block_barrier_ = 0;
  NamedBarrier named_[NAMED_BARRIERS];
  std::vector<MBarrier> mbarriers_;
  std::vector<BulkCopy> bulk_copies_, landed_;
  std::uint32_t runnable_warps_ = 0;
  unsigned warp_ = 0, first_lane_ = 0;
  bool descending_ = false;
  std::uint64_t random_ = 1;
};

// The thread that the calling host thread executes, or null.
Thread* current();

}  // namespace emulator
