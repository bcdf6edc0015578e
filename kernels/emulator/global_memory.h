// The emulated device's memory: allocations that know their bounds.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Allocation {
  std::uintptr_t begin, end;
};

// Memory filled with NaN (every byte 0xFF), 256-byte aligned as cudaMalloc's, with a margin that belongs to nobody on both
// sides; null when there is none.
void* allocate(std::size_t bytes);
void release(void* memory);

// The allocations that were alive when it was made, in ascending order: what one launch may touch.
class Bounds {
 public:
  Bounds();
  bool contains(std::uintptr_t begin, std::size_t bytes) {
    if (last_ < all_.size() && all_[last_].begin <= begin && begin + bytes <= all_[last_].end) return true;
    return search(begin, bytes);
  }
  // Where an address outside lies, in words.
  std::string nearest(std::uintptr_t begin) const;

 private:
  bool search(std::uintptr_t begin, std::size_t bytes);
  std::vector<Allocation> all_;
  std::size_t last_ = 0;  // neighbouring accesses mostly meet the same allocation
};

}  // namespace emulator
