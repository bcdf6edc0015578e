#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

// Between two arrays, so that a step too far meets nobody.
constexpr std::size_t GAP = 128;
constexpr unsigned MAX_ARRAYS = 64;

SharedMemory::SharedMemory() : capacity_((SHARED_LIMIT + MAX_ARRAYS * GAP + 4095) / 4096 * 4096) {
  base_ = static_cast<char*>(std::aligned_alloc(4096, capacity_));
  if (!base_) std::abort();  // a quarter of a megabyte
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(base_, capacity_);
#endif
}

SharedMemory::~SharedMemory() {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(base_, capacity_);
#endif
  std::free(base_);
}

void SharedMemory::start(unsigned threads, std::size_t dynamic) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(base_, capacity_);
#endif
  if (order.start(threads)) words_.clear(), written_.clear();
  arrays_.clear();
  used_ = evict_ = 0;
  written_begin_ = ~0u, written_end_ = 0;
  layout_.clear();
  if (pending_words_) std::fill(pending_.begin(), pending_.end(), 0), pending_words_ = 0;
  if (dynamic) array(nullptr, dynamic, 1024);
}

void* SharedMemory::array(const void* tag, std::size_t bytes, std::size_t align) {
  for (auto& a : arrays_)
    if (a.tag == tag) return base_ + a.begin;
  std::size_t begin = arrays_.empty() ? 0 : (used_ + GAP + align - 1) / align * align, total = bytes;
  for (auto& a : arrays_) total += a.end - a.begin;
  if (total > SHARED_LIMIT || arrays_.size() == MAX_ARRAYS || begin + bytes + GAP > capacity_) return nullptr;
  used_ = begin + bytes;
  arrays_.push_back({tag, static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(used_)});
  std::size_t words = used_ / 4 + 1;
  if (words_.size() < words) words_.resize(words), pending_.resize(words), written_.resize(words);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(base_ + begin, bytes);
#endif
  std::memset(base_ + begin, 0xFF, bytes);
  return base_ + begin;
}

bool SharedMemory::in_bounds(const void* address, std::size_t bytes) const {
  std::uint32_t at = offset(address);
  for (auto& a : arrays_)
    if (a.begin <= at && at + bytes <= a.end) return true;
  return false;
}

std::string SharedMemory::nearest(const void* address) const {
  std::string text = "this block has no shared memory";
  std::uint32_t at = offset(address), best = ~0u;
  for (auto& a : arrays_) {
    std::uint32_t before = a.begin > at ? a.begin - at : 0, past = at > a.end ? at - a.end : 0;
    if (before + past >= best) continue;
    best = before + past;
    text.clear();
    const char* kind = a.tag ? "a static" : "the dynamic";
    if (before) append(text, "%u bytes before %s array of %u bytes", before, kind, a.end - a.begin);
    else if (at >= a.end) append(text, "%u bytes past the end of %s array of %u bytes", past, kind, a.end - a.begin);
    else append(text, "across the end of %s array of %u bytes", kind, a.end - a.begin);
  }
  return text;
}

// Each word remembers its last four accesses. One that is ordered before a newer access of the same bytes, and that could
// race with nothing that the newer one doesn't, gives its place up; when all four are needed, a read goes first. So a race
// can be missed when more than four threads touch a word between two barriers; none is ever reported that isn't one.
bool SharedMemory::record(const void* address, std::size_t bytes, unsigned thread, Use use, Place place, Access& other) {
  const bool write = use != Use::read, atomic = use == Use::update;
  const std::uint64_t epoch = order.epoch(), clock = order.clock(thread);
  std::uint32_t at = offset(address), end = at + bytes;
  if (use == Use::write) wrote(at, end, thread, place);
  for (std::uint32_t word = at / 4; word * 4 < end; word++) {
    std::uint32_t low = std::max(at, word * 4) - word * 4, high = std::min(end, word * 4 + 4) - word * 4;
    const unsigned mask = ((1u << high) - 1) & ~((1u << low) - 1);
    Access* slots = words_[word].slots;
    int free = -1;
    for (unsigned i = 0; i < SLOTS; i++) {
      const Access& a = slots[i];
      if (a.epoch != epoch) {
        free = i;
        continue;
      }
      if (!(a.bytes & mask)) continue;
      if (a.thread != thread && (a.write || write) && !(a.atomic && atomic) && order.known(thread, a.thread) < a.clock) {
        other = a;
        return false;
      }
      bool ordered = a.thread == thread || order.known(thread, a.thread) >= a.clock;
      if (ordered && (a.bytes & ~mask) == 0 && a.write <= write && (a.atomic || !atomic)) free = i;
    }
    if (free < 0) {
      free = evict_++ % SLOTS;
      for (unsigned i = 0; i < SLOTS && slots[free].write; i++) free = (free + 1) % SLOTS;
    }
    slots[free] = {epoch, clock, thread, mask, write, atomic, place};
  }
  return true;
}

void SharedMemory::wrote(std::uint32_t at, std::uint32_t end, unsigned thread, Place place) {
  written_begin_ = std::min(written_begin_, at), written_end_ = std::max(written_end_, end);
  const Written now = {order.epoch(), order.clock(thread), thread, place};
  for (std::uint32_t word = at / 4; word * 4 < end; word++) written_[word] = now;
  if (!layout_.empty())
    for (std::uint32_t chunk = at / 16; chunk * 16 < end; chunk++) layout_[chunk] = 0;
}

const Written* SharedMemory::unfenced(const void* address, std::size_t bytes, unsigned reader) const {
  const std::uint32_t at = std::max(offset(address), written_begin_);
  const std::uint32_t end = std::min(static_cast<std::uint32_t>(offset(address) + bytes), written_end_);
  for (std::uint32_t word = at / 4; word * 4 < end; word++) {
    const Written& w = written_[word];
    if (order.in_block(w.epoch) && !order.fenced(w.thread, w.epoch, w.clock, reader)) return &w;
  }
  return nullptr;
}

void SharedMemory::set_swizzle(const void* address, unsigned swizzle) {
  layout_.resize(capacity_ / 16);
  layout_[offset(address) / 16] = swizzle / 32 + 1;
}

void SharedMemory::set_in_flight(const void* address, std::size_t bytes, bool in_flight) {
  std::uint32_t at = offset(address);
  for (std::uint32_t word = at / 4; word * 4 < at + bytes; word++) {
    pending_words_ += in_flight ? pending_[word] == 0 : -(pending_[word] == 1);
    pending_[word] += in_flight ? 1 : -1;
  }
}

bool SharedMemory::in_flight(const void* address, std::size_t bytes) const {
  if (!pending_words_) return false;
  std::uint32_t at = offset(address);
  for (std::uint32_t word = at / 4; word * 4 < at + bytes; word++)
    if (pending_[word]) return true;
  return false;
}

}  // namespace emulator
