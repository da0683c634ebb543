// The launch of the op finish: no torch, no CUDA headers.
#pragma once
#include "../common/finish.h"
#include "launch.h"

namespace dicekernels {
namespace cuda {

// Counters that finish.cu keeps on every device, zero whenever no launch uses them.
constexpr int kTickets = 65536;

// All memory is the device's. The weights have the stride View::voxel; without data they are ones,
// as are lambdas, whose value then stands beside them.
struct FinishLaunch {
  FinishSpec spec;
  int64_t samples, chunks, classes;
  const double* sums;  // (B, K, C, R)
  View class_weight, pos_weight, neg_weight;
  View region_lambda, voxel_lambda;
  double region_value = 1, voxel_value = 1;
  int ticket = -1;            // one of the counters that no launch at the same time uses, or -1:
  unsigned* own_ticket = {};  // a counter of the caller's, zero
  double* scratch = {};       // finish_scratch() numbers
  void* loss = {};
  DType loss_dtype = DType::f64;
  double* coef = {};  // (B, C, R)
};

int64_t finish_scratch(const FinishSpec& spec, int64_t samples, int64_t classes);

// One launch, also of a problem without samples or classes.
void launch_finish(const FinishLaunch& launch, Stream stream);

}  // namespace cuda
}  // namespace dicekernels
