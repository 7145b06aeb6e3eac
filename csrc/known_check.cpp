// Whether a call is the step that is written down. Nothing is changed here.
#include "known_step.h"

namespace fastdiff {

bool KnownStep::as_expected() const {
  for (const auto& [function, expected] : conditions_)
    if (!same(owned(PyObject_CallNoArgs(function.ptr())).ptr(), expected.ptr())) return false;
  const py::object own = owned(PyObject_GetAttr(override_.ptr(), NAME("__dict__").ptr()));
  PyObject* wanted = at(own, NAME("wanted"));
  if (!same(wanted ? wanted : Py_None, overridden_.ptr())) return false;
  static const py::object* off = new py::object(py::int_(-1));
  return same(at(modes_, NAME("_current_level")), off->ptr());
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
      case Argument::kTime:
        if (!take_time(argument, given, stepper, call)) return false;
        break;
    }
  }
  return true;
}

bool KnownStep::take_time(const Argument& argument, PyObject* given, PyObject* stepper, Call& call) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(given)) != argument.type.ptr()) return false;
  int32_t dtype = 0;
  if (argument.dtype && (!Value(shared(given)).read(aoti_torch_get_dtype, &dtype) || dtype != *argument.dtype))
    return false;
  const bool first = !call.timestep;
  if (first) call.timestep = shared(given);
  if (!argument.expected) return true;
  PyObject* arguments[] = {at(dict_of(stepper), NAME("schedule")), given, argument.per_sample ? Py_True : Py_False};
  const py::object moment = owned(PyObject_VectorcallMethod(NAME("moment").ptr(), arguments, 3, nullptr));
  if (first) call.moment = moment;
  return same(moment.ptr(), argument.expected.ptr());
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
    writes += torch_version(Value(shared(PyList_GET_ITEM(tables, i))).handle());
  return writes == PyLong_AsLongLong(at(schedule, NAME("_writes"))) && take_history(call);
}

bool KnownStep::take_history(Call& call) const {
  size_t position = kHistory;
  const auto take = [&](PyObject* value) {
    if (!PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(Torch::get().tensor.ptr()))) return true;
    if (position == history_end_ || !kinds_[position].take(value, call.values[position])) return false;
    ++position;
    return true;
  };
  for (const py::object& name : held_) {
    PyObject* value = at(call.attributes, name);
    if (!value) continue;
    if (!PyList_CheckExact(value)) {
      if (!take(value)) return false;
    } else {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i)
        if (!take(PyList_GET_ITEM(value, i))) return false;
    }
  }
  return position == history_end_;
}

// The kernels take history in any layout if the sample is contiguous, and have no gradients.
bool KnownStep::suits_the_kernels(const Call& call) const {
  bool contiguous = false;
  if (!call.values[kSample].read(aoti_torch_is_contiguous, &contiguous) || !contiguous) return false;
  return !aoti_torch_grad_mode_is_enabled() ||
         !(needs_gradient(call.mask) || std::any_of(call.values.begin(), call.values.end(), needs_gradient));
}

}  // namespace fastdiff
