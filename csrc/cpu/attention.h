// Softmax attention inside each of several packed sequences, in float32 on a CPU.

#pragma once

#include <cstddef>
#include <cstdint>

namespace megatron_plm {

// A tensor [tokens, heads, head size]; the last dimension lies without gaps, the others as far apart as they say.
template <typename Value>
struct Strided {
    Value* data;
    std::int64_t token_stride;
    std::int64_t head_stride;

    Value* at(std::int64_t token, std::int64_t head) const { return data + token * token_stride + head * head_stride; }
};

struct Shape {
    const std::int32_t* cuts;  // where each sequence begins, and the end: [sequences + 1], never falling
    std::int64_t sequences;
    std::int64_t heads;
    std::int64_t head_size;
    float scale;  // of the scores
    bool causal;

    std::int64_t tokens() const { return cuts[sequences]; }
};

// maxima and sums, both [heads, tokens]: of each query's scores, in units of log 2, the largest, and Σ 2^(score - largest).
struct Forward {
    Strided<const float> q, k, v;
    Strided<float> out;
    float* maxima;
    float* sums;
};

struct Backward {
    Strided<const float> q, k, v, out, dout;
    const float* maxima;
    const float* sums;
    Strided<float> dq, dk, dv;
};

// Bitwise the same for any number of threads.
void attend(const Shape& shape, const Forward& tensors, int threads);
void attend_backward(const Shape& shape, const Backward& tensors, int threads);

// --- one sequence and head: what instructions.h has once for each set of instructions ---------------------------------

template <typename Value>
struct Rows {
    Value* data;
    std::int64_t stride;

    Value* row(std::int64_t index) const { return data + index * stride; }
};

struct Head {
    std::int64_t length;
    std::int64_t size;
    float scale;
    bool causal;
};

struct HeadForward {
    Rows<const float> q, k, v;
    Rows<float> out;
    float* maxima;
    float* sums;
};

struct HeadBackward {
    Rows<const float> q, k, v, out, dout;
    const float* maxima;
    const float* sums;
    Rows<float> dq, dk, dv;
};

// This thread's memory for so many floats, aligned to 64 bytes, until it asks again.
float* scratch(std::size_t floats);

}  // namespace megatron_plm
