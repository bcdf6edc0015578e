// The tensor memory accelerator: boxes of 16-bit elements from global to shared memory, reported to an mbarrier.
//
// A copy lands as late as it can: when no thread of the block can go on without it. What lies outside the tensor is zero.
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

unsigned box_bytes(const TensorMap& map) {
  unsigned bytes = ELEMENT;
  for (unsigned i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// What is wrong with a map, or null.
const char* refuse(const TensorMap& map) {
  const unsigned row = map.box[0] * ELEMENT;
  if (map.rank < 2 || map.rank > 3) return "its rank is not 2 or 3";
  if (map.base % 16 || map.stride[0] % 16 || (map.rank == 3 && map.stride[1] % 16))
    return "base or strides are not multiples of 16 bytes";
  for (unsigned i = 0; i < map.rank; i++)
    if (map.box[i] == 0 || map.box[i] > 256) return "a side of the box is not 1 to 256";
  if (row % 16) return "a row of the box is not a multiple of 16 bytes";
  // Shorter rows are allowed, but where their chunks go we do not know for sure.
  if (map.swizzle && row != map.swizzle) return "a row of the box is not as long as the swizzle";
  return nullptr;
}

}  // namespace

void Block::start_bulk_copy(Thread& t, const BulkCopy& copy) {
  const char* wrong = refuse(copy.map);
  if (!wrong && (!shared.covers(copy.to) || reinterpret_cast<std::uintptr_t>(copy.to) % 128))
    wrong = "its target is not 128-byte aligned shared memory";
  if (wrong) {
    fail([&](std::string& s) {
      append(s, "%s starts a tensor copy at %s: %s", name(t).c_str(), describe(copy.place).c_str(), wrong);
    });
  }
  mbarrier(t, copy.barrier, false, copy.place);
  const unsigned bytes = box_bytes(copy.map);
  check(t, copy.to, bytes, true, false, copy.place);
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
  shared.set_in_flight(copy.to, box_bytes(map), false);
  check(t, copy.to, box_bytes(map), true, false, copy.place);
  char* const arena = static_cast<char*>(copy.to) - shared.offset(copy.to);
  std::uint32_t to = shared.offset(copy.to);
  for (unsigned z = 0; z < depth; z++) {
    for (unsigned y = 0; y < map.box[1]; y++) {
      for (unsigned x = 0; x < map.box[0]; x++, to += ELEMENT) {
        const std::int64_t at[3] = {static_cast<std::int64_t>(copy.corner[0]) + x, static_cast<std::int64_t>(copy.corner[1]) + y,
                                    static_cast<std::int64_t>(copy.corner[2]) + z};
        bool inside = true;
        for (unsigned i = 0; i < map.rank; i++) inside &= at[i] >= 0 && at[i] < static_cast<std::int64_t>(map.size[i]);
        char* element = arena + swizzled(to, map.swizzle);
        if (inside) {
          const std::uint64_t from = map.base + at[0] * ELEMENT + at[1] * map.stride[0] + (map.rank == 3 ? at[2] * map.stride[1] : 0);
          check(t, reinterpret_cast<const void*>(from), ELEMENT, false, false, copy.place);
          std::memcpy(element, reinterpret_cast<const void*>(from), ELEMENT);
        } else {
          std::memset(element, 0, ELEMENT);
        }
      }
    }
  }
  for (auto& b : mbarriers_) {
    if (b.offset != shared.offset(copy.barrier)) continue;
    shared.order.release(copy.thread, b.released);
    b.bytes -= box_bytes(map);
    mbarrier_advance(b);
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
