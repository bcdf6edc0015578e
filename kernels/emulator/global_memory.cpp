#include "global_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "report.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {
namespace {

constexpr std::size_t MARGIN = 256;

struct Table {
  std::mutex lock;
  std::map<std::uintptr_t, Allocation> all;  // by begin
  std::uint32_t launches = 0;
};

Table& table() {
  static auto& it = *new Table;  // never destroyed: memory may be released while the process ends
  return it;
}

// Who touched a word in a launch. Bytes of it that several blocks touched apart from each other make it `MIXED`: nothing more
// is found there in this launch.
struct Touched {
  std::uint64_t launch : 23, updated : 1, writer : 16, reader : 16, written : 4, read : 4;  // the last two: masks of bytes
  static constexpr std::uint64_t LAUNCHES = 1 << 23, NOBODY = 0, SEVERAL = 0xFFFE, MIXED = 0xFFFF;
};
static_assert(sizeof(Touched) == 8 && BLOCKS_TOLD_APART < Touched::SEVERAL - 1);

// True: no race, and `t` is what it is now.
bool touch(Touched& t, std::uint64_t me, unsigned mask, Use use, Meeting& other) {
  if (t.writer == Touched::MIXED) return true;
  const bool write = use != Use::read, update = use == Use::update;
  if (t.writer != Touched::NOBODY && t.writer != me && t.written & mask && !(update && t.updated)) {
    other = {t.writer - 1u, true};
    return false;
  }
  if (write && t.reader != Touched::NOBODY && t.reader != me && t.read & mask) {
    other = {t.reader - 1u, false};
    return false;
  }
  if (write) {
    if (t.writer == Touched::NOBODY) t.writer = me, t.updated = update;
    else if (t.writer == me) t.updated = t.updated && update;
    else t.writer = t.written & mask ? Touched::SEVERAL : Touched::MIXED;
    t.written |= mask;
  } else {
    if (t.reader == Touched::NOBODY) t.reader = me;
    else if (t.reader != me && t.read == mask) t.reader = Touched::SEVERAL;
    else if (t.reader != me) t.writer = Touched::MIXED;
    t.read |= mask;
  }
  return true;
}

}  // namespace

std::uint32_t next_launch() {
  std::lock_guard guard(table().lock);
  if (++table().launches == Touched::LAUNCHES) {
    for (auto& [begin, a] : table().all) std::memset(a.touched, 0, (a.end - begin + 3) / 4 * sizeof *a.touched);
    table().launches = 1;
  }
  return table().launches;
}

bool Allocation::record(std::uintptr_t at, std::size_t bytes, std::uint32_t launch, std::uint64_t block, Use use, Meeting& other) const {
  const std::uint64_t me = 1 + block % BLOCKS_TOLD_APART, first = at - begin, last = first + bytes;
  for (std::uint64_t word = first / 4; word * 4 < last; word++) {
    const std::uint64_t low = std::max(first, word * 4) - word * 4, high = std::min(last, word * 4 + 4) - word * 4;
    const unsigned mask = ((1u << high) - 1) & ~((1u << low) - 1);
    std::uint64_t seen = __atomic_load_n(&touched[word], __ATOMIC_RELAXED), bits;
    do {
      Touched t;
      std::memcpy(&t, &seen, sizeof t);
      if (t.launch != launch) t = {launch, 0, 0, 0, 0, 0};
      if (!touch(t, me, mask, use, other)) return false;
      std::memcpy(&bits, &t, sizeof bits);
    } while (bits != seen && !__atomic_compare_exchange_n(&touched[word], &seen, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  }
  return true;
}

void* allocate(std::size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  std::size_t whole = (bytes + 2 * MARGIN + MARGIN - 1) / MARGIN * MARGIN;
  auto* memory = static_cast<char*>(std::aligned_alloc(MARGIN, whole));
  // The system gives pages of it at their first use.
  auto* touched = static_cast<std::uint64_t*>(std::calloc((bytes + 3) / 4 + 1, sizeof(std::uint64_t)));
  if (!memory || !touched) {
    std::free(memory);
    std::free(touched);
    return nullptr;
  }
  std::memset(memory, 0xFF, whole);
  memory += MARGIN;
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory - MARGIN, MARGIN);
  __asan_poison_memory_region(memory + bytes, whole - MARGIN - bytes);
#endif
  auto begin = reinterpret_cast<std::uintptr_t>(memory);
  std::lock_guard guard(table().lock);
  table().all[begin] = {begin, begin + bytes, touched};
  return memory;
}

void release(void* memory) {
  if (!memory) return;
  {
    std::lock_guard guard(table().lock);
    auto found = table().all.find(reinterpret_cast<std::uintptr_t>(memory));
    std::free(found->second.touched);
    table().all.erase(found);
  }
  std::free(static_cast<char*>(memory) - MARGIN);
}

Bounds::Bounds() {
  std::lock_guard guard(table().lock);
  all_.reserve(table().all.size());
  for (auto& [begin, allocation] : table().all) all_.push_back(allocation);
}

const Allocation* Bounds::search(std::uintptr_t begin, std::size_t bytes) {
  auto after = std::upper_bound(all_.begin(), all_.end(), begin, [](auto a, auto& b) { return a < b.begin; });
  if (after == all_.begin()) return nullptr;
  --after;
  if (begin + bytes > after->end) return nullptr;
  last_ = after - all_.begin();
  return &*after;
}

std::string Bounds::nearest(std::uintptr_t begin) const {
  std::string text = "no allocation is near";
  std::uintptr_t best = 1 << 20;
  for (auto& a : all_) {
    std::uintptr_t before = a.begin > begin ? a.begin - begin : 0, past = begin >= a.end ? begin - a.end : 0;
    if (before + past >= best) continue;
    best = before + past;
    text.clear();
    auto bytes = static_cast<std::size_t>(a.end - a.begin);
    if (before) append(text, "%zu bytes before an allocation of %zu bytes", static_cast<std::size_t>(before), bytes);
    else if (begin >= a.end) append(text, "%zu bytes past the end of an allocation of %zu bytes", static_cast<std::size_t>(past), bytes);
    else append(text, "across the end of an allocation of %zu bytes", bytes);
  }
  return text;
}

}  // namespace emulator
