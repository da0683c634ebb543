// The machine that runs the blocks of a kernel: a fiber for each thread, which thread goes on next,
// and what threads wait for. It knows nothing of CUDA's names; those are in emulator.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_types.h"
#include "fiber.h"
#include "races.h"
#include "schedule.h"
#include "shared_memory.h"

namespace emulator {

// A call at which threads meet, for error messages and to tell such calls apart.
struct Site {
  const char* what;
  const char* file;
  int line;

  // As a default argument this names the place of the call.
  static constexpr Site here(const char* what, const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
    return {what, file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && same(what, other.what) && same(file, other.file);
  }
  std::string text() const {
    return line ? std::string(what) + " (" + file + ":" + std::to_string(line) + ")" : what;
  }

 private:
  // Two calls of one line have the same string nearly always, so that no character is looked at.
  static bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
};

struct Warp;
class Machine;

// The context of a CUDA thread: what threadIdx and its kin are macros for.
struct Thread {
  uint3 index;
  uint32_t lane;
  Warp* warp;
  Machine* machine;
  char* stack;
  Point point;
  Site site;           // where it waits
  uint32_t wait_mask;  // for which lanes; 0 at a barrier of the block
};

// initial-exec: reading it costs an instruction in a shared library, too.
__attribute__((tls_model("initial-exec"))) inline thread_local Thread* current = nullptr;

// Sets Warp::result of every lane of a mask from Warp::value and Warp::argument.
using Combine = void (*)(Warp& warp, uint32_t mask);

struct Warp {
  uint32_t exists, fresh, ready, later, at_barrier, exited;  // a bit for each lane
  uint64_t value[32];
  uint32_t argument[32];
  uint64_t result[32];

  // Lanes that wait for each other at a warp operation. There are several where the warp has
  // diverged. Their masks differ but may overlap: some lanes are still among themselves while
  // others wait for all.
  struct Meeting {
    uint32_t mask, arrived;
    Combine combine;
    Site site;
  } meetings[32];
  uint32_t meeting_count;

  Meeting& meeting_of(uint32_t mask, Combine combine, const Site& site) {
    for (uint32_t i = 0; i < meeting_count; ++i) {
      if (meetings[i].mask == mask) return meetings[i];
    }
    return meetings[meeting_count++] = {mask, 0, combine, site};
  }
  void end(Meeting& meeting) { meeting = meetings[--meeting_count]; }
};

template <typename F>
void for_each_lane(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t dynamic_bytes;
  size_t shared_limit;  // static and dynamic shared memory together
  void (*body)(const void* arguments);
  const void* arguments;
};

// A streaming multiprocessor, so to speak: an OS thread has one, and it runs one block at a time.
class Machine {
 public:
  dim3 block_dim, grid_dim;
  uint3 block_index{};

  // The machine of this OS thread.
  static Machine& here() {
    static thread_local Machine machine;
    return machine;
  }

  void run(const Launch& launch) {
    if (current) throw std::logic_error("emulator: a kernel cannot launch a kernel");
    const Cleanup cleanup{*this};
    launch_ = &launch;
    shared_ = SharedMemory(launch.dynamic_bytes);
    races::watch(shared_.dynamic(), launch.dynamic_bytes);
    grid_dim = launch.grid;
    block_dim = launch.block;
    schedule_ = schedule();
    random_ = Random(schedule_.seed);
    set_up_threads();
    const uint64_t blocks = uint64_t{grid_dim.x} * grid_dim.y * grid_dim.z;
    std::vector<uint64_t> shuffled;
    if (schedule_.order == Order::kShuffle) {
      shuffled.resize(blocks);
      std::iota(shuffled.begin(), shuffled.end(), uint64_t{0});
      shuffle(shuffled.data(), blocks);
    }
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t block = schedule_.order == Order::kForward   ? i
                             : schedule_.order == Order::kReverse ? blocks - 1 - i
                                                                  : shuffled[i];
      block_index = {static_cast<unsigned>(block % grid_dim.x),
                     static_cast<unsigned>(block / grid_dim.x % grid_dim.y),
                     static_cast<unsigned>(block / grid_dim.x / grid_dim.y)};
      run_block();
    }
  }

  // The current thread offers to go on later.
  void yield(Thread& self) {
    if (schedule_.order == Order::kShuffle && random_.next() & 1) return;
    if (++idle_yields_ > kIdleYields) fail("threads wait for each other without end");
    self.warp->later |= 1u << self.lane;
    jump(self.point, host_);
  }

