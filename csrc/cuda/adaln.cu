// y = residual + gate * x and out = norm(y) * (1 + scale) + shift, or either alone
//
// A row, of whole packs or one element at a time, is held in the registers of the warps that share it. The mean's rounding
// error is measured with the variance and taken out of both.
#include "reduce.cuh"

namespace fastdiff::cuda {
namespace {

using cpu::Rows;

template <int width>
constexpr int kHeld = width == 1 ? 16 : 32;  // values of a row per thread
template <int width>
constexpr int kMaxThreads = kMaxColumns / kHeld<width>;
constexpr int kBlock = 128;  // threads of a block, if its rows do not need more

struct Place {
  int64_t index[Rows::kAxes];
  __device__ __forceinline__ int64_t of(const Rows& rows) const {
    int64_t offset = 0;
#pragma unroll
    for (int axis = 0; axis < Rows::kAxes; ++axis) offset += index[axis] * rows.stride[axis];
    return offset;
  }
};

template <class T, int width>
__global__ void __launch_bounds__(kMaxThreads<width>)
    adaln_kernel(const __grid_constant__ cpu::AdalnArgs args, int64_t rows, int axes) {
  constexpr int kPacks = kHeld<width> / width;
  FASTDIFF_SHARED(float[2][2 * kMaxThreads<width> / kWarp], scratch);
  const int warps = blockDim.x / kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t columns = row < rows ? args.columns : 0;  // threads without a row still meet the barriers
  Place place;
  uint64_t rest = row < rows ? row : 0;
#pragma unroll
  for (int axis = Rows::kAxes - 1; axis > 0; --axis) {
    place.index[axis] = 0;
    if (axis < axes) {
      const uint64_t size = args.size[axis], quotient = rest / size;
      place.index[axis] = rest - quotient * size;
      rest = quotient;
    }
  }
  place.index[0] = rest;
  const auto column = [&](int pack) { return (pack * static_cast<int64_t>(blockDim.x) + threadIdx.x) * width; };

  float v[kPacks][width];
  const T* x = static_cast<const T*>(args.x.data) + place.of(args.x);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (column(p) < columns) {
      load(x + column(p), v[p]);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) v[p][i] = 0.0f;
    }
  }
  if (args.gate.data) {
    const T* residual = static_cast<const T*>(args.residual.data) + place.of(args.residual);
    const int64_t gate = place.of(args.gate);
    T* y = static_cast<T*>(args.y) + row * columns;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t c = column(p);
      if (c >= columns) continue;
      float r[width], g[width];
      load(residual + c, r);
      with_type(args.gate.data, args.gate.dtype, [&](auto* t) { load(t + gate + c, g); });
#pragma unroll
      for (int i = 0; i < width; ++i) v[p][i] = to_float(from_float<T>(r[i] + g[i] * v[p][i]));
      store(y + c, v[p]);
    }
  }
  if (!args.out) return;

  const float share = 1.0f / static_cast<float>(args.columns);
  if (!args.rms) {
    float sum[1] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int i = 0; i < width; ++i) sum[0] += v[p][i];
    row_sum(sum, scratch[0], warps, threadIdx.y);
    const float mean = sum[0] * share;
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int i = 0; i < width; ++i) v[p][i] = column(p) < columns ? v[p][i] - mean : 0.0f;
  }
  float sums[2] = {};  // of the values and of their squares
#pragma unroll
  for (int p = 0; p < kPacks; ++p)
#pragma unroll
    for (int i = 0; i < width; ++i) {
      sums[0] += v[p][i];
      sums[1] += v[p][i] * v[p][i];
    }
  row_sum(sums, scratch[1], warps, threadIdx.y);
  const float error = args.rms ? 0.0f : sums[0] * share;
  const float rstd = inverse_sqrt(sums[1] * share - error * error + args.eps);

  const int64_t weight = place.of(args.weight), bias = place.of(args.bias);
  const int64_t scale = place.of(args.scale), shift = place.of(args.shift);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t c = column(p);
    if (c >= columns) continue;
    float t[width];
#pragma unroll
    for (int i = 0; i < width; ++i) v[p][i] = (v[p][i] - error) * rstd;
    if (args.weight.data) {
      with_type(args.weight.data, args.weight.dtype, [&](auto* from) { load(from + weight + c, t); });
#pragma unroll
      for (int i = 0; i < width; ++i) v[p][i] *= t[i];
    }
    if (args.bias.data) {
      with_type(args.bias.data, args.bias.dtype, [&](auto* from) { load(from + bias + c, t); });
#pragma unroll
      for (int i = 0; i < width; ++i) v[p][i] += t[i];
    }
    if (args.scale.data) {
      with_type(args.scale.data, args.scale.dtype, [&](auto* from) { load(from + scale + c, t); });
#pragma unroll
      for (int i = 0; i < width; ++i) v[p][i] *= 1.0f + t[i];
    }
    if (args.shift.data) {
      with_type(args.shift.data, args.shift.dtype, [&](auto* from) { load(from + shift + c, t); });
#pragma unroll
      for (int i = 0; i < width; ++i) v[p][i] += t[i];
    }
    with_type(args.out, args.out_dtype, [&](auto* to) { store(to + row * columns + c, v[p]); });
  }
}

bool rows_packable(const Rows& rows) {
  bool fits = packable(rows.data);
  for (int64_t stride : rows.stride) fits = fits && packable(stride, rows.dtype);
  return fits;
}

}  // namespace

const char* adaln(const cpu::AdalnArgs& args, Stream stream) {
  if (args.columns > kMaxColumns) return "adaln: a row is longer than 8192";
  int64_t rows = 1;
  int axes = 1;  // the leading ones, up to the last that is not of size 1
  for (int axis = 0; axis < Rows::kAxes; ++axis) {
    rows *= args.size[axis];
    if (args.size[axis] > 1) axes = axis + 1;
  }
  if (rows == 0 || args.columns == 0) return nullptr;
  bool packs = packable(args.columns, args.x.dtype) && (!args.out || packable(args.columns, args.out_dtype)) &&
               packable(args.y) && packable(args.out);
  for (const Rows* t : {&args.x, &args.gate, &args.residual, &args.scale, &args.shift, &args.weight, &args.bias})
    packs = packs && rows_packable(*t);
  return dispatch(args.x.dtype, packs, [&](auto tag, auto width) {
    const int64_t wanted = ceil_div(args.columns, kHeld<width>);
    const unsigned threads = std::max(kWarp, power_of_two(wanted, kMaxThreads<width>));
    const unsigned rows_per_block = std::max(1u, kBlock / threads);
    return launch(adaln_kernel<decltype(tag), width>, ceil_div(rows, rows_per_block),
                  dim3(threads, rows_per_block), 0, stream, args, rows, axes);
  });
}

}  // namespace fastdiff::cuda
