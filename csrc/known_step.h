// A sampler's step that ran before, from the call's arguments to its result in one call.
//
// It interprets what fastdiff/schedulers/known.py has written down of the step: what everything has to be for the step
// to be this one (known_check.cpp), what runs, and what the scheduler holds afterwards (known_step.cpp). Whatever is
// not as written down is left to Python, before anything has happened.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "bound_step.h"
#include "tensor_value.h"

namespace fastdiff {

// A value after the step: that at a position, or one that is no tensor.
struct After {
  Py_ssize_t position = -1;
  py::object constant;

  explicit After(const py::handle& after);
  const py::object& of(const std::vector<Value>& values) const {
    const py::object* found = &constant;
    if (position >= 0) found = static_cast<size_t>(position) < values.size() ? &values[position].object() : nullptr;
    if (!found || !*found) throw missing();
    return *found;
  }

 private:
  std::runtime_error missing() const;
};

struct Argument {
  enum Role { kTensor, kMask, kConstant, kTime, kGenerator } role;
  size_t position = 0;           // among the values
  py::object expected;           // the constant; of a time its moment, or null if its value does not count
  py::object type;               // of a time: its class
  std::optional<int32_t> dtype;  // of a time that is a tensor
  bool per_sample = false;
};

struct Launch {
  py::object slot, choice, run, bound;
  const BoundStep* step = nullptr;   // null: only `run` serves
  std::optional<int32_t> results[3];  // their dtypes, for `step`
  std::vector<size_t> history;
  bool noise = false, keeps = false;
};

struct History {
  py::object name;
  bool many = false;
  std::vector<After> after;
};

// What is known of one call.
struct Call {
  std::vector<Value> values;
  Value mask;
  py::object timestep, moment, generator = py::none();
  py::object attributes, left, contents;
};

class KnownStep {
 public:
  explicit KnownStep(const py::dict& parts);

  // The step's result; null where something is not as written down.
  py::object run(PyObject* stepper, PyObject* site, PyObject* args, PyObject* kwargs) const;

 private:
  using Values = std::vector<Value>;
  enum { kSample, kModelOutput, kEntry, kNoise, kSecondNoise, kHistory };  // as in fastdiff/schedulers/probe.py

  bool as_expected() const;
  bool take_arguments(PyObject* args, PyObject* kwargs, PyObject* stepper, Call& call) const;
  bool take_time(const Argument& argument, PyObject* given, PyObject* stepper, Call& call) const;
  bool is_there(PyObject* stepper, Call& call) const;
  bool take_history(Call& call) const;
  bool suits_the_kernels(const Call& call) const;

  void draw(Values& values, const py::object& generator) const;
  void launch(const Launch& launch, PyObject* site, const py::object& served, Values& values) const;
  bool launch_directly(const Launch& launch, const Values& values, Value* results) const;
  void keep_books(const Call& call) const;
  py::object result(const Values& values) const;

  std::vector<std::pair<py::object, py::object>> conditions_;  // a function, and what it has to return
  py::object override_, overridden_;  // the thread's own backend is kept in the first, and has to be the second
  py::object modes_;                  // where the level of forward-mode differentiation is
  size_t positional_ = 0;
  std::vector<py::object> named_;
  std::vector<Argument> arguments_;
  std::vector<Kind> kinds_;  // of the values before the launches; those without a type are not there
  size_t history_end_ = 0;
  Kind mask_;
  std::vector<py::object> held_, lists_;  // names of the attributes that hold tensors, and of those that are lists
  py::object begin_name_, begin_;         // null where there is none, and where its value does not count
  py::object backend_;
  std::vector<Launch> launches_;
  py::object randn_, shape_, device_;
  std::vector<py::object> drawn_;
  std::vector<size_t> blend_;
  std::vector<History> history_;
  std::vector<std::pair<py::object, py::object>> state_;
  py::object past_name_;
  std::vector<std::optional<Py_ssize_t>> past_;  // none, or a position among the past timesteps, -1 for this step's
  bool remembers_ = false;
  py::object output_, field_names_;
  std::vector<After> fields_;
};

void define_known_step(py::module_& m);

}  // namespace fastdiff
