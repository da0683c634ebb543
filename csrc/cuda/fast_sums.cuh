// Forward for the losses that fast.h names.
#pragma once
#include "fast_tiles.cuh"

namespace dicekernels {
namespace cuda {

// What the voxels of one label add up to, in one thread: p, 1 - p, the voxel term, the weights.
// No thread writes to the sums of another one, so nothing waits and the order is fixed.
using Hits = float4;

// Rows of one class and block, in shared memory.
struct ClassSums {
  float fp, neg, i, fn, pos, count;
};

template <class S, int Held, bool Split, bool Focal, bool Last>
struct FastSums {
  static constexpr int kExist = kSurely<S, Held, Split, Focal, Last>;
  using Usual =
      std::conditional_t<Last, LastTile<S, Held, Split, kExist>, RowTile<S, Held, Split, kExist>>;
  using Special = SpecialTile<S, Held, Split, kExist>;
  const Problem& problem;
  const FastPlan& plan;
  const int first_class, classes;  // of this warp
  unsigned char* hits;             // (labels, threads), of this thread
  float* exchanged;
  unsigned char* staged;  // channels-last: of the tile
  int ce;
  // Labels out of range of the run, in shared memory: a rare case should keep no register.
  int* bad;
  float fp[Held], neg[Held];

  __device__ FastSums(const Problem& problem_, const FastPlan& plan_, int first_class_,
                      int classes_, unsigned char* memory, const FastMemory& places)
      : problem(problem_),
        plan(plan_),
        first_class(first_class_),
        classes(classes_),
        hits(memory + threadIdx.x * sizeof(Hits)),
        exchanged(reinterpret_cast<float*>(memory + places.exchange)),
        staged(memory + places.staged + (Split ? 0 : threadIdx.x / 32 * places.tile)),
        ce(problem_.voxel_term == VoxelTerm::ce),
        bad(reinterpret_cast<int*>(memory + places.bad)) {
#if defined(__CUDA_ARCH__)
    asm("" : "+r"(ce));  // a register, else it is compared anew in every tile
#endif
  }

  __device__ int threads() const { return Split ? 32 * plan.warps : kFastThreads; }
  __device__ Hits& hits_of(int label) const {
    return *reinterpret_cast<Hits*>(hits + label * (threads() * int{sizeof(Hits)}));
  }

  __device__ void clear() {
#pragma unroll
    for (int k = 0; k < Held; ++k) fp[k] = neg[k] = 0;
    for (int slot = 0; slot < classes; ++slot) hits_of(slot) = make_float4(0, 0, 0, 0);
  }

  // Every tile of the run that is this warp's turn. The usual way has a loop of its own.
  __device__ void add_run(const Run& run, const unsigned char* row) {
    row = opaque(row);
    constexpr int kTile = 32 * Usual::kVoxels;
    const int step = Split ? kTile : kFastThreads / 32 * kTile;
    const int last = plan.wide && run.weights == nullptr ? run.count - kTile : -1;
    for (int first = Split ? 0 : threadIdx.x / 32 * kTile; first < run.count; first += step) {
      for (; first <= last; first += step) {
        Usual tile(plan, first_class, classes);
        tile.place(first, run.count);
        if (!__all_sync(kWholeWarp, tile.load_labels(run.labels))) break;
        add(tile, row);
      }
      for (int part = 0; part < kTile && first + part < run.count; part += 32 * kSpecialVoxels) {
        Special tile(plan, first_class, classes);
        tile.place(first + part, run.count);
        const int wrong = tile.load_labels(problem, run);
        if (wrong > 0 && (!Split || first_class == 0)) atomicAdd(bad, wrong);
        add(tile, row);
      }
    }
  }

