// The text of a CUDA kernel, compiled by a host compiler and run on the CPU.
//
// Every thread of a block is a fiber, all on the OS thread that launches, and blocks run one after
// another. A thread runs until it waits for others (__syncthreads, a warp operation), offers to
// (an atomic) or ends. Which one goes on then is up to the schedule: DICEKERNELS_EMULATOR_ORDER or
// emulator::set_order. What hardware leaves undefined or hangs on is an exception where it can be
// seen, and reads as 0xff where it cannot.
//
// Not there: threads of different blocks that wait for each other, waiting on plain memory (only
// atomics and __nanosleep give way), cooperative groups, half precision, textures.
#pragma once

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "machine.h"

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::current->machine->block_index)
#define blockDim (::emulator::current->machine->block_dim)
#define gridDim (::emulator::current->machine->grid_dim)

// `type name[count]` in shared memory. Each declaration, and each instantiation of a template
// around it, has memory of its own.
#define DK_SHARED(type, name, count) \
  static char name##_tag;            \
  type* const name = ::emulator::shared_array<type, (count)>(&name##_tag)
#define DK_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::emulator::current->machine->dynamic_shared()

// kernel<<<grid, block, shared_bytes, stream>>>(...). Parentheses around the kernel protect its
// commas.
#define DK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::emulator::launch(#kernel, kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__)

namespace emulator {

template <typename T, size_t count>
T* shared_array(const void* tag) {
  static_assert(count > 0 && alignof(T) <= 16);
  return static_cast<T*>(current->machine->shared(tag, count * sizeof(T)));
}

// The last error of a launch, until cudaGetLastError() takes it.
inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local int current_device = 0;

// Of each kernel, the dynamic shared memory that cudaFuncSetAttribute allows it.
struct SharedLimits {
  std::mutex mutex;
  std::map<const void*, size_t> of_kernel;
};
inline SharedLimits shared_limits;

inline size_t dynamic_shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(shared_limits.mutex);
  const auto found = shared_limits.of_kernel.find(kernel);
  return found == shared_limits.of_kernel.end() ? Machine::kStaticShared : found->second;
}

// What the CUDA runtime says to such a launch, on hardware since Volta.
inline cudaError_t check_launch(const dim3& grid, const dim3& block, size_t bytes, size_t limit) {
  const bool grid_fits =
      grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  const bool block_fits = block.x && block.y && block.z && block.x <= 1024 && block.y <= 1024 &&
                          block.z <= 64 && uint64_t{block.x} * block.y * block.z <= 1024;
  if (!grid_fits || !block_fits) return cudaErrorInvalidConfiguration;
  return bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t /*stream*/, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args),
                "the kernel takes another number of arguments");
  static_assert((!std::is_reference_v<Params> && ... && true),
                "kernels take their arguments by value");
  static_assert((sizeof(Params) + ... + 0) <= 4096, "the arguments of a kernel exceed 4 KiB");
  const size_t limit = dynamic_shared_limit(reinterpret_cast<const void*>(kernel));
  const cudaError_t error = check_launch(grid, block, shared_bytes, limit);
  if (error != cudaSuccess) {
    last_error = error;
    return;
  }
  using Arguments = std::tuple<std::decay_t<Params>...>;
  const auto call = std::make_pair(kernel, Arguments(std::forward<Args>(args)...));
  Machine::here().run(
      {name, grid, block, shared_bytes,
       limit > Machine::kStaticShared ? Machine::kMaxShared : Machine::kStaticShared,
       [](const void* p) {
         const auto& [function, arguments] = *static_cast<decltype(call)*>(p);
         std::apply(function, arguments);
       },
       &call});
}

// A parameter that takes the type of another one, as in a function that is no template.
template <typename T>
struct Identity {
  using type = T;
};
template <typename T>
using Same = typename Identity<T>::type;

template <typename T, typename... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

// Threads are never interrupted, so an atomic is a plain operation. Before it, others get a chance.
template <typename T, typename F>
T atomic(T* address, F f) {
  if (current) current->machine->yield(*current);
  races::in_atomic(true);
  const T old = *address;
  *address = f(old);
  races::in_atomic(false);
  return old;
}

