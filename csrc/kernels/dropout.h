// Dropout by a hash of token, feature and site: megatron_plm/kernels/dropout.py is the reference.
#pragma once

#include "common.h"

namespace megatron_plm {

// lowbias32 of Wellons's search among bijections of 32-bit numbers (github.com/skeeto/hash-prospector).
HOST_DEVICE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

struct Dropout {
  uint32_t site;
  uint32_t threshold;  // of 2^32: what is drawn below is dropped; 0 drops nothing
  float scale;         // of what is kept

  static Dropout with_rate(double rate, int64_t site) {
    return {static_cast<uint32_t>(site), static_cast<uint32_t>(rate * 4294967296.0),
            static_cast<float>(1.0 / (1.0 - rate))};
  }

  HOST_DEVICE float operator()(float value, uint32_t key, int feature) const {
    if (threshold == 0) return value;
    const uint32_t drawn = mixed(key ^ mixed(static_cast<uint32_t>(feature + 1) ^ site << 20));
    return drawn < threshold ? 0.0f : value * scale;
  }
};

// out = residual + dropout(x), or dropout(x) without a residual, of the kSize neighbours of one row that begin at `at`.
template <int kSize, typename T>
HOST_DEVICE void add_dropped(const T* x, const T* residual, const int64_t* keys, T* out, int64_t at, int64_t width,
                             const Dropout& dropout) {
  const int64_t row = at / width;
  const auto key = static_cast<uint32_t>(keys[row]);
  float values[kSize], sum[kSize];
  load<kSize>(x + at, values);
  load_bias<kSize>(residual, at, sum);
  for (int i = 0; i < kSize; ++i) sum[i] += dropout(values[i], key, static_cast<int>(at - row * width) + i);
  store<kSize>(out + at, sum);
}

}  // namespace megatron_plm
