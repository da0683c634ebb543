// The pybind11 module dicekernels._native: facts about the build and the machine.
// It includes no torch header and is never on the path of an op, so the package works without it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

py::dict build_config() {
  const std::vector<std::pair<std::string, std::string>> isas = {DK_ISA_TABLE};
  py::dict isa_flags;
  for (const auto& [name, flags] : isas) isa_flags[py::str(name)] = flags;

  py::dict config;
  config["version"] = DK_VERSION;
  config["compiler"] = DK_COMPILER;
  config["flags"] = DK_FLAGS;
  config["torch_target"] = DK_TORCH_TARGET;
  const std::string commit = DK_COMMIT;
  config["commit"] = commit.empty() ? py::object(py::none()) : py::object(py::str(commit));
  config["isas"] = isa_flags;
  return config;
}

// What the processor and the operating system support together (the compiler's own check asks
// cpuid and xgetbv). Names are those of /proc/cpuinfo.
std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx"] = __builtin_cpu_supports("avx");
  features["avx2"] = __builtin_cpu_supports("avx2");
  features["fma"] = __builtin_cpu_supports("fma");
  features["f16c"] = __builtin_cpu_supports("f16c");
  features["avx512f"] = __builtin_cpu_supports("avx512f");
  features["avx512bw"] = __builtin_cpu_supports("avx512bw");
  features["avx512dq"] = __builtin_cpu_supports("avx512dq");
  features["avx512vl"] = __builtin_cpu_supports("avx512vl");
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about the build and the machine; optional.";
  m.def("build_config", &build_config,
        "version, compiler, flags, torch_target, commit (or None) and isas: {name: its flags}");
  m.def("cpu_features", &cpu_features,
        "{instruction set: usable on this processor}; empty on machines that are not x86-64");
}
