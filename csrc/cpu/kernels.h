// The entry points of one instruction set, and the choice among them.
#pragma once
#include "../common/problem.h"

namespace dicekernels {

// One chunk of one sample. `slot` is (C, R) doubles and is written whole; `workspace` holds
// workspace_bytes(problem) bytes at 64-byte alignment.
using SumsChunk = void (*)(const Problem&, int64_t sample, int64_t first_voxel, int64_t voxel_count,
                           char* workspace, double* slot, BadLabels* bad);

// Writes the gradient of one chunk; `gradient` has the shape (B, C, V) of the logits and their
// dtype. `coef` is dLoss/dsums times grad_loss, (C, R) doubles of this sample.
using BackwardChunk = void (*)(const Problem&, const double* coef, int64_t sample,
                               int64_t first_voxel, int64_t voxel_count, char* workspace,
                               const View& gradient);

struct Kernels {
  const char* name;
  SumsChunk sums;
  BackwardChunk sums_backward;
  int64_t (*workspace_bytes)(const Problem&);
};

// The best set that this processor has, or the one that DICEKERNELS_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace dicekernels
