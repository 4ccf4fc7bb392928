// Some columns of a matrix as rows; included by instructions_*.cpp behind lanes.h, for each set of instructions.

constexpr std::int64_t ROWS_OF_A_SUM = 128;  // added up by themselves first: the sum of all has few roundings

void transpose_columns(const Matrix& from, std::int64_t first, float* to, float* sums) {
    const std::int64_t rows = from.rows, stride = from.columns;
    const std::int64_t left = stride - first, count = left < COLUMNS_OF_A_TASK ? left : COLUMNS_OF_A_TASK;
    const std::int64_t squares = count / W;
    float total[COLUMNS_OF_A_TASK] = {};
    for (std::int64_t begin = 0; begin < rows; begin += ROWS_OF_A_SUM) {
        const std::int64_t end = begin + ROWS_OF_A_SUM < rows ? begin + ROWS_OF_A_SUM : rows;
        float part[COLUMNS_OF_A_TASK] = {};
        std::int64_t row = begin;
        for (; row + W <= end; row += W) {
            for (std::int64_t square = 0; square < squares; ++square) {
                const float* source = from.data + row * stride + first + square * W;
                Vec x[W], sum = load(part + square * W);
#pragma GCC unroll 16
                for (int r = 0; r < W; ++r) {
                    x[r] = load(source + r * stride);
                    sum += x[r];
                }
                store(part + square * W, sum);
                transpose(x);
#pragma GCC unroll 16
                for (int c = 0; c < W; ++c) store(to + (first + square * W + c) * rows + row, x[c]);
            }
        }
        // The rows and columns that fill no square.
        for (std::int64_t r = begin; r < end; ++r) {
            for (std::int64_t c = r < row ? squares * W : 0; c < count; ++c) {
                const float x = from.data[r * stride + first + c];
                part[c] += x;
                to[(first + c) * rows + r] = x;
            }
        }
        for (std::int64_t c = 0; c < count; ++c) total[c] += part[c];
    }
    for (std::int64_t c = 0; sums && c < count; ++c) sums[first + c] = total[c];
}
