// A tile of a few voxels with all of their classes in shared memory, as float or double, whatever
// the dtypes and strides of the tensors are; and what one voxel needs of its softmax.
#pragma once
#include <initializer_list>

#include "elements.h"
#include "tile.h"

namespace dicekernels {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// What all classes of a voxel share of its softmax: over all classes the largest logit and
// 1 / sum, over those from first_class on the largest logit and the log of the sum.
template <class T>
struct Softmax {
  T max = 0, scale = 0, focal_max = 0, focal_log_sum = 0;

  __device__ T p(T x) const { return exp(x - max) * scale; }
  __device__ T focal_log_p(T x) const { return (x - focal_max) - focal_log_sum; }
};

template <class T>
struct Tile {
  const Problem& problem;
  const TilePlan& plan;
  T *z, *g;  // (C, pitch) logits, and the values of a dense target; 0 where m == 0
  // Of each voxel: its weight, and of its softmax (over all classes, and over those from
  // first_class on) largest logit, 1 / sum and log of the sum; what a Jacobian takes off.
  T *m, *max, *scale, *log_sum, *focal_max, *focal_log_sum, *shift, *pull;
  T* slopes;  // (6, C)
  int* label;
  int64_t sample, first;  // first voxel
  int n;                  // voxels that exist

  __device__ Tile(const Problem& problem_, const TilePlan& plan_, unsigned char* memory)
      : problem(problem_), plan(plan_), sample(0), first(0), n(0) {
    T* next = reinterpret_cast<T*>(memory);
    const int64_t classes = problem.classes;
    const auto take = [&](int64_t count) {
      T* taken = next;
      next += count;
      return taken;
    };
    z = take(classes * plan.pitch);
    g = problem.dense ? take(classes * plan.pitch) : nullptr;
    for (T** row : {&m, &max, &scale, &log_sum, &focal_max, &focal_log_sum, &shift, &pull})
      *row = take(plan.voxels());
    slopes = take(6 * classes);
    label = reinterpret_cast<int*>(next);
  }

  __device__ bool has_overlap() const {
    return problem.rows & ((1 << kI) | (1 << kFP) | (1 << kFN));
  }
  __device__ bool needs_softmax() const {
    return (problem.activation == Activation::softmax &&
            (has_overlap() || has_row(problem.rows, kTN))) ||
           problem.voxel_term == VoxelTerm::ce;
  }

  __device__ T target(int64_t c, int v) const {
    return problem.dense ? g[c * plan.pitch + v] : static_cast<T>(label[v] == c);
  }
  __device__ T probability(T x, int v) const {
    if (problem.activation == Activation::softmax) return exp(x - max[v]) * scale[v];
    if (problem.activation == Activation::sigmoid) return sigmoid<false>(x).p;
    return x;
  }
  __device__ T log_p(T x, int v) const { return (x - max[v]) - log_sum[v]; }
  __device__ T focal_log_p(T x, int v) const { return (x - focal_max[v]) - focal_log_sum[v]; }

  // Brings in n voxels from `first` on. Returns how many labels of this thread are out of range.
  __device__ int load(int64_t sample_, int64_t first_, int n_) {
    sample = sample_;
    first = first_;
    n = n_;
    __syncthreads();  // the tile before is not read any more
    const int bad = load_voxels();
    __syncthreads();
    load_classes(problem.logits, z);
    if (problem.dense) load_classes(problem.target, g);
    __syncthreads();
    return bad;
  }

  // Calls f(class, voxel of the tile) for every element in the order of memory of `view`.
  template <class F>
  __device__ void each_element(const View& view, F f) const {
    const int log2_voxels = plan.log2_voxels;
    const int count = static_cast<int>(problem.classes) << log2_voxels;
    const bool by_class = view.channel == 1 && view.voxel != 1;
    for (int at = threadIdx.x; at < count; at += plan.threads) {
      const int c = by_class ? at % static_cast<int>(problem.classes) : at >> log2_voxels;
      const int v = by_class ? at / static_cast<int>(problem.classes) : at & (plan.voxels() - 1);
      if (v < n) f(c, v);
    }
  }

