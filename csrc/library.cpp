// Where the dispatcher finds the kernels. The schemas stand in dicekernels/ops.py, so that the ops
// exist, with their fakes, on machines without this library.
#include "cpu/kernels.h"
#include "cpu/launch.h"

namespace {
// Which instruction set runs, for `python -m dicekernels.env` and the tests.
std::string cpu_capability() {
  return dicekernels::kernels().name;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dicekernels, m) {
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dicekernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(dicekernels, CPU, m) {
  m.impl("sums", TORCH_BOX(&dicekernels::sums));
  m.impl("finish", TORCH_BOX(&dicekernels::finish_op));
  m.impl("sums_backward", TORCH_BOX(&dicekernels::sums_backward));
}
