// Kernels with one mistake each. tests/emulator/ finds the lines by the marks at their ends.
#include "include/ptx.cuh"
#include "include/vectors.cuh"

// Warp 0 waits for a warp that waits for warp 0.
GLOBAL void deadlock(float* out) {
  if (threadIdx.x < 32) named_barrier_sync(1, 64);  // MARK deadlock-named
  __syncthreads();                                  // MARK deadlock-all
  out[threadIdx.x] = 1.0f;
}
KERNEL(deadlock, 96);

// Half a warp shuffles with lanes that wait at the block's barrier.
GLOBAL void deadlock_half(float* out) {
  float x = 1.0f;
  if (threadIdx.x < 16) x = __shfl_xor_sync(~0u, x, 1);  // MARK half-shuffle
  __syncthreads();                                       // MARK half-barrier
  out[threadIdx.x] = x;
}
KERNEL(deadlock_half, 32);

GLOBAL void divergent(float* out) {
  float x;
  if (threadIdx.x % 2) x = __shfl_xor_sync(~0u, 1.0f, 2);  // MARK divergent-shuffle
  else x = __ballot_sync(~0u, 1);                          // MARK divergent-ballot
  out[threadIdx.x] = x;
}
KERNEL(divergent, 32);

GLOBAL void not_in_mask(float* out) { out[threadIdx.x] = __shfl_sync(0xFFu, 1.0f, 0); }  // MARK not-in-mask
KERNEL(not_in_mask, 32);

GLOBAL void mma_by_half_a_warp(float* out) {
  float d[4] = {};
  const unsigned a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) mma_m16n8k16_bf16(d, a, b);  // MARK half-mma
  out[threadIdx.x] = d[0];
}
KERNEL(mma_by_half_a_warp, 32);

GLOBAL void barrier_counts(float* out) {
  if (threadIdx.x < 32) named_barrier_sync(3, 64);  // MARK count-64
  else named_barrier_sync(3, 96);                   // MARK count-96
  out[threadIdx.x] = 1.0f;
}
KERNEL(barrier_counts, 96);

// The array is one element longer than what is written.
GLOBAL void uninitialised(float* out) {
  SHARED(float, values, [33]);
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}
KERNEL(uninitialised, 32);

// `barrier` says whether the one that is needed is there.
GLOBAL void race(int* out, int barrier) {
  SHARED(int, values, [128]);
  values[threadIdx.x] = threadIdx.x;             // MARK race-write
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[127 - threadIdx.x];  // MARK race-read
}
KERNEL(race, 128);

// The second round writes what a slower warp may still read in the first.
GLOBAL void race_of_rounds(int* out) {
  SHARED(int, value, [1]);
  for (int round = 0; round < 2; round++) {
    if (threadIdx.x == 0) value[0] = round;     // MARK rounds-write
    __syncthreads();
    out[threadIdx.x] = value[0];                // MARK rounds-read
  }
}
KERNEL(race_of_rounds, 64);

// Lanes of a warp are no more in step than warps are.
GLOBAL void race_in_warp(int* out) {
  SHARED(int, values, [32]);
  values[threadIdx.x] = threadIdx.x;           // MARK warp-write
  out[threadIdx.x] = values[threadIdx.x ^ 1];  // MARK warp-read
}
KERNEL(race_in_warp, 32);

