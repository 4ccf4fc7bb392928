// The kernels with the instructions that every machine of a kind has: SSE2, NEON.

#include "instructions.h"

#define LANES 4
#define TILE_ROWS 4

namespace megatron_plm {

namespace {

#include "lanes.h"

#include "attention_kernel.h"
#include "transpose_kernel.h"

}  // namespace

const Kernels kPlain{&forward, &backward, &transpose_columns};

}  // namespace megatron_plm
