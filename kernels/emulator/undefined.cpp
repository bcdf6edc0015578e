// What C++ leaves undefined, in kernels: they are compiled with -fsanitize=undefined, which makes the compiler call a function
// where an overflow, a shift, an index of an array or a conversion has no meaning. The functions are ours: a report ends the
// launch, not the process.
#include <cstring>

#include "block.h"

namespace emulator {
namespace {

// What all of the compiler's records begin with.
struct Source {
  const char* file;
  std::uint32_t line, column;
};

[[noreturn]] void undefined(const char* what, const void* record) {
  const auto& at = *static_cast<const Source*>(record);
  const char* file = std::strrchr(at.file, '/');
  Thread& t = *current();  // only kernels are compiled so
  t.block->fail([&](std::string& s) {
    append(s, "undefined behaviour: %s by %s at %s:%u", what, Block::name(t).c_str(), file ? file + 1 : at.file, at.line);
  });
}

}  // namespace
}  // namespace emulator

#define UNDEFINED(name, what, ...) \
  void __ubsan_handle_##name(void* record, ##__VA_ARGS__) { emulator::undefined(what, record); }

extern "C" {
UNDEFINED(add_overflow, "an overflow of a signed sum", void*, void*)
UNDEFINED(sub_overflow, "an overflow of a signed difference", void*, void*)
UNDEFINED(mul_overflow, "an overflow of a signed product", void*, void*)
UNDEFINED(negate_overflow, "an overflow of a negation", void*)
UNDEFINED(divrem_overflow, "a division by zero, or one that overflows", void*, void*)
UNDEFINED(shift_out_of_bounds, "a shift by more bits than there are, or of bits out of a signed number", void*, void*)
UNDEFINED(out_of_bounds, "an index past the end of an array", void*)
UNDEFINED(float_cast_overflow, "a conversion of a float to an integer that cannot hold it", void*)
UNDEFINED(load_invalid_value, "a bool or an enumeration with a value that it cannot have", void*)
UNDEFINED(invalid_builtin, "a count of zero bits in zero")
UNDEFINED(builtin_unreachable, "what was promised to be out of reach")
UNDEFINED(missing_return, "the end of a function that should have returned a value")
}
