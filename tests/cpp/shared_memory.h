// The shared memory of the blocks of a launch.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace emulator {

class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes = 0) {
    if (dynamic_bytes) dynamic_ = Array(nullptr, dynamic_bytes);
  }

  // What stands there is for no other block to see.
  void next_block() { ++block_; }

  // The array of a declaration, told apart by the address of a static variable beside it; null if
  // the launch has not come by it yet.
  void* array(const void* tag) {
    for (Array& array : arrays_) {
      if (array.tag == tag) return array.of_block(block_);
    }
    return nullptr;
  }

  void* declare(const void* tag, size_t bytes) {
    static_bytes_ += bytes;
    arrays_.emplace_back(tag, bytes);
    return arrays_.back().of_block(block_);
  }

  size_t static_bytes() const { return static_bytes_; }

  unsigned char* dynamic() {
    return dynamic_.data ? static_cast<unsigned char*>(dynamic_.of_block(block_)) : nullptr;
  }

 private:
  // Exactly as large as declared, for AddressSanitizer, and aligned for any vector.
  struct Array {
    static constexpr std::align_val_t kAlign{16};
    struct Free {
      void operator()(void* p) const { ::operator delete(p, kAlign); }
    };

    Array() = default;
    Array(const void* tag_, size_t bytes_)
        : tag(tag_), bytes(bytes_), data(::operator new(bytes_, kAlign)) {}

    // 0xff makes a NaN of a float and -1 of an integer: a write that is missing shows.
    void* of_block(uint64_t number) {
      if (block != number) std::memset(data.get(), 0xff, bytes);
      block = number;
      return data.get();
    }

    const void* tag = nullptr;
    size_t bytes = 0;
    uint64_t block = 0;
    std::unique_ptr<void, Free> data;
  };

  std::vector<Array> arrays_;
  Array dynamic_;
  size_t static_bytes_ = 0;
  uint64_t block_ = 0;
};

}  // namespace emulator
