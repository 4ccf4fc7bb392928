// A matrix with rows and columns exchanged, and the sums of its columns in the same pass, in float32 on a CPU.

#pragma once

#include <cstdint>

namespace megatron_plm {

// [rows, columns], without gaps.
struct Matrix {
    const float* data;
    std::int64_t rows, columns;
};

// `to` is [columns, rows], `sums` [columns], over the rows, or null. Bitwise the same for any number of threads.
void transpose(const Matrix& from, float* to, float* sums, int threads);

// Columns `first` … of one task, at most.
constexpr std::int64_t COLUMNS_OF_A_TASK = 64;

}  // namespace megatron_plm
