// Which instance of a fast kernel a plan names. Every file of one dtype and pass instantiates its
// own ones, so that they compile beside each other.
#pragma once
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "device.h"
#include "fast.h"
#include "launch.h"

namespace dicekernels {
namespace cuda {

// Calls launch(held, split, focal, last) with integral constants; the instances are those that
// plan_classes may choose. S: element of the logits.
template <class S, class F>
void with_instance(const Problem& problem, const FastPlan& plan, F launch) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  constexpr int kMostFocal = sizeof(S) == 4 ? 8 : 4, kShared = sizeof(S) == 4 ? 12 : 8;
  const bool focal = problem.voxel_term == VoxelTerm::focal_sigmoid, split = plan.warps > 1;
  const auto with_layout = [&](auto held, auto is_split, auto is_focal) {
    if (split != is_split() || focal != is_focal()) return;
    constexpr bool kLast = is_split() ? held() == (is_focal() ? kMostFocal : 16)
                                      : held() == 4 || held() == 8 || held() == 16;
    if constexpr (kLast)
      if (plan.last) launch(held, is_split, is_focal, yes);
    if (!plan.last) launch(held, is_split, is_focal, no);
  };
  const auto with_held = [&](auto held) {
    if (plan.held != held()) return;
    with_layout(held, no, no);
    if constexpr (held() == 16 || held() == kShared) with_layout(held, yes, no);
    if constexpr (held() == 4 || held() == kMostFocal) with_layout(held, no, yes);
    if constexpr (held() == kMostFocal) with_layout(held, yes, yes);
  };
  with_held(std::integral_constant<int, 2>{});
  with_held(std::integral_constant<int, 3>{});
  with_held(std::integral_constant<int, 4>{});
  with_held(std::integral_constant<int, 6>{});
  with_held(std::integral_constant<int, 8>{});
  with_held(std::integral_constant<int, 12>{});
  with_held(std::integral_constant<int, 16>{});
}

// A block for each task; CUDA's limit is 8.7e12 voxels away.
inline unsigned blocks_of(int64_t tasks) {
  return static_cast<unsigned>(tasks);
}

// More shared memory than 48 KiB has to be asked for, kernel by kernel and device by device. Never
// less than before: another thread may be about to launch with that. False where it is refused:
// then the runtime holds the error for check_launch, and a launch would put its own in that place.
template <class Kernel>
[[nodiscard]] bool allow_shared(Kernel kernel, int bytes) {
  if (bytes <= 48 * 1024) return true;
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, int> allowed;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return true;
  constexpr auto kMost = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaFuncSetAttribute(kernel, kMost, bytes) != cudaSuccess) return false;
  most = bytes;
  return true;
}

}  // namespace cuda
}  // namespace dicekernels