  // The current thread waits until every thread of the block that has not exited is here.
  void barrier(Thread& self, const Site& site) {
    if (arrived_ && !(site == barrier_site_)) {
      fail("threads of the block meet at different barriers: " + site.text() + " and " +
           barrier_site_.text());
    }
    barrier_site_ = site;
    self.warp->at_barrier |= 1u << self.lane;
    ++arrived_;
    release_barrier_if_complete();
    wait(self, site, 0);
    races::passed_barrier();
  }

  // The current thread waits until every lane of the mask is here. Gives what `combine` gave it.
  uint64_t meet(Thread& self, const Site& site, uint32_t mask, uint64_t value, uint32_t argument,
                Combine combine) {
    Warp& warp = *self.warp;
    const uint32_t bit = 1u << self.lane;
    if (!(mask & bit)) fail("a lane calls " + site.text() + " with a mask that leaves it out");
    if (mask & ~warp.exists) {
      fail(site.text() + " has a mask with lanes that the block does not have");
    }
    Warp::Meeting& meeting = warp.meeting_of(mask, combine, site);
    if (meeting.combine != combine || !(meeting.site == site)) {
      fail("lanes of a warp with one mask meet at different calls: " + site.text() + " and " +
           meeting.site.text());
    }
    meeting.arrived |= bit;
    warp.value[self.lane] = value;
    warp.argument[self.lane] = argument;
    if (meeting.arrived == mask) {
      // Everybody's result is written now: a lane that runs ahead may overwrite its value before
      // the others have looked at it.
      if (combine) combine(warp, mask);
      warp.end(meeting);
      warp.ready |= mask;
    }
    wait(self, site, mask);
    // A shuffle or a vote orders no memory; they come with a `combine`.
    if (!combine) races::passed_syncwarp();
    return warp.result[self.lane];
  }

  // Shared memory for the declaration that `tag` is the address of.
  void* shared(const void* tag, size_t bytes) {
    if (void* array = shared_.array(tag)) return array;
    const size_t total = shared_.static_bytes() + bytes;
    if (total > kStaticShared || total + launch_->dynamic_bytes > launch_->shared_limit) {
      fail(std::to_string(total) + " bytes of static shared memory and " +
           std::to_string(launch_->dynamic_bytes) + " of dynamic exceed the limit");
    }
    void* array = shared_.declare(tag, bytes);
    races::watch(array, bytes);
    return array;
  }

  unsigned char* dynamic_shared() { return shared_.dynamic(); }

  // Ends the launch with an exception.
  [[noreturn]] void fail(const std::string& why) const {
    auto text = [](auto v) {
      return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
             ")";
    };
    const std::string message = std::string("emulator: kernel ") + launch_->kernel + ", block " +
                                text(block_index) +
                                (current ? ", thread " + text(current->index) : "") + ": " + why;
    std::fprintf(stderr, "%s\n", message.c_str());
    throw std::runtime_error(message);
  }

  static constexpr size_t kStaticShared = size_t{48} << 10;
  static constexpr size_t kMaxShared = size_t{227} << 10;

 private:
  struct Cleanup {
    Machine& machine;
    ~Cleanup() {
      current = nullptr;
      // Of a launch that failed, threads are left that never end.
      if (machine.live_) machine.stacks_.reclaim();
      machine.live_ = 0;
      machine.failure_ = nullptr;
      machine.shared_ = SharedMemory();
      races::unwatch();
    }
  };

  void set_up_threads() {
    const uint32_t n = block_dim.x * block_dim.y * block_dim.z;
    if (threads_.size() < n) threads_.resize(n);
    warps_.assign((n + 31) / 32, Warp{});
    for (uint32_t i = 0; i < n; ++i) {
      Thread& thread = threads_[i];
      thread.index = {i % block_dim.x, i / block_dim.x % block_dim.y,
                      i / block_dim.x / block_dim.y};
      thread.lane = i % 32;
      thread.warp = &warps_[i / 32];
      thread.machine = this;
    }
  }

  void run_block() {
    live_ = block_dim.x * block_dim.y * block_dim.z;
    arrived_ = 0;
    idle_yields_ = 0;
    shared_.next_block();
    races::begin_block();
    for (size_t w = 0; w < warps_.size(); ++w) {
      Warp& warp = warps_[w];
      const size_t lanes = std::min<size_t>(32, live_ - 32 * w);
      warp.exists = warp.fresh = warp.ready = 0xffffffffu >> (32 - lanes);
      warp.later = warp.at_barrier = warp.exited = 0;
    }
    while (live_) run_round();
  }

