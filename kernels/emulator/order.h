// Happens-before within a block, by vector clocks.
//
// A thread's clock rises whenever it releases: arrives at a barrier of any kind. `known(t, u)` is the latest clock of u whose
// accesses are ordered before what t does now. A barrier of the whole block orders everything, so it only starts a new epoch,
// which costs nothing per thread. Clocks never fall from block to block, so that nothing has to be cleared between them.
//
// What threads write and what wgmma and tensor copies touch are ordered only if a fence.proxy.async is on the way from the one
// to the other. Seen are those of the writer after its write, of the thread that starts the other access, and of any thread
// between two barriers of the whole block.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace emulator {

constexpr unsigned MAX_THREADS = 1024;

// What has been released to whoever acquires it: a clock for each thread. Empty: nothing.
using Released = std::vector<std::uint32_t>;

class Order {
 public:
  Order() : clock_(MAX_THREADS, 1), known_(MAX_THREADS) {}

  // Starts a block of `threads` threads. True: clocks started anew, and what was recorded by them must be forgotten.
  bool start(unsigned threads) {
    threads_ = threads;
    for (unsigned t = 0; t < threads; t++) known_[t].resize(MAX_THREADS);
    if (fenced_) {
      for (auto& f : fences_) f.passed.clear();
      fence_epochs_.clear();
      fenced_ = false;
    }
    first_epoch_ = epoch_ + 1;
    if (++epoch_ < LIMIT / 2 && *std::max_element(clock_.begin(), clock_.end()) < LIMIT / 2) return false;
    epoch_ = first_epoch_ = 1;
    std::fill(clock_.begin(), clock_.end(), 1);
    for (auto& row : known_) std::fill(row.begin(), row.end(), 0);
    return true;
  }

  void block_barrier() { epoch_++; }

  void release(unsigned thread, Released& to) {
    to.resize(MAX_THREADS);
    merge(to.data(), known_[thread].data());
    to[thread] = clock_[thread]++;
  }

  void acquire(unsigned thread, const Released& from) {
    if (!from.empty()) merge(known_[thread].data(), from.data());
  }

  // A thread's fence.proxy.async.
  void proxy_fence(unsigned thread) {
    fenced_ = true;
    Fences& f = fences_[thread];
    f.passed.push_back({epoch_, clock_[thread]++});
    f.known = known_[thread];
    if (fence_epochs_.empty() || fence_epochs_.back() != epoch_) fence_epochs_.push_back(epoch_);
  }

  // Whether a fence is between what `writer` wrote at that time and an asynchronous access that `reader` starts now. The
  // two are ordered, or the access is a race beside.
  bool fenced(unsigned writer, std::uint32_t epoch, std::uint32_t clock, unsigned reader) const {
    const auto& of_writer = fences_[writer].passed;
    auto after = std::lower_bound(of_writer.begin(), of_writer.end(), clock, [](const Moment& f, std::uint32_t c) { return f.clock < c; });
    if (after != of_writer.end() && (after->epoch < epoch_ || writer == reader || known_[reader][writer] > after->clock)) return true;
    const Fences& own = fences_[reader];
    if (!own.passed.empty() && (own.passed.back().epoch > epoch || own.known[writer] >= clock)) return true;
    auto between = std::upper_bound(fence_epochs_.begin(), fence_epochs_.end(), epoch);
    return between != fence_epochs_.end() && *between < epoch_;
  }

  std::uint32_t epoch() const { return epoch_; }
  // Whether something recorded in that epoch was in this block.
  bool in_block(std::uint32_t epoch) const { return epoch >= first_epoch_; }
  std::uint32_t clock(unsigned thread) const { return clock_[thread]; }
  std::uint32_t known(unsigned thread, unsigned other) const { return known_[thread][other]; }

  static constexpr std::uint32_t LIMIT = 1 << 24;  // both fit 24 bits of a recorded access

 private:
  void merge(std::uint32_t* into, const std::uint32_t* from) const {
    for (unsigned u = 0; u < threads_; u++) into[u] = std::max(into[u], from[u]);
  }

  struct Moment {
    std::uint32_t epoch, clock;
  };
  // A thread's fences in this block, and what it knew at the last one.
  struct Fences {
    std::vector<Moment> passed;
    std::vector<std::uint32_t> known;
  };

  std::uint32_t epoch_ = 0, first_epoch_ = 1;
  unsigned threads_ = 0;
  bool fenced_ = false;
  std::vector<Fences> fences_ = std::vector<Fences>(MAX_THREADS);
  std::vector<std::uint32_t> fence_epochs_;
  std::vector<std::uint32_t> clock_;
  std::vector<std::vector<std::uint32_t>> known_;
};

}  // namespace emulator
