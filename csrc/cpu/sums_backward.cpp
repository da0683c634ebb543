// Backward: one pass over the voxels of a chunk, the gradient of every logit written once.
#include "kernels.h"
#include "tile.h"

namespace dicekernels {
namespace DK_ISA {
namespace {

// dLoss/dsums of one class, zero for the rows that are off.
template <class T>
struct Slopes {
  T i, fp, fn, pos, neg, ls;
};

template <class T>
Slopes<T> slopes_of(const Problem& problem, const double* coef, int64_t c) {
  const double* rows = coef + c * row_count(problem.rows);
  const auto at = [&](Row row) {
    return has_row(problem.rows, row) ? static_cast<T>(rows[row_index(problem.rows, row)]) : T{0};
  };
  return {at(kI), at(kFP), at(kFN), at(kPos), at(kNeg), at(kLs)};
}

// d(overlap rows)/dp of class c, without the voxel weight.
template <Overlap O, bool Dense, bool Masked, class T>
DK_INLINE Vec<T> overlap_slope_at(const Tile<T>& tile, const Slopes<T>& a, T c, Vec<T> p,
                                  const T* g_row, int64_t v) {
  if constexpr (O == Overlap::product && !Dense && !Masked) {
    return load<T>(g_row + v) == splat(c) ? splat(a.i - a.fn) : splat(a.fp);
  } else {
    Vec<T> g = tile.template target<Dense>(g_row, c, v);
    if constexpr (Masked) {
      if (tile.problem.product_mask) {
        const Vec<T> m = load<T>(tile.m + v);
        p = p * m;
        g = g * m;
      }
    }
    return overlap_slope<O>(p, g, a.i, a.fp, a.fn);
  }
}

// The sums over classes that the softmax's Jacobian needs, each without the voxel weight:
// dot = sum_c p_c dL/dp_c, pull = sum_c a_pos g_c + a_ls (CE), or sum_c of p dF/dp (softmax focal).
template <Overlap O, bool Dense, bool Masked, class T>
void class_sums(Tile<T>& tile, const double* coef, bool overlap) {
  const Problem& problem = tile.problem;
  const bool ce = problem.voxel_term == VoxelTerm::ce;
  const bool focal = problem.voxel_term == VoxelTerm::focal_softmax;
  const bool softmax_overlap = overlap && problem.activation == Activation::softmax;
  std::memset(tile.dot, 0, sizeof(T) * tile.padded);
  std::memset(tile.pull, 0, sizeof(T) * tile.padded);
  const T gamma = static_cast<T>(problem.focal_gamma);
  for (int64_t c = 0; c < problem.classes; ++c) {
    const Slopes<T> a = slopes_of<T>(problem, coef, c);
    const T* g_row = tile.target_row(c);
    const T *p_row = tile.p + c * tile.capacity, *z_row = tile.z + c * tile.capacity;
    const bool focal_here = focal && c >= problem.first_class;
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      if (softmax_overlap) {
        const Vec<T> p = load<T>(p_row + v);
        const Vec<T> slope =
            overlap_slope_at<O, Dense, Masked>(tile, a, static_cast<T>(c), p, g_row, v);
        store<T>(tile.dot + v, load<T>(tile.dot + v) + p * slope);
      }
      if (!ce && !focal_here) continue;
      const Vec<T> g = tile.template target<Dense>(g_row, static_cast<T>(c), v);
      Vec<T> pull = load<T>(tile.pull + v);
      if (ce) pull = pull + (a.pos * g + a.ls);
      if (focal_here) {
        const Vec<T> log_p = load<T>(z_row + v) - load<T>(tile.focal_lse + v);
        pull = pull + a.pos * g * softmax_focal(log_p, gamma).slope;
      }
      store<T>(tile.pull + v, pull);
    }
  }
}

template <Overlap O, bool Dense, bool Masked, class T>
void overlap_gradient(const Tile<T>& tile, const Slopes<T>& a, int64_t c, const T* g_row, T* out) {
  const T *p_row = tile.p + c * tile.capacity, *z_row = tile.z + c * tile.capacity;
  const Activation activation = tile.problem.activation;
  for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
    Vec<T> p, chain, shift = splat(T{0});
    if (activation == Activation::softmax) {
      p = load<T>(p_row + v);
      chain = p;
      shift = load<T>(tile.dot + v);
    } else if (activation == Activation::sigmoid) {
      const Sigmoid<Vec<T>> s = sigmoid<false>(load<T>(z_row + v));
      p = s.p;
      chain = s.p * s.q;
    } else {
      p = load<T>(z_row + v);
      chain = splat(T{1});
    }
    const Vec<T> slope =
        overlap_slope_at<O, Dense, Masked>(tile, a, static_cast<T>(c), p, g_row, v);
    store<T>(out + v, chain * (slope - shift));
  }
}

template <bool Dense, class T>
void voxel_gradient(const Tile<T>& tile, const Slopes<T>& a, int64_t c, const T* g_row, T* out) {
  const Problem& problem = tile.problem;
  const T *p_row = tile.p + c * tile.capacity, *z_row = tile.z + c * tile.capacity;
  const T gamma = static_cast<T>(problem.focal_gamma), label = static_cast<T>(c);
  const auto add = [&](int64_t v, Vec<T> x) { store<T>(out + v, load<T>(out + v) + x); };
  const auto g_at = [&](int64_t v) { return tile.template target<Dense>(g_row, label, v); };
  if (problem.voxel_term == VoxelTerm::ce) {
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>)
      add(v, load<T>(p_row + v) * load<T>(tile.pull + v) - (a.pos * g_at(v) + a.ls));
  } else if (problem.voxel_term == VoxelTerm::bce) {
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      const Sigmoid<Vec<T>> s = sigmoid<false>(load<T>(z_row + v));
      const Vec<T> g = g_at(v);
      add(v, a.neg * (1 - g) * s.p - a.pos * g * s.q);
    }
  } else if (problem.voxel_term == VoxelTerm::focal_sigmoid) {
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      const Vec<T> g = g_at(v);
      add(v, (a.pos * g + a.neg * (1 - g)) * sigmoid_focal(load<T>(z_row + v), g, gamma).slope);
    }
  } else if (problem.voxel_term == VoxelTerm::focal_softmax && c >= problem.first_class) {
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      const Vec<T> log_p = load<T>(z_row + v) - load<T>(tile.focal_lse + v);
      add(v, a.pos * g_at(v) * softmax_focal(log_p, gamma).slope -
                 exp(log_p) * load<T>(tile.pull + v));
    }
  }
}

