// The Python module fastdiff._C: what this build contains, what this CPU can run, and a sampler's step without torch's
// dispatcher. No torch headers, so the files beside this one tie the library to a Python minor version only; the ops
// register themselves when it is loaded.
#include <pybind11/pybind11.h>

#include "bound_step.h"
#include "direct_step.h"
#include "known_step.h"

#ifndef FASTDIFF_BUILD_INFO
#define FASTDIFF_BUILD_INFO "{}"
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdiff's compiled kernels: build information. The ops are torch.ops.fastdiff.*";
  m.def("build_info", [] { return FASTDIFF_BUILD_INFO; }, "JSON written by setup.py: versions, flags, instruction sets.");
  m.def("cpu_isa", [] { return fastdiff::cpu::isa_name(fastdiff::cpu::isa()); },
        "The instruction set the CPU kernels use in this process.");
  fastdiff::define_bound_step(m);
  fastdiff::define_direct_step(m);
  fastdiff::define_known_step(m);
}
