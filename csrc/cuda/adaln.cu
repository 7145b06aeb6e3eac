// y = residual + gate * x (or residual + x) and out = norm(y) * (1 + scale) + shift, or either alone; of the norm also
// two such results.
//
// A row, of whole packs or one element at a time, is held in the registers of the warps that share it. The mean's rounding
// error is measured with the variance and taken out of both. Rows too long for that are read twice.
#include "reduce.cuh"

namespace fastdiff::cuda {
namespace {

using cpu::Rows;

constexpr int64_t kMaxColumns = 8192;  // of a row held in registers

template <int width>
constexpr int kHeld = width == 1 ? 16 : 32;  // values of a row per thread
template <int width>
constexpr int kMaxThreads = kMaxColumns / kHeld<width>;
constexpr int kBlock = 128;      // threads of a block, if its rows do not need more
constexpr int kLongBlock = 512;  // of a row longer than kMaxColumns

// A row's index on each leading axis.
struct Place {
  int64_t row, index[Rows::kAxes];

  // axes: the leading ones, up to the last that is not of size 1.
  __device__ __forceinline__ Place(const cpu::AdalnArgs& args, int64_t row, int axes) : row(row) {
    uint64_t rest = row;
#pragma unroll
    for (int axis = Rows::kAxes - 1; axis > 0; --axis) {
      index[axis] = 0;
      if (axis < axes) {
        const uint64_t size = args.size[axis], quotient = rest / size;
        index[axis] = rest - quotient * size;
        rest = quotient;
      }
    }
    index[0] = rest;
  }
  __device__ __forceinline__ int64_t of(const Rows& rows) const {
    int64_t offset = 0;
#pragma unroll
    for (int axis = 0; axis < Rows::kAxes; ++axis) offset += index[axis] * rows.stride[axis];
    return offset;
  }
};

// Where a row of x, y and what gates lies.
template <class T>
struct Gated {
  const cpu::AdalnArgs& args;
  const T *x, *residual;
  int64_t gate;
  T* y;

  __device__ __forceinline__ Gated(const cpu::AdalnArgs& args, const Place& place)
      : args(args),
        x(static_cast<const T*>(args.x.data) + place.of(args.x)),
        residual(static_cast<const T*>(args.residual.data) + place.of(args.residual)),
        gate(place.of(args.gate)),
        y(static_cast<T*>(args.y) + place.row * args.columns) {}

  // v = x to y, as y's type holds it, at column c.
  template <int width>
  __device__ __forceinline__ void add_residual(int64_t c, float (&v)[width]) const {
    float r[width], g[width];
    load(residual + c, r);
#pragma unroll
    for (int i = 0; i < width; ++i) g[i] = 1.0f;
    if (args.gate.data) with_type(args.gate.data, args.gate.dtype, [&](auto* p) { load(p + gate + c, g); });
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] = to_float(from_float<T>(r[i] + g[i] * v[i]));
  }
};

// Where a row of what modulates lies, and of the result, or of both results if `dual`.
template <bool dual>
struct Modulation {
  const cpu::AdalnArgs& args;
  int64_t row, weight, bias, scale, shift, scale2, shift2;

  __device__ __forceinline__ Modulation(const cpu::AdalnArgs& args, const Place& place)
      : args(args),
        row(place.row),
        weight(place.of(args.weight)),
        bias(place.of(args.bias)),
        scale(place.of(args.scale)),
        shift(place.of(args.shift)),
        scale2(dual ? place.of(args.scale2) : 0),
        shift2(dual ? place.of(args.shift2) : 0) {}

  // Of normalised values from column c on.
  template <int width>
  __device__ __forceinline__ void finish(int64_t c, float (&v)[width]) const {
    apply(args.weight.data, args.weight.dtype, weight + c, v, [](float a, float b) { return a * b; });
    apply(args.bias.data, args.bias.dtype, bias + c, v, [](float a, float b) { return a + b; });
    if constexpr (dual) {
      float second[width];
#pragma unroll
      for (int i = 0; i < width; ++i) second[i] = v[i];
      modulate(args.scale2, scale2 + c, args.shift2, shift2 + c, second, args.out2, c);
    }
    modulate(args.scale, scale + c, args.shift, shift + c, v, args.out, c);
  }

 private:
  template <int width>
  __device__ __forceinline__ void modulate(const Rows& scale, int64_t scale_at, const Rows& shift, int64_t shift_at,
                                           float (&v)[width], void* out, int64_t c) const {
    apply(scale.data, scale.dtype, scale_at, v, [](float a, float b) { return a * (1.0f + b); });
    apply(shift.data, shift.dtype, shift_at, v, [](float a, float b) { return a + b; });
    with_type(out, args.out_dtype, [&](auto* to) { store(to + row * args.columns + c, v); });
  }
};

template <class T, int width, bool dual>
__global__ void __launch_bounds__(kMaxThreads<width>, 1)  // 1: else ptxas spills for occupancy
    adaln_kernel(const __grid_constant__ cpu::AdalnArgs args, int64_t rows, int axes) {
  constexpr int kPacks = kHeld<width> / width;
  FASTDIFF_SHARED(float[2][2 * kMaxThreads<width> / kWarp], scratch);
  const int warps = blockDim.x / kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int columns = row < rows ? static_cast<int>(args.columns) : 0;  // threads without a row still meet the barriers
  const Place place(args, row < rows ? row : 0, axes);
  const Gated<T> gated(args, place);
  const auto column = [&](int pack) { return static_cast<int>(pack * blockDim.x + threadIdx.x) * width; };

  float v[kPacks][width];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (column(p) < columns) {
      load(gated.x + column(p), v[p]);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) v[p][i] = 0.0f;
    }
  }
  if (args.residual.data) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (column(p) >= columns) continue;
      gated.add_residual(column(p), v[p]);
      store(gated.y + column(p), v[p]);
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
  const Modulation<dual> modulation(args, place);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (column(p) >= columns) continue;
