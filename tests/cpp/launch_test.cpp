// What surrounds a launch: shared memory that is asked for, and the device that is current.
#include <string>

#include "cuda/fast_launch.cuh"
#include "cuda/torch_cuda.h"
#include "named_checks.h"

namespace {

using dicekernels::cuda::allow_shared;
using dicekernels::cuda::check_launch;
using dicekernels::cuda::DeviceGuard;

constexpr int kTooMuch = 228 << 10, kEnough = 99 << 10;

__global__ void touches(int bytes, int* runs) {
  DK_DYNAMIC_SHARED(memory);
  memory[bytes - 1] = 1;
  ++*runs;
}

CHECK(shared_memory_that_is_refused_is_asked_for_again) {
  int runs = 0;
  EXPECT(!allow_shared(touches, kTooMuch));
  const std::string refused = message_of([] { check_launch("touches"); });
  EXPECT(contains(refused, "touches: CUDA error: invalid argument"));
  EXPECT(allow_shared(touches, kEnough));
  DK_LAUNCH(touches, 1, 1, kEnough, nullptr, kEnough, &runs);
  check_launch("touches");
  EXPECT_EQUAL(runs, 1);
}

CHECK(shared_memory_is_never_lowered) {
  int runs = 0;
  EXPECT(allow_shared(touches, kEnough));
  EXPECT(allow_shared(touches, 50 << 10));
  DK_LAUNCH(touches, 1, 1, kEnough, nullptr, kEnough, &runs);
  check_launch("touches");
  EXPECT_EQUAL(runs, 1);
}

CHECK(a_device_that_does_not_come_back_blames_no_kernel) {
  int device = -1;
  EXPECT_EQUAL(cudaSetDevice(3), cudaSuccess);
  {
    const DeviceGuard guard(5);
    cudaGetDevice(&device);
    EXPECT_EQUAL(device, 5);
  }
  cudaGetDevice(&device);
  EXPECT_EQUAL(device, 3);
  emulator::current_device = kRefusedDevice;
  {
    const DeviceGuard guard(5);
  }
  check_launch("a kernel that did not run");
}

CHECK(a_device_that_does_not_become_current_is_an_error) {
  const std::string message = message_of([] { const DeviceGuard guard(kRefusedDevice); });
  EXPECT(contains(message, "cudaSetDevice: CUDA error: invalid argument"));
  EXPECT_EQUAL(cudaGetLastError(), cudaSuccess);
}

}  // namespace

int main(int argc, char** argv) {
  return run_check(argc, argv);
}