  // The statistics of the softmax of every voxel, then f(voxel, lane, whether it is a voxel of its
  // own, statistics): `plan.lanes` neighbouring threads share a voxel, all threads of a warp call
  // it. Beyond the end lanes repeat the last voxel, whose rows another warp is writing: f must not
  // read them there, and has the statistics in registers.
  template <class F>
  __device__ void each_voxel(bool logs, F f) {
    const int lanes = plan.lanes, lane = threadIdx.x % lanes;
    const bool softmax = needs_softmax(), focal = is_softmax_term(problem.voxel_term);
    for (int base = 0; base < n; base += plan.threads / lanes) {
      const int own = base + threadIdx.x / lanes, v = own < n ? own : n - 1;
      Softmax<T> of_voxel;
      if (softmax) {
        T sum;
        softmax_of(0, v, lane, &of_voxel.max, &sum);
        of_voxel.scale = reciprocal(sum);
        if (lane == 0 && own < n) {
          max[v] = of_voxel.max;
          scale[v] = of_voxel.scale;
          if (logs) log_sum[v] = cuda::log_sum(sum);
        }
      }
      if (focal) {
        T sum;
        softmax_of(problem.first_class, v, lane, &of_voxel.focal_max, &sum);
        of_voxel.focal_log_sum = log(sum);
        if (lane == 0 && own < n) {
          focal_max[v] = of_voxel.focal_max;
          focal_log_sum[v] = of_voxel.focal_log_sum;
        }
      }
      f(v, lane, own < n, of_voxel);
    }
    __syncthreads();
  }

  // Sum over the lanes of a voxel; all of them get it.
  __device__ T over_lanes(T x) const {
    for (int step = plan.lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
  }

 private:
  __device__ int load_voxels() {
    int bad = 0;
    for (int v = threadIdx.x; v < plan.voxels(); v += plan.threads) {
      T weight = v < n ? T{1} : T{0};
      const int64_t at = first + v;
      const View& mask = problem.mask;
      if (v < n && mask.data != nullptr)
        weight = read_as<T>(mask, sample * mask.batch + at * mask.voxel);
      int own = -1;
      if (v < n && !problem.dense) {
        const View& target = problem.target;
        const Label read = read_label(problem, sample * target.batch + at * target.voxel);
        bad += read.bad && weight != 0;
        if (read.value < 0) weight = 0;
        if (weight != 0) own = read.value;
      }
      m[v] = weight;
      label[v] = own;
    }
    return bad;
  }

  // Nothing of a voxel without weight goes further, not even NaN.
  __device__ void load_classes(const View& view, T* into) {
    const int64_t from = sample * view.batch + first * view.voxel;
    with_dtype(view.dtype, [&](auto* tag) {
      const auto* data = static_cast<decltype(tag)>(view.data) + from;
      each_element(view, [&](int c, int v) {
        const T value = static_cast<T>(widen(data[c * view.channel + v * view.voxel]));
        into[c * plan.pitch + v] = m[v] != 0 ? value : T{0};
      });
    });
  }

  __device__ void softmax_of(int64_t from, int v, int lane, T* largest, T* sum) const {
    const int classes = static_cast<int>(problem.classes);
    T top = -INFINITY;
    for (int c = static_cast<int>(from) + lane; c < classes; c += plan.lanes) {
      const T x = z[c * plan.pitch + v];
      top = x > top ? x : top;
    }
    for (int step = plan.lanes / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(kFullWarp, top, step);
      top = other > top ? other : top;
    }
    T total = 0;
    for (int c = static_cast<int>(from) + lane; c < classes; c += plan.lanes)
      total += exp(z[c * plan.pitch + v] - top);
    *largest = top;
    *sum = over_lanes(total);
  }
};

}  // namespace cuda
}  // namespace dicekernels
