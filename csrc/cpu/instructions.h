// The sets of instructions that kernels are compiled for, each in a file instructions_*.cpp, and this machine's best.

#pragma once

#include "attention.h"
#include "transpose.h"

namespace megatron_plm {

struct Kernels {
    void (*attend)(const Head&, const HeadForward&);
    void (*attend_backward)(const Head&, const HeadBackward&);
    void (*transpose_columns)(const Matrix&, std::int64_t first, float* to, float* sums);
};

#if defined(__x86_64__)
extern const Kernels kAvx512;
extern const Kernels kAvx2;
#endif
extern const Kernels kPlain;

const Kernels& kernels();

// Which they are: "AVX-512", "AVX2", or "plain" for what every machine has.
const char* instructions();

}  // namespace megatron_plm
