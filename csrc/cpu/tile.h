// A tile: a few hundred voxels of every class, brought into cache as float or double (logits z,
// probabilities p, labels, voxel weights m), padded to whole vectors. All maths happen on tiles.
#pragma once
#include <initializer_list>

#include "rows.h"

namespace dicekernels {
namespace DK_ISA {

// float for the half precisions and fp32, double for fp64.
template <class T>
constexpr int64_t tile_voxels(int64_t classes) {
  int64_t voxels = 512;
  // Two (C, voxels) buffers have to stay in the second-level cache.
  while (voxels > 64 && 2 * voxels * classes * static_cast<int64_t>(sizeof(T)) > 320 * 1024)
    voxels /= 2;
  return voxels;
}

// With more classes than ways of a second-level cache, rows a power of two apart evict each other;
// then the tile is copied.
constexpr int64_t kDirectClasses = 16;

constexpr int64_t kTileRows = 12;  // rows of one value a voxel in Tile below

// One cache line between rows: at a power of two apart they would share the sets of the cache.
template <class T>
constexpr int64_t kRowGap = 64 / sizeof(T);

template <class T>
struct Tile {
  const Problem& problem;
  int64_t capacity;  // voxels of a full tile
  int64_t pitch;     // from row to row of the buffers
  int64_t sample = 0, first = 0;
  int64_t n = 0, padded = 0;
  bool masked = false;   // m is not all ones; where m == 0, z and g read 0 and the label -1
  const T* z = nullptr;  // (C, z_stride) logits: the buffer, or the caller's own memory
  int64_t z_stride = 0;
  T *buffer, *e;  // (C, pitch); e * scale: softmax over all classes
  T *label, *m, *scale, *max, *log_sum, *focal_max, *focal_log_sum, *ones, *row, *g, *shift, *pull;
  bool needs_log = false;  // the cross entropy's forward alone reads log_sum
  BadLabels* bad = nullptr;

  Tile(const Problem& pr, char* workspace)
      : problem(pr), capacity(tile_voxels<T>(pr.classes)), pitch(capacity + kRowGap<T>) {
    T* next = reinterpret_cast<T*>(workspace);
    const auto take = [&](int64_t count) {
      T* taken = next;
      next += count;
      return taken;
    };
    buffer = take(pr.classes * pitch);
    e = take(pr.classes * pitch);
    for (T** r : {&label, &m, &scale, &max, &log_sum, &focal_max, &focal_log_sum, &ones, &row, &g,
                  &shift, &pull})
      *r = take(pitch);
    for (int64_t v = 0; v < capacity; ++v) ones[v] = 1;
  }

  static int64_t bytes(const Problem& pr) {
    return (tile_voxels<T>(pr.classes) + kRowGap<T>)*(2 * pr.classes + kTileRows) *
           static_cast<int64_t>(sizeof(T));
  }

  bool needs_softmax() const {
    return problem.activation == Activation::softmax || problem.voxel_term == VoxelTerm::ce ||
           is_softmax_term(problem.voxel_term);
  }

