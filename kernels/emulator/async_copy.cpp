// cp.async. The bytes land at the wait that covers them and not before: the latest moment that the hardware may choose.
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {
namespace {

void land(Thread& t, std::size_t count) {
  Block& block = *t.block;
  auto& q = t.queue;
  for (std::size_t i = 0; i < count; i++) {
    const Copy& c = q.copies[i];
    block.shared.set_in_flight(c.to, c.bytes + c.zeros, false);
    block.check(t, c.to, c.bytes + c.zeros, Use::write, c.place);
    std::memcpy(c.to, c.from, c.bytes);
    std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
  }
  q.copies.erase(q.copies.begin(), q.copies.begin() + count);
}

}  // namespace

void cp_async(void* to, const void* from, unsigned bytes, unsigned valid) {
  Place place = __builtin_return_address(0);
  Thread& t = *current();
  Block& block = *t.block;
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % bytes || valid > bytes) {
    block.fail([&](std::string& s) {
      append(s, "%s copies %u of %u bytes from %p to %p by cp.async at %s: both must be aligned to the size",
             Block::name(t).c_str(), valid, bytes, from, to, describe(place).c_str());
    });
  }
  if (!block.shared.covers(to) || block.shared.covers(from)) {
    block.fail([&](std::string& s) {
      append(s, "%s copies by cp.async at %s to what is not shared memory, or from what is", Block::name(t).c_str(),
             describe(place).c_str());
    });
  }
  if (valid) block.check(t, from, valid, Use::read, place);
  block.check(t, to, bytes, Use::write, place);
  block.shared.set_in_flight(to, bytes, true);
  t.queue.copies.push_back({to, from, valid, bytes - valid, place});
}

void cp_async_commit() {
  auto& q = current()->queue;
  q.groups.push_back(q.copies.size());
}

void cp_async_wait(unsigned pending) {
  Thread& t = *current();
  auto& groups = t.queue.groups;
  if (groups.size() <= pending) return;
  const std::size_t done = groups.size() - pending, copies = groups[done - 1];
  land(t, copies);
  groups.erase(groups.begin(), groups.begin() + done);
  for (auto& g : groups) g -= copies;
}

void cp_async_wait_all() {
  Thread& t = *current();
  land(t, t.queue.copies.size());
  t.queue.groups.clear();
}

void Block::copy_in_flight(Thread& t, const void* address, std::size_t bytes, bool write, Place place) {
  auto* begin = static_cast<const char*>(address);
  fail([&](std::string& s) {
    append(s, "asynchronous copy not waited for: %s %s byte %u of shared memory at %s", name(t).c_str(),
           write ? "writes" : "reads", shared.offset(address), describe(place).c_str());
    for (auto& owner : threads) {
      for (auto& c : owner.queue.copies) {
        auto* to = static_cast<const char*>(c.to);
        if (begin + bytes <= to || to + c.bytes + c.zeros <= begin) continue;
        append(s, ", where the copy that %s started at %s has not landed", name(owner).c_str(), describe(c.place).c_str());
        return;
      }
    }
    for (auto* copies : {&landed_, &bulk_copies_}) {
      for (auto& c : *copies) {
        const std::size_t size = c.bytes(), from = shared.offset(c.to), at = shared.offset(address);
        if (at + bytes <= from || from + size <= at) continue;
        append(s, ", where the tensor copy that %s started at %s has not landed, as far as anybody has waited",
               name(threads[c.thread]).c_str(), describe(c.place).c_str());
        return;
      }
    }
  });
}

}  // namespace emulator
