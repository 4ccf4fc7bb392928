// The parts of dropout + sum + norm that one thread does; megatron_plm/kernels/norm.py has the formulae.
//
// A row of `width` features is shared by a group of threads: chunk c of a thread is the kSize neighbours that begin at
// (c · threads + thread) · kSize, kept in registers. Between the parts the group adds up what each thread returned.
#pragma once

#include "dropout.h"

namespace megatron_plm {

template <int kSize, int kChunks>
struct Share {
  int thread, threads, width;
  float values[kChunks][kSize];

  HOST_DEVICE int begin(int chunk) const { return (chunk * threads + thread) * kSize; }
};

struct TwoSums {
  float first, second;
};

// s = residual + dropout(x), stored and kept as stored; returns this thread's part of its sum.
template <typename T, int kSize, int kChunks>
HOST_DEVICE float add_branch(Share<kSize, kChunks>& share, const T* x, const T* residual, T* total,
                             const Dropout& dropout, uint32_t key) {
  float sum = 0.0f;
  UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int begin = share.begin(c);
    if (begin >= share.width) break;
    float added[kSize];
    load<kSize>(x + begin, added);
    load<kSize>(residual + begin, share.values[c]);
    for (int i = 0; i < kSize; ++i) {
      const float value = share.values[c][i] + dropout(added[i], key, begin + i);
      share.values[c][i] = to_float(from_float<T>(value));
      sum += share.values[c][i];
    }
    store<kSize>(total + begin, share.values[c]);
  }
  return sum;
}

// This thread's part of Σ (s − mean)²; of an RMSNorm the mean is 0.
template <int kSize, int kChunks>
HOST_DEVICE float squared_distance(const Share<kSize, kChunks>& share, float mean) {
  float sum = 0.0f;
  UNROLL
  for (int c = 0; c < kChunks; ++c) {
    if (share.begin(c) >= share.width) break;
    for (int i = 0; i < kSize; ++i) sum += (share.values[c][i] - mean) * (share.values[c][i] - mean);
  }
  return sum;
}

template <typename T, int kSize, int kChunks>
HOST_DEVICE void write_normed(const Share<kSize, kChunks>& share, float mean, float r, const T* weight, const T* bias,
                              T* normed) {
  UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int begin = share.begin(c);
    if (begin >= share.width) break;
    float scale[kSize], shift[kSize], out[kSize];
    load<kSize>(weight + begin, scale);
    load_bias<kSize>(bias, begin, shift);
    for (int i = 0; i < kSize; ++i) out[i] = (share.values[c][i] - mean) * r * scale[i] + shift[i];
    store<kSize>(normed + begin, out);
  }
}

// Fills `normed` with n and `scaled` with g·w, adds g·n and g to the sums of this thread's columns; returns its parts
// of Σ g·w·n and Σ g·w.
template <typename T, int kSize, int kChunks>
HOST_DEVICE TwoSums read_gradient(Share<kSize, kChunks>& normed, Share<kSize, kChunks>& scaled, const T* grad,
                                  const T* total, const T* weight, float mean, float r,
                                  float (&weight_sums)[kChunks][kSize], float (&bias_sums)[kChunks][kSize]) {
  TwoSums sums{0.0f, 0.0f};
  UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int begin = normed.begin(c);
    if (begin >= normed.width) break;
    float scale[kSize];
    load<kSize>(total + begin, normed.values[c]);
    load<kSize>(grad + begin, scaled.values[c]);
    load<kSize>(weight + begin, scale);
    for (int i = 0; i < kSize; ++i) {
      const float n = (normed.values[c][i] - mean) * r, g = scaled.values[c][i];
      weight_sums[c][i] += g * n;
      bias_sums[c][i] += g;
      normed.values[c][i] = n;
      scaled.values[c][i] = g * scale[i];
      sums.first += g * scale[i] * n;
      sums.second += g * scale[i];
    }
  }
  return sums;
}

// ∂s = r · (g·w − n · mean(g·w·n) − mean(g·w)) + ∂total, and ∂x = dropout(∂s) where `dx` is not null.
template <typename T, int kSize, int kChunks>
HOST_DEVICE void write_gradient(const Share<kSize, kChunks>& normed, const Share<kSize, kChunks>& scaled, TwoSums means,
                                float r, const T* grad_total, T* ds, T* dx, const Dropout& dropout, uint32_t key) {
  UNROLL
  for (int c = 0; c < kChunks; ++c) {
    const int begin = normed.begin(c);
    if (begin >= normed.width) break;
    float own[kSize], out[kSize];
    load_bias<kSize>(grad_total, begin, own);
    for (int i = 0; i < kSize; ++i) {
      out[i] = (scaled.values[c][i] - normed.values[c][i] * means.first - means.second) * r + own[i];
      out[i] = to_float(from_float<T>(out[i]));
    }
    store<kSize>(ds + begin, out);
    if (dx) {
      for (int i = 0; i < kSize; ++i) out[i] = dropout(out[i], key, begin + i);
      store<kSize>(dx + begin, out);
    }
  }
}

}  // namespace megatron_plm
