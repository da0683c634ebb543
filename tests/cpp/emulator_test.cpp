// The emulator tested on kernels with known results: threads that meet, and threads that do not.
// `emulator_test NAME` runs one check under the schedule of the environment.
#include "emulator.h"

#include <cstdio>
#include <thread>
#include <vector>

#include "named_checks.h"

void overrun_shared_memory(bool dynamic);

namespace {

constexpr unsigned kFull = 0xffffffffu;

// ceil(threads / 32) partial sums per block, then one sum by the first warp.
template <typename T, bool kBarrier>
__global__ void block_sum(const T* values, unsigned n, T* sums) {
  DK_SHARED(T, partial, 32);
  T sum = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    sum += values[i];
  }
  for (int delta = 16; delta; delta /= 2) sum += __shfl_down_sync(kFull, sum, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (kBarrier) __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : T(0);
  for (int delta = 16; delta; delta /= 2) sum += __shfl_xor_sync(kFull, sum, delta);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename T, bool kBarrier = true>
T sum_of_first(unsigned n, unsigned blocks, unsigned threads) {
  std::vector<T> values(n), sums(blocks);
  for (unsigned i = 0; i < n; ++i) values[i] = static_cast<T>(i);
  DK_LAUNCH((block_sum<T, kBarrier>), blocks, threads, 0, nullptr, values.data(), n, sums.data());
  EXPECT_EQUAL(cudaGetLastError(), cudaSuccess);
  T total = 0;
  for (T sum : sums) total += sum;
  return total;
}

CHECK(reduction) {
  EXPECT_EQUAL((sum_of_first<int>(1000, 1, 256)), 499500);
  EXPECT_EQUAL((sum_of_first<long long>(100000, 7, 128)), 4999950000);
  EXPECT_EQUAL((sum_of_first<double>(100000, 3, 32)), 4999950000.0);
}

CHECK(threads_1024) {
  EXPECT_EQUAL((sum_of_first<int>(5000, 2, 1024)), 12497500);
}

// The bug that the schedules are for.
CHECK(missing_barrier_is_detected) {
  int wrong = 0;
  for (auto order :
       {emulator::Order::kForward, emulator::Order::kReverse, emulator::Order::kShuffle}) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      emulator::set_order(order, seed);
      EXPECT_EQUAL((sum_of_first<int, true>(1000, 1, 256)), 499500);
      wrong += sum_of_first<int, false>(1000, 1, 256) != 499500;
    }
  }
  EXPECT(wrong > 0);
}

__global__ void indices(uint3* threads, uint3* blocks, int* sizes) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  threads[i] = threadIdx;
  blocks[i] = blockIdx;
  atomicAdd(&sizes[i], 1);
}

CHECK(three_dimensions) {
  const dim3 grid(2, 3, 2), block(3, 2, 5);
  std::vector<uint3> threads(360), blocks(360);
  std::vector<int> visits(360, 0);
  DK_LAUNCH(indices, grid, block, 0, nullptr, threads.data(), blocks.data(), visits.data());
  for (int visit : visits) EXPECT_EQUAL(visit, 1);
  // 200 = 6 * 30 + 20: block 6 is (0, 0, 1), thread 20 = 3 * 6 + 2 is (2, 0, 3).
  EXPECT(blocks[200].x == 0 && blocks[200].y == 0 && blocks[200].z == 1);
  EXPECT(threads[200].x == 2 && threads[200].y == 0 && threads[200].z == 3);
}

struct Shuffled {
  int broadcast, segment, wrapped, up, up8, down, down8, exclusive, xor16;
  double twice;
};

__global__ void shuffles(Shuffled* out) {
  const int lane = threadIdx.x % 32;
  Shuffled& s = out[threadIdx.x];
  s.broadcast = __shfl_sync(kFull, lane * 10, 5);
  s.segment = __shfl_sync(kFull, lane * 10, 3, 8);
  s.wrapped = __shfl_sync(kFull, lane * 10, 35);
  s.up = __shfl_up_sync(kFull, lane, 2);
  s.up8 = __shfl_up_sync(kFull, lane, 3, 8);
  s.down = __shfl_down_sync(kFull, lane, 4);
  s.down8 = __shfl_down_sync(kFull, lane, 3, 8);
  s.exclusive = __shfl_xor_sync(kFull, lane, 9);
  s.xor16 = __shfl_xor_sync(kFull, lane, 20, 16);
  s.twice = __shfl_xor_sync(kFull, lane + 0.25, 1);
}

