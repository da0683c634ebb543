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
void load_slopes(const Problem& problem, const double* coef, Slopes<T>* slopes) {
  for (int64_t c = 0; c < problem.classes; ++c) {
    const double* rows = coef + c * row_count(problem.rows);
    const auto at = [&](Row row) {
      return has_row(problem.rows, row) ? static_cast<T>(rows[row_index(problem.rows, row)]) : T{0};
    };
    // (1 - p)(1 - g) of TN falls where p (1 - g) of FP rises.
    slopes[c] = {at(kI), at(kFP) - at(kTN), at(kFN), at(kPos), at(kNeg), at(kLs)};
  }
}

// a * g + b of class c.
template <bool Dense, class T>
DK_INLINE Vec<T> weighted_target(T a, T b, int64_t c, const T* g_row, int64_t v) {
  if constexpr (Dense)
    return a * load<T>(g_row + v) + b;
  else
    return load<T>(g_row + v) == splat(static_cast<T>(c)) ? splat(a + b) : splat(b);
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

// What the softmax's Jacobian takes off every class, without the voxel weight: `shift` =
// sum_c p_c dL/dp_c of the overlap (if it has a softmax) minus sum_c (a_pos g_c + a_ls) of the CE.
template <Overlap O, bool Dense, bool Masked, bool Ce, class T>
void load_shift(Tile<T>& tile, const Slopes<T>* slopes) {
  const Problem& problem = tile.problem;
  const bool overlap = problem.activation == Activation::softmax && has_overlap(problem);
  std::memset(tile.shift, 0, sizeof(T) * tile.padded);
  for (int64_t c = 0; c < problem.classes; ++c) {
    const Slopes<T>& a = slopes[c];
    const T *g_row = tile.target_row(c), *e_row = tile.e + c * tile.pitch;
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      Vec<T> shift = load<T>(tile.shift + v);
      if (overlap) {
        const Vec<T> p = load<T>(e_row + v) * load<T>(tile.scale + v);
        shift =
            shift + p * overlap_slope_at<O, Dense, Masked>(tile, a, static_cast<T>(c), p, g_row, v);
      }
      if constexpr (Ce) shift = shift - weighted_target<Dense>(a.pos, a.ls, c, g_row, v);
      store<T>(tile.shift + v, shift);
    }
  }
}

// The same for a softmax term alone: pull = sum_c a_pos g_c p_c d loss/dp_c.
template <bool Dense, class T>
void load_pull(Tile<T>& tile, const Slopes<T>* slopes) {
  const Problem& problem = tile.problem;
  const TermNumbers<T> numbers(problem);
  if constexpr (!Dense) {
    // One class of the sum is not zero.
    T* own = tile.g;
    std::memset(own, 0, sizeof(T) * tile.padded);
    for (int64_t c = problem.first_class; c < problem.classes; ++c)
      for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
        const auto hit = load<T>(tile.label + v) == splat(static_cast<T>(c));
        store<T>(own + v, select(hit, splat(slopes[c].pos), load<T>(own + v)));
      }
    tile.label_log_p(tile.pull);
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>)
      store<T>(tile.pull + v,
               load<T>(own + v) * softmax_term(numbers, load<T>(tile.pull + v)).slope);
    return;
  }
  std::memset(tile.pull, 0, sizeof(T) * tile.padded);
  for (int64_t c = problem.first_class; c < problem.classes; ++c) {
    const Slopes<T>& a = slopes[c];
    const T *g_row = tile.target_row(c), *z_row = tile.z + c * tile.z_stride;
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      const Vec<T> log_p = tile.focal_log_p(load<T>(z_row + v), v);
      store<T>(tile.pull + v,
               load<T>(tile.pull + v) + weighted_target<Dense>(a.pos, T{0}, c, g_row, v) *
                                            softmax_term(numbers, log_p).slope);
    }
  }
}

// The whole gradient of an overlap with softmax, and with Ce that of the cross entropy.
template <Overlap O, bool Dense, bool Masked, bool Ce, class T>
void softmax_gradient(const Tile<T>& tile, const Slopes<T>& a, int64_t c, const T* g_row, T* out) {
  const T* e_row = tile.e + c * tile.pitch;
  for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
    const Vec<T> p = load<T>(e_row + v) * load<T>(tile.scale + v);
    const Vec<T> slope =
        overlap_slope_at<O, Dense, Masked>(tile, a, static_cast<T>(c), p, g_row, v);
    Vec<T> gradient = p * (slope - load<T>(tile.shift + v));
    if constexpr (Ce) gradient = gradient - weighted_target<Dense>(a.pos, a.ls, c, g_row, v);
    store<T>(out + v, gradient);
  }
}

