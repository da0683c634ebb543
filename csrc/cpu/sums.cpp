// Forward: one pass over the voxels of a chunk, every row of every class summed.
#include "kernels.h"
#include "tile.h"

namespace dicekernels {
namespace DK_ISA {
namespace {

// fp32 (or fp64) partial sums, one vector for each class and each row that is on; emptied into the
// doubles of the slot at least every kRunVoxels voxels.
template <class T>
struct Accumulators {
  int64_t row_total;
  T* lanes;
  T* unused;
  int64_t offset[kRowCount];  // of a row's vector among those of its class; -1 if it is off

  Accumulators(int64_t rows, T* storage)
      : row_total(row_count(rows)), lanes(storage + kLanes<T>), unused(storage) {
    for (int row = 0; row < kRowCount; ++row)
      offset[row] = has_row(rows, Row(row)) ? row_index(rows, Row(row)) * kLanes<T> : -1;
  }
  T* at(int64_t c, Row row) const {
    return offset[row] >= 0 ? lanes + c * row_total * kLanes<T> + offset[row] : unused;
  }
  void empty_into(double* slot, int64_t classes) {
    for (int64_t i = 0; i < classes * row_total; ++i) {
      double sum = 0;
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += lanes[i * kLanes<T> + lane];
      slot[i] += sum;
    }
    std::memset(lanes, 0, sizeof(T) * classes * row_total * kLanes<T>);
  }
};

// One row of one class over one tile. It starts at zero and is added to its lanes at the end: two
// levels of short sums, since many equal addends round the same way.
template <class T>
struct Sum {
  T* at;
  Vec<T> value = splat(T{0});
  explicit Sum(T* at_) : at(at_) {}
  ~Sum() { store<T>(at, load<T>(at) + value); }
  DK_INLINE void add(Vec<T> x) { value = value + x; }
};

// The rows I, FP, FN and G of one class, and with Ce the row POS of the cross entropy, which shares
// its comparisons. The probability is p_row * scale_row.
template <Overlap O, bool Dense, bool Masked, bool Ce, bool Count, class T>
void overlap_rows(const Tile<T>& tile, const Accumulators<T>& sums, int64_t c, const T* p_row,
                  const T* scale_row, const T* g_row) {
  Sum<T> i(sums.at(c, kI)), fp(sums.at(c, kFP)), fn(sums.at(c, kFN)), count(sums.at(c, kG)),
      pos(sums.at(c, kPos));
  const bool product_mask = Masked && tile.problem.product_mask;
  const T* z_row = tile.z + c * tile.z_stride;
  const Vec<T> zero = splat(T{0}), one = splat(T{1}), label = splat(static_cast<T>(c));
  for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
    Vec<T> p = load<T>(p_row + v) * load<T>(scale_row + v);
    if constexpr (O == Overlap::product && !Dense && !Masked) {
      const auto hit = load<T>(g_row + v) == label;
      // Selected after the addition: one masked instruction each.
      i.value = hit ? i.value + p : i.value;
      fp.value = hit ? fp.value : fp.value + p;
      fn.value = hit ? fn.value + (one - p) : fn.value;
      if constexpr (Count) count.value = hit ? count.value + one : count.value;
      if constexpr (Ce) {
        const Vec<T> log_p = tile.log_p(load<T>(z_row + v), v);
        pos.value = hit ? pos.value - log_p : pos.value;
      }
    } else {
      Vec<T> g = tile.template target<Dense>(g_row, static_cast<T>(c), v), weight = one;
      const Vec<T> m = Masked ? load<T>(tile.m + v) : one;
      if constexpr (Count) count.add(m * g);
      if constexpr (Ce) {
        const Vec<T> nll = m * -tile.log_p(load<T>(z_row + v), v);
        // Selected, not multiplied: -log p of an impossible class is infinite.
        if constexpr (Dense)
          pos.add(g * nll);
        else
          pos.add(g != zero ? nll : zero);
      }
      if (product_mask) {
        p = p * m;
        g = g * m;
      } else {
        weight = m;
      }
      const OverlapTerms<Vec<T>> terms = overlap_terms<O>(p, g);
      i.add(weight * terms.tp);
      fp.add(weight * terms.fp);
      fn.add(weight * terms.fn);
    }
  }
}

// The row TN of one class, which Matthews' correlation alone has.
template <bool Dense, bool Masked, class T>
void negative_row(const Tile<T>& tile, const Accumulators<T>& sums, int64_t c, const T* p_row,
                  const T* scale_row, const T* g_row) {
  Sum<T> tn(sums.at(c, kTN));
  for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
    const Vec<T> p = load<T>(p_row + v) * load<T>(scale_row + v);
    const Vec<T> g = tile.template target<Dense>(g_row, static_cast<T>(c), v);
    const Vec<T> x = (1 - p) * (1 - g);
    tn.add(Masked ? load<T>(tile.m + v) * x : x);
  }
}

template <bool Dense, bool Masked, class T>
void voxel_rows(const Tile<T>& tile, const Accumulators<T>& sums, int64_t c, const T* g_row) {
  const Problem& problem = tile.problem;
  const TermNumbers<T> numbers(problem);
  Sum<T> pos(sums.at(c, kPos));
  const T* z_row = tile.z + c * tile.z_stride;
  const auto m_at = [&](int64_t v) { return Masked ? load<T>(tile.m + v) : splat(T{1}); };
  const auto g_at = [&](int64_t v) {
    return tile.template target<Dense>(g_row, static_cast<T>(c), v);
  };
  if (problem.voxel_term == VoxelTerm::ce) {
    Sum<T> ls(sums.at(c, kLs));
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>)
      ls.add(m_at(v) * -tile.log_p(load<T>(z_row + v), v));
  } else if (is_softmax_term(problem.voxel_term)) {
    if (c < problem.first_class) return;
    for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
      if constexpr (Dense) {
        const Vec<T> log_p = tile.focal_log_p(load<T>(z_row + v), v);
        pos.add(m_at(v) * (g_at(v) * softmax_term(numbers, log_p).loss));
      } else {
        // Selected, not multiplied: the loss of an impossible label is infinite.
        pos.add(g_at(v) != splat(T{0}) ? load<T>(tile.pull + v) : splat(T{0}));
      }
    }
  } else {
    Sum<T> neg(sums.at(c, kNeg));
    with_binary_term(problem.voxel_term, [&](auto term) {
      for (int64_t v = 0; v < tile.padded; v += kLanes<T>)
        add_binary_term<term(), Dense>(numbers, load<T>(z_row + v), g_at(v), m_at(v), &pos.value,
                                       &neg.value);
    });
  }
}