template <class T>
void backward_tile(Tile<T>& tile, const double* coef, const View& gradient) {
  const Problem& problem = tile.problem;
  const bool overlap = problem.rows & ((1 << kI) | (1 << kFP) | (1 << kFN));
  with_flags(problem.dense, tile.masked, [&](auto dense, auto masked) {
    with_overlap(problem.overlap, [&](auto o) {
      if (tile.needs_softmax()) class_sums<o(), dense(), masked()>(tile, coef, overlap);
      for (int64_t c = 0; c < problem.classes; ++c) {
        const Slopes<T> a = slopes_of<T>(problem, coef, c);
        const T* g_row = tile.target_row(c);
        T* out = tile.row;
        if (overlap)
          overlap_gradient<o(), dense(), masked()>(tile, a, c, g_row, out);
        else
          std::memset(out, 0, sizeof(T) * tile.padded);
        if (problem.voxel_term != VoxelTerm::none) voxel_gradient<dense()>(tile, a, c, g_row, out);
        if constexpr (masked())
          for (int64_t v = 0; v < tile.padded; v += kLanes<T>)
            store<T>(out + v, load<T>(tile.m + v) * load<T>(out + v));
        write_row(gradient,
                  tile.sample * gradient.batch + c * gradient.channel + tile.first * gradient.voxel,
                  tile.n, out);
      }
    });
  });
}

template <class T>
void backward_chunk(const Problem& problem, const double* coef, int64_t sample, int64_t first_voxel,
                    int64_t voxel_count, char* workspace, const View& gradient) {
  Tile<T> tile(problem, workspace);
  BadLabels bad;
  tile.bad = &bad;
  for (int64_t v = 0; v < voxel_count; v += tile.capacity) {
    const int64_t left = voxel_count - v;
    tile.load(sample, first_voxel + v, left < tile.capacity ? left : tile.capacity);
    backward_tile(tile, coef, gradient);
  }
}

}  // namespace

void backward_chunk_any(const Problem& problem, const double* coef, int64_t sample,
                        int64_t first_voxel, int64_t voxel_count, char* workspace,
                        const View& gradient) {
  const auto chunk =
      problem.logits.dtype == DType::f64 ? backward_chunk<double> : backward_chunk<float>;
  chunk(problem, coef, sample, first_voxel, voxel_count, workspace, gradient);
}

}  // namespace DK_ISA
}  // namespace dicekernels
