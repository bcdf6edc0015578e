// dim3 and uint3 in one.
#pragma once

namespace emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

}  // namespace emulator
