// The tensor memory accelerator: boxes of 16-bit elements from global to shared memory, reported to an mbarrier.
//
// A copy lands as late as it can: when no thread of the block can go on without it. What lies outside the tensor is zero.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {
namespace {

constexpr unsigned ELEMENT = 2;

// The hardware exchanges 16-byte chunks by address: bits 4.. are XORed with bits 7.., one, two or three of them.
std::uint32_t swizzled(std::uint32_t offset, unsigned swizzle) {
  const std::uint32_t bits = swizzle == 128 ? 7 : swizzle == 64 ? 3 : swizzle == 32 ? 1 : 0;
  return offset ^ ((offset >> 7 & bits) << 4);
}

// After how many bytes a swizzle repeats: at multiples of it a box begins.
unsigned pattern(unsigned swizzle) { return swizzle ? 8 * swizzle : 128; }

}  // namespace

unsigned BulkCopy::bytes() const {
  unsigned bytes = ELEMENT;
  for (unsigned i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// The map itself was checked where it was made, as the driver does.
void Block::start_bulk_copy(Thread& t, const BulkCopy& copy) {
  const unsigned align = pattern(copy.map.swizzle);
  if (!shared.covers(copy.to) || reinterpret_cast<std::uintptr_t>(copy.to) % align) {
    fail([&](std::string& s) {
      append(s, "%s starts a tensor copy at %s: its target is not shared memory aligned to %u bytes, as a swizzle of %u bytes needs it",
             name(t).c_str(), describe(copy.place).c_str(), align, copy.map.swizzle);
    });
  }
  mbarrier(t, copy.barrier, false, copy.place);
  const unsigned bytes = copy.bytes();
  check(t, copy.to, bytes, Use::deliver, copy.place);
  if (const Written* w = shared.unfenced(copy.to, bytes, t.linear)) {
    fail([&](std::string& s) {
      append(s, "%s starts a tensor copy at %s to what %s wrote at %s, and no fence.proxy.async is between", name(t).c_str(),
             describe(copy.place).c_str(), name(threads[w->thread]).c_str(), describe(w->place).c_str());
    });
  }
  shared.set_in_flight(copy.to, bytes, true);
  bulk_copies_.push_back(copy);
}

void Block::land_bulk_copy() {
  const std::size_t which = random() % bulk_copies_.size();
  const BulkCopy copy = bulk_copies_[which];
  bulk_copies_.erase(bulk_copies_.begin() + which);
  Thread& t = threads[copy.thread];
  const TensorMap& map = copy.map;
  const unsigned depth = map.rank == 3 ? map.box[2] : 1;
  // Who reads it without having waited races with this moment; until somebody has waited nobody may.
  shared.set_in_flight(copy.to, copy.bytes(), false);
  check(t, copy.to, copy.bytes(), Use::deliver, copy.place);
  shared.set_in_flight(copy.to, copy.bytes(), true);
  char* const arena = static_cast<char*>(copy.to) - shared.offset(copy.to);
  std::uint32_t to = shared.offset(copy.to);
  const std::int64_t left = copy.corner[0], width = map.box[0], size = static_cast<std::int64_t>(map.size[0]);
  // Of every row of the box: what is before the tensor's, in it, and after it.
  const std::int64_t begin = std::min(std::max<std::int64_t>(-left, 0), width), end = std::max(begin, std::min(size - left, width));
  for (unsigned z = 0; z < depth; z++) {
    for (unsigned y = 0; y < map.box[1]; y++) {
      const std::int64_t at_y = static_cast<std::int64_t>(copy.corner[1]) + y, at_z = static_cast<std::int64_t>(copy.corner[2]) + z;
      const bool inside = at_y >= 0 && at_y < static_cast<std::int64_t>(map.size[1]) &&
                          (map.rank == 2 || (at_z >= 0 && at_z < static_cast<std::int64_t>(map.size[2])));
      const std::uint64_t row = map.base + left * ELEMENT + at_y * map.stride[0] + (map.rank == 3 ? at_z * map.stride[1] : 0);
      if (inside && begin < end) {
        check_global(t, reinterpret_cast<const void*>(row + begin * ELEMENT), (end - begin) * ELEMENT, Use::read, copy.place);
      }
      for (std::int64_t x = 0; x < width; x++, to += ELEMENT) {
        char* element = arena + swizzled(to, map.swizzle);
        if (to % 16 == 0) shared.set_swizzle(element, map.swizzle);
        if (inside && x >= begin && x < end) std::memcpy(element, reinterpret_cast<const void*>(row + x * ELEMENT), ELEMENT);
        else std::memset(element, 0, ELEMENT);
      }
    }
  }
  for (auto& b : mbarriers_) {
    if (b.offset != shared.offset(copy.barrier)) continue;
    landed_.push_back(copy);
    landed_.back().phase = b.phase;
    shared.order.release(copy.thread, b.released);
    b.bytes -= copy.bytes();
    mbarrier_advance(b);
  }
}

// What came in a phase that somebody has waited for may be touched.
void Block::show_bulk_copies(unsigned barrier, std::int32_t phase) {
  for (std::size_t i = 0; i < landed_.size();) {
    const BulkCopy copy = landed_[i];
    if (shared.offset(copy.barrier) != barrier || copy.phase > phase) {
      i++;
      continue;
    }
    landed_.erase(landed_.begin() + i);
    shared.set_in_flight(copy.to, copy.bytes(), false);
  }
}

void tensor_copy_2d(void* to, const TensorMap* map, void* barrier, int x, int y) {
  Thread& t = *current();
  t.block->start_bulk_copy(t, {to, barrier, *map, {x, y, 0}, t.linear, __builtin_return_address(0)});
}

void tensor_copy_3d(void* to, const TensorMap* map, void* barrier, int x, int y, int z) {
  Thread& t = *current();
  t.block->start_bulk_copy(t, {to, barrier, *map, {x, y, z}, t.linear, __builtin_return_address(0)});
}

}  // namespace emulator
