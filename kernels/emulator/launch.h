// The emulator as the host program calls it.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

struct varft_emulator_launch {
  const char* kernel;
  std::uint32_t grid[3], block[3];
  std::size_t shared_bytes;
  std::uint64_t seed;         // of the order in which warps run
  std::uint32_t workers;      // host threads
  std::uint32_t arguments;
  const char* const* types;   // of each argument, as in registry.h
  void* const* values;        // a pointer to each argument
};

// Memory filled with NaN, or null.
void* varft_emulator_allocate(std::size_t bytes);
void varft_emulator_release(void* memory);

// The types of a kernel's parameters, as in registry.h, a null pointer after the last; null where no kernel has that name.
const char* const* varft_emulator_parameters(const char* kernel);

// Runs a launch to its end. 0: it went well; else `message` (at most `capacity` bytes with the final zero) says what did not.
int varft_emulator_run(const varft_emulator_launch* launch, char* message, std::size_t capacity);

}  // extern "C"
