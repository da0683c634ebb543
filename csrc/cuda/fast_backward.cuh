// Backward for the losses that fast.h names.
#pragma once
#include "fast_tiles.cuh"
#include "slopes.cuh"

namespace dicekernels {
namespace cuda {

// dLoss/dsums of one class as the gradient needs them. With p_c the probabilities, y the label and
// [c = y] its indicator,
//   dL/dz_c = p_c (a_fp_c - shift) + [c = y] (p_y step_y - a_pos_y)
//   shift = sum_c p_c a_fp_c + p_y step_y - a_pos_y,    step_c = a_i_c - a_fn_c - a_fp_c
// where a_pos is that of the cross entropy.
struct FastSlopes {
  float fp, neg, step, pos;
};

template <class S, int Held, bool Split, bool Focal, bool Last>
struct FastGradient {
  static constexpr int kExist = kSurely<S, Held, Split, Focal, Last>;
  using Usual =
      std::conditional_t<Last, LastTile<S, Held, Split, kExist>, RowTile<S, Held, Split, kExist>>;
  using Special = SpecialTile<S, Held, Split, kExist>;
  const Problem& problem;
  const FastPlan& plan;
  const int first_class, classes;  // of this warp
  const FastSlopes* slopes;        // of first_class; zero behind the last class of all
  float* exchanged;
  unsigned char* staged;  // channels-last: of the tile

  // Every tile of the run that is this warp's turn. The usual way has a loop of its own.
  // `row`, `out`: of this warp's first class, from the run's first voxel on.
  __device__ void write_run(const Run& run, const unsigned char* row, unsigned char* out) const {
    constexpr int kTile = 32 * Usual::kVoxels;
    const int step = Split ? kTile : kFastThreads / 32 * kTile;
    const int last = plan.wide && run.weights == nullptr ? run.count - kTile : -1;
    for (int first = Split ? 0 : threadIdx.x / 32 * kTile; first < run.count; first += step) {
      for (; first <= last; first += step) {
        Usual tile(plan, first_class, classes);
        tile.place(first, run.count);
        if (!__all_sync(kWholeWarp, tile.load_labels(run.labels))) break;
        write(tile, row, out);
      }
      for (int part = 0; part < kTile && first + part < run.count; part += 32 * kSpecialVoxels) {
        Special tile(plan, first_class, classes);
        tile.place(first + part, run.count);
        tile.load_labels(problem, run);
        write(tile, row, out);
      }
    }
  }

