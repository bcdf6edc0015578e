// ldmatrix and mma.sync m16n8k16, by the tables of the PTX manual (sections "ldmatrix" and "Matrix Fragments for
// mma.m16n8k16"). One f32 accumulator per output, k ascending; products of bf16 or f16 are exact in f32.
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {
namespace {

struct LoadArgument {
  const void* row;
  std::uint32_t* to;
  Place place;
};

// Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes; it gets two neighbouring elements of row l / 4 of each
// matrix, or of column l / 4 when transposed.
template <int MATRICES, bool TRANSPOSED>
void load_matrices(Block& block, Warp& warp, std::uint32_t) {
  auto argument = [&](int lane) -> LoadArgument& { return *static_cast<LoadArgument*>(warp.lanes[lane].argument); };
  std::uint16_t rows[8][8];
  for (int m = 0; m < MATRICES; m++) {
    for (int r = 0; r < 8; r++) {
      Thread& t = warp.lanes[m * 8 + r];
      const LoadArgument& a = argument(m * 8 + r);
      if (!block.shared.covers(a.row) || reinterpret_cast<std::uintptr_t>(a.row) % 16) {
        block.fail([&](std::string& s) {
          append(s, "%s gives ldmatrix the row address %p at %s: it must be in shared memory and aligned to 16 bytes",
                 Block::name(t).c_str(), a.row, describe(a.place).c_str());
        });
      }
      block.check(t, a.row, 16, Use::read, a.place);
      std::memcpy(rows[r], a.row, 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      const int i = lane / 4, j = lane % 4 * 2;
      const std::uint32_t low = TRANSPOSED ? rows[j][i] : rows[i][j], high = TRANSPOSED ? rows[j + 1][i] : rows[i][j + 1];
      block.check(warp.lanes[lane], &argument(lane).to[m], 4, Use::write, argument(lane).place);
      argument(lane).to[m] = low | high << 16;
    }
  }
}

const Collective LOADS[2][3] = {{{"ldmatrix.x1", load_matrices<1, false>, true},
                                 {"ldmatrix.x2", load_matrices<2, false>, true},
                                 {"ldmatrix.x4", load_matrices<4, false>, true}},
                                {{"ldmatrix.x1.trans", load_matrices<1, true>, true},
                                 {"ldmatrix.x2.trans", load_matrices<2, true>, true},
                                 {"ldmatrix.x4.trans", load_matrices<4, true>, true}}};

struct MultiplyArgument {
  float* d;
  const std::uint32_t *a, *b;
  Place place;
};

// Chosen at run time: the binary runs on any x86-64. Without contraction both give the same bits.
__attribute__((target_clones("avx2", "default"))) void multiply(const float (&a)[16][16], const float (&b)[16][8],
                                                                 float (&d)[16][8]) {
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
}

template <float (*TO_FLOAT)(std::uint16_t)>
void multiply_lanes(Block& block, Warp& warp, std::uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  auto unpack = [](std::uint32_t pair, float& low, float& high) {
    low = TO_FLOAT(static_cast<std::uint16_t>(pair)), high = TO_FLOAT(static_cast<std::uint16_t>(pair >> 16));
  };
  for (int lane = 0; lane < 32; lane++) {
    const int group = lane / 4, pair = lane % 4 * 2;
    auto& x = *static_cast<MultiplyArgument*>(warp.lanes[lane].argument);
    block.check(warp.lanes[lane], x.a, 16, Use::read, x.place);
    block.check(warp.lanes[lane], x.b, 8, Use::read, x.place);
    block.check(warp.lanes[lane], x.d, 16, Use::write, x.place);
    for (int i = 0; i < 4; i++) {
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      unpack(x.a[i], a[row][column], a[row][column + 1]);
    }
    for (int i = 0; i < 2; i++) unpack(x.b[i], b[pair + i * 8][group], b[pair + i * 8 + 1][group]);
    for (int i = 0; i < 4; i++) d[group + i / 2 * 8][pair + i % 2] = x.d[i];
  }
  multiply(a, b, d);
  for (int lane = 0; lane < 32; lane++) {
    const int group = lane / 4, pair = lane % 4 * 2;
    auto& x = *static_cast<MultiplyArgument*>(warp.lanes[lane].argument);
    for (int i = 0; i < 4; i++) x.d[i] = d[group + i / 2 * 8][pair + i % 2];
  }
}

const Collective MULTIPLY_BF16 = {"mma.m16n8k16.bf16", multiply_lanes<bf16_to_float>, true};
const Collective MULTIPLY_F16 = {"mma.m16n8k16.f16", multiply_lanes<f16_to_float>, true};

}  // namespace

void ldmatrix(std::uint32_t* to, unsigned matrices, bool transposed, const void* row) {
  Thread& t = *current();
  Place place = __builtin_return_address(0);
  LoadArgument a{row, to, place};
  t.block->rendezvous(t, LOADS[transposed][matrices / 2], ~0u, &a, place);
}

void mma_bf16(float* d, const std::uint32_t* a, const std::uint32_t* b) {
  Thread& t = *current();
  MultiplyArgument x{d, a, b, __builtin_return_address(0)};
  t.block->rendezvous(t, MULTIPLY_BF16, ~0u, &x, x.place);
}

void mma_f16(float* d, const std::uint32_t* a, const std::uint32_t* b) {
  Thread& t = *current();
  MultiplyArgument x{d, a, b, __builtin_return_address(0)};
  t.block->rendezvous(t, MULTIPLY_F16, ~0u, &x, x.place);
}

}  // namespace emulator
