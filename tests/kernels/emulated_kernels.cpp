// The kernels of csrc/kernels, run on the host by emulated_cuda.h. Each function launches as the op of its name does, on
// float (is_bf16 0) or bfloat16 (1).

#include "emulated_cuda.h"

#include "norm_kernels.cuh"
#include "tile_kernels.cuh"

using namespace megatron_plm;
using emulated::launch;

namespace {

template <typename T>
const T* in(const void* memory) {
  return static_cast<const T*>(memory);
}

template <typename T>
T* out(void* memory) {
  return static_cast<T*>(memory);
}

template <typename T>
void sum(const float* partials, void* sums, unsigned count, int64_t width) {
  launch({static_cast<unsigned>(width + kWarp - 1) / kWarp, 1, 1}, {kWarp, kSumRows, 1},
         [=] { sum_partials_kernel<T>(partials, out<T>(sums), static_cast<int>(count), width, width); });
}

dim3 tiles_of(int64_t vectors, int64_t rows) {
  return {static_cast<unsigned>((vectors + kWarp - 1) / kWarp), static_cast<unsigned>((rows + kTileRows - 1) / kTileRows),
          1};
}

}  // namespace

extern "C" {

struct Norm {
  const void *x, *residual, *weight, *bias, *grad_total, *grad;
  const int64_t* keys;
  void *total, *normed, *ds, *dx;
  float *mean, *r, *partials;
  int64_t rows, width, is_rms, max_blocks;
  double rate, eps;
};

}  // extern "C"

namespace {

template <typename T, int kSize, int kChunks, int kWarps>
void norm_both(const Norm& of) {
  constexpr int kRows = kWarps == 1 ? kRowsOfWarps : 1;
  const dim3 threads{(kWarps == 1 ? kRowsOfWarps : kWarps) * kWarp, 1, 1};
  const int width = static_cast<int>(of.width);
  const auto all = static_cast<unsigned>((of.rows + kRows - 1) / kRows);
  const unsigned blocks = std::min(all, static_cast<unsigned>(of.max_blocks));
  const Dropout dropout = Dropout::with_rate(of.rate, 2);
  float* const mean = of.is_rms ? nullptr : of.mean;
  const Forward<T> forward{in<T>(of.x), in<T>(of.residual), in<T>(of.weight), in<T>(of.bias), of.keys,
                           out<T>(of.total), out<T>(of.normed), mean, of.r, of.rows, width,
                           static_cast<float>(of.eps), dropout};
  launch({all, 1, 1}, threads, [=] { forward_kernel<T, kSize, kChunks, kWarps>(forward); });
  const Backward<T> backward{in<T>(of.grad_total), in<T>(of.grad), in<T>(of.total), in<T>(of.weight), mean, of.r, of.keys,
                             out<T>(of.ds), of.rate > 0 ? out<T>(of.dx) : nullptr, of.partials, of.rows, width, dropout};
  launch({blocks, 1, 1}, threads, [=] { backward_kernel<T, kSize, kChunks, kWarps>(backward); });
}

template <typename T, class Activation, int kSize>
void activation_both(const void* x, const void* bias, void* y, const void* grad, void* dx, void* dbias, float* partials,
                     int64_t rows, int64_t width) {
  const dim3 grid = tiles_of(width / kSize, rows), threads{kWarp, kLanes, 1};
  launch(grid, threads, [=] { activate_kernel<Activation, kSize>(in<T>(x), in<T>(bias), out<T>(y), rows, width); });
  launch(grid, threads, [=] {
    activate_backward_kernel<Activation, kSize>(in<T>(grad), in<T>(x), in<T>(bias), out<T>(dx), partials, rows, width);
  });
  sum<T>(partials, dbias, grid.y, width);
}

}  // namespace

extern "C" {

// The fits of csrc/kernels/norm.cu: 0 to 3 by vectors, a row a warp's or that of 4, 8 or 16; 4 by single values.
int norm(int is_bf16, int fit, const Norm* of) {
  switch (fit * 2 + is_bf16) {
    case 0: norm_both<float, 4, 2, 1>(*of); return 0;
    case 1: norm_both<Bf16, 8, 2, 1>(*of); return 0;
    case 2: norm_both<float, 4, 2, 4>(*of); return 0;
    case 3: norm_both<Bf16, 8, 2, 4>(*of); return 0;
    case 5: norm_both<Bf16, 8, 2, 8>(*of); return 0;
    case 7: norm_both<Bf16, 8, 2, 16>(*of); return 0;
    case 8: norm_both<float, 1, 16, 4>(*of); return 0;
    default: return 1;
  }
}

void gelu(const void* x, const void* bias, void* y, const void* grad, void* dx, void* dbias, float* partials,
          int64_t rows, int64_t width) {
  activation_both<float, ExactGelu, 4>(x, bias, y, grad, dx, dbias, partials, rows, width);
}

void swiglu(const void* x, const void* bias, void* y, const void* grad, void* dx, void* dbias, float* partials,
            int64_t rows, int64_t width) {
  activation_both<Bf16, SwiGlu, 8>(x, bias, y, grad, dx, dbias, partials, rows, width);
}

void rotary(const void* qkv, const void* bias, const void* cos, const void* sin, void* q, void* k, void* v,
            const void* dq, const void* dk, const void* dv, void* dqkv, void* dbias, float* partials, int64_t rows,
            int64_t heads, int64_t head_size) {
  const dim3 grid = tiles_of(heads * 3 * head_size / 2 / 4, rows), threads{kWarp, kLanes, 1};
  const Joint<float> joint{in<float>(qkv), in<float>(bias), in<float>(cos), in<float>(sin),
                           {out<float>(q), out<float>(k), out<float>(v)}, rows, heads, head_size};
  launch(grid, threads, [=] { turn_kernel<4>(joint); });
  const JointGradient<float> gradient{{in<float>(dq), in<float>(dk), in<float>(dv)}, in<float>(cos), in<float>(sin),
                                      out<float>(dqkv), partials, rows, heads, head_size};
  launch(grid, threads, [=] { turn_back_kernel<4>(gradient); });
  sum<float>(partials, dbias, grid.y, 3 * heads * head_size);
}

void dropout_add(const void* x, const void* residual, const int64_t* keys, void* sums, int64_t rows, int64_t width) {
  const Dropout dropout = Dropout::with_rate(0.3, 2);
  launch({3, 1, 1}, {64, 1, 1}, [=] {
    dropout_add_kernel<4>(in<float>(x), in<float>(residual), keys, out<float>(sums), rows * width, width, dropout);
  });
}

}  // extern "C"