// A warp operation on values of 4 or 8 bytes.
template <typename T>
T meet(const Site& site, uint32_t mask, T value, uint32_t argument, Combine combine) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = current->machine->meet(*current, site, mask, bits, argument, combine);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The argument of a lane is the lane that it reads. A lane outside of the mask has no defined
// value.
inline void combine_shuffle(Warp& warp, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const uint32_t source = warp.argument[lane];
    warp.result[lane] = mask >> source & 1 ? warp.value[source] : ~uint64_t{0};
  });
}

inline void combine_ballot(Warp& warp, uint32_t mask) {
  uint64_t ballot = 0;
  for_each_lane(mask, [&](int lane) { ballot |= (warp.value[lane] ? uint64_t{1} : 0) << lane; });
  for_each_lane(mask, [&](int lane) { warp.result[lane] = ballot; });
}

inline void combine_match(Warp& warp, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    warp.result[lane] = 0;
    for_each_lane(mask, [&](int other) {
      if (warp.value[lane] == warp.value[other]) warp.result[lane] |= uint64_t{1} << other;
    });
  });
}

template <typename T, typename F>
void combine_reduce(Warp& warp, uint32_t mask) {
  T total = static_cast<T>(warp.value[__builtin_ctz(mask)]);
  for_each_lane(mask & (mask - 1),
                [&](int lane) { total = F{}(total, static_cast<T>(warp.value[lane])); });
  for_each_lane(mask, [&](int lane) { warp.result[lane] = static_cast<uint32_t>(total); });
}

struct Add {
  // Wraps around without being undefined for int.
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  }
};
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

}  // namespace emulator

inline void __syncthreads(emulator::Site site = emulator::Site::here("__syncthreads")) {
  emulator::current->machine->barrier(*emulator::current, site);
}
// The lanes of a warp may meet at different calls of this one.
inline void __syncwarp(unsigned int mask = 0xffffffffu) {
  emulator::meet(emulator::Site{"__syncwarp", "", 0}, mask, 0, 0, nullptr);
}
// Memory is in order for one OS thread; the compiler shall not hold values back either.
inline void __threadfence() {
  std::atomic_signal_fence(std::memory_order_seq_cst);
}
inline void __threadfence_block() {
  __threadfence();
}
inline void __nanosleep(unsigned int) {
  emulator::current->machine->yield(*emulator::current);
}

// Of shuffles: the segment of `width` lanes that a lane is in begins at `lane & ~(width - 1)`, and
// a source outside of it means the lane's own value. Only __shfl_xor_sync may read an earlier
// segment.
template <typename T>
T __shfl_sync(unsigned int mask, T value, int source, int width = 32,
              emulator::Site site = emulator::Site::here("__shfl_sync")) {
  const int begin = static_cast<int>(emulator::current->lane) & ~(width - 1);
  return emulator::meet(site, mask, value, begin + (source & (width - 1)),
                        emulator::combine_shuffle);
}
template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                 emulator::Site site = emulator::Site::here("__shfl_up_sync")) {
  const uint32_t lane = emulator::current->lane;
  const uint32_t source = delta > (lane & (width - 1)) ? lane : lane - delta;
  return emulator::meet(site, mask, value, source, emulator::combine_shuffle);
}
template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                   emulator::Site site = emulator::Site::here("__shfl_down_sync")) {
  const uint32_t lane = emulator::current->lane;
  const uint32_t source = delta >= width - (lane & (width - 1)) ? lane : lane + delta;
  return emulator::meet(site, mask, value, source, emulator::combine_shuffle);
}
template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = 32,
                  emulator::Site site = emulator::Site::here("__shfl_xor_sync")) {
  const uint32_t lane = emulator::current->lane;
  const uint32_t source = lane ^ static_cast<uint32_t>(lane_mask);
  const uint32_t end = (lane & ~static_cast<uint32_t>(width - 1)) + width;
  return emulator::meet(site, mask, value, source < end ? source : lane, emulator::combine_shuffle);
}

