// The ops on CPU tensors: checked, allocated, cut into chunks for torch's own thread pool. Schemas
// with shapes: dicekernels/ops.py.
#include "../common/ops.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace dicekernels {
namespace {

using torch::headeronly::kCPU;

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// Kept from call to call: fresh pages cost more than the small tiles that they hold.
char* workspace(int64_t bytes) {
  thread_local std::unique_ptr<char, Free> buffer;
  thread_local int64_t size = 0;
  if (size < bytes) {
    size = 0;
    buffer.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    STD_TORCH_CHECK(buffer != nullptr, "out of memory for ", bytes, " bytes of workspace");
    size = bytes;
  }
  return buffer.get();
}

// Runs chunk(sample, k, first voxel, voxel count) for every chunk, in any order.
template <class F>
void each_chunk(const Problem& p, F chunk) {
  const int64_t chunks = chunk_count(p.voxels), size = chunk_voxels(p.voxels);
  torch::stable::parallel_for(0, p.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task % chunks, first = k * size, left = p.voxels - first;
      chunk(task / chunks, k, first, left < size ? left : size);
    }
  });
}

void check_labels(const Problem& p, const std::vector<BadLabels>& chunks) {
  BadLabels all;
  for (const BadLabels& bad : chunks) {
    if (bad.count == 0) continue;
    const int64_t count = all.count + bad.count;
    if (all.count == 0) all = bad;
    all.count = count;
  }
  if (all.count == 0) return;
  const bool integral = all.label == std::floor(all.label) && std::fabs(all.label) < 9e18;
  const std::string label =
      integral ? std::to_string(static_cast<int64_t>(all.label)) : std::to_string(all.label);
  STD_TORCH_CHECK(false, "target: ", all.count, " of ", p.batch * p.voxels,
                  " voxels hold a label outside [0, ", p.classes, "), the first is ", label,
                  " (sample ", all.sample, ", voxel ", all.voxel, "). Expected labels 0 to ",
                  p.classes - 1, " for logits with ", p.classes,
                  " channels: remap the labels, give the network more channels, or ",
                  integral ? "pass ignore_index=" + label + " to leave these voxels out"
                           : "leave these voxels out by a mask");
}

Tensor sums(DK_SUMS_PARAMETERS) {
  check_device(logits, "logits", kCPU);
  const Inputs in = inputs_of(logits, target, mask, {DK_SUMS_NUMBERS(DK_VALUE)});
  const Problem& p = in.problem;
  const int64_t chunks = chunk_count(p.voxels), width = p.classes * row_count(rows);
  Tensor out = torch::stable::new_empty(logits, {p.batch, chunks, p.classes, row_count(rows)},
                                        ScalarType::Double);
  double* slots = static_cast<double*>(out.mutable_data_ptr());
  std::vector<BadLabels> bad(p.batch * chunks);
  const Kernels& run = kernels();
  const int64_t bytes = run.workspace_bytes(p);
  each_chunk(p, [&](int64_t b, int64_t k, int64_t first, int64_t count) {
    const int64_t at = b * chunks + k;
    run.sums(p, b, first, count, workspace(bytes), slots + at * width, &bad[at]);
  });
  if (!dense) check_labels(p, bad);
  return out;
}

// Calls f with a zero of the type of a loss or of its gradient.
template <class F>
void with_loss(DType dtype, F f) {
  if (dtype == DType::f16) return f(torch::headeronly::Half());
  if (dtype == DType::bf16) return f(torch::headeronly::BFloat16());
  if (dtype == DType::f32) return f(0.0f);
  f(0.0);
}

// coef (B, C, R) times grad_loss.
std::vector<double> scaled_slopes(const Tensor& coef, OptionalTensor grad_loss, const Problem& p) {
  std::vector<double> scaled(data_of(coef), data_of(coef) + coef.numel());
  if (!grad_loss) return scaled;
  const Grad grad = grad_of(*grad_loss, p);
  const int64_t width = row_count(p.rows);
  for (int64_t b = 0; b < p.batch; ++b)
    // Background without overlap term has no output: its slopes are zero.
    for (int64_t c = grad.skipped; c < p.classes; ++c) {
      const int64_t at = b * grad.batch + (c - grad.skipped) * grad.output;
      double g = 0;
      with_loss(grad.dtype, [&](auto zero) {
        g = static_cast<double>(static_cast<const decltype(zero)*>(grad.data)[at]);
      });
      for (int64_t r = 0; r < width; ++r) scaled[(b * p.classes + c) * width + r] *= g;
    }
  return scaled;
}

