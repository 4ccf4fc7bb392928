#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "instructions.h"
#include "threads.h"

namespace megatron_plm {

namespace {

// Sequences that are not empty, the longest first: no thread begins a long one when the others have nothing left to do.
std::vector<std::int64_t> by_length(const Shape& shape) {
    std::vector<std::int64_t> order;
    for (std::int64_t i = 0; i < shape.sequences; ++i) {
        if (shape.cuts[i + 1] > shape.cuts[i]) order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(), [&shape](std::int64_t a, std::int64_t b) {
        return shape.cuts[a + 1] - shape.cuts[a] > shape.cuts[b + 1] - shape.cuts[b];
    });
    return order;
}

// Calls work(head, first token, number of the head) for every sequence and head.
template <typename Work>
void for_each_head(const Shape& shape, int threads, const Work& work) {
    const std::vector<std::int64_t> order = by_length(shape);
    share_out(static_cast<std::int64_t>(order.size()) * shape.heads, threads, [&](std::int64_t task) {
        const std::int64_t sequence = order[static_cast<std::size_t>(task / shape.heads)];
        const std::int64_t begin = shape.cuts[sequence], length = shape.cuts[sequence + 1] - begin;
        work(Head{length, shape.head_size, shape.scale, shape.causal}, begin, task % shape.heads);
    });
}

template <typename Value>
Rows<Value> rows(const Strided<Value>& tensor, std::int64_t token, std::int64_t head) {
    return {tensor.at(token, head), tensor.token_stride};
}

}  // namespace

void attend(const Shape& shape, const Forward& t, int threads) {
    const Kernels& chosen = kernels();
    for_each_head(shape, threads, [&](const Head& head, std::int64_t token, std::int64_t n) {
        const std::int64_t place = n * shape.tokens() + token;
        chosen.attend(head, {rows(t.q, token, n), rows(t.k, token, n), rows(t.v, token, n), rows(t.out, token, n),
                             t.maxima + place, t.sums + place});
    });
}

void attend_backward(const Shape& shape, const Backward& t, int threads) {
    const Kernels& chosen = kernels();
    for_each_head(shape, threads, [&](const Head& head, std::int64_t token, std::int64_t n) {
        const std::int64_t place = n * shape.tokens() + token;
        chosen.attend_backward(
            head, {rows(t.q, token, n), rows(t.k, token, n), rows(t.v, token, n), rows(t.out, token, n),
                   rows(t.dout, token, n), t.maxima + place, t.sums + place, rows(t.dq, token, n),
                   rows(t.dk, token, n), rows(t.dv, token, n)});
    });
}

float* scratch(std::size_t floats) {
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    static thread_local std::unique_ptr<float, Free> memory;
    static thread_local std::size_t size = 0;
    if (floats > size) {
        const std::size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
        memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        size = memory ? floats : 0;
        if (!memory) throw std::bad_alloc();
    }
    return memory.get();
}

}  // namespace megatron_plm