  void load(int64_t sample_, int64_t first_, int64_t n_) {
    sample = sample_;
    first = first_;
    n = n_;
    padded = (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    load_weights();
    load_logits();
    if (needs_softmax()) softmax();
  }

  // The target of class c as values: one-hot of the label, or the dense row.
  template <bool Dense>
  DK_INLINE Vec<T> target(const T* g_row, T c, int64_t v) const {
    if constexpr (Dense)
      return load_vector(g_row + v);
    else
      return select(load_vector(g_row + v) == splat(c), splat(T{1}), splat(T{0}));
  }
  static DK_INLINE Vec<T> load_vector(const T* at) { return DK_ISA::load<T>(at); }

  // log of the softmax over all classes, and over those from first_class on.
  DK_INLINE Vec<T> log_p(Vec<T> x, int64_t v) const {
    return (x - load_vector(max + v)) - load_vector(log_sum + v);
  }
  DK_INLINE Vec<T> focal_log_p(Vec<T> x, int64_t v) const {
    return (x - load_vector(focal_max + v)) - load_vector(focal_log_sum + v);
  }

  // The focal softmax's log p of each voxel's own label, 0 where that is below first_class.
  void label_log_p(T* row_) const {
    std::memset(row_, 0, sizeof(T) * padded);
    for (int64_t c = problem.first_class; c < problem.classes; ++c)
      for (int64_t v = 0; v < padded; v += kLanes<T>) {
        const auto hit = load_vector(label + v) == splat(static_cast<T>(c));
        const Vec<T> own = focal_log_p(load_vector(z + c * z_stride + v), v);
        store<T>(row_ + v, select(hit, own, load_vector(row_ + v)));
      }
  }

  // The row that target() reads: labels, or the dense target of class c.
  const T* target_row(int64_t c) {
    if (!problem.dense) return label;
    const View& view = problem.target;
    const int64_t offset = sample * view.batch + c * view.channel + first * view.voxel;
    const DType native = sizeof(T) == 4 ? DType::f32 : DType::f64;
    if (!masked && view.voxel == 1 && view.dtype == native)
      return static_cast<const T*>(view.data) + offset;
    read_row(view, offset, n, padded, g);
    if (masked) clear_masked(g);
    return g;
  }

 private:
  void clear_masked(T* row_) const {
    for (int64_t v = 0; v < padded; v += kLanes<T>)
      store<T>(row_ + v, select(load_vector(m + v) != T{0}, load_vector(row_ + v), splat(T{0})));
  }

  void load_weights() {
    const View& mask = problem.mask;
    masked = mask.data != nullptr || n < padded;
    if (mask.data != nullptr)
      read_row(mask, sample * mask.batch + first * mask.voxel, n, padded, m);
    int64_t invalid = 0;
    if (!problem.dense)
      invalid = read_labels(problem, sample, first, n, padded, mask.data ? m : nullptr, label, bad);
    masked |= invalid > 0;
    if (!masked) return;
    if (mask.data == nullptr)
      for (int64_t i = 0; i < padded; ++i) m[i] = i < n ? T{1} : T{0};
    if (problem.dense) return;
    for (int64_t i = 0; i < padded; ++i) {
      m[i] = label[i] < 0 ? T{0} : m[i];
      label[i] = m[i] == 0 ? T{-1} : label[i];
    }
  }

  void load_logits() {
    const View& view = problem.logits;
    const int64_t at = sample * view.batch + first * view.voxel;
    const DType native = sizeof(T) == 4 ? DType::f32 : DType::f64;
    if (!masked && view.voxel == 1 && view.dtype == native && problem.classes <= kDirectClasses) {
      z = static_cast<const T*>(view.data) + at;
      z_stride = view.channel;
      return;
    }
    z = buffer;
    z_stride = pitch;
    for (int64_t c = 0; c < problem.classes; ++c) {
      const int64_t offset = at + c * view.channel;
      // The same piece of every class of the next tile: too short for the hardware to foresee.
      if (view.dtype == native && view.voxel == 1)
        for (int64_t v = capacity; v < 2 * capacity; v += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(static_cast<const T*>(view.data) + offset + v, 0, 2);
      read_row(view, offset, n, padded, buffer + c * pitch);
      if (masked) clear_masked(buffer + c * pitch);
    }
  }

  // e = exp(z - max), scale = 1 / sum e, log_sum = log sum e; the focal ones over the classes from
  // first_class on. max and log_sum stay apart: their sum would round at the size of the logits.
  void softmax() {
    const int64_t classes = problem.classes;
    const bool logs = needs_log && problem.voxel_term == VoxelTerm::ce;
    for (int64_t v = 0; v < padded; v += kLanes<T>) {
      const Vec<T> largest = largest_logit(0, v);
      Vec<T> sum = splat(T{0});
      for (int64_t c = 0; c < classes; ++c) {
        const Vec<T> x = exp(load_vector(z + c * z_stride + v) - largest);
        sum = sum + x;
        store<T>(e + c * pitch + v, x);
      }
      store<T>(scale + v, reciprocal(sum));
      if (!logs) continue;
      store<T>(max + v, largest);
      store<T>(log_sum + v, log(sum));
    }
    if (!is_softmax_term(problem.voxel_term)) return;
    for (int64_t v = 0; v < padded; v += kLanes<T>) {
      const Vec<T> largest = largest_logit(problem.first_class, v);
      Vec<T> sum = splat(T{0});
      for (int64_t c = problem.first_class; c < classes; ++c)
        sum = sum + exp(load_vector(z + c * z_stride + v) - largest);
      store<T>(focal_max + v, largest);
      store<T>(focal_log_sum + v, log(sum));
    }
  }

  DK_INLINE Vec<T> largest_logit(int64_t from, int64_t v) const {
    Vec<T> largest = load_vector(z + from * z_stride + v);
    for (int64_t c = from + 1; c < problem.classes; ++c) {
      const Vec<T> x = load_vector(z + c * z_stride + v);
      largest = select(x > largest, x, largest);
    }
    return largest;
  }
};

static inline bool has_overlap(const Problem& problem) {
  return problem.rows & ((1 << kI) | (1 << kFP) | (1 << kFN));
}

// Calls f with the booleans as compile-time constants.
template <class F>
DK_INLINE void with_flags(bool a, bool b, bool c, bool d, F f) {
  const auto constant = [](bool flag, auto g) {
    flag ? g(std::true_type{}) : g(std::false_type{});
  };
  constant(a, [&](auto a_) {
    constant(b, [&](auto b_) {
      constant(c, [&](auto c_) { constant(d, [&](auto d_) { f(a_, b_, c_, d_); }); });
    });
  });
}

template <class F>
DK_INLINE void with_overlap(Overlap overlap, F f) {
  switch (overlap) {
    case Overlap::product:
      return f(std::integral_constant<Overlap, Overlap::product>{});
    case Overlap::min:
      return f(std::integral_constant<Overlap, Overlap::min>{});
    case Overlap::squared:
      return f(std::integral_constant<Overlap, Overlap::squared>{});
    case Overlap::voxel_squared:
      return f(std::integral_constant<Overlap, Overlap::voxel_squared>{});
  }
}

}  // namespace DK_ISA
}  // namespace dicekernels
