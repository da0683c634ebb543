// The op finish on tensors of a GPU. Schema with shapes: dicekernels/ops.py.
#pragma once
#include <tuple>

#include "../common/check.h"

namespace dicekernels {
namespace cuda {

std::tuple<Tensor, Tensor> finish_op(
    const Tensor& sums, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pos_weight, const std::optional<Tensor>& neg_weight,
    const std::optional<Tensor>& region_lambda, const std::optional<Tensor>& voxel_lambda,
    int64_t rows, int64_t formula, double kappa, double alpha, double beta, double smooth_nr,
    double smooth_dr, int64_t transform, double exponent, int64_t gdl_weight, int64_t skipped,
    bool batch, int64_t reduction, double label_smoothing, int64_t denominator,
    int64_t voxel_skipped, bool empty, torch::headeronly::ScalarType dtype);

}  // namespace cuda
}  // namespace dicekernels
