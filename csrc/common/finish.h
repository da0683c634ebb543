// From sums to the loss and its slopes, in double. The formulas are those of docs/semantics.md and
// of dicekernels/finish.py, which has the same names. One text for one thread of a CPU and for a
// block of a GPU: whoever evaluates is a team (OneThread below, cuda/finish.cu).
#pragma once
#include <cmath>

#include "problem.h"

// Under nvcc a function of a team exists for the device alone, as the barriers that it calls do.
#if defined(__CUDACC__)
#define DK_TEAM static __device__ __forceinline__
#else
#define DK_TEAM static inline
#endif

namespace dicekernels {

enum class Formula : int64_t { none = 0, ratio = 1, generalized = 2, mcc = 3 };
enum class Transform : int64_t { linear = 0, log = 1, power = 2 };
enum class GdlWeight : int64_t { square = 0, simple = 1, uniform = 2 };
enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };
enum class Denominator : int64_t { one = 0, voxels = 1, weights = 2, elements = 3, samples = 4 };

struct FinishSpec {
  DK_FINISH_NUMBERS(DK_FIELD)

  DK_INLINE int64_t groups(int64_t samples) const { return batch ? 1 : samples; }
  DK_INLINE int64_t outputs(int64_t classes) const {
    return formula == Formula::generalized ? 1 : classes - skipped;
  }
};

// The smallest score whose logarithm is taken (segmentation_models_pytorch's eps).
constexpr double kLowestScore = 1e-7;

struct Slopes4 {
  double value, d_i, d_fp, d_fn, d_tn = 0;
};