// Runs f(p_row, scale_row) with the probabilities of class c under the activation of the overlap.
template <class T, class F>
void with_probabilities(const Tile<T>& tile, int64_t c, F f) {
  const T* z_row = tile.z + c * tile.z_stride;
  if (tile.problem.activation == Activation::softmax) return f(tile.e + c * tile.pitch, tile.scale);
  if (tile.problem.activation == Activation::none) return f(z_row, tile.ones);
  for (int64_t v = 0; v < tile.padded; v += kLanes<T>)
    store<T>(tile.row + v, sigmoid<false>(load<T>(z_row + v)).p);
  f(tile.row, tile.ones);
}

// The loss of a softmax term of each voxel of a label map, which its own class alone has.
template <bool Masked, class T>
void load_softmax_term(Tile<T>& tile) {
  const TermNumbers<T> numbers(tile.problem);
  tile.label_log_p(tile.pull);
  for (int64_t v = 0; v < tile.padded; v += kLanes<T>) {
    const Vec<T> loss = softmax_term(numbers, load<T>(tile.pull + v)).loss;
    store<T>(tile.pull + v, Masked ? load<T>(tile.m + v) * loss : loss);
  }
}

template <class T>
void sums_tile(Tile<T>& tile, const Accumulators<T>& sums) {
  const Problem& problem = tile.problem;
  const bool ce = problem.voxel_term == VoxelTerm::ce;
  const bool separate =
      problem.voxel_term != VoxelTerm::none && (!ce || has_row(problem.rows, kLs));
  const bool counts = has_row(problem.rows, kG);
  const bool overlap = has_overlap(problem) || ce || counts;
  with_flags(problem.dense, tile.masked, ce, counts,
             [&](auto dense, auto masked, auto with_ce, auto count) {
               if (is_softmax_term(problem.voxel_term) && !dense())
                 load_softmax_term<masked()>(tile);
               for (int64_t c = 0; c < problem.classes; ++c) {
                 const T* g_row = tile.target_row(c);
                 if (overlap)
                   with_overlap(problem.overlap, [&](auto o) {
                     with_probabilities(tile, c, [&](const T* p_row, const T* scale_row) {
                       overlap_rows<o(), dense(), masked(), with_ce(), count()>(
                           tile, sums, c, p_row, scale_row, g_row);
                       if (has_row(problem.rows, kTN))
                         negative_row<dense(), masked()>(tile, sums, c, p_row, scale_row, g_row);
                     });
                   });
                 if (separate) voxel_rows<dense(), masked()>(tile, sums, c, g_row);
               }
             });
}

