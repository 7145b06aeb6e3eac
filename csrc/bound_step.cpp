// fastdiff._C.bind_scheduler_step: a sampler's step by addresses, without torch's dispatcher.
#include "bound_step.h"

#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;

namespace fastdiff {
namespace {

using Args = cpu::SchedulerStepArgs;

// `dtypes` are those of the places, and -1 where there is no tensor.
BoundStep bind_scheduler_step(int64_t numel, const std::vector<int>& dtypes, const std::vector<double>& prev,
                              const std::vector<double>& entry, std::optional<double> clip,
                              const std::vector<double>& kept) {
  constexpr size_t kFixed = BoundStep::kFixed;
  if (prev.size() < 4 || prev.size() > 4 + Args::kMaxHistory || dtypes.size() != kFixed + prev.size() - 4 ||
      entry.size() != (dtypes[BoundStep::kEntry] < 0 ? 0 : 2) ||
      kept.size() != (dtypes[BoundStep::kKept] < 0 ? 0 : prev.size()))
    throw py::value_error("fastdiff: bind_scheduler_step: types and coefficients do not fit each other");
  for (size_t i = 0; i < dtypes.size(); ++i) {
    const bool optional = i == BoundStep::kEntry || i == BoundStep::kKept || i == BoundStep::kNoise;
    if (dtypes[i] < (optional ? -1 : 0) || dtypes[i] > static_cast<int>(cpu::DType::f16))
      throw py::value_error("fastdiff: bind_scheduler_step: dtypes[" + std::to_string(i) + "] is " +
                            std::to_string(dtypes[i]) + ", expected 0, 1 or 2" + (optional ? ", or -1 for none" : ""));
  }
  if (numel < 0)
    throw py::value_error("fastdiff: bind_scheduler_step: numel is " + std::to_string(numel) + ", expected 0 or more");
  BoundStep step;
  Args& args = step.args;
  const auto operand = [&](size_t coefficient, size_t place) {
    return Args::Operand{nullptr, static_cast<cpu::DType>(dtypes[place]), prev[coefficient],
                         kept.empty() ? 0 : kept[coefficient]};
  };
  args.numel = numel;
  args.prev_dtype = static_cast<cpu::DType>(dtypes[BoundStep::kNext]);
  args.entry_dtype = static_cast<cpu::DType>(dtypes[BoundStep::kEntry]);
  args.kept_dtype = static_cast<cpu::DType>(dtypes[BoundStep::kKept]);
  args.sample = operand(0, BoundStep::kSample);
  args.model_output = operand(1, BoundStep::kModelOutput);
  args.noise = operand(3, BoundStep::kNoise);
  args.history_count = static_cast<int>(prev.size() - 4);
  for (int h = 0; h < args.history_count; ++h) args.history[h] = operand(4 + h, kFixed + h);
  if (!entry.empty()) {
    args.sample.in_entry = entry[0];
    args.model_output.in_entry = entry[1];
    args.entry_in_next = prev[2];
    if (clip) args.clip = *clip;
  }
  if (!kept.empty()) args.entry_in_kept = kept[2];
  for (size_t i = 0; i < dtypes.size(); ++i) step.there |= static_cast<uint32_t>(dtypes[i] >= 0) << i;
  return step;
}

void call(const BoundStep& step, const py::args& addresses) {
  void* data[BoundStep::kMost] = {};
  for (size_t i = 0; i < step.count() && i < addresses.size(); ++i)
    data[i] = PyLong_AsVoidPtr(PyTuple_GET_ITEM(addresses.ptr(), i));
  if (PyErr_Occurred()) throw py::error_already_set();
  if (addresses.size() != step.count())
    throw py::value_error("fastdiff: scheduler_step: an address is missing, or is one of no tensor");
  step(data);
}

}  // namespace

void BoundStep::operator()(void* const* data) const {
  uint32_t given = 0;
  for (size_t i = 0; i < count(); ++i) given |= static_cast<uint32_t>(data[i] != nullptr) << i;
  if (given != there) throw py::value_error("fastdiff: scheduler_step: an address is missing, or is one of no tensor");
  Args now = args;
  now.prev = data[kNext];
  now.entry = data[kEntry];
  now.kept = data[kKept];
  now.sample.data = data[kSample];
  now.model_output.data = data[kModelOutput];
  now.noise.data = data[kNoise];
  for (int h = 0; h < now.history_count; ++h) now.history[h].data = data[kFixed + h];
  if (!cpu::scheduler_step(now)) throw std::runtime_error("fastdiff: scheduler_step has no kernel for this CPU");
}

void define_bound_step(py::module_& m) {
  py::class_<BoundStep>(m, "BoundStep").def("__call__", &call);
  m.def("bind_scheduler_step", &bind_scheduler_step, py::arg("numel"), py::arg("dtypes"), py::arg("prev"),
        py::arg("entry"), py::arg("clip"), py::arg("kept"),
        "scheduler_step on CPU tensors, a function of their addresses: next, entry, kept, sample, model output, noise, "
        "history; 0 for none. dtypes are of these: 0 float32, 1 bfloat16, 2 float16, -1 for none.");
}

}  // namespace fastdiff