 private:
  template <class Tile>
  __device__ __forceinline__ void add(Tile& tile, const unsigned char* row) {
    constexpr int kVoxels = Tile::kVoxels;
    float own[kVoxels], top[kVoxels], sum[kVoxels], pos[kVoxels] = {};
    tile.load(row, staged);
    // Early, beside the other loads; where warps share the classes few need it, and registers are
    // rare.
    if constexpr (!Split) tile.load_own(own);
    tile.largest(top);
    if constexpr (Split) exchange<2 * Usual::kVoxels, 0>(exchanged, plan.warps, top, Largest{});
#pragma unroll
    for (int k = 0; k < Held; ++k)
#pragma unroll
      for (int j = 0; j < kVoxels; ++j) {
        if constexpr (Focal) add_focal(tile, k, j, &pos[j]);
        // The largest is taken off before the product: the cross entropy of a perfect voxel is 0.
        tile.x[k][j] = exp2_fast((tile.x[k][j] - top[j]) * kLog2E);
        if (tile.has(k)) sum[j] = k == 0 ? tile.x[k][j] : sum[j] + tile.x[k][j];
      }
    if constexpr (Split)
      exchange<2 * Usual::kVoxels, Usual::kVoxels>(exchanged, plan.warps, sum, Sum{});
    if constexpr (Split) tile.load_own(own);
    float scale[kVoxels];
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      scale[j] = reciprocal(sum[j]);
      own[j] = (own[j] - top[j]) * kLog2E;
    }
    // Where only the owner needs it, it waits until the owner is known.
    float own_exp[kVoxels];
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      own_exp[j] = exp2_fast(own[j]);
      if (!Focal) pos[j] = own[j];  // without the cross entropy not looked at: spares a register
    }
    if (!Focal && !Split && ce)
#pragma unroll
      for (int j = 0; j < kVoxels; ++j) pos[j] = log2_sum(sum[j], own[j]);
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      const float e = own_exp[j], weight = Tile::kSpecial ? tile.w[j] : 1;
      const float miss = fmaf(-e, scale[j], 1.0f);
      if constexpr (Tile::kSpecial) scale[j] *= weight;
      if (!tile.owns(j)) continue;
      if (!Focal && Split && ce) pos[j] = log2_sum(sum[j], own[j]);
      Hits& into = hits_of(tile.y[j]);
      const Hits now = into;
      into = make_float4(fmaf(e, scale[j], now.x), fmaf(miss, weight, now.y),
                         fmaf(pos[j], weight, now.z), now.w + weight);
    }
#pragma unroll
    for (int k = 0; k < Held; ++k)
#pragma unroll
      for (int j = 0; j < kVoxels; ++j)
        if (tile.y[j] != k) fp[k] = fmaf(tile.x[k][j], scale[j], fp[k]);
  }

  // The focal loss of one logit; that of the own label goes to `pos`, where the hits take it.
  template <class Tile>
  __device__ __forceinline__ void add_focal(const Tile& tile, int k, int j, float* pos) {
    const bool hit = tile.y[j] == k;
    const float z = tile.x[k][j];
    const float loss = hard_focal(hit ? z : -z, kFocalGamma).loss;
    if (hit)
      *pos = loss;
    else
      neg[k] += Tile::kSpecial ? tile.w[j] * loss : loss;
  }
};

