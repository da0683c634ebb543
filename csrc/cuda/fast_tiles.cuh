// Where the logits of a tile come from and its gradient goes to: rows of a class, channels-last, or
// one voxel at a time. All have the same functions, which the passes call in this order: place,
// load_labels, load, load_own, then put for each class and flush.
#pragma once
#include "fast.cuh"

namespace dicekernels {
namespace cuda {

template <class S>
__device__ __forceinline__ float read_element(const unsigned char* at) {
  if constexpr (sizeof(S) == 2)
    return widen(S{__ldg(reinterpret_cast<const unsigned short*>(at))});
  else
    return __ldg(reinterpret_cast<const float*>(at));
}

// The compiler would rather start every address from the row than add one product to `from`.
__device__ __forceinline__ const unsigned char* opaque(const unsigned char* from) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(from));
#endif
  return from;
}

// The product of two 32-bit numbers. From a widened factor that does not change in a loop, the
// compiler makes a product of 64 bits.
__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// Classes that exist in every thread of a kernel.
template <class S, int Held, bool Split, bool Focal, bool Last>
constexpr int kSurely = fewest_classes(sizeof(S), Held, Split, Focal, Last);

// The usual way of rows: the neighbouring voxels of a class are one access.
template <class S, int Held, bool Split, int Surely>
struct RowTile : FastTile<S, Held, Split, Surely, kRowVoxels<S, Held, Split>, 1> {
  using Base = FastTile<S, Held, Split, Surely, kRowVoxels<S, Held, Split>, 1>;
  using Base::Base, Base::kVoxels;
  static constexpr bool kSpecial = false;
  static constexpr float w[kVoxels] = {};  // no weights
  static constexpr int kWords = kVoxels * static_cast<int>(sizeof(S)) / 4;
  const unsigned char* from;
  Words<kWords> most;

  // Whether all labels are in range.
  __device__ bool load_labels(const uint8_t* labels) {
    uint32_t packed[kVoxels / 4];
    memcpy(packed, __builtin_assume_aligned(labels + this->at, kVoxels), kVoxels);
    // A label out of range has the highest bit of its byte, or gets it from the difference.
    const uint32_t more = 0x01010101u * static_cast<uint32_t>(kFastClasses - this->plan.total);
    uint32_t high = 0;
#pragma unroll
    for (int i = 0; i < kVoxels / 4; ++i) high |= packed[i] | (packed[i] + more);
#pragma unroll
    for (int j = 0; j < kVoxels; ++j)
      this->y[j] =
          static_cast<int>(__byte_perm(packed[j / 4], 0, 0x4440 + j % 4)) - this->first_class;
    return (high & 0x80808080u) == 0;
  }

  __device__ bool owns(int j) const { return !Split || this->owns_label(j); }

  // `row`: of this warp's first class, from the run's first voxel on. A register without a class
  // repeats the last one.
  __device__ void load(const unsigned char* row, unsigned char*) {
    from = opaque(row + static_cast<uint32_t>(this->at) * sizeof(S));
    Words<kWords> raw[Held];
#pragma unroll
    for (int k = 0; k < Held; ++k) {
      const int own = this->has(k) ? k : this->classes - 1;
      raw[k] = load_words<kWords>(from + static_cast<uint64_t>(this->plan.channel_bytes) *
                                             static_cast<uint32_t>(own));
    }
#pragma unroll
    for (int k = 0; k < Held; ++k) unpack<S>(raw[k], this->x[k]);
    if constexpr (sizeof(S) == 2) {
      most = raw[0];
#pragma unroll
      for (int k = 1; k < Held; ++k)
#pragma unroll
        for (int i = 0; i < kWords; ++i)
          most.word[i] = larger_pair(most.word[i], raw[k].word[i], S{});
    }
  }
  // Of half precision, two voxels with one instruction.
  __device__ void largest(float (&top)[kVoxels]) const {
    if constexpr (sizeof(S) == 2)
      unpack<S>(most, top);
    else
      Base::largest(top);
  }

