// Shuffles, votes and the warp's barrier.
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {
namespace {

template <class A>
A& argument(Warp& warp, unsigned lane) {
  return *static_cast<A*>(warp.lanes[lane].argument);
}

struct ShuffleArgument {
  std::uint64_t value;
  unsigned source;
  std::uint64_t result;
};

// A lane that takes no part has no defined value: all bits set is NaN in every floating-point format.
void shuffle_lanes(Block&, Warp& warp, std::uint32_t mask) {
  for (std::uint32_t rest = mask; rest; rest &= rest - 1) {
    auto& a = argument<ShuffleArgument>(warp, __builtin_ctz(rest));
    a.result = mask >> a.source & 1 ? argument<ShuffleArgument>(warp, a.source).value : ~0ull;
  }
}

// The mode is part of what lanes must agree on, the lane that each reads is not.
const Collective SHUFFLES[] = {{"__shfl_sync", shuffle_lanes},
                               {"__shfl_up_sync", shuffle_lanes},
                               {"__shfl_down_sync", shuffle_lanes},
                               {"__shfl_xor_sync", shuffle_lanes}};

struct VoteArgument {
  bool predicate;
  std::uint32_t ballot;
};

void ballot_lanes(Block&, Warp& warp, std::uint32_t mask) {
  std::uint32_t ballot = 0;
  for (std::uint32_t rest = mask; rest; rest &= rest - 1) {
    unsigned lane = __builtin_ctz(rest);
    ballot |= static_cast<std::uint32_t>(argument<VoteArgument>(warp, lane).predicate) << lane;
  }
  for (std::uint32_t rest = mask; rest; rest &= rest - 1) {
    auto& a = argument<VoteArgument>(warp, __builtin_ctz(rest));
    a.ballot = ballot;
  }
}

const Collective VOTES[] = {
    {"__ballot_sync", ballot_lanes}, {"__any_sync", ballot_lanes}, {"__all_sync", ballot_lanes}};

void order_lanes(Block& block, Warp& warp, std::uint32_t mask) {
  warp.released.clear();
  for (std::uint32_t rest = mask; rest; rest &= rest - 1)
    block.shared.order.release(warp.lanes[__builtin_ctz(rest)].linear, warp.released);
  for (std::uint32_t rest = mask; rest; rest &= rest - 1)
    block.shared.order.acquire(warp.lanes[__builtin_ctz(rest)].linear, warp.released);
}

const Collective SYNCWARP = {"__syncwarp", order_lanes};

}  // namespace

std::uint64_t shuffle(Shuffle mode, std::uint32_t mask, std::uint64_t value, unsigned operand, unsigned width) {
  Place place = __builtin_return_address(0);
  Thread& t = *current();
  if (width == 0 || width > WARP || (width & (width - 1))) {
    t.block->fail([&](std::string& s) {
      append(s, "%s shuffles over a width of %u at %s: it must be a power of two up to 32", Block::name(t).c_str(), width,
             describe(place).c_str());
    });
  }
  const unsigned first = t.lane & ~(width - 1), in_segment = t.lane & (width - 1);
  unsigned source = t.lane;
  switch (mode) {
    case Shuffle::index: source = first + (operand & (width - 1)); break;
    case Shuffle::up: if (operand <= in_segment) source = t.lane - operand; break;
    case Shuffle::down: if (operand < width - in_segment) source = t.lane + operand; break;
    case Shuffle::exclusive_or:  // a lane of an earlier segment may be read, one of a later segment may not
      if ((t.lane ^ operand) < first + width) source = t.lane ^ operand;
      break;
  }
  ShuffleArgument a{value, source % WARP, 0};
  t.block->rendezvous(t, SHUFFLES[static_cast<int>(mode)], mask, &a, place);
  return a.result;
}

std::uint32_t vote(Vote kind, std::uint32_t mask, bool predicate) {
  Thread& t = *current();
  VoteArgument a{predicate, 0};
  t.block->rendezvous(t, VOTES[static_cast<int>(kind)], mask, &a, __builtin_return_address(0));
  switch (kind) {
    case Vote::ballot: return a.ballot;
    case Vote::any: return a.ballot != 0;
    default: return a.ballot == (mask & t.warp->live);
  }
}

void sync_warp(std::uint32_t mask) {
  Thread& t = *current();
  t.block->rendezvous(t, SYNCWARP, mask, nullptr, __builtin_return_address(0));
}

}  // namespace emulator
