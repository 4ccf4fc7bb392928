// The kernels' arithmetic as the host runs it: thread by thread, in the order of the launches of csrc/kernels/*.cu.
// `vector` values are read at once; each function is for float (is_bf16 0) or bfloat16 (1). Returns 0, or 1 for a vector
// that it was not compiled for.

#include <algorithm>
#include <vector>

#include "norm.h"
#include "rotary.h"

using namespace megatron_plm;

namespace {

constexpr int kChunks = 2, kLanes = 8, kTileRows = 128;

template <class Body>
int with_vector(int is_bf16, int vector, Body body) {
  const auto sized = [&](auto type) {
    switch (vector) {
      case 1: body(type, std::integral_constant<int, 1>{}); return 0;
      case 2: body(type, std::integral_constant<int, 2>{}); return 0;
      case 4: body(type, std::integral_constant<int, 4>{}); return 0;
      case 8: body(type, std::integral_constant<int, 8>{}); return 0;
      default: return 1;
    }
  };
  return is_bf16 ? sized(Bf16{}) : sized(0.0f);
}

template <typename T>
T* as(void* memory) {
  return static_cast<T*>(memory);
}

template <typename T>
const T* as(const void* memory) {
  return static_cast<const T*>(memory);
}

// A row is shared by as many threads as its vectors need, in warps.
int threads_for(int width, int vector) {
  const int needed = (width + vector * kChunks - 1) / (vector * kChunks);
  return (needed + 31) / 32 * 32;
}

// Calls `body` with the first column (in vectors) and the rows of each thread, tile by tile.
template <class Body>
void over_tiles(int64_t vectors, int64_t rows, Body body) {
  for (int64_t first = 0; first < rows; first += kTileRows) {
    for (int64_t column = 0; column < vectors; ++column) {
      for (int lane = 0; lane < kLanes; ++lane) {
        body(column, Rows{first + lane, kLanes, std::min(first + kTileRows, rows)});
      }
    }
  }
}

}  // namespace

extern "C" {

int dropout_and_sum(int is_bf16, int vector, const void* x, const void* residual, const int64_t* keys, void* out,
                    int64_t rows, int64_t width, double rate, int64_t site) {
  const Dropout dropout = Dropout::with_rate(rate, site);
  return with_vector(is_bf16, vector, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kSize = decltype(size)::value;
    for (int64_t at = 0; at < rows * width; at += kSize) {
      add_dropped<kSize>(as<T>(x), as<T>(residual), keys, as<T>(out), at, width, dropout);
    }
  });
}

int add_norm(int is_bf16, int vector, const void* x, const void* residual, const void* weight, const void* bias,
             const int64_t* keys, void* total, void* normed, float* mean, float* r, int64_t rows, int width,
             double rate, int64_t site, double eps, int is_rms) {
  const Dropout dropout = Dropout::with_rate(rate, site);
  return with_vector(is_bf16, vector, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kSize = decltype(size)::value;
    const int threads = threads_for(width, kSize);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * width;
      const uint32_t key = keys ? static_cast<uint32_t>(keys[row]) : 0u;
      std::vector<Share<kSize, kChunks>> shares;
      float sum = 0.0f, squares = 0.0f;
      for (int thread = 0; thread < threads; ++thread) {
        shares.push_back({thread, threads, width, {}});
        sum += add_branch(shares.back(), as<T>(x) + at, as<T>(residual) + at, as<T>(total) + at, dropout, key);
      }
      mean[row] = is_rms ? 0.0f : sum / width;
      for (const auto& share : shares) squares += squared_distance(share, mean[row]);
      r[row] = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
      for (const auto& share : shares) {
        write_normed(share, mean[row], r[row], as<T>(weight), as<T>(bias), as<T>(normed) + at);
      }
    }
  });
}

