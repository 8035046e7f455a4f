// Runs CUDA kernels on the CPU, to see without a GPU what they compute: cuda_on_cpu.py puts this before each source,
// and writes launches as calls of `launch`. A block's threads are fibers that run by turns; one that comes to a barrier
// or a shuffle waits until the block's or the warp's others have come there too. Blocks follow each other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(threads)

struct dim3_on_cpu {
  dim3_on_cpu(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
  unsigned x, y;
};
#define dim3 dim3_on_cpu

inline dim3_on_cpu threadIdx, blockIdx;

namespace on_cpu {

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
};

constexpr unsigned kWarp = 32;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline unsigned current;
inline std::function<void()> body;
inline uint64_t exchanged[1024];

inline void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_body() {
  body();
  wait(State::kDone);
}

inline bool release(unsigned begin, unsigned end, State state) {
  for (unsigned t = begin; t < end; ++t) {
    if (fibers[t].state != state) return false;
  }
  for (unsigned t = begin; t < end; ++t) fibers[t].state = State::kReady;
  return true;
}

inline void run_block(unsigned threads) {
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.state = State::kReady;
    makecontext(&fiber.context, run_body, 0);
  }
  for (;;) {
    unsigned done = 0;
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].state == State::kReady) {
        current = threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t].context);
      }
      done += fibers[t].state == State::kDone;
    }
    if (done == threads) return;
    bool released = release(0, threads, State::kAtBarrier);
    for (unsigned t = 0; t < threads; t += kWarp) released = release(t, t + kWarp, State::kAtShuffle) || released;
    if (!released) {
      std::fputs("threads of a block wait at different places\n", stderr);
      std::abort();
    }
  }
}

template <typename Kernel>
auto launch(Kernel kernel, dim3_on_cpu grid, unsigned threads, int, cudaStream_t) {
  return [=](auto... arguments) {
    body = [=] { kernel(arguments...); };
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
    }
  };
}

inline cudaError_t last_error() { return cudaSuccess; }
inline const char* error_string(cudaError_t) { return ""; }

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::wait(on_cpu::State::kAtBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  const unsigned me = on_cpu::current;
  std::memcpy(&on_cpu::exchanged[me], &value, sizeof(T));
  on_cpu::wait(on_cpu::State::kAtShuffle);
  std::memcpy(&value, &on_cpu::exchanged[me ^ static_cast<unsigned>(offset)], sizeof(T));
  on_cpu::wait(on_cpu::State::kAtShuffle);
  return value;
}

#define cudaGetLastError on_cpu::last_error
#define cudaGetErrorString on_cpu::error_string
