// A block's shared memory: its arrays, who touched which bytes last, and which bytes an asynchronous copy has not reached.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "order.h"
#include "report.h"

namespace emulator {

constexpr std::size_t SHARED_LIMIT = 227 << 10;  // what a block may have on sm_90

// One access of up to four bytes of one 32-bit word, and where in the code.
struct Access {
  std::uint64_t epoch : 24, clock : 24, thread : 10, bytes : 4, write : 1, atomic : 1;  // bytes: a mask
  Place place;
};

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Starts a block of `threads` threads with `dynamic` bytes of dynamic shared memory, all NaN.
  void start(unsigned threads, std::size_t dynamic);
  void* dynamic() const { return base_; }
  // The array that `tag` names, NaN at its first use in a block; null when the block would pass the limit.
  void* array(const void* tag, std::size_t bytes, std::size_t align);

  // Whether the address lies in the arena, in an array or not.
  bool covers(const void* address) const {
    return static_cast<std::size_t>(static_cast<const char*>(address) - base_) < capacity_;
  }
  bool in_bounds(const void* address, std::size_t bytes) const;
  std::uint32_t offset(const void* address) const { return static_cast<const char*>(address) - base_; }
  // Where an address outside all arrays lies, in words.
  std::string nearest(const void* address) const;

  // Records an access in bounds. If it races with an earlier one, copies that one to `other` and returns false.
  bool record(const void* address, std::size_t bytes, unsigned thread, bool write, bool atomic, Place place, Access& other);

  // Marks bytes as the target of an asynchronous copy, or as reached by it.
  void set_in_flight(const void* address, std::size_t bytes, bool in_flight);
  bool in_flight(const void* address, std::size_t bytes) const;

  Order order;

 private:
  struct Array {
    const void* tag;
    std::uint32_t begin, end;
  };
  static constexpr unsigned SLOTS = 4;
  struct alignas(64) Word {
    Access slots[SLOTS];
  };

  char* base_;
  std::size_t capacity_;
  std::size_t used_ = 0;
  std::vector<Array> arrays_;
  std::vector<Word> words_;
  std::vector<std::uint8_t> pending_;  // per word: how many copies are on their way
  unsigned pending_words_ = 0;
  unsigned evict_ = 0;
};

}  // namespace emulator
