// The arguments of the ops, each once, with the names and in the order of dicekernels/spec.py,
// which says what the numbers mean. From these lists come the parameters of the op functions, the
// fields of SumsSpec and FinishSpec with their values, and the schemas that native.cpp reports to a
// test of those in dicekernels/ops.py.
#pragma once
#include <cstdint>
#include <optional>

// Of sums and sums_backward: X(type in the op, type of the field, name).
#define DK_SUMS_NUMBERS(X)                                                                \
  X(bool, bool, dense)               /* the target holds values per class, not labels */  \
  X(int64_t, Activation, activation) /* of the overlap rows */                            \
  X(int64_t, Overlap, overlap)                                                            \
  X(int64_t, VoxelTerm, voxel_term) /* of POS, NEG and LS, always from the raw logits */  \
  X(int64_t, int64_t, rows)         /* bit mask of Row */                                 \
  X(std::optional<int64_t>, std::optional<int64_t>, ignore_index) /* has weight zero */   \
  X(bool, bool, product_mask) /* p*m and g*m before the products, not sums linear in m */ \
  X(double, double, focal_gamma)                                                          \
  X(int64_t, int64_t, first_class) /* focal_softmax: of the classes that its softmax has */

// Of finish.
#define DK_FINISH_NUMBERS(X)                                                                  \
  X(int64_t, int64_t, rows)                                                                   \
  X(int64_t, Formula, formula)                                                                \
  X(double, double, kappa) /* score = (kappa I + nr) / (kappa I + alpha FP + beta FN + dr) */ \
  X(double, double, alpha)                                                                    \
  X(double, double, beta)                                                                     \
  X(double, double, smooth_nr)                                                                \
  X(double, double, smooth_dr)                                                                \
  X(int64_t, Transform, transform) /* 1 - score, -log(score) or (1 - score)^exponent */       \
  X(double, double, exponent)                                                                 \
  X(int64_t, GdlWeight, gdl_weight)                                                           \
  X(int64_t, int64_t, skipped) /* leading classes without overlap term */                     \
  X(bool, bool, batch)         /* sums over the batch before the ratio */                     \
  X(int64_t, Reduction, reduction)                                                            \
  X(double, double, label_smoothing)                                                          \
  X(int64_t, Denominator, denominator) /* of the voxel term */                                \
  X(int64_t, int64_t, voxel_skipped)   /* leading classes with weight 0 in the voxel term */  \
  X(bool, bool, empty)                 /* no sample or no voxel */

#define DK_FIELD(op, type, name) type name;
#define DK_VALUE(op, type, name) static_cast<type>(name),
#define DK_PARAMETER(op, type, name) , op name

// TensorArgument and OptionalTensor are references, see ops.h.
#define DK_SUMS_PARAMETERS \
  TensorArgument logits, TensorArgument target, OptionalTensor mask DK_SUMS_NUMBERS(DK_PARAMETER)

#define DK_FINISH_PARAMETERS                                                   \
  TensorArgument sums, OptionalTensor class_weight, OptionalTensor pos_weight, \
      OptionalTensor neg_weight, OptionalTensor region_lambda,                 \
      OptionalTensor voxel_lambda DK_FINISH_NUMBERS(DK_PARAMETER), ScalarType dtype

#define DK_SUMS_BACKWARD_PARAMETERS                                                            \
  OptionalTensor grad_loss, TensorArgument logits, TensorArgument target, OptionalTensor mask, \
      TensorArgument coef DK_SUMS_NUMBERS(DK_PARAMETER)