Tensor sums_backward(DK_SUMS_BACKWARD_PARAMETERS) {
  check_device(logits, "logits", kCPU);
  check_device(grad_loss, "grad_loss", kCPU);
  const Inputs in = inputs_of(logits, target, mask, {DK_SUMS_NUMBERS(DK_VALUE)});
  const Problem& p = in.problem;
  const std::vector<double> slopes = scaled_slopes(slopes_of(coef, logits, p), grad_loss, p);
  const Kernels& run = kernels();
  const int64_t bytes = run.workspace_bytes(p), width = p.classes * row_count(rows);
  return gradient_like(logits, [&](const View& out) {
    each_chunk(p, [&](int64_t b, int64_t, int64_t first, int64_t count) {
      run.sums_backward(p, slopes.data() + b * width, b, first, count, workspace(bytes), out);
    });
  });
}

// As Tensor::to rounds: what is shorter than float goes through it.
template <class T>
T narrow(double value) {
  using Via = std::conditional_t<sizeof(T) < sizeof(float), float, T>;
  return T(static_cast<Via>(value));
}

// The rounding of finish() for a loss of this dtype.
struct Rounding {
  DType dtype;

  double value(double x) const {
    with_loss(dtype, [&](auto zero) { x = static_cast<double>(narrow<decltype(zero)>(x)); });
    return x;
  }
  double factor(double x) const { return dtype == DType::f64 ? x : narrow<float>(x); }
};

// An optional argument with a fixed number of values; null: ones.
struct Values {
  std::optional<Tensor> held;
  Values(OptionalTensor tensor, int64_t expected, const char* name, const Tensor& sums)
      : held(values_of(tensor, expected, name, sums)) {
    if (held) held = doubles(*held);
  }
  const double* data() const { return held ? data_of(*held) : nullptr; }
  double number() const { return held ? *data() : 1; }
};

// Chunks added up in a fixed order, then finish.h.
std::tuple<Tensor, Tensor> finish_op(DK_FINISH_PARAMETERS) {
  check_device(sums, "sums", kCPU);
  FinishInputs in = finish_inputs_of(sums, dtype, {DK_FINISH_NUMBERS(DK_VALUE)});
  const int64_t classes = in.classes, width = classes * in.width;
  const double* slot = data_of(in.slots);
  std::vector<double> totals(in.samples * width, 0.0), batch_sums(batch ? width : 0);
  for (int64_t b = 0; b < in.samples; ++b)
    for (int64_t k = 0; k < in.chunks; ++k, slot += width)
      for (int64_t at = 0; at < width; ++at) totals[b * width + at] += slot[at];

  const Values class_weights(class_weight, classes - skipped, "class_weight", sums);
  const Values pos_weights(pos_weight, classes, "pos_weight", sums);
  const Values neg_weights(neg_weight, classes, "neg_weight", sums);
  const Values region(region_lambda, 1, "region_lambda", sums);
  const Values voxel(voxel_lambda, 1, "voxel_lambda", sums);
  const FinishData data{in.samples,
                        classes,
                        places_of(rows),
                        totals.data(),
                        batch_sums.data(),
                        class_weights.data(),
                        pos_weights.data(),
                        neg_weights.data(),
                        region.number(),
                        voxel.number(),
                        static_cast<double*>(in.coef.mutable_data_ptr())};
  void* loss = in.loss.mutable_data_ptr();
  const auto store = [&](int64_t at, double value) {
    with_loss(in.loss_dtype, [&](auto zero) {
      static_cast<decltype(zero)*>(loss)[at] = narrow<decltype(zero)>(value);
    });
  };
  finish(in.spec, data, OneThread(), store, Rounding{in.loss_dtype});
  return {in.loss, in.coef};
}

// Which instruction set runs, for `python -m dicekernels.env` and the tests.
std::string cpu_capability() {
  return kernels().name;
}

}  // namespace
}  // namespace dicekernels

STABLE_TORCH_LIBRARY_FRAGMENT(dicekernels, m) {
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dicekernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&dicekernels::cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(dicekernels, CPU, m) {
  m.impl("sums", TORCH_BOX(&dicekernels::sums));
  m.impl("finish", TORCH_BOX(&dicekernels::finish_op));
  m.impl("sums_backward", TORCH_BOX(&dicekernels::sums_backward));
}