CHECK(shuffle_values) {
  std::vector<Shuffled> out(64);
  DK_LAUNCH(shuffles, 1, 64, 0, nullptr, out.data());
  for (int lane : {0, 13, 31}) {
    EXPECT_EQUAL(out[lane].broadcast, 50);
    EXPECT_EQUAL(out[lane].wrapped, 30);
    EXPECT_EQUAL(out[lane].exclusive, lane ^ 9);
    EXPECT_EQUAL(out[32 + lane].exclusive, lane ^ 9);
  }
  EXPECT_EQUAL(out[13].segment, 110);  // lane 3 of the segment that begins at 8
  EXPECT_EQUAL(out[1].up, 1);          // below the warp: its own
  EXPECT_EQUAL(out[13].up, 11);
  EXPECT_EQUAL(out[10].up8, 10);  // 7 is in the segment before
  EXPECT_EQUAL(out[12].up8, 9);
  EXPECT_EQUAL(out[27].down, 31);
  EXPECT_EQUAL(out[28].down, 28);
  EXPECT_EQUAL(out[12].down8, 15);
  EXPECT_EQUAL(out[13].down8, 13);
  EXPECT_EQUAL(out[20].xor16, 0);  // an earlier segment may be read,
  EXPECT_EQUAL(out[3].xor16, 3);   // a later one, 23, may not
  EXPECT_EQUAL(out[6].twice, 7.25);
}

struct Votes {
  unsigned ballot, match, match64, sum, smallest;
  int any, all, none, largest;
};

__global__ void votes(Votes* out) {
  const int lane = threadIdx.x;
  Votes& v = out[lane];
  v.ballot = __ballot_sync(kFull, lane % 3 == 0);
  v.match = __match_any_sync(kFull, lane / 10);
  v.match64 = __match_any_sync(kFull, static_cast<long long>(lane % 2) << 40);
  v.any = __any_sync(kFull, lane == 7);
  v.all = __all_sync(kFull, lane < 32);
  v.none = __all_sync(kFull, lane < 31);
  v.sum = __reduce_add_sync(kFull, 1u << lane);
  v.largest = __reduce_max_sync(kFull, -5 - lane);
  v.smallest = __reduce_min_sync(kFull, 7u + lane);
}

CHECK(vote_values) {
  std::vector<Votes> out(32);
  DK_LAUNCH(votes, 1, 32, 0, nullptr, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQUAL(out[lane].ballot, 0x49249249u);
    EXPECT_EQUAL(out[lane].match64, lane % 2 ? 0xaaaaaaaau : 0x55555555u);
    EXPECT(out[lane].any && out[lane].all && !out[lane].none);
    EXPECT_EQUAL(out[lane].sum, kFull);
    EXPECT_EQUAL(out[lane].largest, -5);
    EXPECT_EQUAL(out[lane].smallest, 7u);
  }
  EXPECT_EQUAL(out[3].match, 0x000003ffu);
  EXPECT_EQUAL(out[30].match, 0xc0000000u);
}

// Two halves of a warp that diverge, and a last warp of 8 lanes.
__global__ void partial_warps(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x >= 32) {
    out[threadIdx.x] = __reduce_add_sync(0xffu, lane);
  } else if (lane < 16) {
    for (int i = 0; i < 3; ++i) out[threadIdx.x] = __ballot_sync(0x0000ffffu, lane % 2);
  } else {
    out[threadIdx.x] = __ballot_sync(0xffff0000u, lane % 2);
  }
  __syncwarp(threadIdx.x < 32 ? kFull : 0xffu);
}