  // Every warp that can goes as far as it can. That lets a warp run far ahead of the others, which
  // shows a missing barrier best.
  void run_round() {
    uint32_t runnable[32];
    uint32_t n = 0;
    for (uint32_t w = 0; w < warps_.size(); ++w) {
      warps_[w].ready |= std::exchange(warps_[w].later, 0u);
      if (warps_[w].ready) runnable[n++] = w;
    }
    if (!n) fail("deadlock; " + who_waits());
    arrange(runnable, n);
    for (uint32_t i = 0; i < n; ++i) run_warp(runnable[i]);
  }

  void run_warp(uint32_t w) {
    Warp& warp = warps_[w];
    while (warp.ready) {
      uint32_t lanes[32];
      uint32_t n = 0;
      for_each_lane(std::exchange(warp.ready, 0u), [&](int lane) { lanes[n++] = lane; });
      arrange(lanes, n);
      for (uint32_t i = 0; i < n; ++i) resume(threads_[32 * w + lanes[i]]);
      if (schedule_.order == Order::kShuffle && random_.next() & 1) return;
    }
  }

  void resume(Thread& thread) {
    current = &thread;
    races::runs(static_cast<uint32_t>(&thread - threads_.data()));
    Warp& warp = *thread.warp;
    const uint32_t bit = 1u << thread.lane;
    if (warp.fresh & bit) {
      warp.fresh &= ~bit;
      thread.stack = stacks_.take();
      prepare(thread.point, thread.stack, &Machine::enter);
    }
    jump(host_, thread.point);
    current = nullptr;
    if (warp.exited & bit) stacks_.give(thread.stack);
    if (failure_) std::rethrow_exception(failure_);
  }

  // Where the fiber of a thread begins and, in its last line, ends.
  static void enter() {
    Thread& self = *current;
    Machine& machine = *self.machine;
    arrive(machine.host_);
    try {
      machine.launch_->body(machine.launch_->arguments);
    } catch (...) {
      machine.failure_ = std::current_exception();
    }
    self.warp->exited |= 1u << self.lane;
    --machine.live_;
    machine.idle_yields_ = 0;
    machine.release_barrier_if_complete();
    jump(self.point, machine.host_, /*for_good=*/true);
  }

  void wait(Thread& self, const Site& site, uint32_t mask) {
    self.site = site;
    self.wait_mask = mask;
    idle_yields_ = 0;
    jump(self.point, host_);
  }

  // Threads that have exited do not count. `later` rather than `ready`: the next round begins anew
  // in the order of the schedule, not with the warp that came last.
  void release_barrier_if_complete() {
    if (!arrived_ || arrived_ < live_) return;
    arrived_ = 0;
    for (Warp& warp : warps_) warp.later |= std::exchange(warp.at_barrier, 0u);
  }

  void arrange(uint32_t* items, uint32_t n) {
    if (schedule_.order == Order::kReverse) std::reverse(items, items + n);
    if (schedule_.order == Order::kShuffle) shuffle(items, n);
  }

  template <typename T>
  void shuffle(T* items, uint64_t n) {
    for (uint64_t i = n; i > 1; --i) std::swap(items[i - 1], items[random_.below(i)]);
  }

  std::string who_waits() const {
    std::map<std::string, int> waiting;
    for (size_t w = 0; w < warps_.size(); ++w) {
      for_each_lane(warps_[w].exists & ~warps_[w].exited, [&](int lane) {
        const Thread& thread = threads_[32 * w + lane];
        char mask[32] = "";
        if (thread.wait_mask)
          std::snprintf(mask, sizeof mask, " for lanes 0x%08x", thread.wait_mask);
        ++waiting["at " + thread.site.text() + mask];
      });
    }
    std::string text;
    for (const auto& [where, count] : waiting)
      text += std::to_string(count) + " wait " + where + ", ";
    return text + std::to_string(block_dim.x * block_dim.y * block_dim.z - live_) + " have exited";
  }

  // Seconds of nothing but threads that give way to each other.
  static constexpr uint64_t kIdleYields = uint64_t{1} << 28;

  const Launch* launch_ = nullptr;
  Schedule schedule_;
  Random random_{0};
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  StackPool stacks_;
  Point host_;  // the launch itself, while a thread runs
  SharedMemory shared_;
  uint32_t live_ = 0;     // threads of the block that have not exited
  uint32_t arrived_ = 0;  // of these, those at the barrier
  Site barrier_site_{};
  uint64_t idle_yields_ = 0;
  std::exception_ptr failure_;
};

}  // namespace emulator
