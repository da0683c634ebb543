// From sums to the loss and its slopes, in double. The formulas are those of docs/semantics.md and
// of dicekernels/finish.py, which has the same names.
#pragma once
#include <cmath>
#include <cstdint>

#include "problem.h"

namespace dicekernels {

enum class Formula : int64_t { none = 0, ratio = 1, generalized = 2, mcc = 3 };
enum class Transform : int64_t { linear = 0, log = 1, power = 2 };
enum class GdlWeight : int64_t { square = 0, simple = 1, uniform = 2 };
enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };
enum class Denominator : int64_t { one = 0, voxels = 1, weights = 2, elements = 3, samples = 4 };

struct FinishSpec {
  int64_t rows;
  Formula formula;
  double kappa, alpha, beta;  // score = (kappa I + nr) / (kappa I + alpha FP + beta FN + dr)
  double smooth_nr, smooth_dr;
  Transform transform;  // 1 - score, -log(score) or (1 - score)^exponent
  double exponent;
  GdlWeight gdl_weight;
  int64_t skipped;  // leading classes without overlap term: 1 without background, else 0
  bool batch;       // sums over the batch before the ratio
  Reduction reduction;
  double label_smoothing;
  Denominator denominator;  // of the voxel term
  int64_t voxel_skipped;    // leading classes with weight 0 in the voxel term
  bool empty;               // no sample or no voxel

  int64_t groups(int64_t samples) const { return batch ? 1 : samples; }
  int64_t outputs(int64_t classes) const {
    return formula == Formula::generalized ? 1 : classes - skipped;
  }
};

// The smallest score whose logarithm is taken (segmentation_models_pytorch's eps).
constexpr double kLowestScore = 1e-7;

struct Slopes4 {
  double value, d_i, d_fp, d_fn, d_tn = 0;
};

static inline Slopes4 finish_ratio(const FinishSpec& f, double i, double fp, double fn) {
  const double errors = f.alpha * fp + f.beta * fn;
  const double numerator = f.kappa * i + f.smooth_nr;
  const double denominator = f.kappa * i + errors + f.smooth_dr;
  const double score = numerator / denominator;
  // 1 - score without the cancellation of a nearly perfect prediction.
  const double miss = (errors + f.smooth_dr - f.smooth_nr) / denominator;
  double value = miss, outer = 1;  // outer = d value / d miss
  if (f.transform == Transform::log) {
    const bool clamped = score < kLowestScore;
    value = -std::log(clamped ? kLowestScore : score);
    outer = clamped ? 0 : 1 / score;
  } else if (f.transform == Transform::power) {
    const bool clamped = miss <= 0;
    value = clamped ? 0 : std::pow(miss, f.exponent);
    outer = clamped ? 0 : f.exponent * std::pow(miss, f.exponent - 1);
  }
  const double by_error = outer * score / denominator;
  return {value, -outer * f.kappa * miss / denominator, by_error * f.alpha, by_error * f.beta};
}

// 1 - Matthews' correlation coefficient. Nothing wrong gives 0, also where a quotient would be 0/0.
static inline Slopes4 finish_mcc(const FinishSpec& f, double tp, double fp, double fn, double tn) {
  if (fp == 0 && fn == 0) return {0, 0, 0, 0};
  const double top = tp * tn - fp * fn + f.smooth_nr;
  const double square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + f.smooth_dr;
  const double root = std::sqrt(square), half = top / (2 * square);
  const auto slope = [&](double of_top, double of_square) {
    return (half * of_square - of_top) / root;
  };
  return {1 - top / root, slope(tn, (tn + fp) * (tn + fn) * (2 * tp + fp + fn)),
          slope(-fn, (tp + fn) * (tn + fn) * (2 * fp + tp + tn)),
          slope(-fp, (tp + fp) * (tn + fp) * (2 * fn + tp + tn)),
          slope(tp, (tp + fp) * (tp + fn) * (2 * tn + fp + fn))};
}

