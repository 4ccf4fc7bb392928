// The parts of bias + activation that one thread does; megatron_plm/kernels/activation.py has the formulae.
//
// A thread takes kSize neighbouring columns of the input, and of the rows each `step`-th from `row` up to `end`.
#pragma once

#include "common.h"

namespace megatron_plm {

struct Rows {
  int64_t row, step, end;
};

HOST_DEVICE float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

struct ExactGelu {
  static constexpr int kInputs = 1;  // columns of the input that make one of the output

  HOST_DEVICE static void value(const float* u, float* y) { *y = 0.5f * *u * (1.0f + erff(*u * 0.70710678118654752f)); }

  HOST_DEVICE static void gradient(float dy, const float* u, float* du) {
    const float density = 0.39894228040143268f * expf(-0.5f * *u * *u);
    *du = dy * (0.5f * (1.0f + erff(*u * 0.70710678118654752f)) + *u * density);
  }
};

struct TanhGelu {
  static constexpr int kInputs = 1;

  HOST_DEVICE static float tangent(float u) { return tanhf(0.79788456080286536f * (u + 0.044715f * u * u * u)); }

  HOST_DEVICE static void value(const float* u, float* y) { *y = 0.5f * *u * (1.0f + tangent(*u)); }

  HOST_DEVICE static void gradient(float dy, const float* u, float* du) {
    const float t = tangent(*u), slope = 0.79788456080286536f * (1.0f + 0.134145f * *u * *u);
    *du = dy * (0.5f * (1.0f + t) + 0.5f * *u * (1.0f - t * t) * slope);
  }
};

struct SwiGlu {
  static constexpr int kInputs = 2;  // gate and value

  HOST_DEVICE static void value(const float* u, float* y) { *y = u[0] * logistic(u[0]) * u[1]; }

  HOST_DEVICE static void gradient(float dy, const float* u, float* du) {
    const float s = logistic(u[0]);
    du[0] = dy * u[1] * s * (1.0f + u[0] * (1.0f - s));
    du[1] = dy * u[0] * s;
  }
};

template <class Activation, int kSize, typename T>
HOST_DEVICE void activate(const T* x, const T* bias, T* y, int64_t width, int64_t column, Rows rows) {
  constexpr int kOutputs = kSize / Activation::kInputs;
  float shift[kSize], u[kSize], out[kOutputs];
  load_bias<kSize>(bias, column, shift);
  for (int64_t row = rows.row; row < rows.end; row += rows.step) {
    load<kSize>(x + row * width + column, u);
    for (int i = 0; i < kSize; ++i) u[i] += shift[i];
    for (int i = 0; i < kOutputs; ++i) Activation::value(u + i * Activation::kInputs, out + i);
    store<kOutputs>(y + (row * width + column) / Activation::kInputs, out);
  }
}

// Adds the gradient of what the bias was added to, over the rows, to `sums`.
template <class Activation, int kSize, typename T>
HOST_DEVICE void activate_backward(const T* grad, const T* x, const T* bias, T* dx, float (&sums)[kSize], int64_t width,
                                   int64_t column, Rows rows) {
  constexpr int kOutputs = kSize / Activation::kInputs;
  float shift[kSize], u[kSize], du[kSize], dy[kOutputs];
  load_bias<kSize>(bias, column, shift);
  for (int64_t row = rows.row; row < rows.end; row += rows.step) {
    load<kSize>(x + row * width + column, u);
    load<kOutputs>(grad + (row * width + column) / Activation::kInputs, dy);
    for (int i = 0; i < kSize; ++i) u[i] += shift[i];
    for (int i = 0; i < kOutputs; ++i) {
      Activation::gradient(dy[i], u + i * Activation::kInputs, du + i * Activation::kInputs);
    }
    for (int i = 0; i < kSize; ++i) sums[i] += du[i];
    store<kSize>(dx + row * width + column, du);
  }
}

}  // namespace megatron_plm
