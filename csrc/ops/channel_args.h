// What the norms over (B, C, *spatial) need to know of their tensors: layouts, and values per channel.
#pragma once

#include "../cpu/channels.h"
#include "tensor_args.h"

namespace fastdiff {

// The strides with which (B, C, *spatial) is dense in each sample, channels before or after the pixels; axes of
// size 1 do not count. `batch_stride` of 0 leaves the stride between samples free.
inline bool has_layout(const Tensor& x, bool pixel_major, int64_t batch_stride) {
  const auto sizes = x.sizes(), strides = x.strides();
  const auto matches = [&](size_t axis, int64_t stride) { return sizes[axis] == 1 || strides[axis] == stride; };
  int64_t stride = 1;
  if (pixel_major) {
    if (!matches(1, 1)) return false;
    stride = sizes[1];
  }
  for (size_t axis = sizes.size() - 1; axis > 1; --axis) {
    if (!matches(axis, stride)) return false;
    stride *= sizes[axis];
  }
  return (pixel_major || matches(1, stride)) && (batch_stride == 0 || matches(0, batch_stride));
}

// Of shape (C,), or with `per_sample`, (B, C) and further axes of size 1.
inline cpu::ChannelValues per_channel(const char* op, const std::optional<Tensor>& t, const char* name, const Tensor& x,
                                      bool per_sample) {
  if (!t) return {};
  const int64_t dim = t->dim(), batch = x.size(0), channels = x.size(1);
  const bool fits = per_sample
                        ? dim >= 2 && t->size(0) == batch && t->size(1) == channels && t->numel() == batch * channels
                        : dim == 1 && t->size(0) == channels;
  STD_TORCH_CHECK(fits, "fastdiff: ", op, " takes ", name, per_sample ? " (B, C)" : " (C,)");
  return {data_of(*t, x, name), dtype_of(*t, name), dim > 1 ? t->stride(0) : 0, t->stride(dim > 1 ? 1 : 0)};
}

// x as the kernels take it, and a result of the same layout.
struct Pixels {
  Pixels(const char* op, const Tensor& input) : x(input) {
    const auto sizes = input.sizes();
    STD_TORCH_CHECK(sizes.size() >= 2 && sizes[1] > 0, "fastdiff: ", op, " takes (B, C, *spatial) with channels");
    batch = sizes[0], channels = sizes[1];
    for (size_t axis = 2; axis < sizes.size(); ++axis) spatial *= sizes[axis];
    const bool contiguous = input.is_contiguous();
    pixel_major = !contiguous && has_layout(input, true, channels * spatial);
    dense = contiguous || pixel_major;
    if (!dense && !has_layout(input, false, 0)) x = torch::stable::contiguous(input);
  }
  // An uninitialised result in x's layout.
  Tensor like() const {
    const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    return dense ? empty_output_like(x) : empty_output(shape, contiguous_strides(shape), x.scalar_type(), x);
  }
  Tensor x;
  int64_t batch = 0, channels = 0, spatial = 1;
  bool pixel_major = false, dense = false;  // of the input
};

}  // namespace fastdiff
