// What every kernel of every backend is told about its problem. Plain data, no torch headers.
#pragma once
#include "arguments.h"

#if defined(__CUDACC__)
#define DK_INLINE __host__ __device__ __forceinline__
#else
#define DK_INLINE inline __attribute__((always_inline))
#endif

namespace dicekernels {

// The numbers are shared with dicekernels/spec.py; they travel through the op schemas as integers.
enum class Activation : int64_t { none = 0, sigmoid = 1, softmax = 2 };
enum class Overlap : int64_t { product = 0, min = 1, squared = 2, voxel_squared = 3 };
enum class VoxelTerm : int64_t { none = 0, ce = 1, bce = 2, focal_sigmoid = 3, focal_softmax = 4 };

// Rows of the sums. A problem switches some of them on (a bit mask); those stand in the last
// dimension of (B, K, C, R) in this order.
enum Row : int { kI = 0, kFP, kFN, kG, kPos, kNeg, kLs, kN, kBad, kTN, kRowCount };

static constexpr bool has_row(int64_t rows, Row row) {
  return (rows >> row) & 1;
}

// Position of a row among the rows that are on.
static constexpr int row_index(int64_t rows, Row row) {
  int index = 0;
  for (int r = 0; r < row; ++r) index += (rows >> r) & 1;
  return index;
}
static constexpr int row_count(int64_t rows) {
  return row_index(rows, kRowCount);
}

// One fp32 partial sum covers at most kRunVoxels voxels; longer runs lose digits.
constexpr int64_t kRunVoxels = 4096;
constexpr int64_t kMaxChunks = 2048;

// Voxels of one chunk: from the size of the sample alone, so the bits of a sum depend on neither
// thread count nor grid. dicekernels/spec.py has the same function.
static constexpr int64_t chunk_voxels(int64_t voxels) {
  const int64_t span = kRunVoxels * kMaxChunks;
  const int64_t runs = (voxels + span - 1) / span;
  return kRunVoxels * (runs > 1 ? runs : 1);
}
static constexpr int64_t chunk_count(int64_t voxels) {
  const int64_t chunk = chunk_voxels(voxels);
  return voxels > 0 ? (voxels + chunk - 1) / chunk : 1;
}

enum class DType : int32_t { u8, i8, i16, i32, i64, f16, bf16, f32, f64 };

// A tensor (B, C, V) with its space flattened to one stride; strides in elements.
struct View {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch = 0, channel = 0, voxel = 0;
};

struct SumsSpec {
  DK_SUMS_NUMBERS(DK_FIELD)
};

struct Problem : SumsSpec {
  int64_t batch, classes, voxels;
  View logits;  // (B, C, V)
  View target;  // (B, C, V) if dense, else labels (B, V)
  View mask;    // (B, V) voxel weights; data == nullptr: all ones
};

// dLoss of the incoming gradient: what the slopes of output (sample, class) are multiplied by.
struct Grad {
  const void* data = nullptr;  // null: 1
  DType dtype = DType::f32;
  int64_t batch = 0, output = 0;  // strides in elements, 0 where it is broadcast
  int64_t skipped = 0;            // leading classes without an output of their own
};

// Labels outside [0, C) that are not ignore_index.
struct BadLabels {
  int64_t count = 0, sample = -1, voxel = -1;
  double label = 0;  // of the first one
};

}  // namespace dicekernels