#pragma unroll
    for (int i = 0; i < width; ++i) v[p][i] = (v[p][i] - error) * rstd;
    modulation.finish(column(p), v[p]);
  }
}

// A block has a row of any length: it goes over it for y and the moments, and once more for the result. The moments are
// taken relative to a pivot, the mean of 32 of the values, so that a large mean costs no digits.
template <class T, int width, bool dual>
__global__ void __launch_bounds__(kLongBlock, 1)  // 1: else ptxas spills for occupancy
    adaln_long_kernel(const __grid_constant__ cpu::AdalnArgs args, int axes) {
  FASTDIFF_SHARED(Moments[kLongBlock / kWarp], scratch);
  FASTDIFF_SHARED(float[kLongBlock / kWarp], sums);
  const Place place(args, blockIdx.x, axes);
  const Gated<T> gated(args, place);
  const auto read = [&](int64_t c, auto& v) {
    load(gated.x + c, v);
    if (args.residual.data) gated.add_residual(c, v);
  };
  float pivot[1] = {};
  if (args.out && !args.rms) {
    read(threadIdx.x % kWarp * args.columns / kWarp, pivot);
    warp_sum(pivot);
    pivot[0] /= kWarp;
  }
  Moments m{};
  float squares[1] = {};
  for (int64_t c = threadIdx.x * width; c < args.columns; c += kLongBlock * width) {
    float v[width];
    read(c, v);
    if (args.residual.data) store(gated.y + c, v);
    if (args.rms) {
#pragma unroll
      for (int i = 0; i < width; ++i) squares[0] += v[i] * v[i];
    } else if (args.out) {
#pragma unroll
      for (int i = 0; i < width; ++i) v[i] -= pivot[0];
      m.add(v, width);
    }
  }
  if (!args.out) return;

  float centre = 0.0f, lost = 0.0f, variance;
  if (args.rms) {
    row_sum(squares, sums, kLongBlock / kWarp, 0);
    variance = divide(squares[0], static_cast<float>(args.columns));
  } else {
    block_merge(m, scratch);
    m = of_first_lane(m);
    centre = add_exactly(pivot[0], m.mean, lost);
    variance = divide(m.m2, m.count);
  }
  const float rstd = inverse_sqrt(variance + args.eps);
  const T* from = args.residual.data ? gated.y : gated.x;
  const Modulation<dual> modulation(args, place);
#pragma unroll 2
  for (int64_t c = threadIdx.x * width; c < args.columns; c += kLongBlock * width) {
    float v[width];
    load(from + c, v);
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] = ((v[i] - centre) - lost) * rstd;
    modulation.finish(c, v);
  }
}

bool rows_packable(const Rows& rows) {
  bool fits = packable(rows.data);
  for (int64_t stride : rows.stride) fits = fits && packable(stride, rows.dtype);
  return fits;
}

}  // namespace

const char* adaln(const cpu::AdalnArgs& args, Stream stream) {
  int64_t rows = 1;
  int axes = 1;
  for (int axis = 0; axis < Rows::kAxes; ++axis) {
    rows *= args.size[axis];
    if (args.size[axis] > 1) axes = axis + 1;
  }
  if (rows == 0 || args.columns == 0) return nullptr;
  bool packs = packable(args.columns, args.x.dtype) && (!args.out || packable(args.columns, args.out_dtype)) &&
               packable(args.y) && packable(args.out) && packable(args.out2);
  for (const Rows* t : {&args.x, &args.gate, &args.residual, &args.scale, &args.shift, &args.scale2, &args.shift2,
                        &args.weight, &args.bias})
    packs = packs && rows_packable(*t);
  return dispatch(args.x.dtype, packs, [&](auto tag, auto width) {
    const auto launch_rows = [&](auto dual) {
      if (args.columns > kMaxColumns)
        return launch(adaln_long_kernel<decltype(tag), width, dual>, rows, dim3(kLongBlock), 0, stream, args, axes);
      const int64_t wanted = ceil_div(args.columns, kHeld<width>);
      const unsigned threads = std::max(kWarp, power_of_two(wanted, kMaxThreads<width>));
      const unsigned rows_per_block = std::max(1u, kBlock / threads);
      return launch(adaln_kernel<decltype(tag), width, dual>, ceil_div(rows, rows_per_block),
                    dim3(threads, rows_per_block), 0, stream, args, rows, axes);
    };
    return args.out2 ? launch_rows(std::true_type{}) : launch_rows(std::false_type{});
  });
}

}  // namespace fastdiff::cuda
