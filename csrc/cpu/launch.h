// The three ops on CPU tensors. Schemas with shapes: dicekernels/ops.py.
#pragma once
#include <tuple>
#include <vector>

#include "../common/check.h"

namespace dicekernels {

Tensor sums(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
            bool dense, int64_t activation, int64_t overlap, int64_t voxel_term, int64_t rows,
            std::optional<int64_t> ignore_index, bool product_mask, double focal_gamma,
            int64_t first_class);

std::tuple<Tensor, Tensor> finish_op(
    const Tensor& sums, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pos_weight, const std::optional<Tensor>& neg_weight,
    const std::optional<Tensor>& region_lambda, const std::optional<Tensor>& voxel_lambda,
    int64_t rows, int64_t formula, double kappa, double alpha, double beta, double smooth_nr,
    double smooth_dr, int64_t transform, double exponent, int64_t gdl_weight, int64_t skipped,
    bool batch, int64_t reduction, double label_smoothing, int64_t denominator,
    int64_t voxel_skipped, bool empty, torch::headeronly::ScalarType dtype);

Tensor sums_backward(const std::optional<Tensor>& grad_loss, const Tensor& logits,
                     const Tensor& target, const std::optional<Tensor>& mask, const Tensor& coef,
                     bool dense, int64_t activation, int64_t overlap, int64_t voxel_term,
                     int64_t rows, std::optional<int64_t> ignore_index, bool product_mask,
                     double focal_gamma, int64_t first_class);

// coef (B, C, R) times grad_loss, which is a scalar or broadcasts to (B, outputs); outputs counts
// from the last class.
std::vector<double> scale_by_grad(const std::optional<Tensor>& grad_loss, const Tensor& coef,
                                  int64_t batch, int64_t classes, int64_t rows);

}  // namespace dicekernels
