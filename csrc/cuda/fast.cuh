// What both fast passes do with a tile: the logits of 32 x kVector voxels in the registers of a
// warp, or of several warps that share the classes; labels as bytes; the softmax.
//
// There are two ways through a tile. The usual one knows that every voxel counts with weight 1 and
// moves 16 bytes at a time (fast_tiles.cuh: rows of one class, or channels-last). The special one
// takes the rest, voxel by voxel: rows that are not aligned, the end of a run, weights, voxels that
// do not count.
#pragma once
#include "elements.h"
#include "fast.h"

namespace dicekernels {
namespace cuda {

// Elements of 16 bytes.
template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

// Voxels of a thread on the usual way.
template <class S, int Held, bool Split>
constexpr int kRowVoxels = row_voxels(sizeof(S), Held, Split);
template <class S, bool Split>
constexpr int kLastVoxels = last_voxels(sizeof(S), Split);

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class S, int Held, bool Split, bool Focal>
constexpr int kMostThreads = Split ? 32 * most_sharing(sizeof(S), Held, Focal) : kFastThreads;
// Blocks of a multiprocessor that the registers have to suffice for. Left alone, ptxas stops at
// some step of occupancy and spills a few bytes for it. Warps that share classes wait for each
// other: only with another block beside theirs is something loaded while they compute.
template <class S, int Held, bool Split, bool Focal>
constexpr int kLeastBlocks = least_blocks(sizeof(S), Held, Split, Focal);

// Voxels of a thread on the special way, which is rare and should not make the code long.
constexpr int kSpecialVoxels = 1;

template <int N>
struct alignas(4 * N) Words {
  uint32_t word[N];
};

__device__ __forceinline__ void unpack_pair(uint32_t word, float* x, Half) {
  unpack_half2(word, x[0], x[1]);
}
__device__ __forceinline__ void unpack_pair(uint32_t word, float* x, Bfloat16) {
  unpack_bfloat162(word, x[0], x[1]);
}
__device__ __forceinline__ uint32_t pack_pair(const float* x, Half) {
  return pack_half2(x[0], x[1]);
}
__device__ __forceinline__ uint32_t pack_pair(const float* x, Bfloat16) {
  return pack_bfloat162(x[0], x[1]);
}

// Elements of type S as floats, and back.
template <class S, int N, int V>
__device__ __forceinline__ void unpack(const Words<N>& raw, float (&x)[V]) {
  static_assert(N * 4 == V * sizeof(S));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(S) == 4)
      x[i] = __uint_as_float(raw.word[i]);
    else
      unpack_pair(raw.word[i], &x[2 * i], S{});
  }
}
template <class S, int V>
__device__ __forceinline__ auto pack(const float (&x)[V]) {
  constexpr int kWords = V * sizeof(S) / 4;
  Words<kWords> raw;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(S) == 4)
      raw.word[i] = __float_as_uint(x[i]);
    else
      raw.word[i] = pack_pair(&x[2 * i], S{});
  }
  return raw;
}

__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b, Half) {
#if defined(__CUDA_ARCH__)
  uint32_t c;
  asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#else
  float x[2], y[2];
  unpack_half2(a, x[0], x[1]);
  unpack_half2(b, y[0], y[1]);
  return pack_half2(fmaxf(x[0], y[0]), fmaxf(x[1], y[1]));
#endif
}
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b, Bfloat16) {
#if defined(__CUDA_ARCH__)
  uint32_t c;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#else
  float x[2], y[2];
  unpack_bfloat162(a, x[0], x[1]);
  unpack_bfloat162(b, y[0], y[1]);
  return pack_bfloat162(fmaxf(x[0], y[0]), fmaxf(x[1], y[1]));
#endif
}
template <int N>
__device__ __forceinline__ Words<N> load_words(const void* at) {
  if constexpr (N == 4) {
    const uint4 raw = __ldg(static_cast<const uint4*>(at));
    return {{raw.x, raw.y, raw.z, raw.w}};
  } else {
    const uint2 raw = __ldg(static_cast<const uint2*>(at));
    return {{raw.x, raw.y}};
  }
}
template <int N>
__device__ __forceinline__ void store_words(void* at, const Words<N>& x) {
  *static_cast<Words<N>*>(at) = x;
}

// Voxels of one sample that are handled together, and what is known of them. All pointers are those
// of its first voxel.
struct Run {
  int count;
  const uint8_t* labels;
  const float* weights;  // null: all ones
};

