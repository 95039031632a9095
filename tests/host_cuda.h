// Stands in for CUDA, so that csrc/fused_cuda.cu runs on the CPU, where the sanitizers see it: a
// thread for each of a block's threads, barriers for __syncthreads and __syncwarp, the grid as a
// loop. Include it before that file, with FUSED_LAUNCH_PROVIDED.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define FUSED_THREADS 64
#define FUSED_SHARED(name) unsigned char* const name = host_cuda::shared

namespace host_cuda {

struct Index {
  unsigned x;
};
inline thread_local Index thread, block;
inline Index grid;
inline unsigned char* shared;
inline pthread_barrier_t barrier, warp_barriers[FUSED_THREADS / 32];

}  // namespace host_cuda

#define threadIdx host_cuda::thread
#define blockIdx host_cuda::block
#define gridDim host_cuda::grid
inline void __syncthreads() { pthread_barrier_wait(&host_cuda::barrier); }
inline void __syncwarp() { pthread_barrier_wait(&host_cuda::warp_barriers[threadIdx.x / 32]); }

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  }
  return result;
}

namespace fused {
namespace {

using std::max;
using std::min;

class Launch {
 public:
  explicit Launch(int32_t) {}
  int processors() const { return 1; }

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), int64_t blocks, size_t shared, Arguments... arguments) {
    if (shared > 48 * 1024) std::abort();  // a GPU does not launch it
    host_cuda::grid.x = static_cast<unsigned>(blocks);
    pthread_barrier_init(&host_cuda::barrier, nullptr, FUSED_THREADS);
    for (auto& barrier : host_cuda::warp_barriers) pthread_barrier_init(&barrier, nullptr, 32);
    // of the exact size, for AddressSanitizer; aligned as shared memory is
    std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(16, (shared + 15) / 16 * 16),
                                                  std::free);
    host_cuda::shared = static_cast<unsigned char*>(memory.get());
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < FUSED_THREADS; ++t) {
      threads.emplace_back([=] {
        host_cuda::thread.x = t;
        for (unsigned b = 0; b < host_cuda::grid.x; ++b) {
          host_cuda::block.x = b;
          if (t == 0 && shared) std::memset(host_cuda::shared, 0xff, shared);  // NaN
          __syncthreads();
          kernel(arguments...);
          __syncthreads();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&host_cuda::barrier);
    for (auto& barrier : host_cuda::warp_barriers) pthread_barrier_destroy(&barrier);
  }
};

}  // namespace
}  // namespace fused
