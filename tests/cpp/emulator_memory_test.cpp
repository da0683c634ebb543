// The emulator tested on kernels with known results: memory, atomics, and what the host sees.
#include <vector>

#include "emulator.h"
#include "named_checks.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

__global__ void last_block(int* total, unsigned* done, int* result) {
  DK_SHARED(bool, is_last, 1);
  atomicAdd(total, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (is_last[0] && threadIdx.x == 0) *result = *total * 2;
}

CHECK(last_block_done) {
  unsigned done = 0;
  for (int run = 0; run < 2; ++run) {
    int total = 0, result = -1;
    DK_LAUNCH(last_block, 10, 50, 0, nullptr, &total, &done, &result);
    EXPECT_EQUAL(result, 249500);  // 2 * (0 + ... + 499)
    EXPECT_EQUAL(done, 0u);        // atomicInc has wrapped around
  }
}

struct Counters {
  unsigned long long big;
  float real;
  double real2;
  unsigned lock;
  int largest, smallest, plain;
  unsigned bits;
};

__global__ void count(Counters* c) {
  atomicAdd(&c->big, 1ull << 33);
  atomicAdd(&c->real, 0.5f);
  atomicAdd(&c->real2, 0.25);
  atomicMax(&c->largest, static_cast<int>(threadIdx.x));
  atomicMin(&c->smallest, -static_cast<int>(threadIdx.x));
  atomicOr(&c->bits, 1u << threadIdx.x % 32);
  while (atomicCAS(&c->lock, 0, 1)) __nanosleep(10);
  const int before = c->plain;
  __nanosleep(10);  // others run here, and none gets in
  c->plain = before + 1;
  atomicExch(&c->lock, 0);
}

CHECK(atomics) {
  Counters c{};
  DK_LAUNCH(count, 3, 64, 0, nullptr, &c);
  EXPECT_EQUAL(c.big, 192ull << 33);
  EXPECT_EQUAL(c.real, 96.0f);
  EXPECT_EQUAL(c.real2, 48.0);
  EXPECT_EQUAL(c.largest, 63);
  EXPECT_EQUAL(c.smallest, -63);
  EXPECT_EQUAL(c.bits, kFull);
  EXPECT_EQUAL(c.plain, 192);
}

// Each instantiation has a scratch of its own, which all threads that call it share.
template <int kBase>
__device__ int neighbour(int value) {
  DK_SHARED(int, scratch, 64);
  scratch[threadIdx.x] = kBase + value;
  __syncthreads();
  return scratch[(threadIdx.x + 1) % 64];
}

__global__ void shared_arrays(int* out, int n) {
  DK_DYNAMIC_SHARED(bytes);
  float4* vectors = reinterpret_cast<float4*>(bytes);
  const int i = threadIdx.x;
  vectors[i] = make_float4(i, n, 2, 3);
  const int a = neighbour<1000>(i);
  const int b = neighbour<2000>(i);
  const float4 v = vectors[63 - i];
  out[i] = a + b + static_cast<int>(v.x + v.y + v.z + v.w) + neighbour<1000>(0) - 1000;
}

CHECK(shared_memory) {
  std::vector<int> out(64);
  DK_LAUNCH(shared_arrays, 1, 64, 64 * sizeof(float4), nullptr, out.data(), 7);
  EXPECT_EQUAL(out[0], 1001 + 2001 + 63 + 12);
  EXPECT_EQUAL(out[63], 1000 + 2000 + 0 + 12);
}

__global__ void reads_before_writing(int* stale) {
  DK_SHARED(float, fixed, 5);
  DK_DYNAMIC_SHARED(bytes);
  if (fixed[4] == fixed[4] || bytes[6] != 0xff) ++*stale;
  fixed[4] = 1;
  bytes[6] = 0;
}

CHECK(shared_memory_is_poisoned_in_every_block) {
  int stale = 0;
  DK_LAUNCH(reads_before_writing, 5, 1, 7, nullptr, &stale);
  EXPECT_EQUAL(stale, 0);
}

__global__ void big_static() {
  DK_SHARED(double, huge, 6145);
  huge[0] = 1;
}

CHECK(static_shared_memory_above_48_kib) {
  const std::string message = message_of([] { DK_LAUNCH(big_static, 1, 1, 0, nullptr); });
  EXPECT(contains(message, "49160 bytes of static shared memory"));
}

// For AddressSanitizer to find: an element after the end. No check of the list, as without the
// sanitizer it would only do damage.
__global__ void overruns(bool dynamic) {
  DK_SHARED(int, fixed, 5);
  DK_DYNAMIC_SHARED(bytes);
  if (dynamic) {
    bytes[threadIdx.x] = 1;
  } else {
    fixed[threadIdx.x] = 1;
  }
}

template <int>
__global__ void touches_last_byte(unsigned bytes, int* runs) {
  DK_DYNAMIC_SHARED(memory);
  memory[bytes - 1] = 1;
  ++*runs;
}

CHECK(launch_errors) {
  int runs = 0;
  auto error = [&](dim3 grid, dim3 block, unsigned bytes) {
    DK_LAUNCH((touches_last_byte<0>), grid, block, bytes, nullptr, bytes, &runs);
    return cudaGetLastError();
  };
  EXPECT_EQUAL(error(1, 1, 48 << 10), cudaSuccess);
  EXPECT_EQUAL(error(1, 1, (48 << 10) + 1), cudaErrorInvalidValue);
  EXPECT_EQUAL(error(1, 1025, 8), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(error(1, dim3(32, 33), 8), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(error(1, 0, 8), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(error(0, 1, 8), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(error(dim3(1, 65536), 1, 8), cudaErrorInvalidConfiguration);
  EXPECT_EQUAL(runs, 1);
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  EXPECT_EQUAL(cudaFuncSetAttribute(touches_last_byte<0>, attribute, (227 << 10) + 1),
               cudaErrorInvalidValue);
  EXPECT_EQUAL(cudaGetLastError(), cudaErrorInvalidValue);
  EXPECT_EQUAL(cudaFuncSetAttribute(touches_last_byte<0>, attribute, 227 << 10), cudaSuccess);
  EXPECT_EQUAL(error(1, 1, 227 << 10), cudaSuccess);
  EXPECT_EQUAL(error(1, 1, (227 << 10) + 1), cudaErrorInvalidValue);
  EXPECT_EQUAL(runs, 2);
  EXPECT_EQUAL(cudaGetLastError(), cudaSuccess);
  EXPECT_EQUAL(std::string(cudaGetErrorString(cudaErrorInvalidConfiguration)),
               "invalid configuration argument");
}

CHECK(intrinsics) {
  EXPECT_EQUAL(__float_as_uint(1.0f), 0x3f800000u);
  EXPECT_EQUAL(__longlong_as_double(0x4000000000000000), 2.0);
  EXPECT_EQUAL(__byte_perm(0x33221100u, 0x77665544u, 0x7531u), 0x77553311u);
  EXPECT_EQUAL(__funnelshift_l(0x80000001u, 0x2u, 1), 0x5u);
  EXPECT_EQUAL(__funnelshift_r(0x80000001u, 0x3u, 4), 0x38000000u);
  EXPECT_EQUAL(__brev(0x00000006u), 0x60000000u);
  EXPECT(__clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0 && __popc(255) == 8);
  EXPECT_EQUAL(min(3, 4u), 3u);
  EXPECT_EQUAL(max(std::nanf(""), -1.0f), -1.0f);
  EXPECT(alignof(float4) == 16 && alignof(ushort4) == 8 && alignof(double4) == 16);
  EXPECT(alignof(float3) == 4 && alignof(uchar4) == 4 && alignof(float2) == 8);
  const float4 v = make_float4(1, 2, 3, 4);
  float4 copy{};
  __stcs(&copy, __ldg(&v));
  EXPECT_EQUAL(copy.w, 4.0f);
  unsigned word = 0;
  EXPECT_EQUAL(cudaMemsetAsync(&word, 0x5a, 4, nullptr), cudaSuccess);
  EXPECT_EQUAL(word, 0x5a5a5a5au);
}

}  // namespace

void overrun_shared_memory(bool dynamic) {
  DK_LAUNCH(overruns, 1, 6, 5, nullptr, dynamic);
}
