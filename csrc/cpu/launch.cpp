// From the tensors of an op call to chunks on torch's own thread pool.
#include "launch.h"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
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

}  // namespace

Tensor sums(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
            bool dense, int64_t activation, int64_t overlap, int64_t voxel_term, int64_t rows,
            std::optional<int64_t> ignore_index, bool product_mask, double focal_gamma,
            int64_t first_class) {
  check_device(logits, "logits", kCPU);
  const Inputs in = inputs_of(logits, target, mask, dense, activation, overlap, voxel_term, rows,
                              ignore_index, product_mask, focal_gamma, first_class);
  const Problem& p = in.problem;
  const int64_t chunks = chunk_count(p.voxels), width = p.classes * row_count(rows);
  Tensor out = torch::stable::new_empty(logits, {p.batch, chunks, p.classes, row_count(rows)},
                                        torch::headeronly::ScalarType::Double);
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

Tensor sums_backward(const std::optional<Tensor>& grad_loss, const Tensor& logits,
                     const Tensor& target, const std::optional<Tensor>& mask, const Tensor& coef,
                     bool dense, int64_t activation, int64_t overlap, int64_t voxel_term,
                     int64_t rows, std::optional<int64_t> ignore_index, bool product_mask,
                     double focal_gamma, int64_t first_class) {
  check_device(logits, "logits", kCPU);
  check_device(grad_loss, "grad_loss", kCPU);
  check_device(coef, "coef", kCPU);
  const Inputs in = inputs_of(logits, target, mask, dense, activation, overlap, voxel_term, rows,
                              ignore_index, product_mask, focal_gamma, first_class);
  const Problem& p = in.problem;
  const int64_t width = p.classes * row_count(rows);
  const std::vector<double> scaled =
      scale_by_grad(grad_loss, coef, p.batch, p.classes, row_count(rows));
  Tensor gradient = torch::stable::empty_like(logits);
  // Permuted space has no single voxel stride: written contiguous, then copied.
  const bool flat = flat_stride(gradient, 2).has_value();
  Tensor written = flat ? gradient : torch::stable::new_empty(logits, logits.sizes()), held;
  const View out = view_of(written, 2, "gradient", &held);
  const Kernels& run = kernels();
  const int64_t bytes = run.workspace_bytes(p);
  each_chunk(p, [&](int64_t b, int64_t, int64_t first, int64_t count) {
    run.sums_backward(p, scaled.data() + b * width, b, first, count, workspace(bytes), out);
  });
  if (!flat) torch::stable::copy_(gradient, written);
  return gradient;
}

}  // namespace dicekernels
