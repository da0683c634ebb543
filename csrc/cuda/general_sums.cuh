// Forward for every problem: dense targets, all activations, overlap kinds, voxel terms, masks and
// layouts, float64. What people train with most has kernels of its own (fast_sums.cuh).
#pragma once
#include "tile.cuh"

namespace dicekernels {
namespace cuda {

// What voxels add to the rows of one class, but N and BAD.
template <class T>
struct Rows {
  T i = 0, fp = 0, fn = 0, g = 0, pos = 0, neg = 0, ls = 0, tn = 0;

  template <class S>
  __device__ void add(const Rows<S>& other) {
    i += other.i;
    fp += other.fp;
    fn += other.fn;
    g += other.g;
    pos += other.pos;
    neg += other.neg;
    ls += other.ls;
    tn += other.tn;
  }
  __device__ double at(Row row) const {
    switch (row) {
      case kI:
        return i;
      case kFP:
        return fp;
      case kFN:
        return fn;
      case kG:
        return g;
      case kPos:
        return pos;
      case kNeg:
        return neg;
      case kLs:
        return ls;
      case kTN:
        return tn;
      default:
        return 0;
    }
  }
};

template <class T>
__device__ __forceinline__ OverlapTerms<T> overlap_terms_of(Overlap overlap, T p, T g) {
  switch (overlap) {
    case Overlap::product:
      return overlap_terms<Overlap::product>(p, g);
    case Overlap::min:
      return overlap_terms<Overlap::min>(p, g);
    case Overlap::squared:
      return overlap_terms<Overlap::squared>(p, g);
    default:
      return overlap_terms<Overlap::voxel_squared>(p, g);
  }
}

template <class T>
__device__ void add_voxel_term(const Tile<T>& tile, int64_t c, int v, T z, T g, T m,
                               Rows<T>* rows) {
  const Problem& problem = tile.problem;
  const TermNumbers<T> numbers(problem);
  if (problem.voxel_term == VoxelTerm::ce) {
    const T nll = m * -tile.log_p(z, v);
    // Selected, not multiplied: -log p of an impossible class is infinite.
    if (problem.dense)
      rows->pos += g * nll;
    else if (g != 0)
      rows->pos += nll;
    rows->ls += nll;
  } else if (is_softmax_term(problem.voxel_term)) {
    if (c >= problem.first_class && (problem.dense || g != 0))
      rows->pos += m * (g * softmax_term(numbers, tile.focal_log_p(z, v)).loss);
  } else {
    with_binary_term(problem.voxel_term, [&](auto term) {
      if (problem.dense)
        add_binary_term<term(), true>(numbers, z, g, m, &rows->pos, &rows->neg);
      else
        add_binary_term<term(), false>(numbers, z, g, m, &rows->pos, &rows->neg);
    });
  }
}

template <class T>
__device__ void add_voxel(const Tile<T>& tile, int64_t c, int v, Rows<T>* rows) {
  const Problem& problem = tile.problem;
  const T m = tile.m[v];
  if (m == 0) return;
  const T z = tile.z[c * tile.plan.pitch + v], g = tile.target(c, v);
  rows->g += m * g;
  const bool overlap = tile.has_overlap(), negatives = has_row(problem.rows, kTN);
  if (overlap || negatives) {
    const T p = tile.probability(z, v), factor = problem.product_mask ? m : T{1};
    const T weight = problem.product_mask ? T{1} : m;
    const OverlapTerms<T> terms = overlap_terms_of<T>(problem.overlap, p * factor, g * factor);
    rows->i += weight * terms.tp;
    rows->fp += weight * terms.fp;
    rows->fn += weight * terms.fn;
    if (negatives) rows->tn += m * ((1 - p) * (1 - g));
  }
  if (problem.voxel_term != VoxelTerm::none) add_voxel_term(tile, c, v, z, g, m, rows);
}

// Voxels of one class that a thread adds up before it adds to its sum of the tile: many equal
// addends round the same way.
constexpr int kShortRun = 16;

// Sum over the threads of a group of `size` (a power of two) neighbours, in the first of them.
__device__ inline double over_group(double x, double* memory, int size) {
  memory[threadIdx.x] = x;
  __syncthreads();
  for (int step = size / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) % size < step)
      memory[threadIdx.x] += memory[threadIdx.x + step];
    __syncthreads();
  }
  const double sum = memory[threadIdx.x];
  __syncthreads();
  return sum;
}

// Sum over the block, the same in every thread.
__device__ inline double over_block(double x, double* memory) {
  memory[threadIdx.x] = x;
  __syncthreads();
  double sum = 0;
  for (int at = 0; at < static_cast<int>(blockDim.x); ++at) sum += memory[at];
  __syncthreads();
  return sum;
}

// A block takes a chunk of a sample. Each thread keeps the rows of one class.
template <class T>
__global__ void __launch_bounds__(kMostTileThreads, 1)
    general_sums(const __grid_constant__ Problem problem, const __grid_constant__ TilePlan plan,
                 double* slots) {
  DK_DYNAMIC_SHARED(memory);
  Tile<T> tile(problem, plan, memory);
  const int64_t chunks = chunk_count(problem.voxels), size = chunk_voxels(problem.voxels);
  const int64_t width = row_count(problem.rows);
  const int c = threadIdx.x / plan.parts, part = threadIdx.x % plan.parts;
  for (int64_t task = blockIdx.x; task < problem.batch * chunks; task += gridDim.x) {
    const int64_t start = task % chunks * size, left = problem.voxels - start;
    const int64_t end = start + (left < size ? left : size);
    Rows<double> rows;
    double weight = 0, bad = 0;
    for (int64_t first = start; first < end; first += plan.voxels()) {
      const int n = static_cast<int>(end - first < plan.voxels() ? end - first : plan.voxels());
      bad += tile.load(task / chunks, first, n);
      tile.each_voxel(true, [](int, int, bool, const Softmax<T>&) {});
      for (int v = threadIdx.x; v < n; v += plan.threads) weight += tile.m[v];
      if (c >= problem.classes) continue;
      Rows<T> of_tile;
      for (int v = part; v < n;) {
        Rows<T> run;
        for (int k = 0; k < kShortRun && v < n; ++k, v += plan.parts) add_voxel(tile, c, v, &run);
        of_tile.add(run);
      }
      rows.add(of_tile);
    }
    __syncthreads();
    double* sums = reinterpret_cast<double*>(memory);
    weight = over_block(weight, sums);
    bad = over_block(bad, sums);
    double* slot = slots + (task * problem.classes + c) * width;
    for (int row = 0; row < kRowCount; ++row) {
      if (!has_row(problem.rows, Row(row))) continue;
      double value = over_group(rows.at(Row(row)), sums, plan.parts);
      if (row == kN) value = weight;
      if (row == kBad) value = c == 0 ? bad : 0;
      if (c < problem.classes && part == 0) slot[row_index(problem.rows, Row(row))] = value;
    }
  }
}

}  // namespace cuda
}  // namespace dicekernels