// Two threads write halves of one word: no race.
GLOBAL void no_race_of_halves(float* out) {
  SHARED(bf16, values, [32]);
  values[threadIdx.x] = to_bf16(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = to_float(values[31 - threadIdx.x]);
}
KERNEL(no_race_of_halves, 32);

GLOBAL void no_wait(const float* in, float* out) {
  SHARED(float, values, [32]);
  cp_async<4>(&values[threadIdx.x], &in[threadIdx.x]);  // MARK no-wait-copy
  cp_async_commit_group();
  out[threadIdx.x] = values[threadIdx.x];               // MARK no-wait-read
  cp_async_wait_all();
}
KERNEL(no_wait, 32);

// Each thread has waited for its own copies, and reads another's.
GLOBAL void wait_without_barrier(const float* in, float* out) {
  SHARED(float, values, [64]);
  cp_async<4>(&values[threadIdx.x], &in[threadIdx.x]);  // MARK own-wait-copy
  cp_async_wait_all();
  out[threadIdx.x] = values[63 - threadIdx.x];          // MARK own-wait-read
}
KERNEL(wait_without_barrier, 64);

GLOBAL void past_static(float* out) {
  SHARED(float, values, [32]);
  volatile int one = 1;
  float* from = values;  // of the array itself the compiler knows the end
  from[threadIdx.x + one] = 1.0f;  // MARK past-static
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
KERNEL(past_static, 32);

GLOBAL void past_dynamic(float* out) {
  DYNAMIC_SHARED(float, values);
  values[threadIdx.x + 1] = 1.0f;  // MARK past-dynamic
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
KERNEL(past_dynamic, 32);

GLOBAL void past_global(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];  // MARK past-global
}
KERNEL(past_global, 32);

GLOBAL void write_past_global(float* out) {
  out[blockIdx.x * 32 + threadIdx.x] = 1.0f;  // MARK write-past-global
}
KERNEL(write_past_global, 32);

GLOBAL void misaligned(const float* in, float* out) {
  out[0] = *reinterpret_cast<const float*>(reinterpret_cast<const char*>(in) + 2);  // MARK misaligned
}
KERNEL(misaligned, 1);

GLOBAL void misaligned_vector(const float* in, float* out) {
  store16(out, load16<f32x4>(in + 2));  // MARK misaligned-vector
}
KERNEL(misaligned_vector, 1);

// The order in which warps come decides the result.
GLOBAL void order_dependent(unsigned* counter, unsigned* order) {
  if (threadIdx.x % 32 == 0) order[threadIdx.x / 32] = atomicAdd(counter, 1u);
}
KERNEL(order_dependent, 512);

GLOBAL void too_much_shared(float* out) {
  DYNAMIC_SHARED(float, dynamic);
  SHARED(float, values, [64]);  // MARK too-much
  dynamic[threadIdx.x] = values[threadIdx.x] = 1.0f;
  out[threadIdx.x] = dynamic[threadIdx.x];
}
KERNEL(too_much_shared, 32);

// A thread's own array.
GLOBAL void past_local(const int* index, float* out) {
  float values[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  out[threadIdx.x] = values[index[threadIdx.x]];  // MARK past-local
}
KERNEL(past_local, 32);

GLOBAL void copy_at_exit(const float* in, float* out) {
  SHARED(float, values, [32]);
  cp_async<4>(&values[threadIdx.x], &in[threadIdx.x]);  // MARK exit-copy
  out[threadIdx.x] = 1.0f;
}
KERNEL(copy_at_exit, 32);

GLOBAL void misaligned_pair(const bf16* in, float* out) {
  out[0] = low_float(load4(in + 1));  // MARK misaligned-pair
}
KERNEL(misaligned_pair, 1);

GLOBAL void blocks_write(int* out) {
  out[threadIdx.x] = blockIdx.x;  // MARK blocks-write
}
KERNEL(blocks_write, 32);

// Block 0 writes what block 1 reads.
GLOBAL void blocks_read_and_write(int* values, int* out) {
  if (blockIdx.x == 0) values[threadIdx.x] = threadIdx.x;  // MARK blocks-writer
  else out[threadIdx.x] = values[threadIdx.x];             // MARK blocks-reader
}
KERNEL(blocks_read_and_write, 32);

// One block counts, the other looks.
GLOBAL void blocks_update_and_read(unsigned* counter, unsigned* out) {
  if (blockIdx.x == 0) atomicAdd(counter, 1u);  // MARK blocks-update
  else out[threadIdx.x] = counter[0];           // MARK blocks-look
}
KERNEL(blocks_update_and_read, 32);

// What blocks may do: read the same, write halves of a word, write over what they have read themselves, count together, and
// count by themselves and look.
GLOBAL void no_race_of_blocks(const float* in, bf16* halves, float* own, unsigned* counter, unsigned* counters) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i % 2) halves[i] = to_bf16(to_float(halves[i]) + in[threadIdx.x % 32]);
  own[i] += in[threadIdx.x % 32];
  atomicAdd(counter, 1u);
  atomicAdd(&counters[blockIdx.x], 1u);
  __syncthreads();
  if (threadIdx.x == 0) counters[blockIdx.x] += 1;
}
KERNEL(no_race_of_blocks, 33);

GLOBAL void address_of(const float* in, unsigned long long* out) { out[0] = reinterpret_cast<unsigned long long>(in); }
KERNEL(address_of, 1);

GLOBAL void read_address(unsigned long long address, float* out) {
  out[threadIdx.x] = *reinterpret_cast<const float*>(address);  // MARK read-address
}
KERNEL(read_address, 1);

// What C++ leaves undefined; `which` says what.
GLOBAL void undefined(const int* large, float* out, int which) {
  int x = large[0];
  if (which == 0) x += large[0];                             // MARK undefined-sum
  if (which == 1) x *= large[0];                             // MARK undefined-product
  if (which == 2) x /= large[1];                             // MARK undefined-quotient
  if (which == 3) x <<= large[2];                            // MARK undefined-shift
  if (which == 4) x = static_cast<int>(large[0] * 1e3f);     // MARK undefined-conversion
  out[threadIdx.x] = x;
}
KERNEL(undefined, 1);
