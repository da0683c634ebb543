// Backward for every problem that general_sums.cuh takes.
#pragma once
#include "slopes.cuh"
#include "tile.cuh"

namespace dicekernels {
namespace cuda {

template <class T>
__device__ void load_slopes(const Tile<T>& tile, const double* coef, const Grad& grad,
                            int64_t sample) {
  const int64_t classes = tile.problem.classes;
  for (int64_t c = threadIdx.x; c < classes; c += blockDim.x) {
    const Slopes<T> a = slopes_of<T>(tile.problem, coef, grad, sample, c);
    T* into = tile.slopes + 6 * c;
    into[0] = a.i, into[1] = a.fp, into[2] = a.fn, into[3] = a.pos, into[4] = a.neg, into[5] = a.ls;
  }
}

template <class T>
__device__ __forceinline__ Slopes<T> class_slopes(const Tile<T>& tile, int64_t c) {
  const T* a = tile.slopes + 6 * c;
  return {a[0], a[1], a[2], a[3], a[4], a[5]};
}

// d(overlap rows)/dp, without the voxel weight.
template <class T>
__device__ T overlap_slope_at(const Tile<T>& tile, const Slopes<T>& a, T p, T g, int v) {
  const T factor = tile.problem.product_mask ? tile.m[v] : T{1};
  p *= factor;
  g *= factor;
  switch (tile.problem.overlap) {
    case Overlap::product:
      return overlap_slope<Overlap::product>(p, g, a.i, a.fp, a.fn);
    case Overlap::min:
      return overlap_slope<Overlap::min>(p, g, a.i, a.fp, a.fn);
    case Overlap::squared:
      return overlap_slope<Overlap::squared>(p, g, a.i, a.fp, a.fn);
    default:
      return overlap_slope<Overlap::voxel_squared>(p, g, a.i, a.fp, a.fn);
  }
}

// What the softmax's Jacobian takes off every class of a voxel, without its weight: shift =
// sum_c p_c dL/dp_c of the overlap minus sum_c (a_pos g_c + a_ls) of the cross entropy; pull the
// same for a softmax term.
template <class T>
__device__ void load_jacobians(Tile<T>& tile) {
  const Problem& problem = tile.problem;
  const bool overlap = tile.has_overlap() && problem.activation == Activation::softmax;
  const bool ce = problem.voxel_term == VoxelTerm::ce;
  const bool pulls = is_softmax_term(problem.voxel_term);
  const TermNumbers<T> numbers(problem);
  tile.each_voxel(false, [&](int v, int lane, bool own, const Softmax<T>& of_voxel) {
    T shift = 0, pull = 0;
    for (int c = lane; c < problem.classes && (overlap || ce || pulls); c += tile.plan.lanes) {
      const Slopes<T> a = class_slopes(tile, c);
      const T z = tile.z[c * tile.plan.pitch + v], g = tile.target(c, v);
      if (overlap) {
        const T p = of_voxel.p(z);
        shift += p * overlap_slope_at(tile, a, p, g, v);
      }
      if (ce) shift -= a.pos * g + a.ls;
      if (pulls && c >= problem.first_class && (problem.dense || g != 0))
        pull += a.pos * g * softmax_term(numbers, of_voxel.focal_log_p(z)).slope;
    }
    shift = tile.over_lanes(shift);
    pull = tile.over_lanes(pull);
    if (own && lane == 0) {
      tile.shift[v] = shift;
      tile.pull[v] = pull;
    }
  });
}

template <class T>
__device__ T voxel_term_gradient(const Tile<T>& tile, const Slopes<T>& a, int64_t c, int v, T z,
                                 T g) {
  const Problem& problem = tile.problem;
  const TermNumbers<T> numbers(problem);
  T slope = 0;
  if (!is_softmax_term(problem.voxel_term)) {
    with_binary_term(problem.voxel_term, [&](auto term) {
      slope = problem.dense ? binary_slope<term(), true>(numbers, z, g, a.pos, a.neg)
                            : binary_slope<term(), false>(numbers, z, g, a.pos, a.neg);
    });
  } else if (c >= problem.first_class) {
    const T log_p = tile.focal_log_p(z, v);
    if (problem.dense || g != 0) slope = a.pos * g * softmax_term(numbers, log_p).slope;
    slope -= exp(log_p) * tile.pull[v];
  }
  return slope;
}

template <class T>
__device__ T gradient_of(const Tile<T>& tile, int64_t c, int v) {
  const Problem& problem = tile.problem;
  const T m = tile.m[v];
  if (m == 0) return 0;
  const Slopes<T> a = class_slopes(tile, c);
  const T z = tile.z[c * tile.plan.pitch + v], g = tile.target(c, v);
  const bool overlap = tile.has_overlap(), ce = problem.voxel_term == VoxelTerm::ce;
  const bool softmax = overlap && problem.activation == Activation::softmax;
  T gradient = voxel_term_gradient(tile, a, c, v, z, g);
  if (softmax || ce) {
    const T p = exp(z - tile.max[v]) * tile.scale[v];
    const T slope = softmax ? overlap_slope_at(tile, a, p, g, v) : T{0};
    gradient += p * (slope - tile.shift[v]);
    if (ce) gradient -= a.pos * g + a.ls;
  }
  if (overlap && !softmax) {
    T p = z, chain = 1;
    if (problem.activation == Activation::sigmoid) {
      const Sigmoid<T> s = sigmoid<false>(z);
      p = s.p;
      chain = s.p * s.q;
    }
    gradient += chain * overlap_slope_at(tile, a, p, g, v);
  }
  return m * gradient;
}

// Voxels of a block: enough to load the slopes once for many tiles, few enough to fill a GPU.
constexpr int64_t kSpan = 4096;

template <class T>
__global__ void __launch_bounds__(kMostTileThreads, 1)
    general_backward(const __grid_constant__ Problem problem, const __grid_constant__ TilePlan plan,
                     const double* coef, const __grid_constant__ Grad grad,
                     const __grid_constant__ View gradient) {
  DK_DYNAMIC_SHARED(memory);
  Tile<T> tile(problem, plan, memory);
  const int64_t spans = (problem.voxels + kSpan - 1) / kSpan;
  for (int64_t task = blockIdx.x; task < problem.batch * spans; task += gridDim.x) {
    const int64_t sample = task / spans, start = task % spans * kSpan;
    const int64_t left = problem.voxels - start, end = start + (left < kSpan ? left : kSpan);
    __syncthreads();  // the slopes of the span before are not read any more
    load_slopes(tile, coef, grad, sample);
    for (int64_t first = start; first < end; first += plan.voxels()) {
      const int n = static_cast<int>(end - first < plan.voxels() ? end - first : plan.voxels());
      tile.load(sample, first, n);
      load_jacobians(tile);
      const int64_t at = sample * gradient.batch + first * gradient.voxel;
      with_dtype(gradient.dtype, [&](auto* tag) {
        using S = Pointee<decltype(tag)>;
        if constexpr (!std::is_integral_v<S>) {
          S* out = static_cast<S*>(const_cast<void*>(gradient.data)) + at;
          tile.each_element(gradient, [&](int c, int v) {
            out[c * gradient.channel + v * gradient.voxel] = narrow<S>(gradient_of(tile, c, v));
          });
        }
      });
    }
  }
}

}  // namespace cuda
}  // namespace dicekernels
