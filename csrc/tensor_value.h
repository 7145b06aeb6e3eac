// Tensors that came from Python, asked for what they are by torch's stable ABI and without its headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "python.h"

// Of torch's stable ABI; a handle is the address of an at::Tensor, which is one pointer to its implementation.
struct AtenTensorOpaque;
extern "C" {
int32_t aoti_torch_get_layout(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_layout_strided();
int32_t aoti_torch_get_dtype(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_device_type(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_device_index(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_dim(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_sizes(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_is_contiguous(AtenTensorOpaque*, bool*);
int32_t torch_get_const_data_ptr(AtenTensorOpaque*, const void**);
int32_t torch_get_mutable_data_ptr(AtenTensorOpaque*, void**);
bool aoti_torch_grad_mode_is_enabled();
}

namespace fastdiff {

// What is needed of torch's Python side.
struct Torch {
  py::object tensor = py::module_::import("torch").attr("Tensor");
  py::object implementation = tensor.attr("_cdata"), version = tensor.attr("_version");
  py::object requires_grad = tensor.attr("requires_grad"), dtype = tensor.attr("dtype");
  py::object is_neg = tensor.attr("is_neg"), lerp = py::module_::import("torch").attr("lerp");

  static const Torch& get() {
    static const Torch* torch = new Torch;  // kept until the process ends
    return *torch;
  }
};

// Of a descriptor of torch.Tensor.
inline py::object property(const py::object& descriptor, PyObject* t) {
  return owned(Py_TYPE(descriptor.ptr())->tp_descr_get(descriptor.ptr(), t, reinterpret_cast<PyObject*>(Py_TYPE(t))));
}

// A tensor, or none; asked without torch's Python side.
class Value {
 public:
  Value() = default;
  explicit Value(py::object t) : object_(std::move(t)) {
    implementation_ = PyLong_AsVoidPtr(property(Torch::get().implementation, object_.ptr()).ptr());
  }

  template <class Answer, class Function>
  bool read(Function function, Answer* answer) const {
    return function(reinterpret_cast<AtenTensorOpaque*>(const_cast<void**>(&implementation_)), answer) == 0;
  }

  explicit operator bool() const { return static_cast<bool>(object_); }
  const py::object& object() const { return object_; }
  PyObject* ptr() const { return object_.ptr(); }

 private:
  py::object object_;
  void* implementation_ = nullptr;
};

// What a step depends on of a tensor: class, dtype, shape, device, and that it is strided.
struct Kind {
  PyTypeObject* type = nullptr;
  int32_t layout = 0, dtype = 0, device = 0, index = 0;
  int64_t axes = 0, *sizes = nullptr;
  std::vector<int64_t> shape;

  // False where torch does not tell; the sizes are the tensor's own.
  bool read(const Value& t) {
    type = Py_TYPE(t.ptr());
    return t.read(aoti_torch_get_layout, &layout) && layout == aoti_torch_layout_strided() &&
           t.read(aoti_torch_get_dtype, &dtype) && t.read(aoti_torch_get_device_type, &device) &&
           t.read(aoti_torch_get_device_index, &index) && t.read(aoti_torch_get_dim, &axes) &&
           t.read(aoti_torch_get_sizes, &sizes);
  }

  // Takes a tensor of this kind, and no other.
  bool take(PyObject* t, Value& taken) const {
    if (Py_TYPE(t) != type) return false;
    taken = Value(shared(t));
    Kind other;
    return other.read(taken) && other.dtype == dtype && other.device == device && other.index == index &&
           other.axes == axes && std::equal(shape.begin(), shape.end(), other.sizes);
  }

  // That of an example, if what is read of it is what Python says.
  static Kind of(const py::object& example) {
    const Value t(example);
    Kind kind;
    if (!kind.read(t)) throw py::value_error("fastdiff: known_step: a tensor does not tell what it is");
    kind.shape.assign(kind.sizes, kind.sizes + kind.axes);
    kind.sizes = nullptr;
    const py::object there = example.attr("data_ptr")();
    const void* data = nullptr;
    if (kind.shape != py::cast<std::vector<int64_t>>(example.attr("shape")) ||
        !t.read(torch_get_const_data_ptr, &data) || data != PyLong_AsVoidPtr(there.ptr()))
      throw py::value_error("fastdiff: known_step: this torch's tensors are not what they were");
    return kind;
  }
};

inline bool needs_gradient(const Value& t) {
  return t && property(Torch::get().requires_grad, t.ptr()).ptr() == Py_True;
}

// The address of a contiguous tensor's data; null of any other, and where there is no memory.
inline const void* address(const Value& t) {
  bool contiguous = false;
  const void* data = nullptr;
  if (!t.read(aoti_torch_is_contiguous, &contiguous) || !contiguous ||
      owned(PyObject_CallOneArg(Torch::get().is_neg.ptr(), t.ptr())).ptr() != Py_False ||
      !t.read(torch_get_const_data_ptr, &data))
    return nullptr;
  return data;
}

}  // namespace fastdiff
