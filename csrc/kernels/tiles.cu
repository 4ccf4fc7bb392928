// The ops of bias + activation and of bias + rotary positions: checks, memory and launches.

#include <vector>

#include "launch.cuh"
#include "tile_kernels.cuh"

namespace megatron_plm {
namespace {

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