int add_norm_backward(int is_bf16, int vector, const void* grad_total, const void* grad, const void* total,
                      const void* weight, const float* mean, const float* r, const int64_t* keys, void* ds, void* dx,
                      float* dweight, float* dbias, int64_t rows, int width, double rate, int64_t site, int is_rms) {
  const Dropout dropout = Dropout::with_rate(rate, site);
  return with_vector(is_bf16, vector, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kSize = decltype(size)::value;
    struct Thread {
      Share<kSize, kChunks> normed, scaled;
      float weight_sums[kChunks][kSize] = {}, bias_sums[kChunks][kSize] = {};
    };
    const int threads = threads_for(width, kSize);
    std::vector<Thread> all(threads);
    for (int thread = 0; thread < threads; ++thread) {
      all[thread].normed = all[thread].scaled = {thread, threads, width, {}};
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * width;
      TwoSums means{0.0f, 0.0f};
      for (Thread& one : all) {
        const TwoSums part = read_gradient(one.normed, one.scaled, as<T>(grad) + at, as<T>(total) + at, as<T>(weight),
                                           mean[row], r[row], one.weight_sums, one.bias_sums);
        means.first += part.first / width;
        means.second += is_rms ? 0.0f : part.second / width;
      }
      for (const Thread& one : all) {
        write_gradient(one.normed, one.scaled, means, r[row], grad_total ? as<T>(grad_total) + at : nullptr,
                       as<T>(ds) + at, rate > 0 ? as<T>(dx) + at : nullptr, dropout,
                       keys ? static_cast<uint32_t>(keys[row]) : 0u);
      }
    }
    for (const Thread& one : all) {
      for (int c = 0; c < kChunks && one.normed.begin(c) < width; ++c) {
        for (int i = 0; i < kSize; ++i) {
          dweight[one.normed.begin(c) + i] = one.weight_sums[c][i];
          dbias[one.normed.begin(c) + i] = one.bias_sums[c][i];
        }
      }
    }
  });
}

// kind: 0 exact GELU, 1 by tanh, 2 SwiGLU.
int activation(int is_bf16, int vector, int kind, const void* x, const void* bias, void* y, int64_t rows,
               int64_t width) {
  return with_vector(is_bf16, vector, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kSize = decltype(size)::value;
    over_tiles(width / kSize, rows, [&](int64_t column, Rows own) {
      if (kind == 0) activate<ExactGelu, kSize>(as<T>(x), as<T>(bias), as<T>(y), width, column * kSize, own);
      if (kind == 1) activate<TanhGelu, kSize>(as<T>(x), as<T>(bias), as<T>(y), width, column * kSize, own);
      if constexpr (kSize > 1) {
        if (kind == 2) activate<SwiGlu, kSize>(as<T>(x), as<T>(bias), as<T>(y), width, column * kSize, own);
      }
    });
  });
}

int activation_backward(int is_bf16, int vector, int kind, const void* grad, const void* x, const void* bias, void* dx,
                        float* dbias, int64_t rows, int64_t width) {
  return with_vector(is_bf16, vector, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kSize = decltype(size)::value;
    over_tiles(width / kSize, rows, [&](int64_t column, Rows own) {
      float sums[kSize] = {};
      const int64_t at = column * kSize;
      const T *dy = as<T>(grad), *from = as<T>(x), *shift = as<T>(bias);
      if (kind == 0) activate_backward<ExactGelu, kSize>(dy, from, shift, as<T>(dx), sums, width, at, own);
      if (kind == 1) activate_backward<TanhGelu, kSize>(dy, from, shift, as<T>(dx), sums, width, at, own);
      if constexpr (kSize > 1) {
        if (kind == 2) activate_backward<SwiGlu, kSize>(dy, from, shift, as<T>(dx), sums, width, at, own);
      }
      for (int i = 0; i < kSize; ++i) dbias[at + i] += sums[i];
    });
  });
}

int rotary(int is_bf16, int vector, const void* qkv, const void* bias, const void* cos, const void* sin, void* q,
           void* k, void* v, int64_t rows, int64_t heads, int64_t head_size) {
  return with_vector(is_bf16, vector, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kSize = decltype(size)::value;
    T* const out[3] = {as<T>(q), as<T>(k), as<T>(v)};
    over_tiles(heads * 3 * head_size / 2 / kSize, rows, [&](int64_t pair, Rows own) {
      turn<kSize>(as<T>(qkv), as<T>(bias), as<T>(cos), as<T>(sin), out, heads, head_size, pair * kSize, own);
    });
  });
}

int rotary_backward(int is_bf16, int vector, const void* dq, const void* dk, const void* dv, const void* cos,
                    const void* sin, void* dqkv, float* dbias, int64_t rows, int64_t heads, int64_t head_size) {
  return with_vector(is_bf16, vector, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kSize = decltype(size)::value;
    const T* const grads[3] = {as<T>(dq), as<T>(dk), as<T>(dv)};
    over_tiles(heads * 3 * head_size / 2 / kSize, rows, [&](int64_t pair, Rows own) {
      float a[kSize] = {}, b[kSize] = {};
      turn_back<kSize>(grads, as<T>(cos), as<T>(sin), as<T>(dqkv), a, b, heads, head_size, pair * kSize, own);
      const Place place(pair * kSize, head_size);
      for (int i = 0; i < kSize; ++i) {
        dbias[place.joint() + i] += a[i];
        dbias[place.joint() + place.half + i] += b[i];
      }
    });
  });
}

}  // extern "C"
