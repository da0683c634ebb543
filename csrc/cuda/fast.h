// How the fast kernels cut their work. They take what people train with most: label maps, a softmax
// with the overlap rows of the product kind, cross entropy or the sigmoid focal term beside them,
// up to kFastClasses classes, one voxel stride.
#pragma once
#include <initializer_list>

#include "../common/problem.h"

namespace dicekernels {
namespace cuda {

constexpr int kFastClasses = 128;   // labels are bytes, and the sums of their hits shared memory
constexpr int kIgnoredLabel = 255;  // of a voxel that does not count
constexpr int kFastThreads = 128;   // of a block whose warps have all classes each
constexpr float kFocalGamma = 2;    // the only one that has fast kernels
constexpr int kMostSharedBytes = 99 * 1024;  // of a block, on every GPU from sm_80 on
constexpr int kSlopeBytes = 16;              // of one class
constexpr int kClassBytes = 24;              // of the sums of one class
constexpr int kHitBytes = 16;  // sums of one thread and class over the voxels of that label

struct FastPlan {
  int held;     // classes that a thread holds in registers, a template's argument
  int warps;    // that share the classes of a voxel; 1: each warp has voxels of its own
  int classes;  // of a warp
  int total;    // of all warps
  bool last;    // channels-last, without gaps between voxels
  bool wide;    // logits and gradient are accessed by 16 bytes, labels by as many voxels
  bool direct;  // labels are bytes that need no other check than that they are in range
  uint32_t channel_bytes, voxel_bytes;          // strides of the logits
  uint32_t out_channel_bytes, out_voxel_bytes;  // strides of the gradient
  // Channels-last: bytes from voxel to voxel in shared memory; 2^32 / (16-byte chunks of a voxel)
  // rounded up, if a chunk is left free after each; whether 16 bytes divide the classes.
  uint32_t pitch_bytes, gap_magic;
  bool whole_chunks;

