// Which of the compiled instruction sets runs: the best one of this processor, once a process.
#include "kernels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace dicekernels {

#define DK_DECLARE(isa)                                                                       \
  namespace isa {                                                                             \
  void sums_chunk_any(const Problem&, int64_t, int64_t, int64_t, char*, double*, BadLabels*); \
  void backward_chunk_any(const Problem&, const double*, int64_t, int64_t, int64_t, char*,    \
                          const View&);                                                       \
  int64_t workspace_bytes(const Problem&);                                                    \
  constexpr Kernels set{#isa, sums_chunk_any, backward_chunk_any, workspace_bytes};           \
  }

DK_DECLARE(baseline)
#if defined(DK_X86)
DK_DECLARE(avx2)
DK_DECLARE(avx512)
#endif

namespace {

#if defined(DK_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels& choose() {
  const char* wish = std::getenv("DICEKERNELS_CPU_CAPABILITY");
  const std::string name = wish ? wish : "";
  STD_TORCH_CHECK(name.empty() || name == "default" || name == "avx2" || name == "avx512",
                  "DICEKERNELS_CPU_CAPABILITY: got \"", name,
                  "\", expected default, avx2 or avx512; unset it to take the best one");
#if defined(DK_X86)
  STD_TORCH_CHECK((name != "avx2" || has_avx2()) && (name != "avx512" || has_avx512()),
                  "DICEKERNELS_CPU_CAPABILITY: this processor has no ", name, "; unset it");
  if (name == "avx512" || (name.empty() && has_avx512())) return avx512::set;
  if (name == "avx2" || (name.empty() && has_avx2())) return avx2::set;
#else
  STD_TORCH_CHECK(name.empty() || name == "default",
                  "DICEKERNELS_CPU_CAPABILITY: this build has no ", name, "; unset it");
#endif
  return baseline::set;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dicekernels
