// fastdiff._C.scheduler_step: the op of that name on small CPU tensors without torch's dispatcher, which takes longer
// than the kernel.
#include "direct_step.h"

#include <array>

#include "bound_step.h"
#include "tensor_value.h"

namespace fastdiff {
namespace {

using Args = cpu::SchedulerStepArgs;

// The dtypes that the kernel takes.
struct Type {
  py::object dtype;
  int32_t number;
  cpu::DType kind;

  explicit Type(const char* name, cpu::DType kind)
      : dtype(Torch::get().module.attr(name)), number(dtype_number(dtype)), kind(kind) {}

  static const auto& all() {
    static const auto* types = new std::array{Type("float32", cpu::DType::f32), Type("bfloat16", cpu::DType::bf16),
                                              Type("float16", cpu::DType::f16)};
    return *types;
  }
  template <class Same>
  static const Type* find(const Same& same) {
    for (const Type& type : all())
      if (same(type)) return &type;
    return nullptr;
  }
  static const Type* of(const Kind& kind) {
    return find([&](const Type& t) { return t.number == kind.dtype; });
  }
  // The one asked for, or else that one.
  static const Type* of(PyObject* dtype, const Type* otherwise) {
    return dtype == Py_None ? otherwise : find([&](const Type& t) { return t.dtype.ptr() == dtype; });
  }
};

// Up to as many numbers as the kernel takes coefficients.
struct Numbers {
  double at[4 + Args::kMaxHistory] = {};
  Py_ssize_t count = 0;

  bool read(PyObject* sequence) {
    if (!PyList_CheckExact(sequence) && !PyTuple_CheckExact(sequence)) return false;
    count = PySequence_Fast_GET_SIZE(sequence);
    if (count > static_cast<Py_ssize_t>(std::size(at))) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* number = PySequence_Fast_GET_ITEM(sequence, i);
      if (!PyFloat_CheckExact(number)) return false;
      at[i] = PyFloat_AS_DOUBLE(number);
    }
    return true;
  }
};

// A tensor that the kernel takes, of the kind of `like` but for its dtype.
bool read(PyObject* t, const Kind* like, Value& value, Kind& kind, Args::Operand& operand, const Type*& type) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(t)) != Torch::get().tensor.ptr()) return false;
  value = Value(shared(t));
  if (!kind.read(value) || kind.device != aoti_torch_device_type_cpu()) return false;
  if (like && (kind.axes != like->axes || !std::equal(kind.sizes, kind.sizes + kind.axes, like->sizes))) return false;
  type = Type::of(kind);
  operand.data = address(value);
  if (type) operand.dtype = type->kind;
  return type && operand.data;
}

// Of sample, model_output, history, noise, prev, entry, clip, prev_dtype, entry_dtype, kept and kept_dtype; null for
// what is left to the dispatcher.
py::object scheduler_step(PyObject* const* given) {
  PyObject *history = given[2], *clip = given[6];
  Numbers prev, entry, kept;
  if (!PyList_CheckExact(history) || !prev.read(given[4]) || !entry.read(given[5]) || !kept.read(given[9])) return {};
  const Py_ssize_t count = PyList_GET_SIZE(history);
  if (count > Args::kMaxHistory || prev.count != 4 + count || (entry.count != 0 && entry.count != 2) ||
      (kept.count != 0 && kept.count != prev.count) || (clip != Py_None && !PyFloat_CheckExact(clip)))
    return {};

  Args args;
  Value sample, other, noise, past[Args::kMaxHistory];
  Kind kind, another;
  const Type *own = nullptr, *of_model = nullptr, *unused = nullptr;
  const auto take = [&](PyObject* t, Value& value, Args::Operand& operand, const Type*& type, Py_ssize_t place) {
    operand.in_next = prev.at[place];
    operand.in_kept = kept.at[place];
    return read(t, &kind, value, another, operand, type);
  };
  if (!read(given[0], nullptr, sample, kind, args.sample, own) ||
      !take(given[1], other, args.model_output, of_model, 1) ||
      (given[3] != Py_None && !take(given[3], noise, args.noise, unused, 3)))
    return {};
  args.sample.in_next = prev.at[0];
  args.sample.in_kept = kept.at[0];
  for (Py_ssize_t h = 0; h < count; ++h)
    if (!take(PyList_GET_ITEM(history, h), past[h], args.history[h], unused, 4 + h)) return {};
  args.history_count = static_cast<int>(count);
  args.numel = 1;
  for (int64_t axis = 0; axis < kind.axes; ++axis) args.numel *= kind.sizes[axis];

  const Type* types[] = {Type::of(given[7], own), Type::of(given[8], of_model), Type::of(given[10], own)};
  const bool wanted[] = {true, entry.count > 0, kept.count > 0};
  void* data[3] = {};
  const py::object results = owned(PyTuple_New(3));
  for (int i = 0; i < 3; ++i) {
    if (!types[i]) return {};
    const Value made = wanted[i] ? empty_like(sample, kind, types[i]->number) : empty(kind, types[i]->number);
    if (!made || (wanted[i] && !made.read(torch_get_mutable_data_ptr, &data[i]))) return {};
    PyTuple_SET_ITEM(results.ptr(), i, Py_NewRef(made.ptr()));
  }
  args.prev = data[0];
  args.prev_dtype = types[0]->kind;
  if (wanted[1]) {
    args.entry = data[1];
    args.entry_dtype = types[1]->kind;
    args.sample.in_entry = entry.at[0];
    args.model_output.in_entry = entry.at[1];
    args.entry_in_next = prev.at[2];
    if (clip != Py_None) args.clip = PyFloat_AS_DOUBLE(clip);
  }
  if (wanted[2]) {
    args.kept = data[2];
    args.kept_dtype = types[2]->kind;
    args.entry_in_kept = wanted[1] ? kept.at[2] : 0;
  }
  return cpu::scheduler_step(args) ? results : py::object();
}

PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return guarded([&] {
    if (count != 11) throw py::type_error("fastdiff: scheduler_step takes 11 arguments");
    py::object results = torch_exports_all() ? scheduler_step(given) : py::object();
    return results ? results : shared(Py_NotImplemented);
  });
}

}  // namespace

void define_direct_step(py::module_& m) {
  // The dtypes are found here, by torch, which lets other threads run: in a first call two could wait for each other.
  if (torch_exports_all()) Type::all();
  static PyMethodDef method = {"scheduler_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)),
                               METH_FASTCALL, "The op's arguments, all by position -> its results, or NotImplemented"};
  m.attr("scheduler_step") = owned(PyCFunction_NewEx(&method, nullptr, nullptr));
}

}  // namespace fastdiff