 private:
  template <class Tile>
  __device__ __forceinline__ void write(Tile& tile, const unsigned char* row,
                                        unsigned char* out) const {
    constexpr int kVoxels = Tile::kVoxels;
    // Of each voxel: minus its largest logit in units of log 2; sum of e^z and of e^z times slopes;
    // e^z of its own label.
    float own[kVoxels], base[kVoxels], sums[2 * kVoxels];
    tile.load(row, staged);
    tile.load_own(own);
    tile.largest(base);
    if constexpr (Split) exchange<3 * Usual::kVoxels, 0>(exchanged, plan.warps, base, Largest{});
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      base[j] *= -kLog2E;
      sums[j] = sums[kVoxels + j] = 0;
    }
#pragma unroll
    for (int k = 0; k < Held; ++k) {
      if (!tile.has(k)) continue;
      const float fp = slopes[k].fp;
#pragma unroll
      for (int j = 0; j < kVoxels; ++j) {
        const float e = exp2_fast(fmaf(tile.x[k][j], kLog2E, base[j]));
        if constexpr (!Focal) tile.x[k][j] = e;
        sums[j] += e;
        sums[kVoxels + j] = fmaf(e, fp, sums[kVoxels + j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      own[j] = tile.owns(j) ? exp2_fast(fmaf(own[j], kLog2E, base[j])) : 0;
      own[j] *= slopes[tile.y[j]].step;
      sums[kVoxels + j] += own[j];
    }
    if constexpr (Split)
      exchange<3 * Usual::kVoxels, Usual::kVoxels>(exchanged, plan.warps, sums, Sum{});
    // p_c = e^z scale, and p_c (a_fp_c - shift) = e^z (a_fp_c scale + offset).
    float scale[kVoxels], offset[kVoxels];
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      const float pos = Focal ? 0 : slopes[tile.y[j]].pos;
      scale[j] = reciprocal(sums[j]);
      offset[j] = (pos - sums[kVoxels + j] * scale[j]) * scale[j];
      own[j] = own[j] * scale[j] - pos;
      if constexpr (Tile::kSpecial) {
        scale[j] *= tile.w[j];
        offset[j] *= tile.w[j];
        own[j] *= tile.w[j];
      }
    }
#pragma unroll
    for (int k = 0; k < Held; ++k) {
      if (!tile.has(k)) continue;
      const FastSlopes a = slopes[k];
      float gradient[kVoxels];
#pragma unroll
      for (int j = 0; j < kVoxels; ++j) {
        const bool hit = tile.y[j] == k;
        const float z = tile.x[k][j];
        const float e = Focal ? exp2_fast(fmaf(z, kLog2E, base[j])) : z;
        gradient[j] = e * fmaf(a.fp, scale[j], offset[j]);
        if (hit) gradient[j] += own[j];
        if constexpr (Focal) {
          const float slope = (hit ? a.pos : -a.neg) * hard_focal(hit ? z : -z, kFocalGamma).slope;
          gradient[j] += Tile::kSpecial ? tile.w[j] * slope : slope;
        }
      }
      tile.put(k, gradient, out);
    }
    tile.flush(out, staged);
  }
};

// A block takes a run of a sample.
template <class S, int Held, bool Split, bool Focal, bool Last>
__global__ void __launch_bounds__(kMostThreads<S, Held, Split, Focal>,
                                  kLeastBlocks<S, Held, Split, Focal>)
    fast_backward(const __grid_constant__ Problem problem, const __grid_constant__ FastPlan plan,
                  const double* coef, const __grid_constant__ Grad grad,
                  const __grid_constant__ View gradient) {
  DK_DYNAMIC_SHARED(memory);
  const FastMemory places = plan_backward_memory(plan, sizeof(S), problem.mask.data != nullptr);
  auto* slopes = reinterpret_cast<FastSlopes*>(memory);
  const int first_class = Split ? threadIdx.x / 32 * plan.classes : 0;
  const int left_classes = plan.total - first_class;
  const FastGradient<S, Held, Split, Focal, Last> pass{
      problem,
      plan,
      first_class,
      left_classes < plan.classes ? left_classes : plan.classes,
      slopes + first_class,
      reinterpret_cast<float*>(memory + places.exchange),
      memory + places.staged + (Split ? 0 : threadIdx.x / 32 * places.tile)};
  const View& logits = problem.logits;
  const int64_t runs = (problem.voxels + kRunVoxels - 1) / kRunVoxels;
  const int64_t sample = blockIdx.x / runs, first = blockIdx.x % runs * kRunVoxels;
  for (int c = threadIdx.x; c <= plan.total; c += blockDim.x) {
    FastSlopes of_class{0, 0, 0, 0};
    if (c < plan.total) {
      const Slopes<double> a = slopes_of<double>(problem, coef, grad, sample, c);
      of_class = {static_cast<float>(a.fp), static_cast<float>(a.neg),
                  static_cast<float>(a.i - a.fn - a.fp), static_cast<float>(a.pos)};
    }
    slopes[c] = of_class;
  }
  __syncthreads();
  Run run;
  start_run(problem, plan, sample, first, problem.voxels, memory + places.labels, &run);
  const int64_t row = sample * logits.batch + first_class * logits.channel + first * logits.voxel;
  const int64_t out =
      sample * gradient.batch + first_class * gradient.channel + first * gradient.voxel;
  constexpr int64_t kBytes = sizeof(S);
  pass.write_run(run, static_cast<const unsigned char*>(logits.data) + row * kBytes,
                 static_cast<unsigned char*>(const_cast<void*>(gradient.data)) + out * kBytes);
}

}  // namespace cuda
}  // namespace dicekernels
