// What went wrong and where, in words for the author of a kernel.
#pragma once
#include <string>

namespace emulator {

// An address in a kernel's code: the return address of a call into the emulator.
using Place = const void*;

// What is done to memory. `deliver`: a tensor copy writes, which is not a write by the thread that started it.
enum class Use { read, write, update, deliver };

// `rms_norm.cu:42`, as far as the executable's line table tells; else the file of code and an offset.
std::string describe(Place place);

// The code and constants of the module that holds the kernels: memory that a kernel may read without an allocation.
bool in_image(const void* address);

// printf into a string.
[[gnu::format(printf, 2, 3)]] void append(std::string& text, const char* format, ...);

}  // namespace emulator
