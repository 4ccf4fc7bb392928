// Bias + activation and bias + rotary positions, forward and backward: a block a tile of columns and rows.

#include "launch.cuh"
#include "rotary.h"

namespace megatron_plm {
namespace {

constexpr int kLanes = 8;        // rows of a tile that are worked on at once
constexpr int kTileRows = 128;   // of one block; each block of the backward pass leaves one partial sum of its columns

__device__ Rows rows_of_thread(int64_t rows) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTileRows;
  return {first + threadIdx.y, kLanes, first + kTileRows < rows ? first + kTileRows : rows};
}

__device__ int64_t column_of_thread() { return static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x; }

// The sums of the block's lanes, by its first lane to `partials`, whose columns begin at `column`.
template <int kSize>
__device__ void write_lane_sums(const float (&sums)[kSize], float* partials, int64_t column, bool inside) {
  __shared__ float shared[kLanes][kWarp * kSize];
  __syncthreads();  // of what was written before, all have read
  for (int i = 0; i < kSize; ++i) shared[threadIdx.y][threadIdx.x * kSize + i] = sums[i];
  __syncthreads();
  if (threadIdx.y > 0 || !inside) return;
  for (int i = 0; i < kSize; ++i) {
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += shared[lane][threadIdx.x * kSize + i];
    partials[column + i] = sum;
  }
}

template <class Activation, int kSize, typename T>
__global__ void activate_kernel(const T* x, const T* bias, T* y, int64_t rows, int64_t width) {
  const int64_t column = column_of_thread() * kSize;
  if (column < width) activate<Activation, kSize>(x, bias, y, width, column, rows_of_thread(rows));
}

template <class Activation, int kSize, typename T>
__global__ void activate_backward_kernel(const T* grad, const T* x, const T* bias, T* dx, float* partials, int64_t rows,
                                         int64_t width) {
  const int64_t column = column_of_thread() * kSize;
  float sums[kSize] = {};
  if (column < width) {
    activate_backward<Activation, kSize>(grad, x, bias, dx, sums, width, column, rows_of_thread(rows));
  }
  if (partials) write_lane_sums(sums, partials + blockIdx.y * width, column, column < width);
}

template <typename T>
struct Joint {
  const T *qkv, *bias, *cos, *sin;
  T* out[3];
  int64_t rows, heads, head_size;
};

template <typename T>
struct JointGradient {
  const T *grads[3], *cos, *sin;
  T* dqkv;
  float* partials;
  int64_t rows, heads, head_size;
};

template <int kSize, typename T>
__global__ void turn_kernel(Joint<T> of) {
  const int64_t pair = column_of_thread() * kSize;
  if (pair >= of.heads * 3 * of.head_size / 2) return;
  turn<kSize>(of.qkv, of.bias, of.cos, of.sin, of.out, of.heads, of.head_size, pair, rows_of_thread(of.rows));
}

template <int kSize, typename T>
__global__ void turn_back_kernel(JointGradient<T> of) {
  const int64_t pair = column_of_thread() * kSize;
  const bool inside = pair < of.heads * 3 * of.head_size / 2;
  float sums_a[kSize] = {}, sums_b[kSize] = {};
  if (inside) {
    turn_back<kSize>(of.grads, of.cos, of.sin, of.dqkv, sums_a, sums_b, of.heads, of.head_size, pair,
                     rows_of_thread(of.rows));
  }
  if (!of.partials) return;
  const Place place(pair, of.head_size);
  float* const partials = of.partials + blockIdx.y * 3 * of.heads * of.head_size;
  write_lane_sums(sums_a, partials, place.joint(), inside);
  write_lane_sums(sums_b, partials, place.joint() + place.half, inside);
}

int64_t tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

dim3 grid_of(int64_t vectors, int64_t rows) {
  STD_TORCH_CHECK(tiles(rows) <= 65535, rows, " tokens at once; the kernel takes up to ", int64_t{65535} * kTileRows);
  return dim3(static_cast<unsigned>((vectors + kWarp - 1) / kWarp), static_cast<unsigned>(tiles(rows)));
}

const dim3 kBlock(kWarp, kLanes);

template <int kSize>
struct Size {
  static constexpr int kValue = kSize;
};

// Runs `body` with the number of values of a vector: 16 bytes, or as few as the activation takes.
template <class Activation, typename T, class Body>
void with_vector(int64_t width, std::initializer_list<const void*> pointers, Body body) {
  constexpr int kVector = 16 / sizeof(T);
  if (width % kVector == 0 && is_aligned(pointers, 16)) {
    body(Size<kVector>{});
  } else {
    STD_TORCH_CHECK(is_aligned(pointers, Activation::kInputs * sizeof(T)), "pairs must lie at multiples of their size");
    body(Size<Activation::kInputs>{});
  }
}

template <class Activation>
Tensor activated(const Tensor& x, const MaybeTensor& bias) {
  const ScalarType dtype = x.scalar_type();
  const int64_t width = x.size(x.dim() - 1), rows = width == 0 ? 0 : x.numel() / width;
  check(x, dtype, x.numel(), "x");
  check(bias, dtype, width, "bias");
  STD_TORCH_CHECK(width % Activation::kInputs == 0, "a gated activation takes pairs");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() /= Activation::kInputs;
  const OnDevice device(x);
  Tensor y = torch::stable::new_empty(x, shape);
  if (rows == 0) return y;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *from = values<T>(x), *shift = values<T>(bias);
    T* const to = written<T>(y);
    with_vector<Activation, T>(width, {from, shift, to}, [&](auto size) {
      constexpr int kSize = decltype(size)::kValue;
      // A kernel's vectors of the output are as many bytes smaller as its values are fewer: they need no more alignment.
      activate_kernel<Activation, kSize>
          <<<grid_of(width / kSize, rows), kBlock, 0, device.stream()>>>(from, shift, to, rows, width);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return y;
}

template <class Activation>
std::tuple<Tensor, Tensor> activated_backward(const Tensor& grad, const Tensor& x, const MaybeTensor& bias) {
  const ScalarType dtype = x.scalar_type();
  const int64_t width = x.size(x.dim() - 1), rows = width == 0 ? 0 : x.numel() / width;
  check(x, dtype, x.numel(), "x");
  check(grad, dtype, x.numel() / Activation::kInputs, "grad");
  check(bias, dtype, width, "bias");
  const OnDevice device(x);
  Tensor dx = torch::stable::empty_like(x), dbias = torch::stable::new_empty(x, {bias ? width : 0});
  if (rows == 0) return {dx, torch::stable::fill_(dbias, 0.0)};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *dy = values<T>(grad), *from = values<T>(x), *shift = values<T>(bias);
    T* const to = written<T>(dx);
    const Tensor sums = torch::stable::new_empty(x, {bias ? tiles(rows) : 0, width}, ScalarType::Float);
    float* const partials = bias ? written<float>(sums) : nullptr;
    with_vector<Activation, T>(width, {dy, from, shift, to}, [&](auto size) {
      constexpr int kSize = decltype(size)::kValue;
      activate_backward_kernel<Activation, kSize>
          <<<grid_of(width / kSize, rows), kBlock, 0, device.stream()>>>(dy, from, shift, to, partials, rows, width);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    if (bias) sum_partials(partials, written<T>(dbias), tiles(rows), width, width, device.stream());
  });
  return {dx, dbias};
}

// Runs `body` with the number of pairs of a vector: it divides half a head.
template <typename T, class Body>
void with_pairs(int64_t head_size, bool aligned, Body body) {
  constexpr int kVector = 16 / sizeof(T);
  if (aligned && head_size / 2 % kVector == 0) {
    body(Size<kVector>{});
  } else if (aligned && head_size / 2 % 4 == 0) {
    body(Size<4>{});
  } else {
    body(Size<1>{});
  }
}

}  // namespace

Tensor bias_gelu(Tensor x, MaybeTensor bias, bool by_tanh) {
  return by_tanh ? activated<TanhGelu>(x, bias) : activated<ExactGelu>(x, bias);
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, MaybeTensor bias, bool by_tanh) {
  return by_tanh ? activated_backward<TanhGelu>(grad, x, bias) : activated_backward<ExactGelu>(grad, x, bias);
}

Tensor bias_swiglu(Tensor x, MaybeTensor bias) { return activated<SwiGlu>(x, bias); }

std::tuple<Tensor, Tensor> bias_swiglu_backward(Tensor grad, Tensor x, MaybeTensor bias) {
  return activated_backward<SwiGlu>(grad, x, bias);
}

std::tuple<Tensor, Tensor, Tensor> bias_rotary(Tensor qkv, MaybeTensor bias, Tensor cos, Tensor sin) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(2) == 3 && qkv.size(3) % 2 == 0, "qkv must be [T, N, 3, H] with H even");
  const ScalarType dtype = qkv.scalar_type();
  const int64_t rows = qkv.size(0), heads = qkv.size(1), head_size = qkv.size(3);
  check(qkv, dtype, qkv.numel(), "qkv");
  check(bias, dtype, heads * 3 * head_size, "bias");
  check(cos, dtype, rows * head_size, "cos");
  check(sin, dtype, rows * head_size, "sin");
  const OnDevice device(qkv);
  const auto made = [&] { return torch::stable::new_empty(qkv, {rows, heads, head_size}); };
  Tensor q = made(), k = made(), v = made();
  if (qkv.numel() == 0) return {q, k, v};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Joint<T> of{values<T>(qkv), values<T>(bias), values<T>(cos), values<T>(sin),
                      {written<T>(q), written<T>(k), written<T>(v)}, rows, heads, head_size};
    const bool aligned = is_aligned({of.qkv, of.bias, of.cos, of.sin, of.out[0], of.out[1], of.out[2]}, 16);
    with_pairs<T>(head_size, aligned, [&](auto size) {
      constexpr int kSize = decltype(size)::kValue;
      turn_kernel<kSize><<<grid_of(heads * 3 * head_size / 2 / kSize, rows), kBlock, 0, device.stream()>>>(of);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {q, k, v};
}

std::tuple<Tensor, Tensor> bias_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin,
                                                bool has_bias) {
  STD_TORCH_CHECK(dq.dim() == 3 && dq.size(2) % 2 == 0, "dq must be [T, N, H] with H even");
  const ScalarType dtype = dq.scalar_type();
  const int64_t rows = dq.size(0), heads = dq.size(1), head_size = dq.size(2), width = 3 * heads * head_size;
  check(dq, dtype, dq.numel(), "dq");
  check(dk, dtype, dq.numel(), "dk");
  check(dv, dtype, dq.numel(), "dv");
  check(cos, dtype, rows * head_size, "cos");
  check(sin, dtype, rows * head_size, "sin");
  const OnDevice device(dq);
  Tensor dqkv = torch::stable::new_empty(dq, {rows, heads, 3, head_size});
  Tensor dbias = torch::stable::new_empty(dq, {has_bias ? width : 0});
  if (dq.numel() == 0) return {dqkv, torch::stable::fill_(dbias, 0.0)};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tensor sums = torch::stable::new_empty(dq, {has_bias ? tiles(rows) : 0, width}, ScalarType::Float);
    const JointGradient<T> of{{values<T>(dq), values<T>(dk), values<T>(dv)}, values<T>(cos), values<T>(sin),
                              written<T>(dqkv), has_bias ? written<float>(sums) : nullptr, rows, heads, head_size};
    const bool aligned = is_aligned({of.grads[0], of.grads[1], of.grads[2], of.cos, of.sin, of.dqkv}, 16);
    with_pairs<T>(head_size, aligned, [&](auto size) {
      constexpr int kSize = decltype(size)::kValue;
      turn_back_kernel<kSize><<<grid_of(width / 2 / kSize, rows), kBlock, 0, device.stream()>>>(of);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    if (has_bias) sum_partials(of.partials, written<T>(dbias), tiles(rows), width, width, device.stream());
  });
  return {dqkv, dbias};
}

}  // namespace megatron_plm
