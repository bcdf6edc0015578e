// Kernels by name. KERNEL(f, threads) beside a __global__ function makes it launchable, with the types of its parameters, in
// blocks of so many threads (0: of any size).
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "tensor_map.h"

namespace emulator {

struct Kernel {
  const char* name;
  void (*call)(void* const* arguments);
  unsigned parameters;
  const char* const* types;
  unsigned threads;
  const Kernel* next = nullptr;
};

// Adds a kernel to the table; `kernel` lives as long as the process.
void register_kernel(Kernel& kernel);

// A parameter's type as the launching side spells it.
template <class T>
struct TypeName;
template <class T>
struct TypeName<const T*> : TypeName<T*> {};
template <>
struct TypeName<float> {
  static constexpr const char* value = "f32";
};
template <>
struct TypeName<int> {
  static constexpr const char* value = "i32";
};
template <>
struct TypeName<unsigned> {
  static constexpr const char* value = "u32";
};
template <>
struct TypeName<unsigned long long> {
  static constexpr const char* value = "u64";
};
template <>
struct TypeName<float*> {
  static constexpr const char* value = "f32*";
};
template <>
struct TypeName<int*> {
  static constexpr const char* value = "i32*";
};
template <>
struct TypeName<unsigned*> {
  static constexpr const char* value = "u32*";
};
template <>
struct TypeName<unsigned char*> {
  static constexpr const char* value = "u8*";
};
template <>
struct TypeName<unsigned long long*> {
  static constexpr const char* value = "u64*";
};

template <>
struct TypeName<TensorMap> {
  static constexpr const char* value = "tensor_map";
};

template <auto F>
struct Registration;
template <class... P, void (*F)(P...)>
struct Registration<F> {
  Registration(const char* name, unsigned threads) : kernel{name, call, sizeof...(P), types, threads} { register_kernel(kernel); }

  // The arguments lie in the launching side's memory, which is not the kernel's: this function's reads are not checked.
  __attribute__((no_sanitize("thread"))) static void call(void* const* arguments) {
    spread(arguments, std::index_sequence_for<P...>());
  }
  template <std::size_t... I>
  __attribute__((no_sanitize("thread"), always_inline)) static void spread(void* const* arguments, std::index_sequence<I...>) {
    (void)arguments;
    F(*static_cast<std::remove_const_t<P>*>(arguments[I])...);
  }

  static constexpr const char* types[sizeof...(P) + 1] = {TypeName<std::remove_const_t<P>>::value..., nullptr};
  Kernel kernel;
};

}  // namespace emulator

#define KERNEL(f, threads) static emulator::Registration<&f> f##_registration(#f, threads)