// Labels and weights of a run as bytes and floats in shared memory. Returns how many labels of this
// thread are out of range. Called, since its many dtypes would stand in every kernel.
__device__ __noinline__ inline int load_run(const Problem& problem, int64_t sample, int64_t first,
                                            int count, uint8_t* labels, float* weights) {
  int bad = 0;
  const View &target = problem.target, &mask = problem.mask;
  for (int at = threadIdx.x; at < count; at += blockDim.x) {
    const Label label = read_label(problem, sample * target.batch + (first + at) * target.voxel);
    float weight = 1;
    if (mask.data != nullptr) {
      weight = read_as<float>(mask, sample * mask.batch + (first + at) * mask.voxel);
      weights[at] = weight;
    }
    bad += label.bad && weight != 0;
    labels[at] = label.value < 0 || weight == 0 ? kIgnoredLabel : label.value;
  }
  __syncthreads();
  return bad;
}

// The run from voxel `first` on, with its labels where they can be read as bytes: `memory` has room
// for them. Returns as load_run.
__device__ inline int start_run(const Problem& problem, const FastPlan& plan, int64_t sample,
                                int64_t first, int64_t end, unsigned char* memory, Run* run) {
  const int64_t left = end - first;
  run->count = static_cast<int>(left < kRunVoxels ? left : kRunVoxels);
  run->weights = nullptr;
  if (plan.direct) {
    run->labels =
        static_cast<const uint8_t*>(problem.target.data) + sample * problem.target.batch + first;
    return 0;
  }
  auto* weights = reinterpret_cast<float*>(memory + kRunVoxels);
  run->labels = memory;
  if (problem.mask.data != nullptr) run->weights = weights;
  return load_run(problem, sample, first, run->count, memory, weights);
}

// One tile as a thread sees it: `Held` classes of `Voxels` voxels that are `Step` apart, of which
// classes `Surely` ones exist in every thread.
template <class S, int Held, bool Split, int Surely, int Voxels, int Step>
struct FastTile {
  static constexpr int kVoxels = Voxels;
  const FastPlan& plan;
  const int first_class, classes;  // of this warp
  int at, end;                     // this thread's first voxel and the end, both in the run
  int y[Voxels];                   // labels, counted from first_class
  float x[Held][Voxels];

  __device__ FastTile(const FastPlan& plan_, int first_class_, int classes_)
      : plan(plan_), first_class(first_class_), classes(classes_) {}

  __device__ bool has(int k) const { return k < Surely || k < classes; }
  __device__ bool exists(int j) const { return at + j * Step < end; }
  // This warp has the class of the voxel's label.
  __device__ bool owns_label(int j) const {
    return static_cast<unsigned>(y[j]) < static_cast<unsigned>(classes);
  }

  __device__ void place(int tile_first, int end_) {
    at = tile_first + threadIdx.x % 32 * (Step == 1 ? Voxels : 1);
    end = end_;
  }

  __device__ void largest(float (&top)[Voxels]) const {
#pragma unroll
    for (int j = 0; j < Voxels; ++j) {
      top[j] = x[0][j];
#pragma unroll
      for (int k = 1; k < Held; ++k) top[j] = fmaxf(top[j], x[k][j]);
    }
  }
};

// What exchange combines with. The order of a sum has to be the same in all warps, so it starts
// with nothing; a maximum may start with what the warp has.
struct Largest {
  __device__ float start(float own) const { return own; }
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float start(float) const { return 0; }
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Combines the values that each of `warps` warps has of the same voxels; all get the same bits.
// `memory`: 32 * Room floats for each warp, of which those from 32 * Place on are used: values of
// the next call need others, since warps that are late may still read these. Both are the same for
// all tiles of a kernel, and addresses of the same warp differ by a constant.
template <int Room, int Place, int N, class F>
__device__ __forceinline__ void exchange(float* memory, int warps, float (&value)[N], F combine) {
  // As many at a time as one access takes.
  constexpr int kPack = (N | Room | Place) % 4 == 0 ? 4 : (N | Room | Place) % 2 == 0 ? 2 : 1;
  struct alignas(4 * kPack) Pack {
    float of[kPack];
  };
  Pack* packs = reinterpret_cast<Pack*>(memory) + threadIdx.x % 32;
  Pack* own = packs + threadIdx.x / 32 * (32 * Room / kPack);
#pragma unroll
  for (int i = 0; i < N / kPack; ++i) {
    Pack pack;
#pragma unroll
    for (int j = 0; j < kPack; ++j) pack.of[j] = value[kPack * i + j];
    own[32 * (Place / kPack + i)] = pack;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = combine.start(value[i]);
#pragma unroll 1
  for (int other = 0; other < warps; ++other, packs += 32 * Room / kPack)
#pragma unroll
    for (int i = 0; i < N / kPack; ++i) {
      const Pack pack = packs[32 * (Place / kPack + i)];
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        float& into = value[kPack * i + j];
        into = combine(into, pack.of[j]);
      }
    }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

}  // namespace cuda
}  // namespace dicekernels
