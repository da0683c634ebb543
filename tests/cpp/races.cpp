// The detector of races.h. Compiled without the sanitizer, or it would be called for itself.
#define DK_EMULATOR_RACES
#include "races.h"

#include <array>
#include <cstdio>
#include <set>
#include <tuple>
#include <vector>

namespace emulator {
namespace races {
namespace {

// How far a thread has come says what it is ordered with: the numbers of barriers are the same in
// all threads between two of them, those of __syncwarp in all lanes of a warp.
struct Access {
  uint64_t block = 0;
  uint32_t thread = 0, barriers = 0, syncs = 0;
  const void* code = nullptr;
};

// The last write, and the last read of each warp.
struct Byte {
  Access write;
  std::array<Access, 32> reads;
};

struct Memory {
  uintptr_t from;
  std::vector<Byte> bytes;
};

std::vector<Memory> watched;
std::array<Access, 1024> threads;
uint32_t running = 0;
uint64_t block = 0;
bool atomic = false;
std::set<std::tuple<const char*, const void*, const void*>> found;

bool ordered(const Access& before, const Access& now) {
  if (before.block != now.block || before.thread == now.thread) return true;
  if (before.barriers != now.barriers) return true;
  return before.thread / 32 == now.thread / 32 && before.syncs != now.syncs;
}

void access(const void* address, size_t size, bool is_write, const void* code) {
  if (atomic) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  for (Memory& memory : watched) {
    if (at < memory.from || at >= memory.from + memory.bytes.size()) continue;
    Access now = threads[running];
    now.block = block;
    now.thread = running;
    now.code = code;
    for (size_t i = at - memory.from; i < at - memory.from + size && i < memory.bytes.size(); ++i) {
      Byte& byte = memory.bytes[i];
      if (!ordered(byte.write, now))
        found.insert({is_write ? "write-write" : "write-read", byte.write.code, code});
      if (!is_write) {
        byte.reads[running / 32] = now;
        continue;
      }
      for (const Access& read : byte.reads)
        if (!ordered(read, now)) found.insert({"read-write", read.code, code});
      byte.write = now;
    }
    return;
  }
}

}  // namespace

void watch(const void* memory, size_t bytes) {
  if (memory) watched.push_back({reinterpret_cast<uintptr_t>(memory), std::vector<Byte>(bytes)});
}
void unwatch() {
  watched.clear();
}
void begin_block() {
  ++block;
  threads.fill({});
}
void runs(uint32_t thread) {
  running = thread;
}
void passed_barrier() {
  ++threads[running].barriers;
}
void passed_syncwarp() {
  ++threads[running].syncs;
}
void in_atomic(bool inside) {
  atomic = inside;
}
int report() {
  for (const auto& [kind, first, second] : found)
    std::printf("race %s %p %p\n", kind, first, second);
  const int count = static_cast<int>(found.size());
  found.clear();
  return count;
}

}  // namespace races
}  // namespace emulator

// What GCC and clang call for -fsanitize=thread.
extern "C" {
#define DK_ACCESS(NAME, SIZE, WRITE)                                            \
  void __tsan_##NAME(void* address) {                                           \
    emulator::races::access(address, SIZE, WRITE, __builtin_return_address(0)); \
  }
#define DK_ACCESSES(SIZE)                      \
  DK_ACCESS(read##SIZE, SIZE, false)           \
  DK_ACCESS(write##SIZE, SIZE, true)           \
  DK_ACCESS(unaligned_read##SIZE, SIZE, false) \
  DK_ACCESS(unaligned_write##SIZE, SIZE, true) \
  DK_ACCESS(volatile_read##SIZE, SIZE, false)  \
  DK_ACCESS(volatile_write##SIZE, SIZE, true)
DK_ACCESSES(1)
DK_ACCESSES(2)
DK_ACCESSES(4)
DK_ACCESSES(8)
DK_ACCESSES(16)
void __tsan_read_range(void* address, size_t size) {
  emulator::races::access(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  emulator::races::access(address, size, true, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Atomics of the emulator itself and of the standard library, in a program of one OS thread.
void __tsan_atomic_signal_fence(int) {}
void __tsan_atomic_thread_fence(int) {}
#define DK_ATOMIC(BITS)                                                                       \
  int##BITS##_t __tsan_atomic##BITS##_load(const volatile int##BITS##_t* from, int) {         \
    return *from;                                                                             \
  }                                                                                           \
  void __tsan_atomic##BITS##_store(volatile int##BITS##_t* to, int##BITS##_t value, int) {    \
    *to = value;                                                                              \
  }                                                                                           \
  int##BITS##_t __tsan_atomic##BITS##_fetch_add(volatile int##BITS##_t* to, int##BITS##_t by, \
                                                int) {                                        \
    const int##BITS##_t old = *to;                                                            \
    *to = static_cast<int##BITS##_t>(old + by);                                               \
    return old;                                                                               \
  }
DK_ATOMIC(8)
DK_ATOMIC(32)
DK_ATOMIC(64)
}
