// The kernels for the CPU, on memory that ends where the tensors end: attention, with every set of instructions that this
// machine has, against softmax written out in double, and exchanging rows and columns; rotation, against turning back.
// Prints the sets; 1 where one is wrong.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "attention.h"
#include "instructions.h"
#include "rotary.h"

using namespace megatron_plm;

namespace {

using Numbers = std::vector<float>;

// Output and gradients of one sequence and head: out, dq, dk, dv, each [length, size].
std::vector<std::vector<double>> expected(const Head& head, const Numbers& q, const Numbers& k, const Numbers& v,
                                          const Numbers& dout) {
    const std::int64_t L = head.length, H = head.size;
    std::vector<std::vector<double>> found(4, std::vector<double>(L * H));
    for (std::int64_t i = 0; i < L; ++i) {
        const std::int64_t seen = head.causal ? i + 1 : L;
        std::vector<double> weight(seen), dweight(seen);
        double largest = -INFINITY, sum = 0, mean = 0;
        for (std::int64_t j = 0; j < seen; ++j) {
            for (std::int64_t h = 0; h < H; ++h) weight[j] += double(q[i * H + h]) * k[j * H + h] * head.scale;
            largest = std::max(largest, weight[j]);
        }
        for (double& w : weight) sum += w = std::exp(w - largest);
        for (std::int64_t j = 0; j < seen; ++j) {
            weight[j] /= sum;
            for (std::int64_t h = 0; h < H; ++h) {
                found[0][i * H + h] += weight[j] * v[j * H + h];
                dweight[j] += double(dout[i * H + h]) * v[j * H + h];
                found[3][j * H + h] += weight[j] * dout[i * H + h];
            }
            mean += weight[j] * dweight[j];
        }
        for (std::int64_t j = 0; j < seen; ++j) {
            const double dscore = weight[j] * (dweight[j] - mean) * head.scale;
            for (std::int64_t h = 0; h < H; ++h) {
                found[1][i * H + h] += dscore * k[j * H + h];
                found[2][j * H + h] += dscore * q[i * H + h];
            }
        }
    }
    return found;
}

bool right(const Kernels& kernels, const Head& head) {
    const std::int64_t L = head.length, H = head.size;
    std::mt19937 random(static_cast<unsigned>(L * 131 + H));
    std::normal_distribution<float> normal;
    std::vector<Numbers> given(4, Numbers(L * H)), found(4, Numbers(L * H));
    for (Numbers& numbers : given) std::generate(numbers.begin(), numbers.end(), [&] { return normal(random); });
    Numbers maxima(L), sums(L);
    const auto in = [H](const Numbers& x) { return Rows<const float>{x.data(), H}; };
    const auto to = [H](Numbers& x) { return Rows<float>{x.data(), H}; };
    kernels.attend(head, {in(given[0]), in(given[1]), in(given[2]), to(found[0]), maxima.data(), sums.data()});
    kernels.attend_backward(head, {in(given[0]), in(given[1]), in(given[2]), in(found[0]), in(given[3]), maxima.data(),
                            sums.data(), to(found[1]), to(found[2]), to(found[3])});
    const auto wanted = expected(head, given[0], given[1], given[2], given[3]);
    for (std::size_t tensor = 0; tensor < 4; ++tensor) {
        double largest = 1;  // of what is added up: the gradients of few tokens are small differences of it
        for (double x : wanted[tensor]) largest = std::max(largest, std::fabs(x));
        for (std::int64_t i = 0; i < L * H; ++i) {
            if (std::fabs(found[tensor][i] - wanted[tensor][i]) <= 1e-5 * largest) continue;
            std::printf("tensor %zu, length %d, head size %d, causal %d, number %d: %g, not %g\n", tensor, int(L), int(H),
                        head.causal, int(i), found[tensor][i], wanted[tensor][i]);
            return false;
        }
    }
    return true;
}

bool exchanges(const Kernels& kernels, std::int64_t rows, std::int64_t columns) {
    Numbers given(static_cast<std::size_t>(rows * columns)), found(given.size()), sums(static_cast<std::size_t>(columns));
    for (std::size_t i = 0; i < given.size(); ++i) given[i] = static_cast<float>(i % 1000) - 300.0f;
    const Matrix matrix{given.data(), rows, columns};
    for (std::int64_t first = 0; first < columns; first += COLUMNS_OF_A_TASK) {
        kernels.transpose_columns(matrix, first, found.data(), sums.data());
    }
    for (std::int64_t c = 0; c < columns; ++c) {
        double sum = 0;
        for (std::int64_t r = 0; r < rows; ++r) {
            sum += given[r * columns + c];
            if (found[c * rows + r] == given[r * columns + c]) continue;
            std::printf("%d rows, %d columns: row %d, column %d is another\n", int(rows), int(columns), int(r), int(c));
            return false;
        }
        if (sums[c] != sum) {  // whole numbers, which float adds up exactly
            std::printf("%d rows, %d columns: sum %d is %g, not %g\n", int(rows), int(columns), int(c), sums[c], sum);
            return false;
        }
    }
    return true;
}

bool right(const char* name, const Kernels& kernels) {
    for (int rows : {0, 1, 15, 16, 17, 127, 128, 129, 300}) {
        for (int columns : {1, 3, 16, 63, 64, 65, 130}) {
            if (!exchanges(kernels, rows, columns)) return false;
        }
    }
    for (int size : {1, 3, 4, 7, 8, 12, 16, 20, 24, 32, 40, 64}) {
        for (int length : {1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 130}) {
            for (bool causal : {false, true}) {
                if (!right(kernels, {length, size, 1 / std::sqrt(float(size)), causal})) return false;
            }
        }
    }
    std::printf("%s\n", name);
    return true;
}

// A rotation is undone by its transpose, which the backward pass is.
bool turns_back(std::int64_t tokens, std::int64_t heads, std::int64_t size) {
    const std::size_t each = static_cast<std::size_t>(tokens * heads * size);
    std::mt19937 random(static_cast<unsigned>(tokens));
    std::normal_distribution<float> normal;
    Numbers qkv(3 * each), bias(static_cast<std::size_t>(3 * heads * size)), q(each), k(each), v(each), back(3 * each);
    for (Numbers* numbers : {&qkv, &bias}) std::generate(numbers->begin(), numbers->end(), [&] { return normal(random); });
    Numbers cosines, sines;
    for (std::int64_t i = 0; i < tokens * size; ++i) {
        const float angle = static_cast<float>(i / size) / static_cast<float>(1 + i % (size / 2));
        cosines.push_back(std::cos(angle)), sines.push_back(std::sin(angle));
    }
    const Turn turn{tokens, heads, size, cosines.data(), sines.data()};
    rotate(turn, qkv.data(), bias.data(), q.data(), k.data(), v.data(), 2);
    rotate_backward(turn, q.data(), k.data(), v.data(), back.data(), 2);
    for (std::size_t i = 0; i < back.size(); ++i) {
        const float wanted = qkv[i] + bias[i % bias.size()];
        if (std::fabs(back[i] - wanted) > 1e-5f * (1 + std::fabs(wanted))) {
            std::printf("turned back, number %d: %g, not %g\n", int(i), back[i], wanted);
            return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    bool all = right("plain", kPlain);
    for (int size : {2, 6, 16, 24, 64}) {
        for (int tokens : {0, 1, 32, 33, 100}) all = turns_back(tokens, 3, size) && all;
    }
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all = right("AVX2", kAvx2) && all;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        all = right("AVX-512", kAvx512) && all;
    }
#endif
    return all ? 0 : 1;
}
