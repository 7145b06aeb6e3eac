// What a known step does, and fastdiff._C.known_step.
#include "known_step.h"

#include <memory>

namespace fastdiff {
namespace {

PyObject* randn_names = nullptr;  // of arguments

}  // namespace

void KnownStep::draw(Values& values, const py::object& generator) const {
  size_t position = kNoise;
  for (const py::object& dtype : drawn_) {
    PyObject* arguments[] = {shape_.ptr(), generator.ptr(), device_.ptr(), dtype.ptr()};
    values[position++] = Value(owned(PyObject_Vectorcall(randn_.ptr(), arguments, 2, randn_names)));
  }
}

bool KnownStep::launch_directly(const Launch& launch, const Values& values, Value* results) const {
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
    if (!launch.results[i]) continue;
    results[i] = empty_like(values[kSample], kinds_[kSample], *launch.results[i]);
    if (!results[i] || !results[i].read(torch_get_mutable_data_ptr, &data[i])) return false;
  }
  (*launch.step)(data);
  return true;
}

void KnownStep::launch(const Launch& launch, PyObject* site, const py::object& served, Values& values) const {
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
  values.push_back(std::move(results[0]));
  if (launch.keeps) values.push_back(std::move(results[2]));
}

void KnownStep::keep_books(const Call& call) const {
  std::vector<py::object> items;
  items.reserve(BoundStep::kMost);
  for (const History& entry : history_) {
    if (!entry.many) {
      set_in_both(call.attributes, call.left, entry.name, entry.after[0].of(call.values));
      continue;
    }
    items.clear();
    for (const After& after : entry.after) items.push_back(after.of(call.values));
    fill(at(call.attributes, entry.name), items);
  }
  for (const auto& [name, value] : state_) set_in_both(call.attributes, call.left, name, value);
  if (!past_.empty()) {
    PyObject* past = still_there(at(call.attributes, past_name_));
    items.clear();
    for (const std::optional<Py_ssize_t>& position : past_)
      items.push_back(!position       ? py::none()
                      : *position < 0 ? call.timestep
                                      : shared(still_there(PyList_GetItem(past, *position))));
    fill(past, items);
  }
  Py_ssize_t copies = 0;
  for (const py::object& name : lists_) {
    PyObject* list = at(call.attributes, name);
    if (!list || !PyList_CheckExact(list)) continue;
    items.clear();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) items.push_back(shared(PyList_GET_ITEM(list, i)));
    fill(PyList_GetItem(call.contents.ptr(), copies++), items);
  }
}

py::object KnownStep::result(const Values& values) const {
  if (output_.ptr() == reinterpret_cast<PyObject*>(&PyTuple_Type)) {
    const py::object tuple = owned(PyTuple_New(static_cast<Py_ssize_t>(fields_.size())));
    for (size_t i = 0; i < fields_.size(); ++i)
      PyTuple_SET_ITEM(tuple.ptr(), i, Py_NewRef(fields_[i].of(values).ptr()));
    return tuple;
  }
  std::vector<PyObject*> found;
  for (const After& field : fields_) found.push_back(field.of(values).ptr());
  return owned(PyObject_Vectorcall(output_.ptr(), found.data(), 0, field_names_.ptr()));
}

py::object KnownStep::run(PyObject* stepper, PyObject* site, PyObject* args, PyObject* kwargs) const {
  Call call;
  call.values.reserve(kinds_.size() + 2 * launches_.size());
  call.values.resize(kinds_.size());
  const py::object own = dict_of(site);
  if (!same(at(own, NAME("backend")), backend_.ptr()) || !as_expected() || !is_there(stepper, call) ||
      !take_arguments(args, kwargs, stepper, call) || !suits_the_kernels(call))
    return {};
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

namespace {

PyObject* call_known(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    if (count != 4 || !PyTuple_Check(arguments[2]) || !PyDict_Check(arguments[3]))
      throw py::type_error("fastdiff: a known step takes a stepper, a site, a tuple and a dictionary");
    const auto* known = static_cast<const KnownStep*>(PyCapsule_GetPointer(capsule, "fastdiff.known_step"));
    const py::object result = known->run(arguments[0], arguments[1], arguments[2], arguments[3]);
    return result ? result : shared(Py_NotImplemented);
  });
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
  randn_names = owned(PyTuple_Pack(2, NAME("device").ptr(), NAME("dtype").ptr())).release().ptr();
  m.def("known_step", &known_step, py::arg("parts"),
        "A step that is known, as a function; `parts` as in fastdiff/schedulers/known.py.");
}

}  // namespace fastdiff
