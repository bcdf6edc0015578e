// A block's shared memory: its arrays, who touched which bytes last, which bytes an asynchronous copy has not reached, and in
// which order a tensor copy has left them.
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

// What a thread wrote last into a word.
struct Written {
  std::uint64_t epoch : 24, clock : 24, thread : 10;
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
  bool record(const void* address, std::size_t bytes, unsigned thread, Use use, Place place, Access& other);

  // Marks bytes as the target of an asynchronous copy, or as reached by it.
  void set_in_flight(const void* address, std::size_t bytes, bool in_flight);
  bool in_flight(const void* address, std::size_t bytes) const;

  // The first word of the range that a thread wrote with no fence.proxy.async before an asynchronous access that `reader`
  // starts now, or null.
  const Written* unfenced(const void* address, std::size_t bytes, unsigned reader) const;

  // The swizzle (0, 32, 64, 128) in which a tensor copy left the 16 bytes there; negative: no tensor copy was there last.
  int swizzle(const void* address) const { return layout_.empty() ? -1 : layout_[offset(address) / 16] * 32 - 32; }
  void set_swizzle(const void* address, unsigned swizzle);

  Order order;

 private:
  struct Array {
    const void* tag;
    std::uint32_t begin, end;
  };
  static constexpr unsigned SLOTS = 4;
  void wrote(std::uint32_t at, std::uint32_t end, unsigned thread, Place place);

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
  std::vector<Written> written_;                      // per word
  std::uint32_t written_begin_ = ~0u, written_end_ = 0;  // all of them in this block
  std::vector<std::uint8_t> layout_;                  // per 16 bytes: swizzle / 32 + 1, or 0; empty without tensor copies
  unsigned evict_ = 0;
};

}  // namespace emulator
