// The emulated device's memory: allocations that know their bounds, and which blocks of a launch touched which bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "report.h"

namespace emulator {

// Blocks of a launch whose numbers are the same modulo this count as one: a race between two of them is missed.
constexpr std::uint64_t BLOCKS_TOLD_APART = 0xFFF0;

// What an access met: who was there before.
struct Meeting {
  std::uint64_t block;  // at least BLOCKS_TOLD_APART: several
  bool wrote;
};

struct Allocation {
  std::uintptr_t begin, end;
  std::uint64_t* touched;  // for each 32-bit word who touched it in the last launch that did: see global_memory.cpp

  // Records an access by a block of a launch. If it races with another block's, tells of that one and returns false.
  bool record(std::uintptr_t at, std::size_t bytes, std::uint32_t launch, std::uint64_t block, Use use, Meeting& other) const;
};

// The number of the next launch. None that recorded accesses know of has it.
std::uint32_t next_launch();

// Memory filled with NaN (every byte 0xFF), 256-byte aligned as cudaMalloc's, with a margin that belongs to nobody on both
// sides; null when there is none.
void* allocate(std::size_t bytes);
void release(void* memory);

// The allocations that were alive when it was made, in ascending order: what one launch may touch.
class Bounds {
 public:
  Bounds();
  // The one that has all of the bytes, or null.
  const Allocation* find(std::uintptr_t begin, std::size_t bytes) {
    if (last_ < all_.size() && all_[last_].begin <= begin && begin + bytes <= all_[last_].end) return &all_[last_];
    return search(begin, bytes);
  }
  // Where an address outside lies, in words.
  std::string nearest(std::uintptr_t begin) const;

 private:
  const Allocation* search(std::uintptr_t begin, std::size_t bytes);
  std::vector<Allocation> all_;
  std::size_t last_ = 0;  // neighbouring accesses mostly meet the same allocation
};

}  // namespace emulator