  // The logit of each voxel's own label, if this warp has it, as it stands in memory: no register
  // has a number that is known at run time only. The line is in the first-level cache.
  __device__ void load_own(float (&own)[kVoxels]) const {
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      own[j] = 0;
      if (owns(j))
        own[j] = read_element<S>(from + j * sizeof(S) +
                                 wide_product(this->y[j], this->plan.channel_bytes));
    }
  }

  // `out`: as `row`, of the gradient.
  __device__ void put(int k, const float (&gradient)[kVoxels], unsigned char* out) {
    store_words(out +
                    static_cast<uint64_t>(this->plan.out_channel_bytes) * static_cast<uint32_t>(k) +
                    static_cast<uint32_t>(this->at) * sizeof(S),
                pack<S>(gradient));
  }
  __device__ void flush(unsigned char*, unsigned char*) const {}
};

// The usual way of channels-last: the tile is one piece of memory. It is brought to shared memory
// as it lies, or with a gap after each voxel so that neighbouring threads read different banks, and
// the gradient goes back the same way.
template <class S, int Held, bool Split, int Surely>
struct LastTile : FastTile<S, Held, Split, Surely, kLastVoxels<S, Split>, 32> {
  using Base = FastTile<S, Held, Split, Surely, kLastVoxels<S, Split>, 32>;
  using Base::Base, Base::kVoxels;
  static constexpr bool kSpecial = false;
  static constexpr float w[kVoxels] = {};     // no weights
  static constexpr int kPacked = kVector<S>;  // classes of 16 bytes
  unsigned char* staged;  // of this thread's first voxel and this warp's first class

  __device__ bool load_labels(const uint8_t* labels) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      const int label = labels[this->at + 32 * j];
      all &= label < this->plan.total;
      this->y[j] = label - this->first_class;
    }
    return all;
  }

  __device__ bool owns(int j) const { return !Split || this->owns_label(j); }

  __device__ void load(const unsigned char* row, unsigned char* memory) {
    each_chunk(memory, [&](unsigned char* inside, int64_t outside) {
      copy_async_16(inside, row - first_bytes() + outside);
    });
    copy_async_wait();
    meet();
    staged = memory + threadIdx.x % 32 * this->plan.pitch_bytes + first_bytes();
    const bool whole = Held % kPacked == 0 && this->plan.whole_chunks;
#pragma unroll
    for (int k = 0; k < Held; ++k)
#pragma unroll
      for (int j = 0; j < kVoxels; ++j) {
        if (whole) break;
        this->x[k][j] = -INFINITY;
        if (this->has(k)) this->x[k][j] = widen(*element(j, k));
      }
    if constexpr (Held % kPacked == 0)
      if (whole)
#pragma unroll
        for (int k = 0; k < Held; k += kPacked)
#pragma unroll
          for (int j = 0; j < kVoxels; ++j) {
            float values[kPacked];
#pragma unroll
            for (int i = 0; i < kPacked; ++i) values[i] = -INFINITY;
            if (this->has(k)) unpack<S>(*reinterpret_cast<const Words<4>*>(element(j, k)), values);
#pragma unroll
            for (int i = 0; i < kPacked; ++i) this->x[k + i][j] = values[i];
          }
  }

  __device__ void load_own(float (&own)[kVoxels]) const {
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) {
      own[j] = 0;
      if (owns(j)) own[j] = widen(*element(j, this->y[j]));
    }
    meet();  // nobody reads the tile any more
  }

  __device__ void put(int k, const float (&gradient)[kVoxels], unsigned char*) {
#pragma unroll
    for (int j = 0; j < kVoxels; ++j) this->x[k][j] = gradient[j];
  }
  __device__ void flush(unsigned char* out, unsigned char* memory) const {
    const bool whole = Held % kPacked == 0 && this->plan.whole_chunks;
#pragma unroll
    for (int k = 0; k < Held; ++k)
#pragma unroll
      for (int j = 0; j < kVoxels; ++j)
        if (!whole && this->has(k)) *element(j, k) = narrow<S>(this->x[k][j]);
    if constexpr (Held % kPacked == 0)
      if (whole)
#pragma unroll
        for (int k = 0; k < Held; k += kPacked)
#pragma unroll
          for (int j = 0; j < kVoxels; ++j) {
            float values[kPacked];
#pragma unroll
            for (int i = 0; i < kPacked; ++i) values[i] = this->x[k + i][j];
            if (this->has(k)) *reinterpret_cast<Words<4>*>(element(j, k)) = pack<S>(values);
          }
    meet();
    each_chunk(memory, [&](unsigned char* inside, int64_t outside) {
      store_words(out - first_bytes() + outside, *reinterpret_cast<const Words<4>*>(inside));
    });
    meet();
  }

 private:
  __device__ int first_bytes() const { return this->first_class * static_cast<int>(sizeof(S)); }
  __device__ S* element(int j, int k) const {
    return reinterpret_cast<S*>(staged + j * 32 * this->plan.pitch_bytes) + k;
  }
  // Of the threads that share the tile.
  __device__ static void meet() {
    if constexpr (Split)
      __syncthreads();
    else
      __syncwarp();
  }
  // f(place in shared memory, bytes from the run's first voxel) for every 16 bytes of the tile.
  template <class F>
  __device__ void each_chunk(unsigned char* memory, F f) const {
    const int members = Split ? 32 * this->plan.warps : 32;
    const int rank = Split ? threadIdx.x : threadIdx.x % 32;
    const int row_bytes = this->plan.total * static_cast<int>(sizeof(S));
    const int chunks = 32 * kVoxels / 16 * row_bytes;
    const int64_t tile = static_cast<int64_t>(this->at - threadIdx.x % 32) * row_bytes;
#pragma unroll 4
    for (int chunk = rank; chunk < chunks; chunk += members) {
      // A gap after every row, if rows have gaps.
      const int gaps = static_cast<int>(__umulhi(chunk, this->plan.gap_magic));
      f(memory + 16 * (chunk + gaps), tile + 16 * chunk);
    }
  }
};

