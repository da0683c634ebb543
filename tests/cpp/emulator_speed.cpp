// Prints what the emulator costs. Compile with -O2 and run; no test looks at the times.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "emulator.h"

namespace {

__global__ void block_sum(const float* values, unsigned n, float* sums) {
  DK_SHARED(float, partial, 32);
  float sum = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    sum += values[i];
  }
  for (int delta = 16; delta; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
  for (int delta = 16; delta; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void starts_and_ends() {}

__global__ void meets(int times, bool barrier) {
  for (int i = 0; i < times; ++i) {
    if (barrier) {
      __syncthreads();
    } else {
      __shfl_xor_sync(0xffffffffu, i, 1);
    }
  }
}

void measure() {
  using Clock = std::chrono::steady_clock;
  auto seconds = [](auto f) {
    double best = 1e9;
    for (int i = 0; i < 5; ++i) {
      const auto begin = Clock::now();
      f();
      best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
    }
    return best;
  };
  const double starts = seconds([] { DK_LAUNCH(starts_and_ends, 1000, 256, 0, nullptr); });
  std::printf("a thread that does nothing: %.1f ns\n", starts / 256e3 * 1e9);
  for (bool barrier : {false, true}) {
    for (unsigned threads : {32u, 256u, 1024u}) {
      const double time = seconds([&] { DK_LAUNCH(meets, 1, threads, 0, nullptr, 1000, barrier); });
      std::printf("%s of %u threads: %.1f ns a thread, there and back\n",
                  barrier ? "barrier" : "shuffle", threads, time / (1e3 * threads) * 1e9);
    }
  }
  for (unsigned n : {1u << 18, 1u << 20, 1u << 24}) {
    std::vector<float> values(n, 1.0f), sums(8);
    const double time =
        seconds([&] { DK_LAUNCH(block_sum, 8, 256, 0, nullptr, values.data(), n, sums.data()); });
    std::printf("grid-stride sum of %u floats: %.0f Melem/s\n", n, n / time / 1e6);
  }
}

}  // namespace

int main() {
  measure();
}
