// A known step as it is written down; see fastdiff/schedulers/known.py.
#include <string>

#include "known_step.h"

namespace fastdiff {
namespace {

std::vector<After> afters(const py::handle& items) {
  std::vector<After> found;
  for (const py::handle item : items) found.emplace_back(item);
  return found;
}

std::vector<std::pair<py::object, py::object>> pairs(const py::handle& items) {
  std::vector<std::pair<py::object, py::object>> found;
  for (const py::handle item : items) found.emplace_back(item[py::int_(0)], item[py::int_(1)]);
  return found;
}

Argument argument_of(const py::tuple& parts) {
  const auto role = py::cast<std::string>(parts[0]);
  Argument found;
  if (role == "tensor") {
    found.role = Argument::kTensor;
    found.position = py::cast<size_t>(parts[1]);
  } else if (role == "constant") {
    found.role = Argument::kConstant;
    found.expected = parts[1];
  } else if (role == "time") {
    found.role = Argument::kTime;
    found.type = parts[1];
    if (!parts[2].is_none()) found.dtype = dtype_number(parts[2]);
    if (!parts[3].is_none()) found.expected = parts[3];
    found.per_sample = py::cast<bool>(parts[4]);
  } else {
    found.role = role == "mask" ? Argument::kMask : Argument::kGenerator;
  }
  return found;
}

Launch launch_of(const py::dict& parts) {
  Launch found;
  found.slot = parts["slot"];
  found.choice = parts["choice"];
  found.run = parts["run"];
  found.noise = py::cast<bool>(parts["noise"]);
  found.keeps = py::cast<bool>(parts["keeps"]);
  for (const py::handle position : parts["history"]) found.history.push_back(py::cast<size_t>(position));
  found.bound = parts["bound"];
  if (py::isinstance<BoundStep>(found.bound)) {
    found.step = found.bound.cast<const BoundStep*>();
    size_t i = 0;
    for (const py::handle dtype : parts["results"]) {
      if (!dtype.is_none()) found.results[i] = dtype_number(dtype);
      ++i;
    }
  }
  return found;
}

}  // namespace

After::After(const py::handle& after) {
  if (PyLong_CheckExact(after.ptr()))
    position = py::cast<Py_ssize_t>(after);
  else
    constant = after.attr("value");
}

std::runtime_error After::missing() const {
  return std::runtime_error("fastdiff: a known step has no value " + std::to_string(position));
}

KnownStep::KnownStep(const py::dict& parts) {
  if (!torch_exports_all()) throw py::value_error("fastdiff: known_step: this torch does not export what it uses");
  conditions_ = pairs(parts["conditions"]);
  override_ = parts["override"];
  overridden_ = parts["overridden"];
  modes_ = parts["modes"];
  positional_ = py::cast<size_t>(parts["positional"]);
  named_ = interned_all(parts["named"]);
  for (const py::handle item : parts["arguments"]) arguments_.push_back(argument_of(py::cast<py::tuple>(item)));
  for (const py::handle t : parts["tensors"]) kinds_.push_back(t.is_none() ? Kind{} : Kind::of(shared(t.ptr())));
  history_end_ = py::cast<size_t>(parts["history_end"]);
  if (!parts["mask"].is_none()) mask_ = Kind::of(parts["mask"]);
  held_ = interned_all(parts["held"]);
  lists_ = interned_all(parts["lists"]);
  if (!parts["begin"].is_none()) {
    const auto begin = py::cast<py::tuple>(parts["begin"]);
    begin_name_ = interned(begin[0]);
    if (py::cast<bool>(begin[1])) begin_ = begin[2];
  }
  backend_ = parts["backend"];
  for (const py::handle item : parts["launches"]) launches_.push_back(launch_of(py::cast<py::dict>(item)));
  randn_ = parts["randn"];
  shape_ = parts["shape"];
  device_ = parts["device"];
  for (const py::handle dtype : parts["drawn"]) drawn_.push_back(shared(dtype.ptr()));
  if (!parts["blend"].is_none())
    for (const py::handle position : parts["blend"]) blend_.push_back(py::cast<size_t>(position));
  for (const auto& [name, after] : pairs(parts["history"])) {
    const bool many = PyList_Check(after.ptr());
    history_.push_back({interned(name), many, many ? afters(after) : std::vector<After>{After(after)}});
  }
  for (const auto& [name, value] : pairs(parts["state"])) state_.emplace_back(interned(name), value);
  if (!parts["past_name"].is_none()) past_name_ = interned(parts["past_name"]);
  past_ = py::cast<std::vector<std::optional<Py_ssize_t>>>(parts["past"]);
  remembers_ = py::cast<bool>(parts["remembers"]);
  output_ = parts["output"];
  std::vector<py::object> names;
  for (const auto& [name, after] : pairs(parts["fields"])) {
    names.push_back(interned(name));
    fields_.emplace_back(after);
  }
  py::tuple tuple(names.size());
  for (size_t i = 0; i < names.size(); ++i) tuple[i] = names[i];
  field_names_ = tuple;
}

}  // namespace fastdiff
