// The Python module fastdiff._C: what this build contains, what this CPU can run, and a sampler's step by addresses.
// No torch headers, so the file ties the library to a Python minor version only; the ops register themselves when it
// is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/scheduler_step.h"

#ifndef FASTDIFF_BUILD_INFO
#define FASTDIFF_BUILD_INFO "{}"
#endif

namespace py = pybind11;

namespace fastdiff {
namespace {

using Args = cpu::SchedulerStepArgs;

// The op scheduler_step of which all is known but where the tensors are: a function of their addresses, in the order
// of `dtypes`: next, entry, kept, sample, model output, noise, history. Of those that are not there the type is -1 and
// the address 0.
py::cpp_function bind_scheduler_step(int64_t numel, const std::vector<int>& dtypes, const std::vector<double>& prev,
                                     const std::vector<double>& entry, std::optional<double> clip,
                                     const std::vector<double>& kept) {
  constexpr size_t kFixed = 6;
  if (prev.size() < 4 || prev.size() > 4 + Args::kMaxHistory || dtypes.size() != kFixed + prev.size() - 4 ||
      entry.size() != (dtypes[1] < 0 ? 0 : 2) || kept.size() != (dtypes[2] < 0 ? 0 : prev.size()))
    throw py::value_error("fastdiff: bind_scheduler_step: types and coefficients do not fit each other");
  for (size_t i = 0; i < dtypes.size(); ++i) {
    const bool optional = i == 1 || i == 2 || i == 5;  // entry, kept, noise
    if (dtypes[i] < (optional ? -1 : 0) || dtypes[i] > static_cast<int>(cpu::DType::f16))
      throw py::value_error("fastdiff: bind_scheduler_step: dtypes[" + std::to_string(i) + "] is " +
                            std::to_string(dtypes[i]) + ", expected 0, 1 or 2" + (optional ? ", or -1 for none" : ""));
  }
  if (numel < 0)
    throw py::value_error("fastdiff: bind_scheduler_step: numel is " + std::to_string(numel) + ", expected 0 or more");
  Args args;
  const auto operand = [&](size_t coefficient, size_t place) {
    return Args::Operand{nullptr, static_cast<cpu::DType>(dtypes[place]), prev[coefficient],
                         kept.empty() ? 0 : kept[coefficient]};
  };
  args.numel = numel;
  args.prev_dtype = static_cast<cpu::DType>(dtypes[0]);
  args.entry_dtype = static_cast<cpu::DType>(dtypes[1]);
  args.kept_dtype = static_cast<cpu::DType>(dtypes[2]);
  args.sample = operand(0, 3);
  args.model_output = operand(1, 4);
  args.noise = operand(3, 5);
  args.history_count = static_cast<int>(prev.size() - 4);
  for (int h = 0; h < args.history_count; ++h) args.history[h] = operand(4 + h, kFixed + h);
  if (!entry.empty()) {
    args.sample.in_entry = entry[0];
    args.model_output.in_entry = entry[1];
    args.entry_in_next = prev[2];
    if (clip) args.clip = *clip;
  }
  if (!kept.empty()) args.entry_in_kept = kept[2];
  uint32_t there = 0;
  for (size_t i = 0; i < dtypes.size(); ++i) there |= static_cast<uint32_t>(dtypes[i] >= 0) << i;

  return [args, there](const py::args& addresses) {
    Args now = args;
    const size_t count = kFixed + now.history_count;
    void* data[kFixed + Args::kMaxHistory] = {};
    uint32_t given = 0;
    for (size_t i = 0; i < count && i < addresses.size(); ++i) {
      data[i] = PyLong_AsVoidPtr(PyTuple_GET_ITEM(addresses.ptr(), i));
      given |= static_cast<uint32_t>(data[i] != nullptr) << i;
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (addresses.size() != count || given != there)
      throw py::value_error("fastdiff: scheduler_step: an address is missing, or is one of no tensor");
    now.prev = data[0];
    now.entry = data[1];
    now.kept = data[2];
    now.sample.data = data[3];
    now.model_output.data = data[4];
    now.noise.data = data[5];
    for (int h = 0; h < now.history_count; ++h) now.history[h].data = data[kFixed + h];
    if (!cpu::scheduler_step(now)) throw std::runtime_error("fastdiff: scheduler_step has no kernel for this CPU");
  };
}

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdiff's compiled kernels: build information. The ops are torch.ops.fastdiff.*";
  m.def("build_info", [] { return FASTDIFF_BUILD_INFO; }, "JSON written by setup.py: versions, flags, instruction sets.");
  m.def("cpu_isa", [] { return fastdiff::cpu::isa_name(fastdiff::cpu::isa()); },
        "The instruction set the CPU kernels use in this process.");
  m.def("bind_scheduler_step", &fastdiff::bind_scheduler_step, py::arg("numel"), py::arg("dtypes"), py::arg("prev"),
        py::arg("entry"), py::arg("clip"), py::arg("kept"),
        "scheduler_step on CPU tensors, a function of their addresses; types are 0 float32, 1 bfloat16, 2 float16.");
}
