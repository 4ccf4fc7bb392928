// Attention of one head over one sequence; included by instructions_*.cpp behind lanes.h, for each set of instructions.
//
// Scores are computed again and again in blocks that stay in the first-level cache, never as a whole (Dao et al. 2022,
// "FlashAttention", arXiv:2205.14135). Across the lanes of a vector lie queries in the forward pass and keys in the
// backward pass, so that maxima and sums need no shuffles and any head size fills the vectors.

constexpr std::int64_t KEYS = 128;    // of a block of the forward pass, at most
constexpr std::int64_t QUERIES = 64;  // of a block of the backward pass, at most
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

static_assert(KEYS % R == 0 && QUERIES % R == 0, "blocks are made of whole tiles");

MEGATRON_INLINE Ints lane_numbers(int v) {
    Ints numbers;
    for (int i = 0; i < W; ++i) numbers[i] = v * W + i;
    return numbers;
}

struct ForwardMemory {
    float *k, *v;  // [rows up to R][size] and [length][size up to R], packed
    float *q, *out, *weights;  // of a block of queries, in lanes: [size], [size up to R] and [KEYS] rows
};

// Attention of queries first … in Wide · W lanes.
template <int Wide>
void forward_queries(const Head& head, const HeadForward& tensors, const ForwardMemory& memory, std::int64_t first) {
    constexpr int Q = Wide * W;
    const std::int64_t size = head.size, padded = up_to(R, size);
    to_lanes<Wide>(tensors.q, first, head.length, size, head.scale * LOG2_E, memory.q);
    for (std::int64_t i = 0; i < padded * Q; i += W) store(memory.out + i, Vec{});
    Vec top[Wide], sum[Wide];
    for (int v = 0; v < Wide; ++v) top[v] = Vec{} - __builtin_inff(), sum[v] = Vec{};

    const std::int64_t past = head.causal && first + Q < head.length ? first + Q : head.length;
    for (std::int64_t begin = 0; begin < past; begin += KEYS) {
        const std::int64_t keys = past - begin < KEYS ? past - begin : KEYS;
        Vec largest[Wide];
        for (int v = 0; v < Wide; ++v) largest[v] = top[v];
        for (std::int64_t tile = 0; tile < keys; tile += R) {
            const std::int64_t key = begin + tile;
            Vec scores[R][Wide];
            clear(scores);
            accumulate<R, Wide>(scores, memory.k + key * size, size, 1, memory.q, Q, size);
            if (key + R > past || (head.causal && key + R - 1 > first)) {
                for (int r = 0; r < R; ++r) {
                    for (int v = 0; v < Wide; ++v) {
                        const auto sees = lane_numbers(v) + static_cast<int>(first) >= static_cast<int>(key) + r;
                        const Vec hidden = Vec{} - __builtin_inff();
                        if (key + r >= past) scores[r][v] = hidden;
                        else if (head.causal) scores[r][v] = sees ? scores[r][v] : hidden;
                    }
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < Wide; ++v) {
                    largest[v] = larger(largest[v], scores[r][v]);
                    store(memory.weights + (tile + r) * Q + v * W, scores[r][v]);
                }
            }
        }
        Vec shrink[Wide];
        for (int v = 0; v < Wide; ++v) {
            shrink[v] = exp2_of(top[v] - largest[v]);
            top[v] = largest[v];
            sum[v] *= shrink[v];
        }
        for (std::int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 2
            for (int v = 0; v < Wide; ++v) {
                float* place = memory.weights + key * Q + v * W;
                const Vec weight = exp2_of(load(place) - top[v]);
                sum[v] += weight;
                store(place, weight);
            }
        }
        for (std::int64_t h = 0; h < padded; h += R) {
            Vec out[R][Wide];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                for (int v = 0; v < Wide; ++v) out[r][v] = load(memory.out + (h + r) * Q + v * W) * shrink[v];
            }
            accumulate<R, Wide>(out, memory.v + begin * padded + h, 1, padded, memory.weights, Q, keys);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                for (int v = 0; v < Wide; ++v) store(memory.out + (h + r) * Q + v * W, out[r][v]);
            }
        }
    }
    Vec share[Wide];
    for (int v = 0; v < Wide; ++v) {
        share[v] = 1.0f / sum[v];
        for (int i = 0; i < W && first + v * W + i < head.length; ++i) {
            tensors.maxima[first + v * W + i] = top[v][i];
            tensors.sums[first + v * W + i] = sum[v][i];
        }
    }
    from_lanes<Wide>(memory.out, share, first, head.length, size, tensors.out);
}

