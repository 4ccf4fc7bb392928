#include "transpose.h"

#include "instructions.h"
#include "threads.h"

namespace megatron_plm {

void transpose(const Matrix& from, float* to, float* sums, int threads) {
    const Kernels& chosen = kernels();
    share_out((from.columns + COLUMNS_OF_A_TASK - 1) / COLUMNS_OF_A_TASK, threads, [&](std::int64_t task) {
        chosen.transpose_columns(from, task * COLUMNS_OF_A_TASK, to, sums);
    });
}

}  // namespace megatron_plm
