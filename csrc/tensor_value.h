// Tensors that came from Python, or go there, without torch's Python side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "python.h"
#include "torch_abi.h"

namespace fastdiff {

// What is needed of torch's Python side.
class Torch {
 public:
  py::object module = py::module_::import("torch");
  py::object tensor = module.attr("Tensor"), requires_grad = tensor.attr("requires_grad"), lerp = module.attr("lerp");

  static const Torch& get() {
    static const Torch* torch = new Torch;  // kept until the process ends
    return *torch;
  }

  void* implementation(PyObject* t) const { return follows_head_ ? word_after_head(t) : told(t); }

 private:
  static void* word_after_head(PyObject* t) { return *reinterpret_cast<void**>(t + 1); }
  void* told(PyObject* t) const;

  py::object told_ = tensor.attr("_cdata"), example_ = module.attr("empty")(0);
  // Whether the at::Tensor is what comes first in the Python object, as in torch 2.13; in others a flag does.
  bool follows_head_ = word_after_head(example_.ptr()) == told(example_.ptr());
};

// Of a descriptor of torch.Tensor.
inline py::object property(const py::object& descriptor, PyObject* t) {
  return owned(Py_TYPE(descriptor.ptr())->tp_descr_get(descriptor.ptr(), t, reinterpret_cast<PyObject*>(Py_TYPE(t))));
}

inline void* Torch::told(PyObject* t) const { return PyLong_AsVoidPtr(property(told_, t).ptr()); }

// A tensor, or none.
class Value {
 public:
  Value() = default;
  explicit Value(py::object t) : object_(std::move(t)), implementation_(Torch::get().implementation(object_.ptr())) {}

  // Takes over what a handle owns.
  static Value take(AtenTensorOpaque* handle) {
    const std::unique_ptr<AtenTensorOpaque, decltype(&aoti_torch_delete_tensor_object)> own(
        handle, &aoti_torch_delete_tensor_object);
    Value value;
    value.implementation_ = *reinterpret_cast<void**>(handle);
    value.object_ = owned(torch_wrap(handle));
    return value;
  }

  // Valid as long as this is.
  AtenTensorOpaque* handle() const {
    return reinterpret_cast<AtenTensorOpaque*>(const_cast<void**>(&implementation_));
  }
  template <class Answer, class Function>
  bool read(Function function, Answer* answer) const {
    return function(handle(), answer) == 0;
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

// The number by which the stable ABI knows a torch.dtype.
inline int32_t dtype_number(const py::handle& dtype) {
  const py::object example = Torch::get().module.attr("empty")(0, py::arg("dtype") = dtype);
  int32_t number = 0;
  if (!Value(example).read(aoti_torch_get_dtype, &number))
    throw py::value_error("fastdiff: known_step: a tensor does not tell its dtype");
  return number;
}

inline bool needs_gradient(const Value& t) {
  return t && property(Torch::get().requires_grad, t.ptr()).ptr() == Py_True;
}

// The address of a contiguous tensor's data; null of any other, and where there is no memory.
inline const void* address(const Value& t) {
  bool contiguous = false;
  const void* data = nullptr;
  if (!t.read(aoti_torch_is_contiguous, &contiguous) || !contiguous || torch_is_neg(t.handle()) ||
      !t.read(torch_get_const_data_ptr, &data))
    return nullptr;
  return data;
}

// torch.empty_like on a contiguous tensor of that kind, of the given dtype; none where torch fails.
inline Value empty_like(const Value& t, const Kind& kind, int32_t dtype) {
  int64_t *sizes = nullptr, *strides = nullptr;
  AtenTensorOpaque* made = nullptr;
  if (!t.read(aoti_torch_get_sizes, &sizes) || !t.read(aoti_torch_get_strides, &strides) ||
      aoti_torch_empty_strided(kind.axes, sizes, strides, dtype, kind.device, kind.index, &made) != 0)
    return {};
  return Value::take(made);
}

// A tensor without elements where others of that kind are.
inline Value empty(const Kind& kind, int32_t dtype) {
  const int64_t size = 0, stride = 1;
  AtenTensorOpaque* made = nullptr;
  if (aoti_torch_empty_strided(1, &size, &stride, dtype, kind.device, kind.index, &made) != 0) return {};
  return Value::take(made);
}

}  // namespace fastdiff
