// Fibers: several flows of control in one OS thread, each on a stack of its own, that hand over to
// each other by hand. A handover is a handful of instructions, which is what makes a fiber per CUDA
// thread affordable.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__x86_64__) && !defined(DK_EMULATOR_UCONTEXT)
#define DK_EMULATOR_ASM 1
#else
#define DK_EMULATOR_ASM 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define DK_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DK_EMULATOR_ASAN 1
#endif
#endif
#ifndef DK_EMULATOR_ASAN
#define DK_EMULATOR_ASAN 0
#endif

#if DK_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// AddressSanitizer puts red zones around every local array, hence the larger stacks.
constexpr size_t kStackBytes = size_t{DK_EMULATOR_ASAN ? 256 : 64} << 10;

// The stacks of one OS thread. A stack that comes back is the next to go out: threads that run one
// after another without a barrier all run on the same stack, hot in cache.
class StackPool {
 public:
  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool() {
    for (char* bottom : all_) ::munmap(bottom - page_, page_ + kStackBytes);
  }

  // The lowest address of a stack of kStackBytes.
  char* take() {
    if (free_.empty()) free_.push_back(map());
    char* bottom = free_.back();
    free_.pop_back();
    return bottom;
  }

  void give(char* bottom) {
#if DK_EMULATOR_ASAN
    // The frames that stood here have left their red zones behind.
    ASAN_UNPOISON_MEMORY_REGION(bottom, kStackBytes);
#endif
    free_.push_back(bottom);
  }

  // Takes back the stacks of fibers that will never go on.
  void reclaim() {
    free_.clear();
    for (char* bottom : all_) give(bottom);
  }

 private:
  char* map() {
    void* region = ::mmap(nullptr, page_ + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (region == MAP_FAILED) throw std::bad_alloc();
    // Below the stack a page that faults: an overflow is a crash, not a corrupted neighbour.
    ::mprotect(region, page_, PROT_NONE);
    all_.push_back(static_cast<char*>(region) + page_);
    return all_.back();
  }

  const size_t page_ = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<char*> all_;
  std::vector<char*> free_;
};

// Where a flow of control that is suspended goes on.
struct Point {
#if DK_EMULATOR_ASM
  void* stack_pointer = nullptr;
#else
  ucontext_t context{};
#endif
  // For AddressSanitizer: the stack it goes on on.
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
};

#if DK_EMULATOR_ASM
// Saves what a System V callee must preserve, and returns to where `to` was saved. `noipa` keeps
// the compiler from concluding anything from the body, such as which registers survive.
__attribute__((naked, noipa, no_sanitize("thread"))) inline void switch_stack(void** /*from*/,
                                                                              void* /*to*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#endif

// A point at which `entry` begins on the stack at `bottom`.
inline void prepare(Point& point, char* bottom, void (*entry)()) {
  // Stacks lie a fixed distance apart. Starting each at another cache line keeps their upper ends
  // from competing for the same few sets of the cache.
  const size_t color = (reinterpret_cast<uintptr_t>(bottom) >> 12) % 31 * 128;
  const size_t usable = kStackBytes - color;
#if DK_EMULATOR_ASM
  void** top = reinterpret_cast<void**>(bottom + usable);
  *--top = nullptr;  // the return address of `entry`: here ends a backtrace
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  point.stack_pointer = top;
#else
  ::getcontext(&point.context);
  point.context.uc_stack.ss_sp = bottom;
  point.context.uc_stack.ss_size = usable;
  point.context.uc_link = nullptr;
  ::makecontext(&point.context, entry, 0);
#endif
  point.fake_stack = nullptr;
  point.bottom = bottom;
  point.bytes = kStackBytes;
}

// Suspends at `from` and goes on at `to`. With `for_good` nobody ever comes back to `from`.
inline void jump(Point& from, Point& to, [[maybe_unused]] bool for_good = false) {
#if DK_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
#if DK_EMULATOR_ASM
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  ::swapcontext(&from.context, &to.context);
#endif
#if DK_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing an entry calls, with the point that jumped to it: only here the sanitizer tells
// which stack that was.
inline void arrive([[maybe_unused]] Point& caller) {
#if DK_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &caller.bottom, &caller.bytes);
#endif
}

}  // namespace emulator
