// fastdiff._C.known_step: a sampler's step that ran before, from the call's arguments to its result in one call.
//
// It interprets what fastdiff/schedulers/known.py has written down of the step: what everything has to be for the step
// to be this one, what runs, and what the scheduler holds afterwards. Whatever is not as written down is left to
// Python, before anything has happened.
#include "known_step.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bound_step.h"
#include "tensor_value.h"

namespace fastdiff {
namespace {

// A value after the step: that at a position, or one that is no tensor.
struct After {
  Py_ssize_t position = -1;
  py::object constant;

  explicit After(const py::handle& after) {
    if (PyLong_CheckExact(after.ptr()))
      position = py::cast<Py_ssize_t>(after);
    else
      constant = after.attr("value");
  }
  const py::object& of(const std::vector<Value>& values) const {
    const py::object& found = position < 0 ? constant : values.at(position).object();
    if (!found) throw std::runtime_error("fastdiff: a known step has no value " + std::to_string(position));
    return found;
  }
};

std::vector<After> afters(const py::handle& items) {
  std::vector<After> found;
  for (const py::handle item : items) found.emplace_back(item);
  return found;
}

struct Argument {
  enum Role { kTensor, kMask, kConstant, kTime, kGenerator } role;
  size_t position = 0;      // among the values
  py::object expected;      // the constant; of a time its moment, or null if its value does not count
  py::object type, dtype;   // of a time: its class, and its dtype if it is a tensor, else null
  bool per_sample = false;
};

struct Launch {
  py::object slot, choice, run, bound, make[3];
  const BoundStep* step = nullptr;  // null: only `run` serves
  std::vector<size_t> history;
  bool noise = false, keeps = false;
};

struct History {
  py::object name;
  bool many = false;
  std::vector<After> after;
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
  bool take_arguments(PyObject* args, PyObject* kwargs, PyObject* stepper, struct Call& call) const;
  bool is_there(PyObject* stepper, struct Call& call) const;
  void draw(Values& values, const py::object& generator) const;
  static void launch(const Launch& launch, PyObject* site, const py::object& served, Values& values);
  static bool launch_directly(const Launch& launch, const Values& values, Value* results);
  void keep_books(const struct Call& call) const;
  py::object result(const Values& values) const;

