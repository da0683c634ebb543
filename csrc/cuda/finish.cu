// The op between the two passes in one launch. Every block adds up the chunks of a few columns
// (sample, class and row in one index); the one that ends last evaluates the formulas over all of
// the totals. No block waits for another, and the order of every addition follows from the shapes.
#include "finish.h"

#include "elements.h"

namespace dicekernels {
namespace cuda {
namespace {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kLoads = 8;  // of one thread, in flight at the same time

__device__ unsigned tickets[kTickets];

// How many threads share a column of `rows` numbers. A tile has the other kThreads / sharers
// columns: at least four, a sector of memory, and more where there are blocks enough anyway.
DK_INLINE int sharers_of(int64_t rows, int64_t columns) {
  const int most = columns > 4096 ? 16 : 64;
  int sharers = 1;
  while (sharers < most && sharers * kLoads < rows) sharers *= 2;
  return sharers;
}

// out[column] = sum over k of in[column / width][k][column % width], k < rows, for one tile.
template <class Load>
__device__ void add_rows(const double* in, int64_t rows, int64_t width, int64_t columns,
                         int sharers, int64_t tile, double* partial, double* out, Load load) {
  const int thread = threadIdx.x, wide = kThreads / sharers, sharer = thread / wide;
  const int64_t column = tile * wide + thread % wide;
  const bool inside = column < columns;
  double sum = 0;
  if (inside) {
    const double* from = in + column / width * rows * width + column % width;
    for (int64_t start = sharer; start < rows; start += int64_t{kLoads} * sharers) {
      double values[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t row = start + j * sharers;
        values[j] = row < rows ? load(from + row * width) : 0;
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) sum += values[j];
    }
  }
  partial[thread] = sum;
  for (int half = sharers / 2; half > 0; half /= 2) {
    __syncthreads();
    if (sharer < half) partial[thread] += partial[thread + half * wide];
  }
  if (sharer == 0 && inside) out[column] = partial[thread];
}

// The teams of common/finish.h. A butterfly gives every lane the same bits: each step adds the same
// two numbers in both.
struct Warp {
  __device__ int64_t rank() const { return threadIdx.x % kWarp; }
  __device__ int64_t size() const { return kWarp; }
  __device__ double sum(double x) const {
    for (int other = kWarp / 2; other > 0; other /= 2) x += __shfl_xor_sync(~0u, x, other);
    return x;
  }
  __device__ double max(double x) const {
    for (int other = kWarp / 2; other > 0; other /= 2) {
      const double y = __shfl_xor_sync(~0u, x, other);
      x = y > x ? y : x;
    }
    return x;
  }
};

struct Block {
  double* partial;  // shared memory, kThreads numbers

  __device__ int64_t rank() const { return threadIdx.x; }
  __device__ int64_t size() const { return kThreads; }
  __device__ Warp part() const { return {}; }
  __device__ int64_t part_rank() const { return threadIdx.x / kWarp; }
  __device__ int64_t parts() const { return kWarps; }
  __device__ void sync() const { __syncthreads(); }
  __device__ double sum(double x) const {
    x = part().sum(x);
    __syncthreads();  // what was in `partial` has been read
    if (threadIdx.x % kWarp == 0) partial[part_rank()] = x;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += partial[warp];
    return total;
  }
  // From the L2 cache, where the other blocks have written it: the L1 cache is one of many.
  __device__ double load(const double* value) const { return __ldcg(value); }
  __device__ void add_samples(const double* totals, int64_t samples, int64_t columns,
                              double* sums) const {
    const int sharers = sharers_of(samples, columns), wide = kThreads / sharers;
    for (int64_t tile = 0; tile * wide < columns; ++tile) {
      __syncthreads();  // what was in `partial` has been read
      add_rows(totals, samples, columns, columns, sharers, tile, partial, sums,
               [&](const double* value) { return load(value); });
    }
  }
};

// Where in the scratch what begins.
struct Scratch {
  int64_t totals, batch_sums, class_weight, pos_weight, neg_weight, lambdas, end;
};
DK_INLINE Scratch scratch_of(const FinishSpec& f, int64_t samples, int64_t classes, int width) {
  Scratch s{};
  s.batch_sums = s.totals + samples * classes * width;
  s.class_weight = s.batch_sums + (f.batch ? classes * width : 0);
  s.pos_weight = s.class_weight + classes;
  s.neg_weight = s.pos_weight + classes;
  s.lambdas = s.neg_weight + classes;
  s.end = s.lambdas + 2;
  return s;
}

__device__ void copy_values(const View& values, int64_t count, double* out) {
  if (!values.data) return;
  for (int64_t at = threadIdx.x; at < count; at += kThreads)
    out[at] = read_as<double>(values, at * values.voxel);
}

// Calls f with a zero of the type of a loss.
template <class F>
__device__ void with_loss(DType dtype, F f) {
  if (dtype == DType::f16) return f(Half{});
  if (dtype == DType::bf16) return f(Bfloat16{});
  if (dtype == DType::f32) return f(0.0f);
  f(0.0);
}

// The rounding of finish() for a loss of this dtype.
struct Rounding {
  DType dtype;

