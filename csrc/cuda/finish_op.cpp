// The op between the two passes: its arguments brought to the device, its counter, its launch.
#include "finish_op.h"

#include <map>
#include <mutex>
#include <unordered_map>

#include "finish.h"
#include "torch_cuda.h"

namespace dicekernels {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;

// An argument with a fixed number of values, read by the kernel in its own dtype. One that lies on
// the CPU is copied, which waits for the device: weights belong where the logits are.
struct Values {
  View view;
  Tensor held;  // what the view points into
  Values(const std::optional<Tensor>& tensor, int64_t expected, const char* name,
         const Tensor& sums) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->numel() == expected, name, ": got ", tensor->numel(),
                    " values, expected ", expected);
    if (!tensor->is_cpu()) check_device(*tensor, name, sums.device());
    held = is_on(*tensor, sums.device()) ? *tensor : torch::stable::to(*tensor, sums.device());
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
  Factor(const std::optional<Tensor>& tensor, const char* name, const Tensor& sums) {
    if (tensor && tensor->dim() == 0 && tensor->is_cpu()) {
      const Tensor number = torch::stable::to(*tensor, ScalarType::Double);
      value = *static_cast<const double*>(number.const_data_ptr());
      return;
    }
    const Values values(tensor, 1, name, sums);
    view = values.view;
    held = values.held;
  }
};

DType loss_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "dtype: expected float64, float32, float16 or bfloat16");
  }
  return DType::f64;
}

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

}  // namespace

std::tuple<Tensor, Tensor> finish_op(
    const Tensor& sums, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pos_weight, const std::optional<Tensor>& neg_weight,
    const std::optional<Tensor>& region_lambda, const std::optional<Tensor>& voxel_lambda,
    int64_t rows, int64_t formula, double kappa, double alpha, double beta, double smooth_nr,
    double smooth_dr, int64_t transform, double exponent, int64_t gdl_weight, int64_t skipped,
    bool batch, int64_t reduction, double label_smoothing, int64_t denominator,
    int64_t voxel_skipped, bool empty, ScalarType dtype) {
  check_device(sums, "sums", kDevice);
  const int32_t device = sums.get_device_index();
  const DeviceGuard guard(device);
  const int64_t samples = sums.size(0), classes = sums.size(2), width = row_count(rows);
  STD_TORCH_CHECK(sums.size(3) == width, "sums: got ", sums.size(3), " rows, expected ", width);
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double, "sums: got ",
                  torch::headeronly::toString(sums.scalar_type()), ", expected float64");
  const Tensor slots = sums.is_contiguous() ? sums : torch::stable::contiguous(sums);
  const Values class_weights(class_weight, classes - skipped, "class_weight", sums);
  const Values pos_weights(pos_weight, classes, "pos_weight", sums);
  const Values neg_weights(neg_weight, classes, "neg_weight", sums);
  const Factor region(region_lambda, "region_lambda", sums);
  const Factor voxel(voxel_lambda, "voxel_lambda", sums);

  FinishLaunch launch;
  FinishSpec& f = launch.spec;
  f.rows = rows;
  f.formula = static_cast<Formula>(formula);
  f.kappa = kappa;
  f.alpha = alpha;
  f.beta = beta;
  f.smooth_nr = smooth_nr;
  f.smooth_dr = smooth_dr;
  f.transform = static_cast<Transform>(transform);
  f.exponent = exponent;
  f.gdl_weight = static_cast<GdlWeight>(gdl_weight);
  f.skipped = skipped;
  f.batch = batch;
  f.reduction = static_cast<Reduction>(reduction);
  f.label_smoothing = label_smoothing;
  f.denominator = static_cast<Denominator>(denominator);
  f.voxel_skipped = voxel_skipped;
  f.empty = empty;
  launch.samples = samples;
  launch.chunks = sums.size(1);
  launch.classes = classes;
  launch.sums = static_cast<const double*>(slots.const_data_ptr());
  launch.class_weight = class_weights.view;
  launch.pos_weight = pos_weights.view;
  launch.neg_weight = neg_weights.view;
  launch.region_lambda = region.view;
  launch.voxel_lambda = voxel.view;
  launch.region_value = region.value;
  launch.voxel_value = voxel.value;
  launch.loss_dtype = loss_dtype(dtype);

  Tensor loss = f.reduction == Reduction::none
                    ? torch::stable::new_empty(sums, {f.groups(samples), f.outputs(classes)}, dtype)
                    : torch::stable::new_empty(sums, {}, dtype);
  Tensor coef = torch::stable::new_empty(sums, {samples, classes, width});
  Tensor scratch = torch::stable::new_empty(sums, {finish_scratch(f, samples, classes)});
  launch.loss = loss.mutable_data_ptr();
  launch.coef = static_cast<double*>(coef.mutable_data_ptr());
  launch.scratch = static_cast<double*>(scratch.mutable_data_ptr());

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
  return {loss, coef};
}

}  // namespace cuda
}  // namespace dicekernels
