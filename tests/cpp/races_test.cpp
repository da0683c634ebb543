// Races in shared memory: that the detector finds them, and that the kernels of csrc/cuda have
// none.
#include <cmath>
#include <vector>

#include "cuda/fast_backward.cuh"
#include "cuda/fast_sums.cuh"
#include "cuda/finish.cu"
#include "cuda/general_backward.cuh"
#include "cuda/general_sums.cuh"
#include "emulator.h"
#include "named_checks.h"

namespace {

using namespace dicekernels;
using namespace dicekernels::cuda;
using emulator::races::report;

enum class Between { nothing, shuffle, syncwarp, syncthreads };

__global__ void neighbours(Between between, int distance, int* out) {
  DK_SHARED(int, values, 64);
  const int own = threadIdx.x, other = (own + distance) % 64;
  values[own] = own;
  int shuffled = 0;
  if (between == Between::shuffle) shuffled = __shfl_xor_sync(kFullWarp, own, 1);
  if (between == Between::syncwarp) __syncwarp();
  if (between == Between::syncthreads) __syncthreads();
  out[own] = values[other] + shuffled;
}

int races_of(Between between, int distance) {
  std::vector<int> out(64);
  DK_LAUNCH(neighbours, 2, 64, 0, nullptr, between, distance, out.data());
  return report();
}

CHECK(the_detector_sees_what_nothing_orders) {
  EXPECT(races_of(Between::nothing, 1) > 0);
  EXPECT(races_of(Between::nothing, 32) > 0);
  EXPECT(races_of(Between::shuffle, 16) > 0);   // a shuffle orders no memory
  EXPECT(races_of(Between::syncwarp, 32) > 0);  // another warp
}

__global__ void add_up(int* out) {
  DK_SHARED(int, sum, 1);
  if (threadIdx.x == 0) *sum = 0;
  __syncthreads();
  atomicAdd(sum, 1);
  __syncthreads();
  out[threadIdx.x] = *sum;
}

__global__ void lanes_alone(int* out) {
  DK_SHARED(int, values, 64);
  const int own = threadIdx.x;
  values[own] = own;
  __syncwarp();
  out[own] = values[own ^ 1];
}

CHECK(the_detector_sees_nothing_in_kernels_that_are_right) {
  std::vector<int> out(64);
  EXPECT_EQUAL(races_of(Between::nothing, 0), 0);
  EXPECT_EQUAL(races_of(Between::syncthreads, 1), 0);
  EXPECT_EQUAL(races_of(Between::syncthreads, 32), 0);
  DK_LAUNCH(add_up, 2, 64, 0, nullptr, out.data());
  EXPECT_EQUAL(report(), 0);
  DK_LAUNCH(lanes_alone, 2, 64, 0, nullptr, out.data());
  EXPECT_EQUAL(report(), 0);
}

// Two samples of logits with a target and, with `masked`, weights of which some are 0.
struct Tensors {
  std::vector<float> logits, values, mask;
  std::vector<uint8_t> labels;
  std::vector<double> coef, slots;
  std::vector<float> gradient;
  Problem problem{};

  Tensors(int64_t classes, int64_t voxels, bool dense, bool masked, bool last) {
    const int64_t samples = 2, size = samples * classes * voxels;
    problem.batch = samples;
    problem.classes = classes;
    problem.voxels = voxels;
    problem.activation = Activation::softmax;
    problem.rows = (1 << kI) | (1 << kFP) | (1 << kFN) | (1 << kG) | (1 << kN) | (1 << kBad);
    problem.focal_gamma = 2;
    problem.dense = dense;
    for (int64_t i = 0; i < size; ++i) {
      logits.push_back(static_cast<float>(std::sin(1.7 * i)));
      values.push_back(static_cast<float>(0.5 + 0.5 * std::cos(0.9 * i)));
    }
    for (int64_t i = 0; i < samples * voxels; ++i) {
      labels.push_back(static_cast<uint8_t>(i * 7 % classes));
      mask.push_back(static_cast<float>(i % 5) / 4);
    }
    gradient.resize(size);
    const int64_t channel = last ? 1 : voxels, voxel = last ? classes : 1;
    problem.logits = {logits.data(), DType::f32, classes * voxels, channel, voxel};
    problem.target = dense ? View{values.data(), DType::f32, classes * voxels, channel, voxel}
                           : View{labels.data(), DType::u8, voxels, 0, 1};
    if (masked) problem.mask = {mask.data(), DType::f32, voxels, 0, 1};
  }

  View out() const {
    View view = problem.logits;
    view.data = gradient.data();
    return view;
  }

  // After the rows are chosen.
  void allocate() {
    const int64_t width = problem.classes * row_count(problem.rows);
    coef.assign(problem.batch * width, 0.3);
    slots.assign(problem.batch * chunk_count(problem.voxels) * width, 0);
  }

