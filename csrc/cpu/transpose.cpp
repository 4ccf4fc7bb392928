#include "transpose.h"

#include "instructions.h"
#include "threads.h"

namespace megatron_plm {

void transpose(const Matrix& from, float* to, float* sums, int threads) {
    struct Context {
        const Kernels& kernels;
        const Matrix& from;
        float *to, *sums;
    } context{kernels(), from, to, sums};
    const auto run = [](void* pointer, std::int64_t task) {
        const Context& c = *static_cast<const Context*>(pointer);
        c.kernels.transpose_columns(c.from, task * COLUMNS_OF_A_TASK, c.to, c.sums);
    };
    share_out((from.columns + COLUMNS_OF_A_TASK - 1) / COLUMNS_OF_A_TASK, threads, run, &context);
}

}  // namespace megatron_plm