inline unsigned int __ballot_sync(unsigned int mask, int predicate,
                                  emulator::Site site = emulator::Site::here("__ballot_sync")) {
  return emulator::meet(site, mask, static_cast<uint32_t>(predicate), 0, emulator::combine_ballot);
}
inline int __any_sync(unsigned int mask, int predicate,
                      emulator::Site site = emulator::Site::here("__any_sync")) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned int mask, int predicate,
                      emulator::Site site = emulator::Site::here("__all_sync")) {
  return __ballot_sync(mask, predicate, site) == mask;
}
template <typename T>
unsigned int __match_any_sync(unsigned int mask, T value,
                              emulator::Site site = emulator::Site::here("__match_any_sync")) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned int>(emulator::meet(site, mask, bits, 0, emulator::combine_match));
}
// The lanes that have not exited. Hardware gives any set of lanes that happen to run together.
inline unsigned int __activemask() {
  return emulator::current->warp->exists & ~emulator::current->warp->exited;
}

#define DK_EMULATOR_REDUCE(NAME, F)                                                        \
  template <typename T>                                                                    \
  T NAME(unsigned int mask, T value, emulator::Site site = emulator::Site::here(#NAME)) {  \
    static_assert(emulator::is_one_of<T, int, unsigned int>);                              \
    return emulator::meet(site, mask, value, 0, emulator::combine_reduce<T, emulator::F>); \
  }
DK_EMULATOR_REDUCE(__reduce_add_sync, Add)
DK_EMULATOR_REDUCE(__reduce_min_sync, Min)
DK_EMULATOR_REDUCE(__reduce_max_sync, Max)
#undef DK_EMULATOR_REDUCE

template <typename T>
T atomicAdd(T* address, emulator::Same<T> value) {
  static_assert(emulator::is_one_of<T, int, unsigned int, unsigned long long, float, double>);
  return emulator::atomic(address, [&](T old) {
    if constexpr (std::is_integral_v<T>)
      return emulator::Add{}(old, value);
    else
      return old + value;
  });
}
template <typename T>
T atomicMin(T* address, emulator::Same<T> value) {
  static_assert(emulator::is_one_of<T, int, unsigned int, long long, unsigned long long>);
  return emulator::atomic(address, [&](T old) { return emulator::Min{}(old, value); });
}
template <typename T>
T atomicMax(T* address, emulator::Same<T> value) {
  static_assert(emulator::is_one_of<T, int, unsigned int, long long, unsigned long long>);
  return emulator::atomic(address, [&](T old) { return emulator::Max{}(old, value); });
}
template <typename T>
T atomicOr(T* address, emulator::Same<T> value) {
  static_assert(emulator::is_one_of<T, int, unsigned int, unsigned long long>);
  return emulator::atomic(address, [&](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* address, emulator::Same<T> value) {
  static_assert(emulator::is_one_of<T, int, unsigned int, unsigned long long, float>);
  return emulator::atomic(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, emulator::Same<T> expected, emulator::Same<T> value) {
  static_assert(emulator::is_one_of<T, int, unsigned int, unsigned long long, unsigned short>);
  return emulator::atomic(address, [&](T old) { return old == expected ? value : old; });
}
// Counts to `last`, then from 0 again.
inline unsigned int atomicInc(unsigned int* address, unsigned int last) {
  return emulator::atomic(address, [&](unsigned int old) { return old >= last ? 0 : old + 1; });
}

inline cudaError_t cudaPeekAtLastError() {
  return emulator::last_error;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(emulator::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}
// Every device there is, is this CPU; the one of this number refuses to become current.
inline constexpr int kRefusedDevice = 99;
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device == kRefusedDevice) return emulator::last_error = cudaErrorInvalidValue;
  emulator::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                        int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > emulator::Machine::kMaxShared) {
    return emulator::last_error = cudaErrorInvalidValue;
  }
  const std::lock_guard<std::mutex> lock(emulator::shared_limits.mutex);
  emulator::shared_limits.of_kernel[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}
template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
