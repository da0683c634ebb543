// The ops on tensors of a GPU: checked, allocated, launched on the current stream. Nothing here
// waits for the device. Schemas with shapes: dicekernels/ops.py.
#include "../common/ops.h"

#if !defined(DK_EMULATED)
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>

#include "finish.h"
#include "launch.h"
#include "torch_cuda.h"

namespace dicekernels {
namespace cuda {
namespace {

Tensor sums(DK_SUMS_PARAMETERS) {
  check_device(logits, "logits", kDevice);
  const DeviceGuard guard(logits.get_device_index());
  const Inputs in = inputs_of(logits, target, mask, {DK_SUMS_NUMBERS(DK_VALUE)});
  const Problem& p = in.problem;
  Tensor slots = torch::stable::new_empty(
      logits, {p.batch, chunk_count(p.voxels), p.classes, row_count(rows)}, ScalarType::Double);
  launch_sums(p, static_cast<double*>(slots.mutable_data_ptr()),
              current_stream(logits.get_device_index()));
  check_launch("sums");
  return slots;
}

Tensor sums_backward(DK_SUMS_BACKWARD_PARAMETERS) {
  check_device(logits, "logits", kDevice);
  const DeviceGuard guard(logits.get_device_index());
  const Inputs in = inputs_of(logits, target, mask, {DK_SUMS_NUMBERS(DK_VALUE)});
  const Tensor slopes = slopes_of(coef, logits, in.problem);
  check_device(grad_loss, "grad_loss", logits.device());
  const Grad grad = grad_loss ? grad_of(*grad_loss, in.problem) : Grad();
  return gradient_like(logits, [&](const View& out) {
    launch_sums_backward(in.problem, data_of(slopes), grad, out,
                         current_stream(logits.get_device_index()));
    check_launch("sums_backward");
  });
}

// An optional argument with a fixed number of values, read by the kernel in its own dtype.
struct Values {
  View view;
  Tensor held;  // what the view points into
  Values(OptionalTensor tensor, int64_t expected, const char* name, const Tensor& sums) {
    if (!tensor) return;
    held = *values_of(tensor, expected, name, sums);
    std::optional<int64_t> stride = flat_stride(held, 0);
    if (!stride) {
      held = torch::stable::contiguous(held);
      stride = 1;
    }
    view.data = held.const_data_ptr();
    view.dtype = dtype_of(held, name);
    view.voxel = *stride;
  }
};

// A factor: a number on the CPU is at hand and travels with the launch; one on the device, which a
// captured graph can change between replays, is read there.
struct Factor {
  double value = 1;
  View view;
  Tensor held;
  Factor(OptionalTensor tensor, const char* name, const Tensor& sums) {
    if (tensor && tensor->dim() == 0 && tensor->is_cpu()) {
      value = *data_of(doubles(*tensor));
      return;
    }
    const Values values(tensor, 1, name, sums);
    view = values.view;
    held = values.held;
  }
};

// Which of the kernel's counters a launch on this stream uses, -1 if none is left. The last block
// of a launch finds its counter as zero as the first one did, so launches that follow each other on
// a stream share one, without a launch to clear it. Launches that may run at the same time do not:
// each stream has its own, by its id, which unlike the handle is never given to another stream. A
// captured launch has one that nobody else ever gets, as its graph may be replayed on any stream,
// beside launches on the one that it was captured on. Nobody tells when a graph is destroyed, so
// the ticket never comes back; after kTickets of them a counter is allocated for each launch. All
// executables of one captured graph have its ticket: two of them must not run at the same time.
int next_ticket(int32_t device, cudaStream_t stream) {
#if defined(DK_EMULATED)
  (void)device, (void)stream;
  return -1;  // any threads of the CPU may be in the kernel at the same time
#else
  struct Tickets {
    int taken = 0;
    std::unordered_map<unsigned long long, int> of_stream;
  };
  static std::mutex mutex;
  static auto& devices = *new std::map<int32_t, Tickets>;  // outlives threads that end after main()
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "finish: cudaStreamIsCapturing");
  const bool captured = status != cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (!captured) check_cuda(cudaStreamGetId(stream, &id), "finish: cudaStreamGetId");
  const std::lock_guard<std::mutex> lock(mutex);
  Tickets& tickets = devices[device];
  if (!captured) {
    const auto found = tickets.of_stream.find(id);
    if (found != tickets.of_stream.end()) return found->second;
  }
  if (tickets.taken == kTickets) return -1;
  if (!captured) tickets.of_stream[id] = tickets.taken;
  return tickets.taken++;
#endif
}

std::tuple<Tensor, Tensor> finish_op(DK_FINISH_PARAMETERS) {
  check_device(sums, "sums", kDevice);
  const int32_t device = sums.get_device_index();
  const DeviceGuard guard(device);
  FinishInputs in = finish_inputs_of(sums, dtype, {DK_FINISH_NUMBERS(DK_VALUE)});
  const Values class_weights(class_weight, in.classes - skipped, "class_weight", sums);
  const Values pos_weights(pos_weight, in.classes, "pos_weight", sums);
  const Values neg_weights(neg_weight, in.classes, "neg_weight", sums);
  const Factor region(region_lambda, "region_lambda", sums);
  const Factor voxel(voxel_lambda, "voxel_lambda", sums);
  Tensor scratch =
      torch::stable::new_empty(sums, {finish_scratch(in.spec, in.samples, in.classes)});

  FinishLaunch launch;
  launch.spec = in.spec;
  launch.samples = in.samples;
  launch.chunks = in.chunks;
  launch.classes = in.classes;
  launch.sums = data_of(in.slots);
  launch.class_weight = class_weights.view;
  launch.pos_weight = pos_weights.view;
  launch.neg_weight = neg_weights.view;
  launch.region_lambda = region.view;
  launch.voxel_lambda = voxel.view;
  launch.region_value = region.value;
  launch.voxel_value = voxel.value;
  launch.scratch = static_cast<double*>(scratch.mutable_data_ptr());
  launch.loss = in.loss.mutable_data_ptr();
  launch.loss_dtype = in.loss_dtype;
  launch.coef = static_cast<double*>(in.coef.mutable_data_ptr());

  const cudaStream_t stream = current_stream(device);
  launch.ticket = next_ticket(device, stream);
  Tensor counter;
  if (launch.ticket < 0) {
    // Cleared on the stream, and by the graph if there is one.
    counter = torch::stable::new_zeros(sums, {1}, ScalarType::Int);
    launch.own_ticket = static_cast<unsigned*>(counter.mutable_data_ptr());
  }
  launch_finish(launch, stream);
  check_launch("finish");
  return {in.loss, in.coef};
}

#if !defined(DK_EMULATED)
// What the library was compiled for, as CMake lists it.
std::string architectures() {
  return DK_ARCHITECTURES;
}

// "" or why no kernel can run here, whatever the GPU is.
std::string obstacle() {
  // Asked of the driver itself: the runtime would initialise it for that, and a process that
  // imports this package could neither fork nor choose its GPUs any more.
  int driver = 0;
  if (void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL))
    if (void* symbol = dlsym(library, "cuDriverGetVersion"))
      reinterpret_cast<int (*)(int*)>(symbol)(&driver);
  // A driver runs what was built with any toolkit of its own major version or an older one.
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  return "the library was built with CUDA " + std::to_string(CUDART_VERSION / 1000) +
         ", the driver here supports CUDA " + std::to_string(driver / 1000) +
         "; update the driver, or build with an older toolkit";
}

#endif

}  // namespace
}  // namespace cuda
}  // namespace dicekernels

#if defined(DK_EMULATED)
#define DK_NAMESPACE dicekernels_emulated
#define DK_KEY CPU
#else
#define DK_NAMESPACE dicekernels
#define DK_KEY CUDA

STABLE_TORCH_LIBRARY_FRAGMENT(dicekernels, m) {
  m.def("cuda_architectures() -> str");
  m.def("cuda_obstacle() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dicekernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&dicekernels::cuda::architectures));
  m.impl("cuda_obstacle", TORCH_BOX(&dicekernels::cuda::obstacle));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(DK_NAMESPACE, DK_KEY, m) {
  m.impl("sums", TORCH_BOX(&dicekernels::cuda::sums));
  m.impl("finish", TORCH_BOX(&dicekernels::cuda::finish_op));
  m.impl("sums_backward", TORCH_BOX(&dicekernels::cuda::sums_backward));
}
