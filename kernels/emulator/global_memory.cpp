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
  std::map<std::uintptr_t, std::uintptr_t> ends;  // by begin
};

Table& table() {
  static auto& it = *new Table;  // never destroyed: memory may be released while the process ends
  return it;
}

}  // namespace

void* allocate(std::size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  std::size_t whole = (bytes + 2 * MARGIN + MARGIN - 1) / MARGIN * MARGIN;
  auto* memory = static_cast<char*>(std::aligned_alloc(MARGIN, whole));
  if (!memory) return nullptr;
  std::memset(memory, 0xFF, whole);
  memory += MARGIN;
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory - MARGIN, MARGIN);
  __asan_poison_memory_region(memory + bytes, whole - MARGIN - bytes);
#endif
  auto begin = reinterpret_cast<std::uintptr_t>(memory);
  std::lock_guard guard(table().lock);
  table().ends[begin] = begin + bytes;
  return memory;
}

void release(void* memory) {
  if (!memory) return;
  {
    std::lock_guard guard(table().lock);
    table().ends.erase(reinterpret_cast<std::uintptr_t>(memory));
  }
  std::free(static_cast<char*>(memory) - MARGIN);
}

Bounds::Bounds() {
  std::lock_guard guard(table().lock);
  all_.reserve(table().ends.size());
  for (auto [begin, end] : table().ends) all_.push_back({begin, end});
}

bool Bounds::search(std::uintptr_t begin, std::size_t bytes) {
  auto after = std::upper_bound(all_.begin(), all_.end(), begin, [](auto a, auto& b) { return a < b.begin; });
  if (after == all_.begin()) return false;
  --after;
  if (begin + bytes > after->end) return false;
  last_ = after - all_.begin();
  return true;
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