CHECK(masks_of_fewer_lanes) {
  std::vector<unsigned> out(40);
  DK_LAUNCH(partial_warps, 1, 40, 0, nullptr, out.data());
  EXPECT_EQUAL(out[4], 0x0000aaaau);
  EXPECT_EQUAL(out[20], 0xaaaa0000u);
  EXPECT_EQUAL(out[35], 28u);
}

__global__ void diverges(int kind) {
  const unsigned lane = threadIdx.x;
  if (kind == 0 && lane < 24) __syncthreads();
  if (kind == 0 && lane >= 24) __syncwarp();
  if (kind == 1 && lane < 24) __shfl_sync(kFull, 1, 0);
  if (kind == 2 && lane < 8) __syncthreads();
  if (kind == 2 && lane >= 8) __syncthreads();
  if (kind == 3) __syncwarp(lane < 16 ? kFull : 0xffff0000u);
  if (kind == 4) __syncwarp(2);
}

CHECK(divergence_raises) {
  auto message = [](int kind) {
    return message_of([&] { DK_LAUNCH(diverges, 1, 32, 0, nullptr, kind); });
  };
  const std::string barrier = message(0);
  EXPECT(contains(barrier, "kernel diverges, block (0, 0, 0)"));
  EXPECT(contains(barrier, "deadlock") && contains(barrier, "24 wait at __syncthreads"));
  EXPECT(contains(barrier, "8 wait at __syncwarp") && contains(barrier, "0xffffffff"));
  EXPECT(contains(message(1), "24 wait at __shfl_sync") && contains(message(1), "8 have exited"));
  EXPECT(contains(message(2), "different barriers"));
  EXPECT(contains(message(3), "deadlock"));
  EXPECT(contains(message(4), "leaves it out"));
  EXPECT(contains(message_of([] { DK_LAUNCH(diverges, 1, 16, 0, nullptr, 0); }), "not have") ||
         contains(message_of([] { DK_LAUNCH(diverges, 1, 30, 0, nullptr, 0); }), "not have"));
  EXPECT_EQUAL((sum_of_first<int>(1000, 1, 256)), 499500);
}

__global__ void exits_early(unsigned keep, int* out) {
  DK_SHARED(int, slot, 1);
  if (threadIdx.x >= keep) return;
  if (threadIdx.x == keep - 1) slot[0] = 41;
  __syncthreads();
  out[threadIdx.x] = slot[0] + 1;
}

CHECK(exited_threads_do_not_block_a_barrier) {
  for (unsigned keep : {1u, 31u, 40u, 100u}) {
    std::vector<int> out(100, 0);
    DK_LAUNCH(exits_early, 2, 100, 0, nullptr, keep, out.data());
    for (unsigned i = 0; i < 100; ++i) EXPECT_EQUAL(out[i], i < keep ? 42 : 0);
  }
}

__global__ void throws(unsigned thread) {
  __syncthreads();
  if (threadIdx.x == thread) throw std::runtime_error("from thread " + std::to_string(thread));
  __syncthreads();
}

CHECK(exceptions_propagate) {
  for (unsigned thread : {0u, 77u, 127u}) {
    EXPECT_EQUAL(message_of([&] { DK_LAUNCH(throws, 3, 128, 0, nullptr, thread); }),
                 "from thread " + std::to_string(thread));
    EXPECT_EQUAL((sum_of_first<int>(1000, 2, 256)), 499500);
  }
}

CHECK(two_os_threads) {
  long long sums[2] = {};
  auto work = [&](int which) {
    for (int i = 0; i < 20; ++i) sums[which] += sum_of_first<int>(1000 + which, 2, 128);
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  EXPECT_EQUAL(sums[0], 20ll * 499500);
  EXPECT_EQUAL(sums[1], 20ll * 500500);
}

__global__ void record_order(int* order, int* next) {
  order[(*next)++] = blockIdx.x * 4 + threadIdx.x;
}

}  // namespace

// The order in which two blocks of four threads begin.
extern "C" __attribute__((visibility("default"))) void emulator_test_order(int* order) {
  int next = 0;
  DK_LAUNCH(record_order, 2, 4, 0, nullptr, order, &next);
}

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--overrun") overrun_shared_memory(argc > 2);
  return run_check(argc, argv);
}
