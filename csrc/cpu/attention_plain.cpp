// The attention kernels with the instructions that every machine of a kind has: SSE2, NEON.

#include "attention.h"

#define LANES 4
#define TILE_ROWS 4

namespace megatron_plm {

namespace {

#include "lanes.h"

#include "attention_kernel.h"

}  // namespace

const Kernels kPlain{&forward, &backward};

}  // namespace megatron_plm