DK_TEAM Slopes4 finish_ratio(const FinishSpec& f, double i, double fp, double fn) {
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
DK_TEAM Slopes4 finish_mcc(const FinishSpec& f, double tp, double fp, double fn, double tn) {
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
DK_TEAM double gdl_class_weight(GdlWeight kind, double volume, bool* infinite) {
  *infinite = false;
  if (kind == GdlWeight::uniform) return 1;
  const float g = static_cast<float>(volume);
  const double w = kind == GdlWeight::square ? 1 / (volume * volume) : 1 / volume;
  *infinite = std::isinf(1.0f / (kind == GdlWeight::square ? g * g : g));
  return *infinite ? 0 : w;
}

// Where the rows stand among those that are on; of use only for these.
struct Places {
  int width, i, fp, fn, g, pos, neg, ls, n, bad, tn;
};
static inline Places places_of(int64_t rows) {
  const auto at = [&](Row row) { return row_index(rows, row); };
  return {row_count(rows), at(kI),  at(kFP), at(kFN),  at(kG), at(kPos),
          at(kNeg),        at(kLs), at(kN),  at(kBad), at(kTN)};
}

// What finish() reads and where it writes.
struct FinishData {
  int64_t samples, classes;
  Places at;
  const double* totals;        // (B, C, R) sums over the chunks
  double* batch_sums;          // (C, R), room that f.batch needs
  const double* class_weight;  // (C - skipped,); nullptr: ones, as for the other two
  const double* pos_weight;    // (C,)
  const double* neg_weight;    // (C,)
  double region_lambda, voxel_lambda;
  double* coef;  // (B, C, R) = dLoss/dtotals; without reduction of the one loss that a sum is in
};

// A team of one. In a larger one `sum` takes a number from every member and gives each the same
// total, added up in an order that depends on the team's size alone; so all members call it, and
// sync() and add_samples(), alike. Its parts are teams as well, with `max` beside `sum`, that take
// turns of their own.
struct OneThread {
  int64_t rank() const { return 0; }
  int64_t size() const { return 1; }
  const OneThread& part() const { return *this; }
  int64_t part_rank() const { return 0; }
  int64_t parts() const { return 1; }
  void sync() const {}
  double sum(double x) const { return x; }
  double max(double x) const { return x; }
  // Weights and totals, which nobody writes any more.
  double load(const double* value) const { return *value; }
  // Sums (C, R) over the samples of totals (B, C, R), written for the whole team to read.
  void add_samples(const double* totals, int64_t samples, int64_t columns, double* sums) const {
    for (int64_t at = 0; at < columns; ++at) sums[at] = 0;
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t at = 0; at < columns; ++at) sums[at] += *totals++;
  }
};

// Calls cell(b, c) for this member's share of rows x classes; one member sees them in order.
template <class Team, class F>
DK_TEAM void each_cell(const Team& team, int64_t rows, int64_t classes, F cell) {
  if (classes <= 0) return;
  const int64_t down = team.size() / classes, right = team.size() % classes;
  int64_t b = team.rank() / classes, c = team.rank() % classes;
  while (b < rows) {
    cell(b, c);
    b += down;
    c += right;
    if (c >= classes) {
      c -= classes;
      ++b;
    }
  }
}

// A loss that is not rounded: see finish().
struct Exact {
  DK_INLINE double value(double x) const { return x; }
  DK_INLINE double factor(double x) const { return x; }
};

// A half of the loss as it is alone, times its lambda.
template <class Round>
DK_TEAM double finish_half(double value, double lambda, const Round& round) {
  return round.value(round.value(value) * round.factor(lambda));
}

// Generalized Dice of one group: writes `scale` times the slopes in its sums (C, R), returns the
// value.
template <class Team, class Load>
DK_TEAM double finish_generalized(const FinishSpec& f, const FinishData& d, const Team& team,
                                  double scale, Load sum, double* slopes) {
  double largest = -INFINITY;
  bool infinite;
  for (int64_t c = f.skipped + team.rank(); c < d.classes; c += team.size()) {
    const double w = gdl_class_weight(f.gdl_weight, sum(c, d.at.g), &infinite);
    largest = w > largest ? w : largest;
  }
  largest = team.max(largest);
  const auto weight_of = [&](int64_t c) {
    const double w = gdl_class_weight(f.gdl_weight, sum(c, d.at.g), &infinite);
    return infinite ? largest : w;
  };
  const bool first = team.rank() == 0;
  double top = first ? f.smooth_nr : 0, bottom = first ? f.smooth_dr : 0, errors = 0;
  for (int64_t c = f.skipped + team.rank(); c < d.classes; c += team.size()) {
    const double w = weight_of(c), i = sum(c, d.at.i);
    const double miss = sum(c, d.at.fp) + sum(c, d.at.fn);
    top += 2 * w * i;
    bottom += w * (2 * i + miss);
    errors += w * miss;
  }
  top = team.sum(top);
  bottom = team.sum(bottom);
  errors = team.sum(errors);
  const double miss = (errors + f.smooth_dr - f.smooth_nr) / bottom;
  for (int64_t c = f.skipped + team.rank(); c < d.classes; c += team.size()) {
    const double w = weight_of(c), by_error = w * top / (bottom * bottom);
    double* out = slopes + c * d.at.width;
    out[d.at.i] = scale * (-2 * w * miss / bottom);
    out[d.at.fp] = scale * by_error;
    out[d.at.fn] = scale * by_error;
  }
  return miss;
}

// The overlap terms: writes their slopes, and their values without reduction; else returns this
// member's share of their sum, without the lambda.
template <class Team, class Store, class Round>
DK_TEAM double finish_region(const FinishSpec& f, const FinishData& d, const Team& team,
                             Store store_loss, const Round& round) {
  const Places& at = d.at;
  const int64_t groups = f.groups(d.samples), outputs = f.outputs(d.classes);
  const double terms = static_cast<double>(groups * outputs);
  const double share = f.reduction == Reduction::mean ? 1 / terms : 1;
  const int64_t group_size = d.classes * at.width;
  if (f.batch) {
    team.add_samples(d.totals, d.samples, group_size, d.batch_sums);
    team.sync();
  }
  // The slopes of a batch take the place of its sums, each written by the one who has read them.
  double* const slopes = f.batch ? d.batch_sums : d.coef;
  const auto sum = [&](int64_t from) {
    return f.batch ? d.batch_sums[from] : team.load(d.totals + from);
  };
  double region = 0;
  const auto add = [&](int64_t output, double value) {
    if (f.reduction == Reduction::none)
      store_loss(output, finish_half(value, d.region_lambda, round));
    else
      region += share * value;
  };
  if (f.formula == Formula::generalized) {
    const auto& part = team.part();
    for (int64_t group = team.part_rank(); group < groups; group += team.parts()) {
      const int64_t first = group * group_size;
      const double value = finish_generalized(
          f, d, part, d.region_lambda * share,
          [&](int64_t c, int row) { return sum(first + c * at.width + row); }, slopes + first);
      if (part.rank() == 0) add(group, value);
    }
  } else {
    each_cell(team, groups, outputs, [&](int64_t group, int64_t output) {
      const int64_t row = group * group_size + (f.skipped + output) * at.width;
      const double i = sum(row + at.i), fp = sum(row + at.fp), fn = sum(row + at.fn);
      const bool ratio = f.formula == Formula::ratio;
      const Slopes4 s =
          ratio ? finish_ratio(f, i, fp, fn) : finish_mcc(f, i, fp, fn, sum(row + at.tn));
      const double weight = ratio && d.class_weight ? team.load(d.class_weight + output) : 1;
      const double scale = d.region_lambda * share * weight;
      double* out = slopes + row;
      out[at.i] = scale * s.d_i;
      out[at.fp] = scale * s.d_fp;
      out[at.fn] = scale * s.d_fn;
      if (!ratio) out[at.tn] = scale * s.d_tn;
      add(group * outputs + output, weight * s.value);
    });
  }
  if (f.batch) {
    team.sync();
    each_cell(team, d.samples, d.classes - f.skipped, [&](int64_t b, int64_t output) {
      const int64_t row = (f.skipped + output) * at.width;
      const double* from = d.batch_sums + row;
      double* out = d.coef + b * group_size + row;
      out[at.i] = from[at.i];
      out[at.fp] = from[at.fp];
      out[at.fn] = from[at.fn];
      if (f.formula == Formula::mcc) out[at.tn] = from[at.tn];
    });
  }
  return region;
}

// The voxel term: writes its slopes, returns this member's share of its value, without the lambda.
template <class Team>
DK_TEAM double finish_voxel(const FinishSpec& f, const FinishData& d, const Team& team) {
  const Places& at = d.at;
  const bool neg = has_row(f.rows, kNeg), ls = has_row(f.rows, kLs);
  const auto weight = [&](const double* weights, int64_t c) {
    return c < f.voxel_skipped ? 0 : weights ? team.load(weights + c) : 1;
  };
  const auto row = [&](int64_t b, int64_t c) { return (b * d.classes + c) * at.width; };
  double shared = 1;  // the denominator of all samples
  if (f.denominator == Denominator::weights) {
    double weights = 0;
    each_cell(team, d.samples, d.classes, [&](int64_t b, int64_t c) {
      weights += weight(d.pos_weight, c) * team.load(d.totals + row(b, c) + at.g);
    });
    shared = team.sum(weights);
  } else if (f.denominator == Denominator::voxels || f.denominator == Denominator::elements) {
    double voxels = 0;
    for (int64_t b = team.rank(); b < d.samples; b += team.size())
      voxels += team.load(d.totals + row(b, 0) + at.n);
    shared = team.sum(voxels);
    if (f.denominator == Denominator::elements) shared *= d.classes - f.voxel_skipped;
  }
  double voxel = 0;
  each_cell(team, d.samples, d.classes, [&](int64_t b, int64_t c) {
    const double denominator =
        f.denominator == Denominator::samples ? team.load(d.totals + row(b, 0) + at.n) : shared;
    // Nothing to learn from (all voxels ignored, or only classes of weight 0): 0, not 0/0.
    const bool ignored = !f.empty && denominator == 0;
    const double scale = ignored ? 0 : d.voxel_lambda / denominator;
    const double pos_weight = weight(d.pos_weight, c), neg_weight = weight(d.neg_weight, c);
    const double* t = d.totals + row(b, c);
    double sum = pos_weight * (1 - f.label_smoothing) * team.load(t + at.pos);
    if (ls) sum += pos_weight * f.label_smoothing / d.classes * team.load(t + at.ls);
    if (neg) sum += neg_weight * team.load(t + at.neg);
    if (!ignored) voxel += sum / denominator;
    double* out = d.coef + row(b, c);
    out[at.pos] = scale * pos_weight * (1 - f.label_smoothing);
    if (ls) out[at.ls] = scale * pos_weight * f.label_smoothing / d.classes;
    if (neg) out[at.neg] = scale * neg_weight;
  });
  return voxel;
}

// Loss and coef. store_loss(at, value) gets groups * outputs values, or one if reduced, each from
// one member of the team. `round` makes a loss of two halves the sum of these halves to the last
// bit: each is rounded to the loss's dtype (`value`) before and after its lambda, which torch takes
// as float32 beside anything but float64 (`factor`).
template <class Team, class Store, class Round = Exact>
DK_TEAM void finish(const FinishSpec& f, const FinishData& d, const Team& team, Store store_loss,
                    const Round& round = {}) {
  const int64_t values = d.samples * d.classes * d.at.width;
  const int64_t terms = f.groups(d.samples) * f.outputs(d.classes);
  const bool reduced = f.reduction != Reduction::none;
  for (int64_t at = team.rank(); at < values; at += team.size()) d.coef[at] = 0;

  double bad = 0;
  if (has_row(f.rows, kBad)) {
    // The count of a sample stands in its first class.
    for (int64_t b = team.rank(); b < d.samples; b += team.size())
      bad += team.load(d.totals + b * d.classes * d.at.width + d.at.bad);
    bad = team.sum(bad);
  }
  if (bad > 0 || (!reduced && f.formula == Formula::none)) {
    // Weights survive a batch with labels out of range: the loss shows it, the gradient is zero.
    const double value = bad > 0 ? NAN : 0;
    for (int64_t at = team.rank(); at < (reduced ? 1 : terms); at += team.size())
      store_loss(at, value);
    if (bad > 0) return;
  }
  team.sync();  // the zeros stand before the slopes that replace them

  double region = 0, voxel = 0;
  if (f.formula != Formula::none) {
    region = team.sum(finish_region(f, d, team, store_loss, round));
    // The mean of nothing, as torch has it.
    if (terms == 0 && f.reduction == Reduction::mean) region = NAN;
  }
  if (has_row(f.rows, kPos)) {
    voxel = team.sum(finish_voxel(f, d, team));
    const bool shared = f.denominator != Denominator::one && f.denominator != Denominator::samples;
    if (d.samples == 0 && shared) voxel = NAN;  // as torch: 0/0
  }
  if (reduced && team.rank() == 0)
    store_loss(
        0, finish_half(region, d.region_lambda, round) + finish_half(voxel, d.voxel_lambda, round));
}

}  // namespace dicekernels
