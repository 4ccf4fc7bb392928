// The ops of dropout + sum + norm: checks, memory and launches.

#include "launch.cuh"
#include "norm_kernels.cuh"

namespace megatron_plm {
namespace {

constexpr int kMaxPartials = 512;  // blocks of the backward pass, whatever the GPU: the order of additions is fixed

template <typename T, int kSize, int kChunks, int kWarps>
struct Fit {
  static constexpr int kVector = kSize, kParts = kChunks, kWarpsOfRow = kWarps;
  static constexpr int kThreads = kWarps == 1 ? kRowsOfWarps * kWarp : kWarps * kWarp;
  static constexpr int kRows = kWarps == 1 ? kRowsOfWarps : 1;
};

// Runs `body` with the smallest fit of a row: vectors of 16 bytes where width and memory allow, else single values.
template <typename T, class Body>
void with_fit(int64_t width, bool aligned, int64_t max_width, Body body) {
  constexpr int kVector = 16 / sizeof(T), kSpan = kVector * 2 * kWarp;
  STD_TORCH_CHECK(width >= 1 && width <= max_width, "rows of ", width, " features; the kernel takes 1 to ", max_width);
  if (aligned && width % kVector == 0 && width <= kSpan) {
    body(Fit<T, kVector, 2, 1>{});
  } else if (aligned && width % kVector == 0 && width <= 4 * kSpan) {
    body(Fit<T, kVector, 2, 4>{});
  } else if (aligned && width % kVector == 0 && width <= 8 * kSpan) {
    body(Fit<T, kVector, 2, 8>{});
  } else if (aligned && width % kVector == 0 && width <= 16 * kSpan) {
    body(Fit<T, kVector, 2, 16>{});
  } else if (width <= 16 * kWarp * 4) {
    body(Fit<T, 1, 16, 4>{});
  } else {
    body(Fit<T, 1, 16, 16>{});
  }
}

constexpr int64_t kMaxWidth = 8192;  // config/problems.py refuses wider models

Dropout checked_dropout(const MaybeTensor& keys, double rate, int64_t site, int64_t rows) {
  STD_TORCH_CHECK(rate >= 0 && rate < 1, "rate is ", rate, ", and should be from 0 up to 1");
  STD_TORCH_CHECK(site >= 0 && site < 4096, "site is ", site, ", and should be from 0 to 4095");
  STD_TORCH_CHECK(rate == 0 || keys, "dropout needs the tokens' keys");
  check(keys, ScalarType::Long, rows, "keys");
  return Dropout::with_rate(rate, site);
}

}  // namespace

Tensor dropout_add(Tensor x, MaybeTensor residual, Tensor keys, double rate, int64_t site) {
  const int64_t numel = x.numel(), rows = keys.numel();
  const ScalarType dtype = x.scalar_type();
  check(x, dtype, numel, "x");
  check(residual, dtype, numel, "residual");
  STD_TORCH_CHECK(rows == 0 ? numel == 0 : numel % rows == 0, "there must be a key for each token of x");
  const Dropout dropout = checked_dropout(keys, rate, site, rows);
  const OnDevice device(x);
  Tensor out = torch::stable::empty_like(x);
  if (numel == 0) return out;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    const T *from = values<T>(x), *to_add = values<T>(residual);
    T* const to = written<T>(out);
    const int64_t width = numel / rows;
    const bool by_vector = width % kVector == 0 && is_aligned({from, to_add, to}, 16);
    const auto kernel = by_vector ? dropout_add_kernel<kVector, T> : dropout_add_kernel<1, T>;
    const int64_t vectors = by_vector ? numel / kVector : numel;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((vectors + 255) / 256, 65536));
    kernel<<<blocks, 256, 0, device.stream()>>>(from, to_add, values<int64_t>(keys), to, numel, width, dropout);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm(Tensor x, Tensor residual, Tensor weight, MaybeTensor bias,
                                                            MaybeTensor keys, double rate, int64_t site, double eps,
                                                            bool is_rms) {
  const int64_t width = weight.numel(), numel = x.numel();
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(width > 0 && numel % width == 0, "x must have rows of the weight's length");
  const int64_t rows = numel / width;
  check(x, dtype, numel, "x");
  check(residual, dtype, numel, "residual");
  check(weight, dtype, width, "weight");
  check(bias, dtype, width, "bias");
  const Dropout dropout = checked_dropout(keys, rate, site, rows);
  const OnDevice device(x);
  const torch::headeronly::IntHeaderOnlyArrayRef tokens(x.sizes().data(), x.dim() - 1);
  Tensor total = torch::stable::empty_like(x), normed = torch::stable::empty_like(x);
  const int64_t none = 0;
  Tensor mean = torch::stable::new_empty(
      x, is_rms ? torch::headeronly::IntHeaderOnlyArrayRef(&none, 1) : tokens, ScalarType::Float);
  Tensor r = torch::stable::new_empty(x, tokens, ScalarType::Float);
  if (rows == 0) return {total, normed, mean, r};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Forward<T> of{values<T>(x), values<T>(residual), values<T>(weight), values<T>(bias), values<int64_t>(keys),
                        written<T>(total), written<T>(normed), is_rms ? nullptr : written<float>(mean),
                        written<float>(r), rows, static_cast<int>(width), static_cast<float>(eps), dropout};
    const bool aligned = is_aligned({of.x, of.residual, of.weight, of.bias, of.total, of.normed}, 16);
    with_fit<T>(width, aligned, kMaxWidth, [&](auto fit) {
      using F = decltype(fit);
      forward_kernel<T, F::kVector, F::kParts, F::kWarpsOfRow>
          <<<static_cast<unsigned>((rows + F::kRows - 1) / F::kRows), F::kThreads, 0, device.stream()>>>(of);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {total, normed, mean, r};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm_backward(MaybeTensor grad_total, Tensor grad_normed,
                                                                     Tensor total, Tensor weight, Tensor mean, Tensor r,
                                                                     MaybeTensor keys, double rate, int64_t site,
                                                                     bool is_rms, bool has_bias) {
  const int64_t width = weight.numel(), numel = total.numel(), rows = r.numel();
  const ScalarType dtype = total.scalar_type();
  check(grad_total, dtype, numel, "grad_total");
  check(grad_normed, dtype, numel, "grad_normed");
  check(total, dtype, rows * width, "total");
  check(weight, dtype, width, "weight");
  check(mean, ScalarType::Float, is_rms ? 0 : rows, "mean");
  check(r, ScalarType::Float, rows, "r");
  const Dropout dropout = checked_dropout(keys, rate, site, rows);
  const OnDevice device(total);
  Tensor ds = torch::stable::empty_like(total);
  Tensor dx = rate == 0 ? torch::stable::new_empty(total, {0}) : torch::stable::empty_like(total);
  Tensor dweight = torch::stable::empty_like(weight);
  Tensor dbias = torch::stable::new_empty(weight, {has_bias ? width : 0});
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backward<T> of{values<T>(grad_total), values<T>(grad_normed), values<T>(total), values<T>(weight),
                   is_rms ? nullptr : values<float>(mean), values<float>(r), values<int64_t>(keys), written<T>(ds),
                   rate == 0 ? nullptr : written<T>(dx), nullptr, rows, static_cast<int>(width), dropout};
    const bool aligned = is_aligned({of.grad_total, of.grad, of.total, of.weight, of.ds, of.dx}, 16);
    with_fit<T>(width, aligned, kMaxWidth, [&](auto fit) {
      using F = decltype(fit);
      const int64_t blocks = std::clamp<int64_t>((rows + F::kRows - 1) / F::kRows, 1, kMaxPartials);
      const Tensor partials = torch::stable::new_empty(total, {blocks, 2, width}, ScalarType::Float);
      of.partials = written<float>(partials);
      const auto kernel = backward_kernel<T, F::kVector, F::kParts, F::kWarpsOfRow>;
      const auto shared = static_cast<int>(F::kRows * 2 * width * sizeof(float));
      // A block gets more than 48 KB where it asks for them.
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
      kernel<<<static_cast<unsigned>(blocks), F::kThreads, shared, device.stream()>>>(of);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      sum_partials(of.partials, written<T>(dweight), blocks, 2 * width, width, device.stream());
      if (has_bias) sum_partials(of.partials + width, written<T>(dbias), blocks, 2 * width, width, device.stream());
    });
  });
  return {ds, dx, dweight, dbias};
}

}  // namespace megatron_plm