// Adds up what the threads have and writes it (first run of a chunk) or adds it to the slot.
template <class S, int Held, bool Split, bool Focal, bool Last>
__device__ void flush(const FastSums<S, Held, Split, Focal, Last>& from, ClassSums* sums,
                      double* slot, bool first_run) {
  constexpr int kWarps = kFastThreads / 32;
  DK_SHARED(float, parts, 2 * kWarps * Held);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, threads = from.threads();
  const int classes = from.classes, total = from.plan.total;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Held; ++k) {
    const float fp = warp_sum(from.fp[k]), neg = Focal ? warp_sum(from.neg[k]) : 0;
    if (lane > 0 || k >= classes) continue;
    if constexpr (Split) {
      sums[from.first_class + k].fp = fp;
      sums[from.first_class + k].neg = neg;
    } else {
      parts[2 * (warp * Held + k)] = fp;
      parts[2 * (warp * Held + k) + 1] = neg;
    }
  }
  // The classes of this warp where they are shared, else those whose turn it is.
  for (int k = Split ? 0 : warp; k < classes; k += Split ? 1 : kWarps) {
    const Hits* hits = &from.hits_of(k) - threadIdx.x;
    Hits sum = make_float4(0, 0, 0, 0);
    for (int at = Split ? threadIdx.x : lane; at < threads; at += Split ? threads : 32) {
      sum.x += hits[at].x;
      sum.y += hits[at].y;
      sum.z += hits[at].z;
      sum.w += hits[at].w;
    }
    sum = make_float4(warp_sum(sum.x), warp_sum(sum.y), warp_sum(sum.z), warp_sum(sum.w));
    if (lane > 0) continue;
    ClassSums& into = sums[from.first_class + k];
    into.i = sum.x;
    into.fn = sum.y;
    into.pos = sum.z;
    into.count = sum.w;
  }
  __syncthreads();
  const int64_t rows = from.problem.rows;
  for (int c = threadIdx.x; c < total; c += threads) {
    const ClassSums& sum = sums[c];
    double fp = sum.fp, neg = sum.neg, n = 0;
    if constexpr (!Split) {
      fp = neg = 0;
      for (int part = 0; part < kWarps; ++part) {
        fp += parts[2 * (part * Held + c)];
        neg += parts[2 * (part * Held + c) + 1];
      }
    }
    // Every voxel that counts has one label.
    for (int other = 0; other < total; ++other) n += sums[other].count;
    double* row = slot + c * row_count(rows);
    const auto write = [&](Row name, double value) {
      if (!has_row(rows, name)) return;
      *row = first_run ? value : *row + value;
      ++row;
    };
    write(kI, sum.i);
    write(kFP, fp);
    write(kFN, sum.fn);
    write(kG, sum.count);
    // The cross entropy is summed in units of log 2.
    write(kPos, !Focal ? sum.pos * 0.69314718055994531 : sum.pos);
    write(kNeg, neg);
    write(kN, n);
    write(kBad, c == 0 ? *from.bad : 0);
  }
  __syncthreads();
}

// A block takes a chunk of a sample, run by run; an empty sample has one chunk of zeros.
template <class S, int Held, bool Split, bool Focal, bool Last>
__global__ void __launch_bounds__(kMostThreads<S, Held, Split, Focal>,
                                  kLeastBlocks<S, Held, Split, Focal>)
    fast_sums(const __grid_constant__ Problem problem, const __grid_constant__ FastPlan plan,
              double* slots) {
  DK_DYNAMIC_SHARED(memory);
  const FastMemory places = plan_memory(plan, sizeof(S), problem.mask.data != nullptr);
  const int first_class = Split ? threadIdx.x / 32 * plan.classes : 0;
  const int left_classes = plan.total - first_class;
  FastSums<S, Held, Split, Focal, Last> sums(
      problem, plan, first_class, left_classes < plan.classes ? left_classes : plan.classes, memory,
      places);
  auto* class_sums = reinterpret_cast<ClassSums*>(memory + places.classes);

  const View& logits = problem.logits;
  const int64_t chunks = chunk_count(problem.voxels), size = chunk_voxels(problem.voxels);
  const int64_t sample = blockIdx.x / chunks, start = blockIdx.x % chunks * size;
  const int64_t left = problem.voxels - start, voxels = left < size ? left : size;
  const unsigned char* row =
      static_cast<const unsigned char*>(logits.data) +
      (sample * logits.batch + first_class * logits.channel + start * logits.voxel) *
          int64_t{sizeof(S)};
  const int runs = static_cast<int>((voxels + kRunVoxels - 1) / kRunVoxels);
  for (int at = 0; at < runs || at == 0; ++at) {
    Run run;
    const int64_t first = at * kRunVoxels;
    if (threadIdx.x == 0) *sums.bad = 0;
    __syncthreads();
    const int bad = start_run(problem, plan, sample, start + first, start + voxels,
                              memory + places.labels, &run);
    if (bad > 0) atomicAdd(sums.bad, bad);
    sums.clear();
    sums.add_run(run, row + first * plan.voxel_bytes);
    flush(sums, class_sums, slots + blockIdx.x * problem.classes * row_count(problem.rows),
          at == 0);
  }
}

}  // namespace cuda
}  // namespace dicekernels
