#include "rotary.h"

#include <algorithm>

#include "threads.h"

// Memory is what this waits for: which instructions compute hardly matters, and the compiler's choice for every machine
// will do.

namespace megatron_plm {

namespace {

constexpr std::int64_t TOKENS = 32;  // of one task

// Calls work(token) for every token, from so many threads.
template <typename Work>
void for_each_token(std::int64_t tokens, int threads, const Work& work) {
    share_out((tokens + TOKENS - 1) / TOKENS, threads, [&](std::int64_t task) {
        const std::int64_t end = std::min(tokens, (task + 1) * TOKENS);
        for (std::int64_t token = task * TOKENS; token < end; ++token) work(token);
    });
}

// to = x + bias, turned by the angles of one token; all of one head.
void turned(const float* __restrict x, const float* __restrict bias, const float* __restrict cosines,
            const float* __restrict sines, std::int64_t half, float* __restrict to) {
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = bias ? x[i] + bias[i] : x[i], b = bias ? x[i + half] + bias[i + half] : x[i + half];
        to[i] = a * cosines[i] - b * sines[i];
        to[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

void turned_back(const float* __restrict grad, const float* __restrict cosines, const float* __restrict sines,
                 std::int64_t half, float* __restrict to) {
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = grad[i], b = grad[i + half];
        to[i] = a * cosines[i] + b * sines[i + half];
        to[i + half] = b * cosines[i + half] - a * sines[i];
    }
}

}  // namespace

void rotate(const Turn& turn, const float* qkv, const float* bias, float* q, float* k, float* v, int threads) {
    const std::int64_t size = turn.head_size, half = size / 2;
    for_each_token(turn.tokens, threads, [&](std::int64_t token) {
        const float *cosines = turn.cosines + token * size, *sines = turn.sines + token * size;
        for (std::int64_t head = 0; head < turn.heads; ++head) {
            const std::int64_t place = token * turn.heads + head;
            const float* x = qkv + 3 * place * size;
            const float* b = bias ? bias + 3 * head * size : nullptr;
            turned(x, b, cosines, sines, half, q + place * size);
            turned(x + size, b ? b + size : nullptr, cosines, sines, half, k + place * size);
            for (std::int64_t i = 0; i < size; ++i) {
                v[place * size + i] = b ? x[2 * size + i] + b[2 * size + i] : x[2 * size + i];
            }
        }
    });
}

void rotate_backward(const Turn& turn, const float* dq, const float* dk, const float* dv, float* dqkv, int threads) {
    const std::int64_t size = turn.head_size, half = size / 2;
    for_each_token(turn.tokens, threads, [&](std::int64_t token) {
        const float *cosines = turn.cosines + token * size, *sines = turn.sines + token * size;
        for (std::int64_t head = 0; head < turn.heads; ++head) {
            const std::int64_t place = (token * turn.heads + head) * size;
            float* to = dqkv + 3 * place;
            turned_back(dq + place, cosines, sines, half, to);
            turned_back(dk + place, cosines, sines, half, to + size);
            std::copy_n(dv + place, size, to + 2 * size);
        }
    });
}

}  // namespace megatron_plm