template <Overlap O, bool Dense, bool Masked, class T>
void pointwise_gradient(const Tile<T>& tile, const Slopes<T>& a, int64_t c, const T* g_row,
                        T* out) {
  const T* z_row = tile.z + c * tile.z_stride;
  const bool sigmoid_ = tile.problem.activation == Activation::sigmoid;
  for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
    Vec<T> p = load<T>(z_row + v), chain = splat(T{1});
    if (sigmoid_) {
      const Sigmoid<Vec<T>> s = sigmoid<false>(p);
      p = s.p;
      chain = s.p * s.q;
    }
    store<T>(out + v,
             chain * overlap_slope_at<O, Dense, Masked>(tile, a, static_cast<T>(c), p, g_row, v));
  }
}

template <bool Dense, class T>
void add_voxel_gradient(const Tile<T>& tile, const Slopes<T>& a, int64_t c, const T* g_row,
                        T* out) {
  const Problem& problem = tile.problem;
  const T *e_row = tile.e + c * tile.pitch, *z_row = tile.z + c * tile.z_stride;
  const TermNumbers<T> numbers(problem);
  const auto add = [&](int64_t v, Vec<T> x) { store<T>(out + v, load<T>(out + v) + x); };
  const auto g_at = [&](int64_t v) {
    return tile.template target<Dense>(g_row, static_cast<T>(c), v);
  };
  if (problem.voxel_term == VoxelTerm::ce) {
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      const Vec<T> p = load<T>(e_row + v) * load<T>(tile.scale + v);
      add(v, -p * load<T>(tile.shift + v) - weighted_target<Dense>(a.pos, a.ls, c, g_row, v));
    }
  } else if (is_softmax_term(problem.voxel_term)) {
    if (c < problem.first_class) return;
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      const Vec<T> log_p = tile.focal_log_p(load<T>(z_row + v), v), pull = load<T>(tile.pull + v);
      if constexpr (Dense)
        add(v, a.pos * g_at(v) * softmax_term(numbers, log_p).slope - exp(log_p) * pull);
      else
        add(v, (g_at(v) - exp(log_p)) * pull);
    }
  } else {
    with_binary_term(problem.voxel_term, [&](auto term) {
      for (int64_t v = 0; v < tile.padded; v += kLanes<T>)
        add(v, binary_slope<term(), Dense>(numbers, load<T>(z_row + v), g_at(v), a.pos, a.neg));
    });
  }
}

// The gradient of one class of the tile, in `out`.
template <Overlap O, bool Dense, bool Masked, bool Ce, class T>
void gradient_row(Tile<T>& tile, const Slopes<T>* slopes, int64_t c, T* out) {
  const Problem& problem = tile.problem;
  const Slopes<T>& a = slopes[c];
  const T* g_row = tile.target_row(c);
  const bool fused = problem.activation == Activation::softmax && has_overlap(problem);
  if (fused)
    softmax_gradient<O, Dense, Masked, Ce>(tile, a, c, g_row, out);
  else if (has_overlap(problem))
    pointwise_gradient<O, Dense, Masked>(tile, a, c, g_row, out);
  else
    std::memset(out, 0, sizeof(T) * tile.padded);
  if (!(fused && Ce)) add_voxel_gradient<Dense>(tile, a, c, g_row, out);
  if constexpr (Masked)
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>)
      store<T>(out + v, load<T>(tile.m + v) * load<T>(out + v));
}

template <class T>
void backward_tile(Tile<T>& tile, const Slopes<T>* slopes, const View& gradient) {
  const Problem& problem = tile.problem;
  const bool ce = problem.voxel_term == VoxelTerm::ce;
  const bool native = gradient.dtype == (sizeof(T) == 4 ? DType::f32 : DType::f64);
  const bool direct = native && gradient.voxel == 1 && tile.n == tile.padded;
  const int64_t at = tile.sample * gradient.batch + tile.first * gradient.voxel;
  with_flags(
      problem.dense, tile.masked, ce, false, [&](auto dense, auto masked, auto with_ce, auto) {
        with_overlap(problem.overlap, [&](auto o) {
          if (tile.needs_softmax()) load_shift<o(), dense(), masked(), with_ce()>(tile, slopes);
          if (is_softmax_term(problem.voxel_term)) load_pull<dense()>(tile, slopes);
          for (int64_t c = 0; c < problem.classes; ++c) {
            const int64_t offset = at + c * gradient.channel;
            T* out = direct ? static_cast<T*>(const_cast<void*>(gradient.data)) + offset : tile.row;
            gradient_row<o(), dense(), masked(), with_ce()>(tile, slopes, c, out);
            if (!direct) write_row(gradient, offset, tile.n, out);
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
  auto* slopes = reinterpret_cast<Slopes<T>*>(workspace + Tile<T>::bytes(problem));
  load_slopes(problem, coef, slopes);
  for (int64_t v = 0; v < voxel_count; v += tile.capacity) {
    const int64_t left = voxel_count - v;
    tile.load(sample, first_voxel + v, left < tile.capacity ? left : tile.capacity);
    backward_tile(tile, slopes, gradient);
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
