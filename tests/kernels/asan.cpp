// All of the emulator and the kernels in one program for AddressSanitizer; tests/emulator/ builds and runs it.
#include "emulator/access.cpp"
#include "emulator/async_copy.cpp"
#include "emulator/atomics.cpp"
#include "emulator/barriers.cpp"
#include "emulator/block.cpp"
#include "emulator/bulk_copy.cpp"
#include "emulator/context.cpp"
#include "emulator/global_memory.cpp"
#include "emulator/launch.cpp"
#include "emulator/mbarrier.cpp"
#include "emulator/report.cpp"
#include "emulator/shared_memory.cpp"
#include "emulator/tensor_core.cpp"
#include "emulator/warp.cpp"
#include "emulator/wgmma.cpp"

#include <cstdio>
#include <initializer_list>

// What kernels include, before the namespaces that keep their constants apart.
#include "include/ptx.cuh"
#include "include/reduce.cuh"
#include "include/vectors.cuh"

namespace rms_norm {
#include "rms_norm.cu"
}
namespace gemm {
#include "gemm.cu"
}
namespace planted {
#include "planted.cu"
}

namespace {

struct Argument {
  const char* type;
  std::uint64_t value;
};

int run(const char* kernel, emulator::Index grid, unsigned threads, std::size_t shared, std::initializer_list<Argument> list) {
  std::vector<const char*> types;
  std::vector<std::uint64_t> values;
  std::vector<void*> pointers;
  for (auto& a : list) types.push_back(a.type), values.push_back(a.value);
  for (auto& v : values) pointers.push_back(&v);
  varft_emulator_launch launch{kernel, {grid.x, grid.y, grid.z}, {threads, 1, 1}, shared, 1, 2,
                               static_cast<std::uint32_t>(types.size()), types.data(), pointers.data()};
  char message[8192];
  if (!varft_emulator_run(&launch, message, sizeof message)) return 0;
  std::puts(message);
  return 1;
}

// Zeros.
Argument pointer(const char* type, std::size_t bytes) {
  void* memory = varft_emulator_allocate(bytes);
  std::memset(memory, 0, bytes);
  return {type, reinterpret_cast<std::uint64_t>(memory)};
}

}  // namespace

int main(int, char** arguments) {
  const std::string what = arguments[1];
  const Argument out = pointer("f32*", 128), in = pointer("f32*", 128);
  if (what == "past_local") {
    const Argument index = pointer("i32*", 128);
    *reinterpret_cast<int*>(index.value) = 4;
    return run("past_local", {}, 32, 0, {index, out});
  }
  if (what == "past_static") return run("past_static", {}, 32, 0, {out});
  if (what == "past_dynamic") return run("past_dynamic", {}, 32, 128, {out});
  if (what == "past_global") return run("past_global", {}, 32, 0, {in, out});
  const unsigned columns = 1031, rows = 5;
  const Argument x = pointer("bf16*", rows * columns * 2), w = pointer("bf16*", columns * 2), y = pointer("bf16*", rows * columns * 2);
  const Argument square = pointer("bf16*", 128 * 128 * 2), product = pointer("f32*", 128 * 128 * 4);
  int failed = run("rms_norm_forward", {rows, 1, 1}, 128, 0, {x, w, y, {"i32", columns}, {"f32", 0}});
  failed |= run("rms_norm_backward", {2, 1, 1}, 128, columns * 4,
                {x, w, y, x, x, pointer("f32*", 2 * columns * 4), {"i32", rows}, {"i32", columns}, {"f32", 0x33D6BF95}});
  failed |= run("gemm_bf16", {2, 2, 1}, 128, 3 * 2 * 64 * 64 * 2, {square, square, product, {"i32", 128}, {"i32", 128}});
  // A failed launch leaves fibers behind in the middle of their work; others then use their stacks.
  failed |= !run("deadlock", {2, 1, 1}, 96, 0, {out});
  failed |= run("gemm_bf16", {2, 2, 1}, 128, 3 * 2 * 64 * 64 * 2, {square, square, product, {"i32", 128}, {"i32", 128}});
  return failed;
}
