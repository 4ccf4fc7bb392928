// Vectors of LANES floats, and what kernels do with them; included by instructions_*.cpp for each set of instructions.
//
// Written with the vector types of GCC and clang. No include here, no templates from outside: what the compiler makes
// of this file may run only where the instructions exist, and a linker keeps any one of several equal functions.

#define MEGATRON_INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef std::int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr int W = LANES;
constexpr int R = TILE_ROWS;  // rows of a tile of accumulators: with 2 vectors each, they fit the registers

MEGATRON_INLINE Vec load(const float* from) {
    Vec x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

MEGATRON_INLINE void store(float* to, Vec x) { __builtin_memcpy(to, &x, sizeof x); }

// Keeps `a` where `b` is no number: an accumulated maximum is never lost.
MEGATRON_INLINE Vec larger(Vec a, Vec b) { return b > a ? b : a; }

// 2^x for x of at most 0, to 2e-7 of it; 2^-125 for what is smaller still. No number gives no number.
MEGATRON_INLINE Vec exp2_of(Vec x) {
    x = x < -125.0f ? Vec{} - 125.0f : x;
    const Vec shifted = x + 12582912.0f;  // 1.5 · 2^23: the sum's last bits are x to the nearest integer
    const Vec rest = x - (shifted - 12582912.0f);
    // The polynomial with 1 at 0 whose largest relative error between -½ and ½ is the least.
    Vec y = rest * 0.001326472731307149f + 0.009671512991189957f;
    y = y * rest + 0.05550733581185341f;
    y = y * rest + 0.24022242426872253f;
    y = y * rest + 0.6931470036506653f;
    y = y * rest + 1.0f;
    return (Vec)((Bits)y + ((Bits)shifted << 23));
}

// c[r][v] += Σ_d a[r · a_row + d · a_step] · b[d · b_step + v · W …]: numbers of a, each for all lanes.
template <int Tall, int Wide>
MEGATRON_INLINE void accumulate(Vec (&c)[Tall][Wide], const float* a, std::int64_t a_row, std::int64_t a_step,
                                const float* b, std::int64_t b_step, std::int64_t depth) {
    for (std::int64_t d = 0; d < depth; ++d) {
        Vec row[Wide];
#pragma GCC unroll 2
        for (int v = 0; v < Wide; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 16
        for (int r = 0; r < Tall; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < Wide; ++v) c[r][v] += row[v] * a[r * a_row];
        }
        a += a_step;
        b += b_step;
    }
}

// Sets a tile to 0, without going through memory.
template <int Tall, int Wide>
MEGATRON_INLINE void clear(Vec (&c)[Tall][Wide]) {
#pragma GCC unroll 16
    for (int r = 0; r < Tall; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < Wide; ++v) c[r][v] = Vec{};
    }
}

// c += a · b as above, where c lies in memory: c[r · c_row + v · W …].
template <int Tall, int Wide>
MEGATRON_INLINE void accumulate_stored(float* c, std::int64_t c_row, const float* a, std::int64_t a_row,
                                       std::int64_t a_step, const float* b, std::int64_t b_step, std::int64_t depth) {
    Vec sums[Tall][Wide];
#pragma GCC unroll 16
    for (int r = 0; r < Tall; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < Wide; ++v) sums[r][v] = load(c + r * c_row + v * W);
    }
    accumulate<Tall, Wide>(sums, a, a_row, a_step, b, b_step, depth);
#pragma GCC unroll 16
    for (int r = 0; r < Tall; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < Wide; ++v) store(c + r * c_row + v * W, sums[r][v]);
    }
}

#if defined(__clang__)
template <int... I>
struct Indices {};
template <int N, int... I>
struct Counted : Counted<N - 1, N - 1, I...> {};
template <int... I>
struct Counted<0, I...> { typedef Indices<I...> Type; };
template <int First, int... I>
MEGATRON_INLINE Vec interleaved(Vec a, Vec b, Indices<I...>) {
    return __builtin_shufflevector(a, b, (First + I / 2 + (I % 2) * W)...);
}
template <int First>
MEGATRON_INLINE Vec interleaved(Vec a, Vec b) { return interleaved<First>(a, b, typename Counted<W>::Type()); }
#else
template <int First>
MEGATRON_INLINE Vec interleaved(Vec a, Vec b) {
    Ints from;
    for (int i = 0; i < W; ++i) from[i] = First + i / 2 + (i % 2) * W;
    return __builtin_shuffle(a, b, from);
}
#endif