  std::vector<std::pair<py::object, py::object>> conditions_;  // a function, and what it has to return
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
  std::vector<py::object> past_;  // None, or a position among the past timesteps, -1 for this step's
  bool remembers_ = false;
  py::object output_, field_names_;
  std::vector<After> fields_;
};

// What is known of one call.
struct Call {
  std::vector<Value> values;
  Value mask;
  py::object timestep, moment, generator = py::none();
  py::object attributes, left, contents;
};

std::vector<std::pair<py::object, py::object>> pairs(const py::handle& items) {
  std::vector<std::pair<py::object, py::object>> found;
  for (const py::handle item : items) found.emplace_back(item[py::int_(0)], item[py::int_(1)]);
  return found;
}

KnownStep::KnownStep(const py::dict& parts) {
  conditions_ = pairs(parts["conditions"]);
  positional_ = py::cast<size_t>(parts["positional"]);
  named_ = interned_all(parts["named"]);
  for (const py::handle item : parts["arguments"]) {
    const auto argument = py::cast<py::tuple>(item);
    const auto role = py::cast<std::string>(argument[0]);
    Argument& found = arguments_.emplace_back();
    if (role == "tensor") {
      found.role = Argument::kTensor;
      found.position = py::cast<size_t>(argument[1]);
    } else if (role == "constant") {
      found.role = Argument::kConstant;
      found.expected = argument[1];
    } else if (role == "time") {
      found.role = Argument::kTime;
      found.type = argument[1];
      if (!argument[2].is_none()) found.dtype = argument[2];
      if (!argument[3].is_none()) found.expected = argument[3];
      found.per_sample = py::cast<bool>(argument[4]);
    } else {
      found.role = role == "mask" ? Argument::kMask : Argument::kGenerator;
    }
  }
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
  for (const py::handle item : parts["launches"]) {
    const auto part = py::cast<py::dict>(item);
    Launch& found = launches_.emplace_back();
    found.slot = part["slot"];
    found.choice = part["choice"];
    found.run = part["run"];
    found.noise = py::cast<bool>(part["noise"]);
    found.keeps = py::cast<bool>(part["keeps"]);
    for (const py::handle position : part["history"]) found.history.push_back(py::cast<size_t>(position));
    found.bound = part["bound"];
    if (py::isinstance<BoundStep>(found.bound)) {
      found.step = found.bound.cast<const BoundStep*>();
      size_t i = 0;
      for (const py::handle make : part["make"])
        found.make[i++] = make.is_none() ? py::object() : shared(make.ptr());
    }
  }
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
  for (const py::handle position : parts["past"]) past_.push_back(shared(position.ptr()));
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

bool KnownStep::as_expected() const {
  for (const auto& [function, expected] : conditions_)
    if (!same(owned(PyObject_CallNoArgs(function.ptr())).ptr(), expected.ptr())) return false;
  return true;
}

bool KnownStep::take_arguments(PyObject* args, PyObject* kwargs, PyObject* stepper, Call& call) const {
  if (PyTuple_GET_SIZE(args) != static_cast<Py_ssize_t>(positional_) ||
      PyDict_Size(kwargs) != static_cast<Py_ssize_t>(named_.size()))
    return false;
  Py_ssize_t next = 0;
  for (size_t i = 0; i < arguments_.size(); ++i) {
    PyObject *name = nullptr, *given = nullptr;
    if (i < positional_)
      given = PyTuple_GET_ITEM(args, i);
    else if (!PyDict_Next(kwargs, &next, &name, &given) || !same(name, named_[i - positional_].ptr()))
      return false;
    const Argument& argument = arguments_[i];
    switch (argument.role) {
      case Argument::kTensor:
        if (!kinds_[argument.position].take(given, call.values[argument.position])) return false;
        break;
      case Argument::kMask:
        if (!mask_.take(given, call.mask)) return false;
        break;
      case Argument::kConstant:
        if (!same(given, argument.expected.ptr())) return false;
        break;
      case Argument::kGenerator:
        call.generator = shared(given);
        break;
      case Argument::kTime: {
        if (reinterpret_cast<PyObject*>(Py_TYPE(given)) != argument.type.ptr()) return false;
        if (argument.dtype && property(Torch::get().dtype, given).ptr() != argument.dtype.ptr()) return false;
        const bool first = !call.timestep;
        if (first) call.timestep = shared(given);
        if (argument.expected) {
          PyObject* arguments[] = {at(dict_of(stepper), NAME("schedule")), given,
                                   argument.per_sample ? Py_True : Py_False};
          const py::object moment = owned(PyObject_VectorcallMethod(NAME("moment").ptr(), arguments, 3, nullptr));
          if (!same(moment.ptr(), argument.expected.ptr())) return false;
          if (first) call.moment = moment;
        }
        break;
      }
    }
  }
  return true;
}

// Whether nobody changed the scheduler since the step before; takes the tensors that it holds.
bool KnownStep::is_there(PyObject* stepper, Call& call) const {
  const py::object own = dict_of(stepper);
  const py::object scheduler = shared(at(own, NAME("scheduler")));
  call.attributes = dict_of(scheduler.ptr());
  call.left = shared(at(own, NAME("_left")));
  call.contents = shared(at(own, NAME("_contents")));
  if (!identical(call.attributes.ptr(), call.left.ptr(), begin_name_.ptr())) return false;
  if (begin_) {
    PyObject* begin = at(call.attributes, begin_name_);  // which not every scheduler has
    if (!same(begin ? begin : Py_None, begin_.ptr())) return false;
  }
  Py_ssize_t found = 0;
  for (const py::object& name : lists_) {
    PyObject* list = at(call.attributes, name);
    if (!list || !PyList_CheckExact(list)) continue;
    if (found == PyList_GET_SIZE(call.contents.ptr())) return false;
    if (!identical(list, PyList_GET_ITEM(call.contents.ptr(), found++))) return false;
  }
  if (found != PyList_GET_SIZE(call.contents.ptr())) return false;

  const py::object schedule = dict_of(at(own, NAME("schedule")));
  PyObject* config = at(call.attributes, NAME("_internal_dict"));
  if (!config || !identical(dict_of(config).ptr(), at(schedule, NAME("_options")), nullptr)) return false;
  PyObject* tables = at(schedule, NAME("_tables"));
  long long writes = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables); ++i)
    writes += PyLong_AsLongLong(property(Torch::get().version, PyList_GET_ITEM(tables, i)).ptr());
  if (writes != PyLong_AsLongLong(at(schedule, NAME("_writes")))) return false;

