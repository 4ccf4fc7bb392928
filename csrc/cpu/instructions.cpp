#include "instructions.h"

namespace megatron_plm {

const Kernels& kernels() {
#if defined(__x86_64__)
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx512) return kAvx512;
    if (avx2) return kAvx2;
#endif
    return kPlain;
}

const char* instructions() {
    const Kernels* chosen = &kernels();
#if defined(__x86_64__)
    if (chosen == &kAvx512) return "AVX-512";
    if (chosen == &kAvx2) return "AVX2";
#endif
    return chosen == &kPlain ? "plain" : "";
}

}  // namespace megatron_plm
