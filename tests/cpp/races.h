// What the emulator tells a detector of races in shared memory. Without DK_EMULATOR_RACES nobody
// listens and nothing is left of the calls.
//
// With it, the text of the kernels is compiled with -fsanitize=thread, so that the compiler calls a
// function before each access, and linked with races.cpp instead of the sanitizer, which defines
// these functions: two accesses of a byte by different threads, one of them a write, with neither
// __syncthreads nor, in a warp, __syncwarp between them are a race.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {
namespace races {

#if defined(DK_EMULATOR_RACES)
void watch(const void* memory, size_t bytes);
void unwatch();
void begin_block();
void runs(uint32_t thread);  // of the block: it does all that follows
void passed_barrier();
void passed_syncwarp();
void in_atomic(bool inside);
// Prints the races since the last call, a line for each pair of addresses of code; how many.
int report();
#else
inline void watch(const void*, size_t) {}
inline void unwatch() {}
inline void begin_block() {}
inline void runs(uint32_t) {}
inline void passed_barrier() {}
inline void passed_syncwarp() {}
inline void in_atomic(bool) {}
#endif

}  // namespace races
}  // namespace emulator
