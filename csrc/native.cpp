// The pybind11 module dicekernels._native: facts about the build and the machine, and how the CUDA
// kernels would cut a problem, so that tests see it without a GPU.
// It includes no torch header and is never on the path of an op, so the package works without it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>

#include "build_info.h"
#include "common/finish.h"
#include "cuda/fast.h"
#include "cuda/tile.h"

namespace py = pybind11;

#define DK_ARGUMENT(op, type, name) , py::arg(#name)
#define DK_TEXT(...) DK_TEXT_OF(__VA_ARGS__)  // after the macros in it
#define DK_TEXT_OF(...) #__VA_ARGS__

namespace {

// What _build_info.json says, compiled in: it tells a module of another build from its libraries.
py::object build_config() {
  return py::module_::import("json").attr("loads")(kBuildInfo);
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

// The widest kernels that run here; DICEKERNELS_CPU_CAPABILITY may narrow them (cpu/kernels.cpp).
std::string isa_level() {
  const auto features = cpu_features();
  const auto all = [&](std::initializer_list<const char*> names) {
    for (const char* name : names) {
      const auto found = features.find(name);
      if (found == features.end() || !found->second) return false;
    }
    return true;
  };
  if (!all({"avx2", "fma", "f16c"})) return "baseline";
  return all({"avx512f", "avx512bw", "avx512dq", "avx512vl"}) ? "avx512" : "avx2";
}

dicekernels::DType dtype_of(const std::string& name) {
  using D = dicekernels::DType;
  static const std::map<std::string, D> names = {
      {"uint8", D::u8},      {"int8", D::i8},     {"int16", D::i16},
      {"int32", D::i32},     {"int64", D::i64},   {"float16", D::f16},
      {"bfloat16", D::bf16}, {"float32", D::f32}, {"float64", D::f64}};
  const auto found = names.find(name);
  if (found == names.end())
    throw py::value_error("dtype: got '" + name + "', expected as float32 or uint8");
  return found->second;
}

// A tensor (B, C, V) as an allocator gives it: aligned, and without gaps.
dicekernels::View view_of(const std::string& dtype, int64_t channels, int64_t voxels,
                          bool channels_last) {
  dicekernels::View view;
  view.data = reinterpret_cast<const void*>(uintptr_t{1} << 20);
  view.dtype = dtype_of(dtype);
  view.batch = channels * voxels;
  view.channel = channels_last ? 1 : voxels;
  view.voxel = channels_last ? channels : 1;
  return view;
}

py::dict pass_of(const dicekernels::Problem& p, bool backward) {
  using namespace dicekernels;
  const bool masked = p.mask.data != nullptr;
  // A block of the forward pass has a chunk of a sample, one of the backward pass a run of voxels.
  const int64_t pieces =
      backward ? (p.voxels + kRunVoxels - 1) / kRunVoxels : chunk_count(p.voxels);
  py::dict out;
  out["blocks"] = p.batch * pieces;
  cuda::FastPlan fast{};
  if (cuda::plan_fast(p, backward ? &p.logits : nullptr, &fast)) {
    const int bytes = p.logits.dtype == DType::f32 ? 4 : 2;
    out["kernel"] = "fast";
    out["threads"] = fast.threads();
    out["shared_bytes"] = backward ? cuda::plan_backward_memory(fast, bytes, masked).bytes
                                   : cuda::plan_memory(fast, bytes, masked).bytes;
    out["classes_in_registers"] = fast.held;
    out["warps_per_voxel"] = fast.warps;
    out["voxels_per_thread"] = fast.last ? cuda::last_voxels(bytes, fast.warps > 1)
                                         : cuda::row_voxels(bytes, fast.held, fast.warps > 1);
    out["wide"] = fast.wide;
    out["channels_last"] = fast.last;
    out["direct_labels"] = fast.direct;
    return out;
  }
  const int value_bytes = p.logits.dtype == DType::f64 ? 8 : 4;
  const cuda::TilePlan tile = cuda::plan_tile(p.classes, p.dense, value_bytes);
  out["kernel"] = "general";
  out["threads"] = tile.threads;
  out["shared_bytes"] = tile.bytes;
  out["tile_voxels"] = tile.voxels();
  return out;
}

// The arguments after channels_last are those of the ops after their tensors (dicekernels/ops.py).
py::dict launch_plan(const std::array<int64_t, 3>& shape, const std::string& logits,
                     const std::string& target, bool masked,
                     bool channels_last DK_SUMS_NUMBERS(DK_PARAMETER)) {
  using namespace dicekernels;
  if (shape[0] < 0 || shape[1] < 1 || shape[2] < 0)
    throw py::value_error("shape: expected (B, C, V) with at least one class");
  Problem p{};
  static_cast<SumsSpec&>(p) = {DK_SUMS_NUMBERS(DK_VALUE)};
  p.batch = shape[0];
  p.classes = shape[1];
  p.voxels = shape[2];
  p.logits = view_of(logits, p.classes, p.voxels, channels_last);
  p.target = view_of(target, dense ? p.classes : 1, p.voxels, channels_last);
  if (masked) p.mask = view_of("float32", 1, p.voxels, false);
  py::dict passes;
  passes["sums"] = pass_of(p, false);
  passes["sums_backward"] = pass_of(p, true);
  return passes;
}

// As dicekernels/ops.py writes them, from the parameters of the op functions.
std::map<std::string, std::string> schemas() {
  const auto schema = [](std::string text, const char* results) {
    const std::pair<std::string, std::string> spelled[] = {{"OptionalTensor", "Tensor?"},
                                                           {"TensorArgument", "Tensor"},
                                                           {"std::optional<int64_t>", "int?"},
                                                           {"int64_t", "int"},
                                                           {"double", "float"},
                                                           {" ,", ","}};
    for (const auto& [here, there] : spelled)
      for (size_t at; (at = text.find(here)) != std::string::npos;)
        text.replace(at, here.size(), there);
    return "(" + text + ") -> " + results;
  };
  return {
      {"sums", "sums" + schema(DK_TEXT(DK_SUMS_PARAMETERS), "Tensor")},
      {"finish", "finish" + schema(DK_TEXT(DK_FINISH_PARAMETERS), "(Tensor, Tensor)")},
      {"sums_backward", "sums_backward" + schema(DK_TEXT(DK_SUMS_BACKWARD_PARAMETERS), "Tensor")}};
}

}  // namespace

// Its functions share nothing that they write, so a free-threaded Python keeps its lock off.
PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Facts about the build and the machine; optional.";
  m.def("build_config", &build_config, "What _build_info.json says of the build of this module");
  m.def("cpu_features", &cpu_features,
        "{instruction set: usable on this processor}; empty on machines that are not x86-64");
  m.def("isa_level", &isa_level, "baseline, avx2 or avx512: the widest CPU kernels that run here");
  m.def(
      "launch_plan", &launch_plan, py::arg("shape"), py::arg("logits"), py::arg("target"),
      py::arg("masked"), py::arg("channels_last") DK_SUMS_NUMBERS(DK_ARGUMENT),
      "How the CUDA kernels cut (B, C, V) logits and a target of these dtypes, aligned and without "
      "gaps: {sums, sums_backward: {kernel, blocks, threads, shared_bytes, ...}}");
  m.def("schemas", &schemas, "{op: its schema}, as the compiled libraries implement it");
}
