// Torch's current stream and device, and errors of a launch as exceptions of torch.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "device.h"
#if !defined(DK_EMULATED)
#include <dlfcn.h>
#endif

namespace dicekernels {
namespace cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed
  STD_TORCH_CHECK(false, what, ": CUDA error: ", cudaGetErrorString(error));
}

// After the launch of `kernel`: what can be known without waiting for it.
inline void check_launch(const char* kernel) {
  check_cuda(cudaGetLastError(), kernel);
}

#if defined(DK_EMULATED)

// What the kernels' tensors are on.
constexpr auto kDevice = torch::headeronly::kCPU;

inline cudaStream_t current_stream(int32_t) {
  return nullptr;
}

#else

constexpr auto kDevice = torch::headeronly::kCUDA;

// The one function of libtorch_cuda that is needed. Torch loads its libraries RTLD_LOCAL, so that
// neither linking nor a weak symbol finds it in every build of torch; by name it is always found,
// and this library also loads where torch has no CUDA.
inline cudaStream_t current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY | RTLD_LOCAL);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function != nullptr,
                  "this PyTorch has no CUDA support; install a build of torch with CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "no current stream on cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

#endif

// Makes `device` current for as long as it lives. It asks the runtime that this library is linked
// with, since that one launches; torch's own notion of the device may be set lazily.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == device) return;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    switched_ = true;
  }
  ~DeviceGuard() {
    // A destructor cannot throw. An error that stays would be taken for one of the next launch.
    if (switched_ && cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool switched_ = false;
};

}  // namespace cuda
}  // namespace dicekernels
