// As much of CUDA as the kernels use, on the host: a block at a time, a thread for each of its threads.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // of the one block that runs
#define __launch_bounds__(...)
#define __restrict__
#define DYNAMIC_SHARED(name) float* const name = emulated::dynamic_shared

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulated {

inline float dynamic_shared[1 << 15], exchanged[1024];
inline std::unique_ptr<std::barrier<>> block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline thread_local unsigned number;

template <class Kernel>
void launch(dim3 grid, dim3 threads, Kernel kernel) {
  gridDim = grid;
  blockDim = threads;
  const unsigned count = threads.x * threads.y;
  for (unsigned at = 0; at < grid.x * grid.y; ++at) {
    block = std::make_unique<std::barrier<>>(count);
    warps.clear();
    for (unsigned warp = 0; warp < count / 32; ++warp) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < count; ++thread) {
      running.emplace_back([=] {
        number = thread;
        threadIdx = {thread % threads.x, thread / threads.x, 0};
        blockIdx = {at % grid.x, at / grid.x, 0};
        kernel();
        block->arrive_and_drop();  // one that has ended keeps nobody waiting
        warps[thread / 32]->arrive_and_drop();
      });
    }
    for (std::thread& each : running) each.join();
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::block->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  std::barrier<>& warp = *emulated::warps[emulated::number / 32];
  emulated::exchanged[emulated::number] = value;
  warp.arrive_and_wait();
  const float other = emulated::exchanged[emulated::number ^ static_cast<unsigned>(mask)];
  warp.arrive_and_wait();
  return other;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
