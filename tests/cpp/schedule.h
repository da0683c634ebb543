// The order in which threads, warps and blocks run, and how it is chosen.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace emulator {

// Which of the threads that can go on does so first; blocks and warps follow it too. A kernel that
// is right gives the same result in every order.
enum class Order : int { kForward = 0, kReverse = 1, kShuffle = 2 };

struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;

  // "forward", "reverse" or "shuffle:SEED".
  static Schedule parse(const char* text) {
    if (!text || !*text || !std::strcmp(text, "forward")) return {};
    if (!std::strcmp(text, "reverse")) return {Order::kReverse, 0};
    if (!std::strncmp(text, "shuffle:", 8) && text[8] >= '0' && text[8] <= '9') {
      char* end = nullptr;
      const uint64_t seed = std::strtoull(text + 8, &end, 10);
      if (!*end) return {Order::kShuffle, seed};
    }
    throw std::runtime_error(std::string("DICEKERNELS_EMULATOR_ORDER is '") + text +
                             "'; expected forward, reverse or shuffle:SEED");
  }
};

// Of the whole process: Python sets it for whichever thread launches. -1: the environment decides.
inline std::atomic<int> chosen_order{-1};
inline std::atomic<uint64_t> chosen_seed{0};

inline void set_order(Order order, uint64_t seed = 0) {
  chosen_seed = seed;
  chosen_order = static_cast<int>(order);
}

inline Schedule schedule() {
  const int order = chosen_order;
  if (order < 0) return Schedule::parse(std::getenv("DICEKERNELS_EMULATOR_ORDER"));
  return {static_cast<Order>(order), chosen_seed};
}

// splitmix64. The same seed gives the same schedule for every launch of a kernel.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<uint32_t>((z ^ z >> 31) >> 32);
  }
  uint64_t below(uint64_t n) { return n * next() >> 32; }

 private:
  uint64_t state_;
};

}  // namespace emulator

// For ctypes: 0 forward, 1 reverse, 2 shuffle with the seed; anything else: as the environment
// says.
extern "C" __attribute__((visibility("default"), used)) inline void dicekernels_emulator_order(
    int order, unsigned long long seed) {
  emulator::chosen_seed = seed;
  emulator::chosen_order = order >= 0 && order <= 2 ? order : -1;
}
