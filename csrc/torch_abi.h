// What the files that speak to Python use of torch, declared here since they are built without its headers.
#pragma once

#include <Python.h>

#include <cstdint>

// Of its stable ABI. A handle is the address of an at::Tensor, which is one pointer to its implementation.
struct AtenTensorOpaque;
extern "C" {
int32_t aoti_torch_get_layout(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_layout_strided();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_get_dtype(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_device_type(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_device_index(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_dim(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_sizes(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_strides(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_is_contiguous(AtenTensorOpaque*, bool*);
int32_t torch_get_const_data_ptr(AtenTensorOpaque*, const void**);
int32_t torch_get_mutable_data_ptr(AtenTensorOpaque*, void**);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorOpaque**);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque*);
bool aoti_torch_grad_mode_is_enabled();
}

// C++ functions that torch exports besides, by the names that linkers know them by, in which their arguments' types are
// written down: a torch that has others has none of these, and then they are null. What they return is not in a name;
// from 2.10 to 2.13 it is this. All take an at::Tensor by address.
#ifdef __APPLE__
#define FASTDIFF_EXPORTED(name) __asm__("_" name) __attribute__((weak_import))
#else
#define FASTDIFF_EXPORTED(name) __asm__(name) __attribute__((weak))
#endif
extern "C" {
// The Python object of a tensor, as a new reference: THPVariable_Wrap, of a tensor that it may take or not.
PyObject* torch_wrap_shared(AtenTensorOpaque*) FASTDIFF_EXPORTED("_Z16THPVariable_WrapRKN2at10TensorBaseE");
PyObject* torch_wrap_taken(AtenTensorOpaque*) FASTDIFF_EXPORTED("_Z16THPVariable_WrapN2at10TensorBaseE");
bool torch_is_neg(AtenTensorOpaque*) FASTDIFF_EXPORTED("_ZN2at6native6is_negERKNS_6TensorE");
int64_t torch_version(AtenTensorOpaque*) FASTDIFF_EXPORTED("_ZNK2at10TensorBase8_versionEv");
}

namespace fastdiff {

// Whether this torch has all of them.
inline bool torch_exports_all() {
  return (torch_wrap_shared || torch_wrap_taken) && torch_is_neg && torch_version;
}

inline PyObject* torch_wrap(AtenTensorOpaque* t) { return torch_wrap_shared ? torch_wrap_shared(t) : torch_wrap_taken(t); }

}  // namespace fastdiff