  size_t position = kHistory;
  const auto hold = [&](PyObject* value) {
    if (!PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(Torch::get().tensor.ptr()))) return true;
    if (position == history_end_ || !kinds_[position].take(value, call.values[position])) return false;
    ++position;
    return true;
  };
  for (const py::object& name : held_) {
    PyObject* value = at(call.attributes, name);
    if (!value) continue;
    if (!PyList_CheckExact(value)) {
      if (!hold(value)) return false;
    } else {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i)
        if (!hold(PyList_GET_ITEM(value, i))) return false;
    }
  }
  return position == history_end_;
}

void KnownStep::draw(Values& values, const py::object& generator) const {
  static PyObject* names = PyTuple_Pack(2, NAME("device").ptr(), NAME("dtype").ptr());
  size_t position = kNoise;
  for (const py::object& dtype : drawn_) {
    PyObject* arguments[] = {shape_.ptr(), generator.ptr(), device_.ptr(), dtype.ptr()};
    values[position++] = Value(owned(PyObject_Vectorcall(randn_.ptr(), arguments, 2, names)));
  }
}

bool KnownStep::launch_directly(const Launch& launch, const Values& values, Value* results) {
  if (!launch.step) return false;
  void* data[BoundStep::kMost] = {};
  const auto read = [&](size_t place, size_t position) {
    data[place] = const_cast<void*>(address(values[position]));
    return data[place] != nullptr;
  };
  if (!read(BoundStep::kSample, kSample) || !read(BoundStep::kModelOutput, kModelOutput) ||
      (launch.noise && !read(BoundStep::kNoise, kNoise)))
    return false;
  for (size_t h = 0; h < launch.history.size(); ++h)
    if (!read(BoundStep::kFixed + h, launch.history[h])) return false;
  for (size_t i = 0; i < 3; ++i) {
    if (!launch.make[i]) continue;
    results[i] = Value(owned(PyObject_CallOneArg(launch.make[i].ptr(), values[kSample].ptr())));
    if (!results[i].read(torch_get_mutable_data_ptr, &data[i])) return false;
  }
  (*launch.step)(data);
  return true;
}

void KnownStep::launch(const Launch& launch, PyObject* site, const py::object& served, Values& values) {
  if (at(served, launch.slot) != launch.choice.ptr()) {
    PyObject* arguments[] = {site, launch.slot.ptr(), launch.choice.ptr()};
    owned(PyObject_VectorcallMethod(NAME("note").ptr(), arguments, 3, nullptr));
  }
  Value results[3];
  if (!launch_directly(launch, values, results)) {
    py::list history;
    for (const size_t position : launch.history) history.append(values[position].object());
    PyObject* arguments[] = {values[kSample].ptr(), values[kModelOutput].ptr(), history.ptr(),
                             launch.noise ? values[kNoise].ptr() : Py_None};
    const auto found = py::cast<py::tuple>(owned(PyObject_Vectorcall(launch.run.ptr(), arguments, 4, nullptr)));
    for (size_t i = 0; i < 3; ++i)
      if (!found[i].is_none()) results[i] = Value(found[i]);
  }
  if (!values[kEntry]) values[kEntry] = results[1];
  values.push_back(results[0]);
  if (launch.keeps) values.push_back(results[2]);
}

void KnownStep::keep_books(const Call& call) const {
  const auto assign = [&](const py::object& name, const py::object& value) {
    set(call.attributes, name, value);
    set(call.left, name, value);
  };
  for (const History& entry : history_) {
    if (!entry.many) {
      assign(entry.name, entry.after[0].of(call.values));
      continue;
    }
    py::list items(entry.after.size());
    for (size_t i = 0; i < entry.after.size(); ++i) items[i] = entry.after[i].of(call.values);
    replace(at(call.attributes, entry.name), items);
  }
  for (const auto& [name, value] : state_) assign(name, value);
  if (!past_.empty()) {
    PyObject* past = still_there(at(call.attributes, past_name_));
    py::list items(past_.size());
    for (size_t i = 0; i < past_.size(); ++i) {
      items[i] = py::none();
      if (past_[i].is_none()) continue;
      const auto position = py::cast<Py_ssize_t>(past_[i]);
      items[i] = position < 0 ? call.timestep : shared(still_there(PyList_GetItem(past, position)));
    }
    replace(past, items);
  }
  Py_ssize_t copies = 0;
  for (const py::object& name : lists_) {
    PyObject* list = at(call.attributes, name);
    if (list && PyList_CheckExact(list)) replace(PyList_GetItem(call.contents.ptr(), copies++), shared(list));
  }
}