void forward(const Head& head, const HeadForward& tensors) {
    const std::int64_t size = head.size, padded = up_to(R, size), rows = up_to(R, head.length);
    float* at = scratch(rows * (size + padded) + 2 * W * (size + padded + KEYS) + 5 * 16);
    const auto take = [&at](std::int64_t floats) {
        float* taken = at;
        at += up_to(16, floats);
        return taken;
    };
    const ForwardMemory memory{take(rows * size), take(rows * padded), take(2 * W * size), take(2 * W * padded),
                               take(2 * W * KEYS)};
    pack(tensors.k, head.length, rows, size, size, 1.0f, memory.k);
    pack(tensors.v, head.length, rows, size, padded, 1.0f, memory.v);
    for (std::int64_t first = 0; first < head.length; first += 2 * W) {
        if (head.length - first > W) {
            forward_queries<2>(head, tensors, memory, first);
        } else {
            forward_queries<1>(head, tensors, memory, first);
        }
    }
}

struct BackwardMemory {
    float *q, *dout;  // [rows up to R][size up to R], packed; times what stands at `backward`
    float *top, *mean;  // [length up to R], up to W
    float *k;  // [length][size up to W], packed
    float *dq;  // the same shape as k, for queries up to R
    float *k_lanes, *v_lanes, *dk, *dv;  // of a block of keys, in lanes: [size up to R] rows
    float *weights, *dscores;  // of a block of keys and one of queries: [QUERIES] rows of lanes
};

// dq of a block of queries += dscores · k, with the head's numbers in lanes.
template <int Wide>
MEGATRON_INLINE void add_dq(const BackwardMemory& memory, std::int64_t begin, std::int64_t queries, std::int64_t first,
                            std::int64_t keys, std::int64_t row, std::int64_t wide) {
    for (std::int64_t h = 0; h < wide; h += Wide * W) {
        const float* k = memory.k + first * wide + h;
        std::int64_t tile = 0;
        // With one vector a tile is twice as high: the processor then has enough sums to work on at a time.
        for (; Wide == 1 && tile + 2 * R <= queries; tile += 2 * R) {
            accumulate_stored<2 * R, Wide>(memory.dq + (begin + tile) * wide + h, wide, memory.dscores + tile * row, row,
                                           1, k, wide, keys);
        }
        for (; tile < queries; tile += R) {
            accumulate_stored<R, Wide>(memory.dq + (begin + tile) * wide + h, wide, memory.dscores + tile * row, row, 1,
                                       k, wide, keys);
        }
    }
}

// The shares of keys first … in Wide · W lanes: all of dk and dv for them, and what they add to dq.
template <int Wide>
void backward_keys(const Head& head, const HeadBackward& tensors, const BackwardMemory& memory, std::int64_t first) {
    constexpr int K = Wide * W;
    const std::int64_t size = head.size, padded = up_to(R, size), wide = up_to(W, size);
    const std::int64_t keys = head.length - first < K ? head.length - first : K;
    to_lanes<Wide>(tensors.k, first, head.length, size, 1.0f, memory.k_lanes);
    to_lanes<Wide>(tensors.v, first, head.length, size, 1.0f, memory.v_lanes);
    for (std::int64_t i = 0; i < padded * K; i += W) store(memory.dk + i, Vec{}), store(memory.dv + i, Vec{});

    const std::int64_t start = head.causal ? first / R * R : 0;
    for (std::int64_t begin = start; begin < head.length; begin += QUERIES) {
        const std::int64_t rows = up_to(R, head.length - begin);
        const std::int64_t queries = rows < QUERIES ? rows : QUERIES;
        for (std::int64_t tile = 0; tile < queries; tile += R) {
            const std::int64_t query = begin + tile;
            Vec x[R][Wide];
            clear(x);
            accumulate<R, Wide>(x, memory.q + query * padded, padded, 1, memory.k_lanes, K, size);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < Wide; ++v) {
                    Vec weight = exp2_of(x[r][v] - memory.top[query + r]);
                    if (head.causal) {
                        const auto later = lane_numbers(v) + static_cast<int>(first) > static_cast<int>(query) + r;
                        weight = later ? Vec{} : weight;
                    }
                    store(memory.weights + (tile + r) * K + v * W, weight);
                }
            }
            clear(x);
            accumulate<R, Wide>(x, memory.dout + query * padded, padded, 1, memory.v_lanes, K, size);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < Wide; ++v) {
                    const std::int64_t place = (tile + r) * K + v * W;
                    store(memory.dscores + place, load(memory.weights + place) * (x[r][v] - memory.mean[query + r]));
                }
            }
        }
        for (std::int64_t h = 0; h < padded; h += R) {
            accumulate_stored<R, Wide>(memory.dv + h * K, K, memory.dout + begin * padded + h, 1, padded, memory.weights,
                                       K, queries);
            accumulate_stored<R, Wide>(memory.dk + h * K, K, memory.q + begin * padded + h, 1, padded, memory.dscores, K,
                                       queries);
        }
        if (wide % (2 * W) == 0) {
            add_dq<2>(memory, begin, queries, first, keys, K, wide);
        } else {
            add_dq<1>(memory, begin, queries, first, keys, K, wide);
        }
    }
    Vec one[Wide], ln2[Wide];
    for (int v = 0; v < Wide; ++v) one[v] = Vec{} + 1.0f, ln2[v] = Vec{} + LN_2;
    from_lanes<Wide>(memory.dk, ln2, first, head.length, size, tensors.dk);
    from_lanes<Wide>(memory.dv, one, first, head.length, size, tensors.dv);
}