// Weight of a class from its volume. Whether it is infinite follows MONAI's fp32 arithmetic.
static inline double gdl_class_weight(GdlWeight kind, double volume, bool* infinite) {
  *infinite = false;
  if (kind == GdlWeight::uniform) return 1;
  const float g = static_cast<float>(volume);
  const double w = kind == GdlWeight::square ? 1 / (volume * volume) : 1 / volume;
  *infinite = std::isinf(1.0f / (kind == GdlWeight::square ? g * g : g));
  return *infinite ? 0 : w;
}

// totals: (B, C, R) sums over the chunks. Writes loss (groups * outputs values, or one if reduced)
// and coef (B, C, R) = dLoss/dtotals (for reduction none: of the one loss that the sum belongs to).
static inline void finish(const FinishSpec& f, int64_t samples, int64_t classes,
                          const double* totals, const double* class_weight,
                          const double* pos_weights, const double* neg_weights,
                          double region_lambda, double voxel_lambda, double* loss, double* coef) {
  const int64_t width = row_count(f.rows);
  const int i_at = row_index(f.rows, kI), fp_at = row_index(f.rows, kFP),
            fn_at = row_index(f.rows, kFN), g_at = row_index(f.rows, kG),
            pos_at = row_index(f.rows, kPos), neg_at = row_index(f.rows, kNeg),
            ls_at = row_index(f.rows, kLs), n_at = row_index(f.rows, kN),
            bad_at = row_index(f.rows, kBad), tn_at = row_index(f.rows, kTN);
  const bool pos = has_row(f.rows, kPos), neg = has_row(f.rows, kNeg), ls = has_row(f.rows, kLs);
  const int64_t groups = f.groups(samples), outputs = f.outputs(classes);
  const int64_t members = f.batch ? samples : 1;
  const bool reduced = f.reduction != Reduction::none;
  const double terms = static_cast<double>(groups * outputs);
  const double share = region_lambda * (f.reduction == Reduction::mean ? 1 / terms : 1);
  const auto row = [&](int64_t b, int64_t c) { return (b * classes + c) * width; };
  const auto group_sum = [&](int64_t group, int64_t c, int at) {
    double sum = 0;
    for (int64_t b = 0; b < members; ++b) sum += totals[row(group + b, c) + at];
    return sum;
  };
  for (int64_t at = 0; at < samples * classes * width; ++at) coef[at] = 0;

  double region = 0;
  for (int64_t group = 0; group < groups && f.formula != Formula::none; ++group) {
    double top = f.smooth_nr, bottom = f.smooth_dr, errors = 0, largest = 0;
    if (f.formula == Formula::generalized)
      for (int64_t c = f.skipped; c < classes; ++c) {
        bool infinite;
        const double w = gdl_class_weight(f.gdl_weight, group_sum(group, c, g_at), &infinite);
        largest = c == f.skipped || w > largest ? w : largest;
      }
    const auto weight_of = [&](int64_t c) {
      bool infinite;
      const double w = gdl_class_weight(f.gdl_weight, group_sum(group, c, g_at), &infinite);
      return infinite ? largest : w;
    };
    if (f.formula == Formula::generalized)
      for (int64_t c = f.skipped; c < classes; ++c) {
        const double w = weight_of(c), i = group_sum(group, c, i_at);
        const double miss = group_sum(group, c, fp_at) + group_sum(group, c, fn_at);
        top += 2 * w * i;
        bottom += w * (2 * i + miss);
        errors += w * miss;
      }
    const double miss = (errors + f.smooth_dr - f.smooth_nr) / bottom;
    for (int64_t c = f.skipped; c < classes; ++c) {
      Slopes4 s;
      double scale = share;
      if (f.formula == Formula::ratio) {
        s = finish_ratio(f, group_sum(group, c, i_at), group_sum(group, c, fp_at),
                         group_sum(group, c, fn_at));
        if (class_weight) scale *= class_weight[c - f.skipped];
      } else if (f.formula == Formula::mcc) {
        s = finish_mcc(f, group_sum(group, c, i_at), group_sum(group, c, fp_at),
                       group_sum(group, c, fn_at), group_sum(group, c, tn_at));
      } else {
        const double w = weight_of(c), by_error = w * top / (bottom * bottom);
        s = {miss, -2 * w * miss / bottom, by_error, by_error};
      }
      const int64_t output = f.formula == Formula::generalized ? 0 : c - f.skipped;
      if (reduced && (f.formula != Formula::generalized || c == f.skipped))
        region += scale * s.value;
      if (!reduced) loss[group * outputs + output] = scale * s.value;
      for (int64_t b = 0; b < members; ++b) {
        double* out = coef + row(group + b, c);
        out[i_at] = scale * s.d_i;
        out[fp_at] = scale * s.d_fp;
        out[fn_at] = scale * s.d_fn;
        if (f.formula == Formula::mcc) out[tn_at] = scale * s.d_tn;
      }
    }
  }
  if (reduced && f.formula != Formula::none && groups * outputs == 0 &&
      f.reduction == Reduction::mean)
    region = NAN;  // the mean of nothing, as torch has it

  double voxel = 0;
  if (pos) {
    const auto weight = [&](const double* weights, int64_t c) {
      return c < f.voxel_skipped ? 0 : weights ? weights[c] : 1;
    };
    const auto pos_weight = [&](int64_t c) { return weight(pos_weights, c); };
    const auto neg_weight = [&](int64_t c) { return weight(neg_weights, c); };
    double voxels = 0, weights = 0;
    for (int64_t b = 0; b < samples; ++b) {
      voxels += totals[row(b, 0) + n_at];
      for (int64_t c = 0; c < classes && f.denominator == Denominator::weights; ++c)
        weights += pos_weight(c) * totals[row(b, c) + g_at];
    }
    for (int64_t b = 0; b < samples; ++b) {
      double denominator = 1;
      if (f.denominator == Denominator::voxels) denominator = voxels;
      if (f.denominator == Denominator::weights) denominator = weights;
      if (f.denominator == Denominator::elements)
        denominator = voxels * (classes - f.voxel_skipped);
      if (f.denominator == Denominator::samples) denominator = totals[row(b, 0) + n_at];
      // Nothing to learn from (all voxels ignored, or only classes of weight 0): 0, not 0/0.
      const bool ignored = !f.empty && denominator == 0;
      const double scale = ignored ? 0 : voxel_lambda / denominator;
      for (int64_t c = 0; c < classes; ++c) {
        const double* t = totals + row(b, c);
        double sum = pos_weight(c) * (1 - f.label_smoothing) * t[pos_at];
        if (ls) sum += pos_weight(c) * f.label_smoothing / classes * t[ls_at];
        if (neg) sum += neg_weight(c) * t[neg_at];
        if (!ignored) voxel += scale * sum;
        double* out = coef + row(b, c);
        out[pos_at] = scale * pos_weight(c) * (1 - f.label_smoothing);
        if (ls) out[ls_at] = scale * pos_weight(c) * f.label_smoothing / classes;
        if (neg) out[neg_at] = scale * neg_weight(c);
      }
    }
    const bool shared = f.denominator != Denominator::one && f.denominator != Denominator::samples;
    if (samples == 0 && shared) voxel = NAN;  // as torch: 0/0
  }
  if (reduced) *loss = region + voxel;

  if (has_row(f.rows, kBad)) {
    double bad = 0;
    for (int64_t b = 0; b < samples; ++b) bad += totals[row(b, 0) + bad_at];
    if (bad > 0) {
      // Weights survive a batch with labels out of range: the loss shows it, the gradient is zero.
      for (int64_t at = 0; at < (reduced ? 1 : groups * outputs); ++at) loss[at] = NAN;
      for (int64_t at = 0; at < samples * classes * width; ++at) coef[at] = 0;
    }
  }
}

}  // namespace dicekernels