// A square of W · W numbers, transposed: log W perfect shuffles of its rows.
MEGATRON_INLINE void transpose(Vec (&x)[W]) {
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        Vec y[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            y[2 * i] = interleaved<0>(x[i], x[i + W / 2]);
            y[2 * i + 1] = interleaved<W / 2>(x[i], x[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = y[i];
    }
}

// Rows first … of `from` into lanes: to[h · Wide · W + lane] = scale · from[first + lane][h]. Lanes beyond the last of
// `length` rows repeat it: what they compute is a number like others, and isn't stored.
template <int Wide>
MEGATRON_INLINE void to_lanes(const Rows<const float>& from, std::int64_t first, std::int64_t length, std::int64_t size,
                              float scale, float* to) {
    for (int v = 0; v < Wide; ++v) {
        const float* rows[W];
        for (int r = 0; r < W; ++r) {
            const std::int64_t row = first + v * W + r;
            rows[r] = from.row(row < length ? row : length - 1);
        }
        if (size < W) {
            for (std::int64_t h = 0; h < size; ++h) {
                for (int r = 0; r < W; ++r) to[h * Wide * W + v * W + r] = scale * rows[r][h];
            }
            continue;
        }
        for (std::int64_t h = 0; h < size; h += W) {
            const std::int64_t begin = h + W <= size ? h : size - W;  // the last square overlaps the one before
            Vec x[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) x[r] = load(rows[r] + begin) * scale;
            transpose(x);
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) store(to + (begin + r) * Wide * W + v * W, x[r]);
        }
    }
}

// Lanes back into rows: to[first + lane][h] = factor[lane] · from[h · Wide · W + lane], for rows below `length`.
template <int Wide>
MEGATRON_INLINE void from_lanes(const float* from, const Vec (&factor)[Wide], std::int64_t first, std::int64_t length,
                                std::int64_t size, const Rows<float>& to) {
    for (int v = 0; v < Wide; ++v) {
        const std::int64_t begins = first + v * W;
        const int count = length - begins < W ? static_cast<int>(length - begins) : W;
        if (size < W) {
            for (std::int64_t h = 0; h < size; ++h) {
                for (int r = 0; r < count; ++r) to.row(begins + r)[h] = factor[v][r] * from[h * Wide * W + v * W + r];
            }
            continue;
        }
        for (std::int64_t h = 0; h < size; h += W) {
            const std::int64_t begin = h + W <= size ? h : size - W;
            Vec x[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) x[r] = load(from + (begin + r) * Wide * W + v * W) * factor[v];
            transpose(x);
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) {
                if (r < count) store(to.row(begins + r) + begin, x[r]);
            }
        }
    }
}

// Rows one behind the other, `stride` apart and scaled; columns from `size` on and rows from `length` to `rows` are 0.
MEGATRON_INLINE void pack(const Rows<const float>& from, std::int64_t length, std::int64_t rows, std::int64_t size,
                          std::int64_t stride, float scale, float* to) {
    for (std::int64_t r = 0; r < length; ++r) {
        const float* source = from.row(r);
        float* target = to + r * stride;
        std::int64_t h = 0;
        for (; h + W <= size; h += W) store(target + h, load(source + h) * scale);
        for (; h < size; ++h) target[h] = source[h] * scale;
        for (; h < stride; ++h) target[h] = 0.0f;
    }
    for (std::int64_t i = length * stride; i < rows * stride; ++i) to[i] = 0.0f;
}

MEGATRON_INLINE std::int64_t up_to(std::int64_t multiple, std::int64_t x) { return (x + multiple - 1) / multiple * multiple; }
