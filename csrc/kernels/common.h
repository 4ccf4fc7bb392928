// What the kernels' arithmetic stands on: functions for host and device, bfloat16, and vectors of memory.
//
// No CUDA header is needed on the host: a test compiles everything but the .cu and .cuh files with the host's compiler, and runs it
// thread by thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL  // the host's compiler knows the pragma by another name
#endif

namespace megatron_plm {

// The upper half of a float's bits.
struct Bf16 {
  uint16_t bits;
};

HOST_DEVICE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

HOST_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

HOST_DEVICE float to_float(float value) { return value; }
HOST_DEVICE float to_float(Bf16 value) { return float_of(uint32_t{value.bits} << 16); }

template <typename T>
HOST_DEVICE T from_float(float value);

template <>
HOST_DEVICE float from_float<float>(float value) {
  return value;
}

// To the nearest, ties to even; what is no number stays none.
template <>
HOST_DEVICE Bf16 from_float<Bf16>(float value) {
#ifdef __CUDA_ARCH__
  return Bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return Bf16{static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return Bf16{static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
#endif
}

// kSize neighbours in memory, read and written at once; they lie at a multiple of their size.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T values[kSize];
};

template <int kSize, typename T>
HOST_DEVICE void load(const T* from, float (&values)[kSize]) {
  Vector<T, kSize> vector;
#ifdef __CUDA_ARCH__
  vector = *reinterpret_cast<const Vector<T, kSize>*>(from);
#else
  std::memcpy(&vector, from, sizeof vector);
#endif
  for (int i = 0; i < kSize; ++i) values[i] = to_float(vector.values[i]);
}

template <int kSize, typename T>
HOST_DEVICE void store(T* to, const float (&values)[kSize]) {
  Vector<T, kSize> vector;
  for (int i = 0; i < kSize; ++i) vector.values[i] = from_float<T>(values[i]);
#ifdef __CUDA_ARCH__
  *reinterpret_cast<Vector<T, kSize>*>(to) = vector;
#else
  std::memcpy(to, &vector, sizeof vector);
#endif
}

// As `load`, or zeros where there is no bias.
template <int kSize, typename T>
HOST_DEVICE void load_bias(const T* bias, int64_t column, float (&values)[kSize]) {
  if (bias) {
    load<kSize>(bias + column, values);
  } else {
    for (int i = 0; i < kSize; ++i) values[i] = 0.0f;
  }
}

}  // namespace megatron_plm
