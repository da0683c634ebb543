// The small op between the two passes: chunks added up in a fixed order, then finish.h.
#include "../common/finish.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "launch.h"

namespace dicekernels {
namespace {

// A few values of any floating or integer dtype as doubles, in the order of the tensor's indices.
std::vector<double> doubles(const Tensor& tensor) {
  Tensor copy =
      torch::stable::contiguous(torch::stable::to(tensor, torch::headeronly::ScalarType::Double));
  const double* data = static_cast<const double*>(copy.const_data_ptr());
  return {data, data + copy.numel()};
}

// An optional argument with a fixed number of values.
struct Values {
  std::vector<double> values;
  Values(const std::optional<Tensor>& tensor, int64_t expected, const char* name) {
    if (!tensor) return;
    check_device(*tensor, name, torch::headeronly::kCPU);
    values = doubles(*tensor);
    STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == expected, name, ": got ", values.size(),
                    " values, expected ", expected);
  }
  const double* data() const { return values.empty() ? nullptr : values.data(); }
};

// As Tensor::to rounds: what is shorter than float goes through it.
template <class T>
T narrow(double value) {
  using Via = std::conditional_t<sizeof(T) < sizeof(float), float, T>;
  return T(static_cast<Via>(value));
}

// The rounding of finish() for a loss of this dtype.
struct Rounding {
  torch::headeronly::ScalarType dtype;

  double value(double x) const {
    using S = torch::headeronly::ScalarType;
    if (dtype == S::Float) return narrow<float>(x);
    if (dtype == S::Half) return static_cast<float>(narrow<torch::headeronly::Half>(x));
    if (dtype == S::BFloat16) return static_cast<float>(narrow<torch::headeronly::BFloat16>(x));
    return x;
  }
  double factor(double x) const {
    return dtype == torch::headeronly::ScalarType::Double ? x : narrow<float>(x);
  }
};

template <class T>
void store_as(const std::vector<double>& values, Tensor& out) {
  T* data = static_cast<T*>(out.mutable_data_ptr());
  for (size_t at = 0; at < values.size(); ++at) data[at] = narrow<T>(values[at]);
}

void store(const std::vector<double>& values, Tensor& out) {
  using S = torch::headeronly::ScalarType;
  switch (out.scalar_type()) {
    case S::Double:
      return store_as<double>(values, out);
    case S::Float:
      return store_as<float>(values, out);
    case S::Half:
      return store_as<torch::headeronly::Half>(values, out);
    case S::BFloat16:
      return store_as<torch::headeronly::BFloat16>(values, out);
    default:
      STD_TORCH_CHECK(false, "dtype: expected float64, float32, float16 or bfloat16");
  }
}

}  // namespace

std::tuple<Tensor, Tensor> finish_op(
    const Tensor& sums, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pos_weight, const std::optional<Tensor>& neg_weight,
    const std::optional<Tensor>& region_lambda, const std::optional<Tensor>& voxel_lambda,
    int64_t rows, int64_t formula, double kappa, double alpha, double beta, double smooth_nr,
    double smooth_dr, int64_t transform, double exponent, int64_t gdl_weight, int64_t skipped,
    bool batch, int64_t reduction, double label_smoothing, int64_t denominator,
    int64_t voxel_skipped, bool empty, torch::headeronly::ScalarType dtype) {
  check_device(sums, "sums", torch::headeronly::kCPU);
  const int64_t samples = sums.size(0), chunks = sums.size(1), classes = sums.size(2);
  const FinishSpec f{rows,
                     static_cast<Formula>(formula),
                     kappa,
                     alpha,
                     beta,
                     smooth_nr,
                     smooth_dr,
                     static_cast<Transform>(transform),
                     exponent,
                     static_cast<GdlWeight>(gdl_weight),
                     skipped,
                     batch,
                     static_cast<Reduction>(reduction),
                     label_smoothing,
                     static_cast<Denominator>(denominator),
                     voxel_skipped,
                     empty};
  const int64_t width = classes * row_count(rows);
  STD_TORCH_CHECK(sums.size(3) == row_count(rows), "sums: got ", sums.size(3), " rows, expected ",
                  row_count(rows));
  const Tensor slots = sums.is_contiguous() ? sums : torch::stable::contiguous(sums);
  const double* slot = static_cast<const double*>(slots.const_data_ptr());
  std::vector<double> totals(samples * width, 0.0);
  for (int64_t b = 0; b < samples; ++b)
    for (int64_t k = 0; k < chunks; ++k, slot += width)
      for (int64_t at = 0; at < width; ++at) totals[b * width + at] += slot[at];

  const Values class_weights(class_weight, classes - skipped, "class_weight");
  const Values pos_weights(pos_weight, classes, "pos_weight");
  const Values neg_weights(neg_weight, classes, "neg_weight");
  const Values region(region_lambda, 1, "region_lambda"), voxel(voxel_lambda, 1, "voxel_lambda");

  Tensor loss = f.reduction == Reduction::none
                    ? torch::stable::new_empty(sums, {f.groups(samples), f.outputs(classes)}, dtype)
                    : torch::stable::new_empty(sums, {}, dtype);
  Tensor coef = torch::stable::new_empty(sums, {samples, classes, row_count(rows)},
                                         torch::headeronly::ScalarType::Double);
  std::vector<double> values(loss.numel()), batch_sums(batch ? width : 0);
  const FinishData data{samples,
                        classes,
                        places_of(rows),
                        totals.data(),
                        batch_sums.data(),
                        class_weights.data(),
                        pos_weights.data(),
                        neg_weights.data(),
                        region.data() ? *region.data() : 1,
                        voxel.data() ? *voxel.data() : 1,
                        static_cast<double*>(coef.mutable_data_ptr())};
  finish(
      f, data, OneThread(), [&](int64_t at, double value) { values[at] = value; }, Rounding{dtype});
  store(values, loss);
  return {loss, coef};
}

std::vector<double> scale_by_grad(const std::optional<Tensor>& grad_loss, const Tensor& coef,
                                  int64_t batch, int64_t classes, int64_t rows) {
  std::vector<double> scaled = doubles(coef);
  STD_TORCH_CHECK(static_cast<int64_t>(scaled.size()) == batch * classes * rows, "coef: got ",
                  scaled.size(), " values, expected ", batch * classes * rows);
  if (!grad_loss) return scaled;
  const std::vector<double> grad = doubles(*grad_loss);
  const int64_t groups = grad_loss->dim() == 2 ? grad_loss->size(0) : 1;
  const int64_t outputs = grad_loss->dim() == 2 ? grad_loss->size(1) : 1;
  STD_TORCH_CHECK(grad_loss->dim() == 0 || grad_loss->dim() == 2, "grad_loss: got ",
                  grad_loss->dim(), " dimensions, expected 0 or 2");
  STD_TORCH_CHECK((groups == 1 || groups == batch) && outputs <= classes,
                  "grad_loss: its shape does not broadcast to (B, outputs)");
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t output = outputs == 1 ? 0 : c - (classes - outputs);
      if (output < 0) continue;  // background without overlap term: its slopes are zero
      const double g = grad[(groups == 1 ? 0 : b) * outputs + output];
      double* row = scaled.data() + (b * classes + c) * rows;
      for (int64_t r = 0; r < rows; ++r) row[r] *= g;
    }
  return scaled;
}

}  // namespace dicekernels