  constexpr int threads() const { return warps > 1 ? 32 * warps : kFastThreads; }
};

// Most warps that share the classes of a voxel: as many as leave each thread the registers it
// needs.
constexpr int most_sharing(int element_bytes, int held, bool focal) {
  if (focal) return element_bytes == 4 ? 16 : 12;
  return held == 8 ? 6 : 8;
}

// Voxels of a thread on the usual way of rows: those of 16 bytes, unless the registers would leave
// room for one block alone.
constexpr int row_voxels(int element_bytes, int held, bool split) {
  return split && held == 16 ? 4 : 16 / element_bytes;
}

constexpr int least_blocks(int element_bytes, int held, bool split, bool focal) {
  if (split) return focal ? 1 : 2;
  if (focal) return 3;
  const int values = held * 16 / element_bytes;
  if (values <= 16) return 6;
  if (values > 64) return 2;
  return element_bytes == 2 && held == 8 ? 3 : 4;
}

// Voxels of a thread on the usual way of channels-last. Where warps share the classes, a tile of
// float32 with more would leave room for one block alone.
constexpr int last_voxels(int element_bytes, bool split) {
  return split && element_bytes == 4 ? 2 : 4;
}

// Numbers of classes that a thread may hold where it has all of them. The focal term takes so many
// registers and so much code for each class that fewer are held; it and channels-last come in fewer
// variants.
constexpr int kHeld[] = {2, 3, 4, 6, 8, 12, 16};
constexpr bool is_held(int held, bool few) {
  return !few || held == 4 || held == 8 || held == 16;
}
// As few registers without a class as possible.
constexpr FastPlan plan_classes(int64_t classes, bool focal, int element_bytes, bool last) {
  FastPlan plan{};
  plan.last = last;
  plan.warps = 1;
  const int most = !focal ? 16 : element_bytes == 4 ? 8 : 4;
  for (const int held : kHeld) {
    if (classes > held || held > most || !is_held(held, focal || last)) continue;
    plan.held = held;
    plan.classes = static_cast<int>(classes);
    return plan;
  }
  int64_t least = 0;
  for (const int held : {8, 12, 16, 4}) {
    const int64_t warps = (classes + held - 1) / held;
    // Half precision: twice the voxels want half of the classes.
    const bool rows = !focal && !last;
    const bool exists = rows ? held == 16 || held == (element_bytes == 4 ? 12 : 8) : held == most;
    if (!exists || (least > 0 && warps * held >= least)) continue;
    if (warps > most_sharing(element_bytes, held, focal)) continue;
    least = warps * held;
    // Whole 16-byte chunks, where channels-last has such and the registers hold them.
    const bool whole = last && classes * element_bytes % 16 == 0 && held * element_bytes % 16 == 0;
    const int64_t unit = whole ? 16 / element_bytes : 1;
    plan.held = held;
    plan.warps = static_cast<int>(warps);
    plan.classes = static_cast<int>((classes + warps * unit - 1) / (warps * unit) * unit);
  }
  return plan;
}

// The fewest classes that a thread has of the problems that a kernel is chosen for.
constexpr int fewest_classes(int element_bytes, int held, bool split, bool focal, bool last) {
  int fewest = held;
  for (int classes = 2; classes <= kFastClasses; ++classes) {
    const FastPlan plan = plan_classes(classes, focal, element_bytes, last);
    if (plan.held != held || (plan.warps > 1) != split) continue;
    const int of_last_warp = classes - (plan.warps - 1) * plan.classes;
    fewest = of_last_warp < fewest ? of_last_warp : fewest;
  }
  return fewest;
}

// Where the parts of shared memory begin; the hits of the forward pass, or the slopes of the
// backward pass, at 0. tile: bytes of one that is staged.
struct FastMemory {
  int exchange, classes, bad, staged, tile, labels, bytes;
};

constexpr FastMemory plan_parts(const FastPlan& plan, int element_bytes, bool masked, int first,
                                int exchanged, int class_bytes) {
  const bool split = plan.warps > 1;
  const int voxels =
      plan.last ? last_voxels(element_bytes, split) : row_voxels(element_bytes, plan.held, split);
  const int row = plan.warps * 32 * voxels * static_cast<int>(sizeof(float));
  FastMemory m{};
  m.exchange = m.classes =
      first;  // what is added up at the end takes the place of what was exchanged
  const int exchange = split ? exchanged * row : 0, classes = plan.total * class_bytes;
  m.bad = first + (exchange > classes ? exchange : classes);
  m.staged = (m.bad + 4 + 15) / 16 * 16;
  m.tile = plan.last ? 32 * voxels * static_cast<int>(plan.pitch_bytes) : 0;
  m.labels = m.staged + (split ? 1 : kFastThreads / 32) * m.tile;
  m.bytes = m.labels + (plan.direct ? 0 : static_cast<int>(kRunVoxels));
  if (masked) m.bytes += static_cast<int>(kRunVoxels * sizeof(float));
  return m;
}

constexpr FastMemory plan_memory(const FastPlan& plan, int element_bytes, bool masked) {
  return plan_parts(plan, element_bytes, masked, plan.classes * plan.threads() * kHitBytes, 2,
                    kClassBytes);
}
constexpr FastMemory plan_backward_memory(const FastPlan& plan, int element_bytes, bool masked) {
  return plan_parts(plan, element_bytes, masked, (plan.total + 1) * kSlopeBytes, 3, 0);
}

inline bool takes_fast(const Problem& p) {
  const bool term = p.voxel_term == VoxelTerm::none || p.voxel_term == VoxelTerm::ce ||
                    (p.voxel_term == VoxelTerm::focal_sigmoid && p.focal_gamma == kFocalGamma);
  const int64_t others = (1 << kLs) | (1 << kTN);
  return !p.dense && term && p.classes > 1 && p.classes <= kFastClasses &&
         p.activation == Activation::softmax && p.overlap == Overlap::product &&
         !(p.rows & others) && p.logits.dtype != DType::f64 &&
         !(p.mask.data != nullptr && p.product_mask);
}

// Whether rows of neighbouring voxels can be accessed by `bytes`.
inline bool aligned(const View& view, int64_t element_bytes, int64_t bytes) {
  const int64_t strides = (view.batch | view.channel) * element_bytes;
  return view.voxel == 1 && reinterpret_cast<uintptr_t>(view.data) % bytes == 0 &&
         strides % bytes == 0;
}

// Whether a sample is channels-last in one piece that can be accessed by 16 bytes.
inline bool packed_last(const View& view, int64_t element_bytes, int64_t classes) {
  return view.channel == 1 && view.voxel == classes && classes > 1 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch * element_bytes % 16 == 0;
}

// The plan for a problem that takes_fast; nothing where the kernels hold fewer classes, or where an
// offset within a run, or to a class, has more than 32 bits. `gradient`: what the backward pass
// writes, else null.
inline bool plan_fast(const Problem& p, const View* gradient, FastPlan* plan) {
  if (!takes_fast(p)) return false;
  const int bytes = p.logits.dtype == DType::f32 ? 4 : 2;
  const View& out = gradient == nullptr ? p.logits : *gradient;
  const bool last = packed_last(p.logits, bytes, p.classes) && packed_last(out, bytes, p.classes);
  *plan = plan_classes(p.classes, p.voxel_term == VoxelTerm::focal_sigmoid, bytes, last);
  if (plan->held == 0) return false;
  plan->total = static_cast<int>(p.classes);
  const int64_t ignored = p.ignore_index.value_or(-1);
  plan->direct = p.target.dtype == DType::u8 && p.target.voxel == 1 && p.mask.data == nullptr &&
                 !(ignored >= 0 && ignored < p.classes);
  plan->wide = last || (aligned(p.logits, bytes, 16) && aligned(out, bytes, 16) &&
                        (!plan->direct || aligned(p.target, 1, 16 / bytes)));
  const auto fits = [](int64_t stride) {
    return stride >= 0 && stride < (int64_t{1} << 32) / (kRunVoxels + 1);
  };
  const auto fits_class = [](int64_t stride) { return stride >= 0 && stride < int64_t{1} << 32; };
  if (!fits(p.logits.voxel * bytes) || !fits_class(p.logits.channel * bytes) ||
      !fits(out.voxel * bytes) || !fits_class(out.channel * bytes))
    return false;
  plan->channel_bytes = static_cast<uint32_t>(p.logits.channel * bytes);
  plan->voxel_bytes = static_cast<uint32_t>(p.logits.voxel * bytes);
  plan->out_channel_bytes = static_cast<uint32_t>(out.channel * bytes);
  plan->out_voxel_bytes = static_cast<uint32_t>(out.voxel * bytes);
  const uint32_t row = plan->voxel_bytes, chunks = row / 16;
  plan->whole_chunks = last && row % 16 == 0;
  // An odd number of chunks from voxel to voxel: eight neighbouring threads then meet all banks.
  const bool gap = plan->whole_chunks && chunks % 2 == 0;
  plan->pitch_bytes = gap ? row + 16 : row;
  plan->gap_magic = gap ? static_cast<uint32_t>((uint64_t{1} << 32) / chunks + 1) : 0;
  const bool masked = p.mask.data != nullptr;
  return plan_memory(*plan, bytes, masked).bytes <= kMostSharedBytes &&
         plan_backward_memory(*plan, bytes, masked).bytes <= kMostSharedBytes;
}

}  // namespace cuda
}  // namespace dicekernels
