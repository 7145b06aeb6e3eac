// Python's objects by its C API, where pybind11's way takes longer: owned references, dictionaries and lists.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fastdiff {

namespace py = pybind11;

inline py::object owned(PyObject* o) {
  if (!o) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(o);
}

inline py::object shared(PyObject* o) { return py::reinterpret_borrow<py::object>(o); }

inline py::object interned(const char* name) { return owned(PyUnicode_InternFromString(name)); }

inline py::object interned(const py::handle& name) {
  PyObject* text = shared(name.ptr()).release().ptr();
  PyUnicode_InternInPlace(&text);
  return owned(text);
}

inline std::vector<py::object> interned_all(const py::handle& names) {
  std::vector<py::object> found;
  for (const py::handle name : names) found.push_back(interned(name));
  return found;
}

inline py::object dict_of(PyObject* o) { return owned(PyObject_GenericGetDict(o, nullptr)); }

// The value at a key of a dictionary; null where there is none.
inline PyObject* at(const py::object& dict, const py::object& key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline void set(const py::object& dict, const py::object& key, const py::object& value) {
  if (PyDict_SetItem(dict.ptr(), key.ptr(), value.ptr())) throw py::error_already_set();
}

// Whether two objects are one, or equal and of one type.
inline bool same(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (!a || !b || Py_TYPE(a) != Py_TYPE(b)) return false;
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal;
}

// Pairs of dictionaries that were found identical, so that they need no comparing as long as nobody writes to them:
// until Python 3.11 every state of every dictionary has a number of its own.
class Identical {
 public:
#if PY_VERSION_HEX < 0x030C0000
  static bool is_noted(PyObject* a, PyObject* b) { return place(a, b) == std::pair(version(a), version(b)); }
  static void note(PyObject* a, PyObject* b) { place(a, b) = {version(a), version(b)}; }

 private:
  using Pair = std::pair<uint64_t, uint64_t>;
  static uint64_t version(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
  static Pair& place(PyObject* a, PyObject* b) {
    static Pair places[64] = {};  // the lock of the interpreter is held
    return places[(version(a) ^ version(b)) % 64];
  }
#else
  static bool is_noted(PyObject*, PyObject*) { return false; }
  static void note(PyObject*, PyObject*) {}
#endif
};

// Whether two dictionaries hold the same objects in the same order, but for that of the name `except`.
inline bool identical(PyObject* a, PyObject* b, PyObject* except) {
  if (Identical::is_noted(a, b)) return true;
  if (PyDict_Size(a) != PyDict_Size(b)) return false;
  Py_ssize_t i = 0, j = 0;
  PyObject *name, *value, *other_name, *other;
  while (PyDict_Next(a, &i, &name, &value))
    if (!PyDict_Next(b, &j, &other_name, &other) || name != other_name || (value != other && name != except))
      return false;
  Identical::note(a, b);
  return true;
}

inline bool identical(PyObject* a, PyObject* b) {
  const Py_ssize_t size = PyList_GET_SIZE(a);
  if (PyList_GET_SIZE(b) != size) return false;
  for (Py_ssize_t i = 0; i < size; ++i)
    if (PyList_GET_ITEM(a, i) != PyList_GET_ITEM(b, i)) return false;
  return true;
}

// A borrowed object that other threads may have taken away meanwhile.
inline PyObject* still_there(PyObject* o) {
  if (o) return o;
  PyErr_Clear();
  throw std::runtime_error("fastdiff: the scheduler was changed while it made a step");
}

// Let a list hold these items, and no others.
inline void fill(PyObject* list, const std::vector<py::object>& items) {
  if (!PyList_CheckExact(still_there(list))) still_there(nullptr);
  const auto size = static_cast<Py_ssize_t>(items.size());
  if (PyList_GET_SIZE(list) == size) {
    for (Py_ssize_t i = 0; i < size; ++i)
      if (PyList_SetItem(list, i, Py_NewRef(items[i].ptr()))) throw py::error_already_set();
    return;
  }
  py::list whole(size);
  for (Py_ssize_t i = 0; i < size; ++i) whole[i] = items[i];
  if (PyList_SetSlice(list, 0, PyList_GET_SIZE(list), whole.ptr())) throw py::error_already_set();
}

// Set one value in both of two dictionaries, which stay identical if they were.
inline void set_in_both(const py::object& a, const py::object& b, const py::object& key, const py::object& value) {
  const bool were = Identical::is_noted(a.ptr(), b.ptr());
  const py::object old = shared(at(a, key));  // that what it does when it goes comes after
  set(a, key, value);
  set(b, key, value);
  if (were) Identical::note(a.ptr(), b.ptr());
}

// What a function of Python's C API returns: the result, or null with its exception set as Python's.
template <class Function>
PyObject* guarded(const Function& function) {
  try {
    return py::object(function()).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

#define NAME(name)                                                 \
  ([]() -> const py::object& {                                     \
    static const py::object* kept = new py::object(interned(name)); \
    return *kept;                                                  \
  }())

}  // namespace fastdiff
