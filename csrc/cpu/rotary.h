// The rotation of queries and keys by their tokens' angles, in float32 on a CPU: megatron_plm/kernels/rotary.py has the
// formulae.

#pragma once

#include <cstdint>

namespace megatron_plm {

struct Turn {
    std::int64_t tokens, heads, head_size;  // the head size is even
    const float *cosines, *sines;           // [tokens, head size]
};

// q, k, v, each [tokens, heads, head size], of qkv [tokens, heads, 3, head size] plus a bias [heads, 3, head size], or
// null: queries and keys rotated, values as they are.
void rotate(const Turn& turn, const float* qkv, const float* bias, float* q, float* k, float* v, int threads);

// The gradient of qkv from those of q, k and v.
void rotate_backward(const Turn& turn, const float* dq, const float* dk, const float* dv, float* dqkv, int threads);

}  // namespace megatron_plm