py::object KnownStep::result(const Values& values) const {
  std::vector<PyObject*> found;
  for (const After& field : fields_) found.push_back(field.of(values).ptr());
  if (output_.ptr() != reinterpret_cast<PyObject*>(&PyTuple_Type))
    return owned(PyObject_Vectorcall(output_.ptr(), found.data(), 0, field_names_.ptr()));
  py::tuple tuple(found.size());
  for (size_t i = 0; i < found.size(); ++i) tuple[i] = shared(found[i]);
  return tuple;
}

py::object KnownStep::run(PyObject* stepper, PyObject* site, PyObject* args, PyObject* kwargs) const {
  Call call;
  call.values.reserve(kinds_.size() + 2 * launches_.size());
  call.values.resize(kinds_.size());
  const py::object own = dict_of(site);
  if (!same(at(own, NAME("backend")), backend_.ptr()) || !as_expected() ||
      !is_there(stepper, call) || !take_arguments(args, kwargs, stepper, call))
    return {};
  bool contiguous = false;  // of such a sample, kernels take history in any layout
  if (!call.values[kSample].read(aoti_torch_is_contiguous, &contiguous) || !contiguous) return {};
  if (aoti_torch_grad_mode_is_enabled()) {
    for (const Value& t : call.values)
      if (needs_gradient(t)) return {};
    if (needs_gradient(call.mask)) return {};
  }
  draw(call.values, call.generator);
  const py::object served = shared(at(own, NAME("served")));
  for (const Launch& each : launches_) launch(each, site, served, call.values);
  if (!blend_.empty()) {
    PyObject* arguments[] = {call.values.at(blend_[0]).ptr(), call.values.at(blend_[1]).ptr(), call.mask.ptr()};
    call.values[blend_[0]] = Value(owned(PyObject_Vectorcall(Torch::get().lerp.ptr(), arguments, 3, nullptr)));
  }
  keep_books(call);
  if (remembers_) {
    PyObject* arguments[] = {stepper, call.timestep.ptr(), call.moment ? call.moment.ptr() : Py_None};
    owned(PyObject_VectorcallMethod(NAME("_remember").ptr(), arguments, 3, nullptr));
  }
  return result(call.values);
}

PyObject* call_known(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != 4 || !PyTuple_Check(arguments[2]) || !PyDict_Check(arguments[3]))
      throw py::type_error("fastdiff: a known step takes a stepper, a site, a tuple and a dictionary");
    const auto* known = static_cast<const KnownStep*>(PyCapsule_GetPointer(capsule, "fastdiff.known_step"));
    py::object result = known->run(arguments[0], arguments[1], arguments[2], arguments[3]);
    return result ? result.release().ptr() : Py_NewRef(Py_NotImplemented);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

py::object known_step(const py::dict& parts) {
  static PyMethodDef method = {"known_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_known)),
                               METH_FASTCALL, "(stepper, site, args, kwargs) -> the step's result, or NotImplemented"};
  auto known = std::make_unique<KnownStep>(parts);
  const auto destroy = [](PyObject* c) {
    delete static_cast<KnownStep*>(PyCapsule_GetPointer(c, "fastdiff.known_step"));
  };
  py::capsule capsule(known.get(), "fastdiff.known_step", destroy);
  known.release();
  return owned(PyCFunction_NewEx(&method, capsule.ptr(), nullptr));
}

}  // namespace

void define_known_step(py::module_& m) {
  m.def("known_step", &known_step, py::arg("parts"),
        "A step that is known, as a function; `parts` as in fastdiff/schedulers/known.py.");
}

}  // namespace fastdiff
