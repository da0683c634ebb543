// How the general kernels cut their work: voxels of a tile in shared memory, and the threads'
// roles. A function of the problem's sizes alone, so that the bits of a sum are.
#pragma once
#include "../common/problem.h"

namespace dicekernels {
namespace cuda {

constexpr int kTileBytes = 44 * 1024;
constexpr int kMostTileBytes = 96 * 1024;  // what every architecture from sm_80 on can give
constexpr int kMostTileThreads = 512;      // one a class
constexpr int kVoxelRows = 8;              // values of one voxel beside its classes: tile.cuh

constexpr int power_of_two_below(int64_t x) {
  int power = 1;
  while (2 * int64_t{power} <= x) power *= 2;
  return power;
}

struct TilePlan {
  int threads;      // of a block
  int log2_voxels;  // of a tile
  int pitch;        // from class to class
  int parts;        // threads that share the voxels of a class, when rows are summed
  int lanes;        // threads that share the classes of a voxel, when a softmax is taken
  int bytes;        // of shared memory

  constexpr int voxels() const { return 1 << log2_voxels; }
};

// `value_bytes`: 4, or 8 for float64 logits.
constexpr TilePlan plan_tile(int64_t classes, bool dense, int value_bytes) {
  TilePlan plan{};
  plan.threads = classes <= 128 ? 128 : static_cast<int>((classes + 31) / 32 * 32);
  plan.parts = power_of_two_below(plan.threads / classes);
  const int64_t buffers = dense ? 2 : 1;
  for (plan.log2_voxels = 9;; --plan.log2_voxels) {
    const int voxels = plan.voxels();
    // Threads of neighbouring classes read different banks: `parts` voxels lie between them, or an
    // odd number.
    plan.pitch = voxels >= 32 ? voxels + plan.parts % 32 : voxels + 1;
    // The slopes of the backward pass are six rows of one value a class.
    const int64_t values = classes * (buffers * plan.pitch + 6) + kVoxelRows * voxels;
    const int64_t bytes = values * value_bytes + voxels * int64_t{sizeof(int)};
    plan.bytes = static_cast<int>((bytes + 15) / 16 * 16);
    if (bytes <= (plan.log2_voxels > 3 ? kTileBytes : kMostTileBytes) || plan.log2_voxels == 0)
      break;
  }
  const int lanes = power_of_two_below(plan.threads >> plan.log2_voxels);
  plan.lanes = lanes < 1 ? 1 : lanes > 32 ? 32 : lanes;
  return plan;
}

}  // namespace cuda
}  // namespace dicekernels