// With weights w = 2^(score - largest) / sum and dw = dout · vᵀ: dv = wᵀ · dout, dscore = w (dw - dout · out), dq =
// dscore · k, dk = dscoreᵀ · q. The sum divides dout instead of w, once for each query.
void backward(const Head& head, const HeadBackward& tensors) {
    const std::int64_t size = head.size, padded = up_to(R, size), wide = up_to(W, size), rows = up_to(R, head.length);
    const std::int64_t vectors = up_to(W, rows);
    float* at = scratch(2 * (vectors + rows * (padded + wide)) + 2 * W * (4 * padded + 2 * QUERIES) + 12 * 16);
    const auto take = [&at](std::int64_t floats) {
        float* taken = at;
        at += up_to(16, floats);
        return taken;
    };
    const BackwardMemory memory{take(rows * padded),   take(rows * padded),   take(vectors),        take(vectors),
                                take(rows * wide),     take(rows * wide),     take(2 * W * padded), take(2 * W * padded),
                                take(2 * W * padded),  take(2 * W * padded),  take(2 * W * QUERIES),
                                take(2 * W * QUERIES)};
    pack(tensors.q, head.length, rows, size, padded, head.scale * LOG2_E, memory.q);
    pack(tensors.k, head.length, rows, size, wide, 1.0f, memory.k);
    for (std::int64_t i = 0; i < rows * wide; i += W) store(memory.dq + i, Vec{});
    for (std::int64_t first = 0; first < head.length; first += W) {
        // Here the lanes of the blocks of keys hold those of a vector of queries.
        to_lanes<1>(tensors.dout, first, head.length, size, 1.0f, memory.k_lanes);
        to_lanes<1>(tensors.out, first, head.length, size, 1.0f, memory.v_lanes);
        Vec mean = Vec{};
        for (std::int64_t h = 0; h < size; ++h) mean += load(memory.k_lanes + h * W) * load(memory.v_lanes + h * W);
        store(memory.mean + first, mean);
    }
    for (std::int64_t r = 0; r < head.length; ++r) {
        const float share = 1.0f / tensors.sums[r];
        memory.top[r] = tensors.maxima[r];
        memory.mean[r] *= share;
        pack({tensors.dout.row(r), 0}, 1, 1, size, padded, share, memory.dout + r * padded);
    }
    // Rows beyond the end add nothing: their dout is 0.
    for (std::int64_t r = head.length; r < rows; ++r) {
        memory.top[r] = memory.mean[r] = 0.0f;
        for (std::int64_t h = 0; h < padded; ++h) memory.dout[r * padded + h] = 0.0f;
    }
    for (std::int64_t first = 0; first < head.length; first += 2 * W) {
        if (head.length - first > W) {
            backward_keys<2>(head, tensors, memory, first);
        } else {
            backward_keys<1>(head, tensors, memory, first);
        }
    }
    for (std::int64_t r = 0; r < head.length; ++r) {
        pack({memory.dq + r * wide, 0}, 1, 1, size, size, head.scale, tensors.dq.row(r));
    }
}
