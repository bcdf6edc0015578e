// Happens-before within a block, by vector clocks.
//
// A thread's clock rises whenever it releases: arrives at a barrier of any kind. `known(t, u)` is the latest clock of u whose
// accesses are ordered before what t does now. A barrier of the whole block orders everything, so it only starts a new epoch,
// which costs nothing per thread. Clocks never fall from block to block, so that nothing has to be cleared between them.
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
    if (++epoch_ < LIMIT / 2 && *std::max_element(clock_.begin(), clock_.end()) < LIMIT / 2) return false;
    epoch_ = 1;
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

  std::uint32_t epoch() const { return epoch_; }
  std::uint32_t clock(unsigned thread) const { return clock_[thread]; }
  std::uint32_t known(unsigned thread, unsigned other) const { return known_[thread][other]; }

  static constexpr std::uint32_t LIMIT = 1 << 24;  // both fit 24 bits of a recorded access

 private:
  void merge(std::uint32_t* into, const std::uint32_t* from) const {
    for (unsigned u = 0; u < threads_; u++) into[u] = std::max(into[u], from[u]);
  }

  std::uint32_t epoch_ = 0;
  unsigned threads_ = 0;
  std::vector<std::uint32_t> clock_;
  std::vector<std::vector<std::uint32_t>> known_;
};

}  // namespace emulator