template <class T>
void sums_chunk(const Problem& problem, int64_t sample, int64_t first_voxel, int64_t voxel_count,
                char* workspace, double* slot, BadLabels* bad) {
  Tile<T> tile(problem, workspace);
  tile.bad = bad;
  tile.needs_log = true;
  T* lanes = reinterpret_cast<T*>(workspace + Tile<T>::bytes(problem));
  const int64_t row_total = row_count(problem.rows), width = problem.classes * row_total;
  Accumulators<T> sums(problem.rows, lanes);
  std::memset(lanes, 0, sizeof(T) * (width + 1) * kLanes<T>);
  std::memset(slot, 0, sizeof(double) * width);
  double weight = 0;
  for (int64_t v = 0; v < voxel_count; v += tile.capacity) {
    const int64_t left = voxel_count - v;
    tile.load(sample, first_voxel + v, left < tile.capacity ? left : tile.capacity);
    sums_tile(tile, sums);
    if (tile.masked)
      for (int64_t i = 0; i < tile.n; ++i) weight += tile.m[i];
    else
      weight += tile.n;
    if ((v + tile.capacity) % kRunVoxels == 0) sums.empty_into(slot, problem.classes);
  }
  sums.empty_into(slot, problem.classes);
  for (int64_t c = 0; c < problem.classes; ++c) {
    double* rows = slot + c * row_total;
    if (has_row(problem.rows, kN)) rows[row_index(problem.rows, kN)] = weight;
    if (has_row(problem.rows, kBad)) rows[row_index(problem.rows, kBad)] = c == 0 ? bad->count : 0;
  }
}

}  // namespace

void sums_chunk_any(const Problem& problem, int64_t sample, int64_t first_voxel,
                    int64_t voxel_count, char* workspace, double* slot, BadLabels* bad) {
  const auto chunk = problem.logits.dtype == DType::f64 ? sums_chunk<double> : sums_chunk<float>;
  chunk(problem, sample, first_voxel, voxel_count, workspace, slot, bad);
}

int64_t workspace_bytes(const Problem& problem) {
  // Behind the tile: one vector a row and class (forward), or the slopes of a class (backward).
  const int64_t vectors = problem.classes * (row_count(problem.rows) + 1) + 1;
  return vectors * 64 + (problem.logits.dtype == DType::f64 ? Tile<double>::bytes(problem)
                                                            : Tile<float>::bytes(problem));
}

}  // namespace DK_ISA
}  // namespace dicekernels