// One voxel of any layout. A voxel that does not count has weight 0, a label that no class has, and
// finite logits.
template <class S, int Held, bool Split, int Surely>
struct SpecialTile : FastTile<S, Held, Split, Surely, kSpecialVoxels, 32> {
  using Base = FastTile<S, Held, Split, Surely, kSpecialVoxels, 32>;
  using Base::Base, Base::kVoxels;
  static_assert(kVoxels == 1, "addresses below are those of one voxel");
  static constexpr bool kSpecial = true;
  bool counts;
  float w[1];
  const unsigned char* from;

  // Returns how many labels are out of range, if that was not looked at before.
  __device__ int load_labels(const Problem& problem, const Run& run) {
    const int label = this->exists(0) ? run.labels[this->at] : this->plan.total;
    counts = label < this->plan.total;
    w[0] = !counts ? 0 : run.weights != nullptr ? run.weights[this->at] : 1;
    this->y[0] = (counts ? label : this->plan.total) - this->first_class;
    return this->exists(0) && !counts && this->plan.direct && problem.ignore_index != label;
  }

  __device__ bool owns(int j) const { return this->owns_label(j); }

  __device__ void load(const unsigned char* row, unsigned char*) {
    from = opaque(row + static_cast<uint32_t>(this->at) * this->plan.voxel_bytes);
#pragma unroll
    for (int k = 0; k < Held; ++k) {
      this->x[k][0] = 0;
      if (!counts) continue;
      const int own = this->has(k) ? k : this->classes - 1;
      this->x[k][0] = read_element<S>(from + static_cast<uint64_t>(this->plan.channel_bytes) *
                                                 static_cast<uint32_t>(own));
    }
  }

  __device__ void load_own(float (&own)[1]) const {
    own[0] = 0;
    if (owns(0))
      own[0] = read_element<S>(from + static_cast<uint64_t>(this->plan.channel_bytes) *
                                          static_cast<uint32_t>(this->y[0]));
  }

  __device__ void put(int k, const float (&gradient)[1], unsigned char* out) {
    if (!this->exists(0)) return;
    unsigned char* at =
        out + static_cast<uint64_t>(this->plan.out_channel_bytes) * static_cast<uint32_t>(k) +
        static_cast<uint64_t>(this->plan.out_voxel_bytes) * static_cast<uint32_t>(this->at);
    *reinterpret_cast<S*>(at) = narrow<S>(gradient[0]);
  }
  __device__ void flush(unsigned char*, unsigned char*) const {}
};

}  // namespace cuda
}  // namespace dicekernels