  __device__ double value(double x) const {
    with_loss(dtype, [&](auto zero) { x = widen(narrow<decltype(zero)>(x)); });
    return x;
  }
  __device__ double factor(double x) const { return dtype == DType::f64 ? x : narrow<float>(x); }
};

// Two blocks to a multiprocessor: left alone, ptxas spills to fit a third one beside them.
__global__ void __launch_bounds__(kThreads, 2)
    finish_kernel(const FinishLaunch a, const Places places, const int sharers) {
  DK_SHARED(double, partial, kThreads);
  DK_SHARED(unsigned, taken, 1);
  const int64_t width = a.classes * places.width, columns = a.samples * width;
  const Scratch at = scratch_of(a.spec, a.samples, a.classes, places.width);
  double* const totals = a.scratch + at.totals;
  double* const class_weight = a.scratch + at.class_weight;
  double* const pos_weight = a.scratch + at.pos_weight;
  double* const neg_weight = a.scratch + at.neg_weight;
  double* const lambdas = a.scratch + at.lambdas;
  add_rows(a.sums, a.chunks, width, columns, sharers, blockIdx.x, partial, totals,
           [](const double* value) { return __ldg(value); });
  if (blockIdx.x == 0) {
    copy_values(a.class_weight, a.classes - a.spec.skipped, class_weight);
    copy_values(a.pos_weight, a.classes, pos_weight);
    copy_values(a.neg_weight, a.classes, neg_weight);
    copy_values(a.region_lambda, 1, lambdas);
    copy_values(a.voxel_lambda, 1, lambdas + 1);
  }
  // Each thread puts its writes before the ticket that thread 0 takes for all of them; who takes
  // the last one is behind the fences of all blocks.
  __threadfence();
  __syncthreads();
  unsigned* const ticket = a.own_ticket ? a.own_ticket : tickets + a.ticket;
  if (threadIdx.x == 0) {
    *taken = atomicAdd(ticket, 1u);
    __threadfence();
  }
  __syncthreads();
  if (*taken != gridDim.x - 1) return;
  if (threadIdx.x == 0) *ticket = 0;  // for the next launch

  const Block block{partial};
  const FinishData data{a.samples,
                        a.classes,
                        places,
                        totals,
                        a.scratch + at.batch_sums,
                        a.class_weight.data ? class_weight : nullptr,
                        a.pos_weight.data ? pos_weight : nullptr,
                        a.neg_weight.data ? neg_weight : nullptr,
                        a.region_lambda.data ? block.load(lambdas) : a.region_value,
                        a.voxel_lambda.data ? block.load(lambdas + 1) : a.voxel_value,
                        a.coef};
  const auto store = [&](int64_t at, double value) {
    with_loss(a.loss_dtype, [&](auto zero) {
      static_cast<decltype(zero)*>(a.loss)[at] = narrow<decltype(zero)>(value);
    });
  };
  finish(a.spec, data, block, store, Rounding{a.loss_dtype});
}

}  // namespace

int64_t finish_scratch(const FinishSpec& spec, int64_t samples, int64_t classes) {
  return scratch_of(spec, samples, classes, row_count(spec.rows)).end;
}

void launch_finish(const FinishLaunch& launch, Stream stream) {
  const Places places = places_of(launch.spec.rows);
  const int64_t columns = launch.samples * launch.classes * places.width;
  const int sharers = sharers_of(launch.chunks, columns), wide = kThreads / sharers;
  const int64_t tiles = (columns + wide - 1) / wide;
  DK_LAUNCH((finish_kernel), static_cast<unsigned>(tiles > 0 ? tiles : 1), kThreads, 0,
            static_cast<cudaStream_t>(stream), launch, places, sharers);
}

}  // namespace cuda
}  // namespace dicekernels