  template <class T>
  void run_general() {
    allocate();
    const TilePlan plan = plan_tile(problem.classes, problem.dense, sizeof(T));
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    cudaFuncSetAttribute(general_sums<T>, most, kMostTileBytes);
    cudaFuncSetAttribute(general_backward<T>, most, kMostTileBytes);
    DK_LAUNCH((general_sums<T>), 2, plan.threads, plan.bytes, nullptr, problem, plan, slots.data());
    DK_LAUNCH((general_backward<T>), 2, plan.threads, plan.bytes, nullptr, problem, plan,
              coef.data(), Grad{}, out());
    EXPECT_EQUAL(cudaGetLastError(), cudaSuccess);
  }

  template <int held, bool split, bool focal, bool last>
  void run_fast() {
    allocate();
    FastPlan plan{};
    const View written = out();
    EXPECT(plan_fast(problem, &written, &plan));
    EXPECT(plan.held == held && (plan.warps > 1) == split && plan.last == last);
    const bool masked = problem.mask.data != nullptr;
    const auto forward = fast_sums<float, held, split, focal, last>;
    const auto backward = fast_backward<float, held, split, focal, last>;
    const int bytes = plan_memory(plan, 4, masked).bytes;
    const int backward_bytes = plan_backward_memory(plan, 4, masked).bytes;
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    cudaFuncSetAttribute(forward, most, kMostSharedBytes);
    cudaFuncSetAttribute(backward, most, kMostSharedBytes);
    DK_LAUNCH((forward), 2, plan.threads(), bytes, nullptr, problem, plan, slots.data());
    DK_LAUNCH((backward), 2, plan.threads(), backward_bytes, nullptr, problem, plan, coef.data(),
              Grad{}, written);
    EXPECT_EQUAL(cudaGetLastError(), cudaSuccess);
  }
};

CHECK(the_general_kernels_have_no_race) {
  const VoxelTerm terms[] = {VoxelTerm::none, VoxelTerm::ce, VoxelTerm::bce,
                             VoxelTerm::focal_sigmoid, VoxelTerm::focal_softmax};
  for (const VoxelTerm term : terms) {
    for (const int64_t classes : {3, 140}) {
      for (const bool dense : {false, true}) {
        Tensors tensors(classes, classes == 3 ? 701 : 77, dense, classes == 3, false);
        tensors.problem.voxel_term = term;
        tensors.problem.rows |=
            term == VoxelTerm::none ? 0 : (1 << kPos) | (1 << kNeg) | (1 << kLs);
        tensors.problem.first_class = term == VoxelTerm::focal_softmax;
        tensors.run_general<float>();
        if (classes == 3) tensors.run_general<double>();
      }
    }
  }
  EXPECT_EQUAL(report(), 0);
}

template <int held, bool split, bool focal, bool last>
void run_fast(int64_t classes, int64_t voxels) {
  for (const bool masked : {false, true}) {
    Tensors tensors(classes, voxels, false, masked, last);
    tensors.problem.voxel_term = focal ? VoxelTerm::focal_sigmoid : VoxelTerm::ce;
    tensors.problem.rows |= focal ? (1 << kPos) | (1 << kNeg) : 1 << kPos;
    tensors.run_fast<held, split, focal, last>();
  }
}

CHECK(the_fast_kernels_have_no_race) {
  run_fast<4, false, false, false>(4, 1200);
  run_fast<4, false, false, true>(4, 1203);
  run_fast<12, true, false, false>(33, 517);
  run_fast<16, true, false, true>(32, 520);
  run_fast<8, true, true, false>(17, 517);
  EXPECT_EQUAL(report(), 0);
}

CHECK(finish_has_no_race) {
  for (const Formula formula : {Formula::ratio, Formula::generalized, Formula::mcc}) {
    for (const bool batch : {false, true}) {
      for (const int64_t chunks : {1, 70}) {
        FinishLaunch launch{};
        FinishSpec& f = launch.spec;
        f.rows = (1 << kI) | (1 << kFP) | (1 << kFN) | (1 << kG) | (1 << kPos) | (1 << kN) |
                 (1 << kBad) | (1 << kTN);
        f.formula = formula;
        f.kappa = f.alpha = f.beta = f.smooth_nr = f.smooth_dr = f.exponent = 1;
        f.batch = batch;
        f.reduction = Reduction::mean;
        launch.samples = 3;
        launch.chunks = chunks;
        launch.classes = 33;
        const int64_t width = launch.classes * row_count(f.rows);
        std::vector<double> sums(launch.samples * chunks * width, 1.5);
        std::vector<double> coef(launch.samples * width), weight(launch.classes, 2);
        std::vector<double> scratch(finish_scratch(f, launch.samples, launch.classes));
        double loss = 0;
        unsigned counter = 0;
        launch.sums = sums.data();
        launch.class_weight = {weight.data(), DType::f64, 0, 0, 1};
        launch.own_ticket = &counter;
        launch.scratch = scratch.data();
        launch.loss = &loss;
        launch.coef = coef.data();
        launch_finish(launch, nullptr);
        EXPECT_EQUAL(cudaGetLastError(), cudaSuccess);
      }
    }
  }
  EXPECT_EQUAL(report(), 0);
}

}  // namespace

int main(int argc, char** argv) {
  return run_check(argc, argv);
}
