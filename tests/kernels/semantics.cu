// One kernel for each part of the execution model; tests/emulator/ knows what each must compute.
#include "include/ptx.cuh"

// out[i] = block and thread of i, packed: the order of indices in three dimensions.
GLOBAL void indices(unsigned* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = blockIdx.x | blockIdx.y << 4 | blockIdx.z << 8 | threadIdx.x << 12 | threadIdx.y << 16 |
                                  threadIdx.z << 20;
}
KERNEL(indices, 0);

// out[mode][lane], the operand of lane l being operands[l].
GLOBAL void shuffles(const int* operands, int width, int* out) {
  const int lane = threadIdx.x, value = 100 + lane;
  out[lane] = __shfl_sync(~0u, value, operands[lane], width);
  out[32 + lane] = __shfl_up_sync(~0u, value, operands[lane], width);
  out[64 + lane] = __shfl_down_sync(~0u, value, operands[lane], width);
  out[96 + lane] = __shfl_xor_sync(~0u, value, operands[lane], width);
}
KERNEL(shuffles, 32);

// The halves of a warp vote apart from each other, each by its own mask; 24 threads: lanes 24 to 31 do not exist.
GLOBAL void votes(const int* predicates, unsigned* out) {
  const int lane = threadIdx.x, p = predicates[lane];
  const unsigned mask = lane < 16 ? 0xFFFFu : 0xFF0000u;
  if (lane < 16) {
    out[lane] = __ballot_sync(mask, p);
    out[32 + lane] = __any_sync(mask, p);
    out[64 + lane] = __all_sync(mask, p);
  } else {
    out[64 + lane] = __all_sync(mask, p);
    out[32 + lane] = __any_sync(mask, p);
    out[lane] = __ballot_sync(mask, p);
  }
  // Another lane's value when it takes part, nothing defined when it doesn't.
  const float other = __shfl_sync(mask, 1.0f, (lane + 8) % 32);
  out[96 + lane] = other == 1.0f;
}
KERNEL(votes, 24);

// Warp 0 fills a buffer for warps 1 and 2, twice, with a barrier for full and one for empty.
GLOBAL void producer_consumer(const int* in, int* out) {
  SHARED(int, buffer, [32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int round = 0; round < 2; round++) {
    if (warp == 0) {
      if (round) named_barrier_sync(2, 96);
      buffer[lane] = in[round * 32 + lane];
      named_barrier_arrive(1, 96);
    } else {
      named_barrier_sync(1, 96);
      out[(round * 2 + warp - 1) * 32 + lane] = buffer[31 - lane];
      if (round == 0) named_barrier_arrive(2, 96);
    }
  }
}
KERNEL(producer_consumer, 96);

// A warp reverses its values through shared memory: __syncwarp is enough, and the block's other warps need not wait.
GLOBAL void warp_reverse(const int* in, int* out) {
  SHARED(int, values, [64]);
  const int lane = threadIdx.x % 32, base = threadIdx.x - lane;
  values[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = values[base + 31 - lane];
}
KERNEL(warp_reverse, 64);

// Threads that have ended do not hold others up.
GLOBAL void early_exit(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  const unsigned lanes = __ballot_sync(threadIdx.x < 32 ? ~0u : 0xFFu, 1);
  out[threadIdx.x] = static_cast<int>(lanes);
}
KERNEL(early_exit, 128);

// Every thread leaves a number in counters[3], and adds the one that it finds to counters[4].
GLOBAL void atomics(unsigned* counters, float* sum, unsigned* largest, unsigned long long* wide) {
  SHARED(unsigned, local, [1]);
  if (threadIdx.x == 0) local[0] = 0;
  __syncthreads();
  atomicAdd(local, 1u);
  atomicAdd(&counters[0], 2u);
  atomicAdd(sum, 0.5f);
  atomicMax(largest, blockIdx.x * 1000 + threadIdx.x);
  atomicAdd(wide, 1ull << 32);
  for (unsigned seen = 0;;) {
    const unsigned before = atomicCAS(&counters[1], seen, seen + 3);
    if (before == seen) break;
    seen = before;
  }
  atomicAdd(&counters[4], atomicExch(&counters[3], 1u + threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&counters[2], local[0]);
}
KERNEL(atomics, 0);

// Two stages of copies of 4, 8 and 16 bytes, the last of each size cut short by one element.
GLOBAL void async_copies(const unsigned* in, unsigned* out) {
  SHARED(unsigned, stage, [2][32][8]);
  const int t = threadIdx.x;
  for (int s = 0; s < 2; s++) {
    const unsigned* from = in + (s * 32 + t) * 8;
    cp_async<16>(&stage[s][t][0], from, t == 31 ? 12 : 16);
    cp_async<8>(&stage[s][t][4], from + 4, t == 31 ? 4 : 8);
    cp_async<4>(&stage[s][t][6], from + 6);
    cp_async<4>(&stage[s][t][7], from + 7, t == 31 ? 0 : 4);
    cp_async_commit_group();
  }
  cp_async_wait_group<1>();
  __syncthreads();
  for (int i = 0; i < 8; i++) out[t * 8 + i] = stage[0][31 - t][i];
  cp_async_wait_all();
  __syncthreads();
  for (int i = 0; i < 8; i++) out[(32 + t) * 8 + i] = stage[1][31 - t][i];
}
KERNEL(async_copies, 32);

// All six forms on four matrices whose elements are numbered; out[form][register][lane].
GLOBAL void load_matrices(unsigned* out) {
  SHARED(unsigned, elements, [4][8][4]);  // pairs of 16-bit elements
  const int lane = threadIdx.x;
  for (int i = lane; i < 128; i += 32) (&elements[0][0][0])[i] = static_cast<unsigned>(2 * i) | static_cast<unsigned>(2 * i + 1) << 16;
  __syncthreads();
  const void* row = &elements[lane / 8][lane % 8][0];
  unsigned one[1], two[2], four[4];
  ldmatrix_x1(one, row);
  out[lane] = one[0];
  ldmatrix_x2(two, row);
  for (int i = 0; i < 2; i++) out[(4 + i) * 32 + lane] = two[i];
  ldmatrix_x4(four, row);
  for (int i = 0; i < 4; i++) out[(8 + i) * 32 + lane] = four[i];
  ldmatrix_x1_trans(one, row);
  out[12 * 32 + lane] = one[0];
  ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; i++) out[(16 + i) * 32 + lane] = two[i];
  ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; i++) out[(20 + i) * 32 + lane] = four[i];
}
KERNEL(load_matrices, 32);

// d[16, 8] = a[16, 16] b[16, 8] + d, fragments gathered by hand; a and b as pairs along k: a[16][8], b transposed [8][8].
GLOBAL void multiply_tile(const unsigned* a, const unsigned* b, float* d, int is_f16) {
  const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
  const unsigned ra[4] = {a[group * 8 + pair], a[(group + 8) * 8 + pair], a[group * 8 + pair + 4], a[(group + 8) * 8 + pair + 4]};
  const unsigned rb[2] = {b[group * 8 + pair], b[group * 8 + pair + 4]};
  float* rows[2] = {d + group * 8 + pair * 2, d + (group + 8) * 8 + pair * 2};
  float rd[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  if (is_f16) mma_m16n8k16_f16(rd, ra, rb);
  else mma_m16n8k16_bf16(rd, ra, rb);
  rows[0][0] = rd[0], rows[0][1] = rd[1], rows[1][0] = rd[2], rows[1][1] = rd[3];
}
KERNEL(multiply_tile, 32);
