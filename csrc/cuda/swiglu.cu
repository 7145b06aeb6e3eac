// out = silu(gate) * x
#include "device.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int kBlock = 256;

template <class T, int width>
__global__ void __launch_bounds__(kBlock) swiglu_kernel(const __grid_constant__ cpu::SwigluArgs args, uint32_t across) {
  const int64_t row = Grid2d::row(across), c = Grid2d::pack(across) * width, left = args.columns - c;
  if (row >= args.rows || left <= 0) return;
  float gate[width], v[width];
  load(static_cast<const T*>(args.gate) + row * args.gate_stride + c, left, gate);
  load(static_cast<const T*>(args.x) + row * args.x_stride + c, left, v);
#pragma unroll
  for (int i = 0; i < width; ++i) v[i] *= silu<T>(gate[i]);
  store(static_cast<T*>(args.out) + row * args.columns + c, left, v);
}

}  // namespace

const char* swiglu(const cpu::SwigluArgs& args, Stream stream) {
  if (args.rows == 0 || args.columns == 0) return nullptr;
  const bool packs = packable(args.gate) && packable(args.x) && packable(args.out) &&
                     (args.rows == 1 || (packable(args.gate_stride, args.dtype) && packable(args.x_stride, args.dtype) &&
                                         packable(args.columns, args.dtype)));
  return dispatch(args.dtype, packs, [&](auto tag, auto width) {
    using T = decltype(tag);
    const Grid2d grid(args.rows, ceil_div(args.columns, width), kBlock);
    return launch(swiglu_kernel<T, width>, grid.blocks, grid.threads, 0, stream, args, grid.across);
  });
}

}  // namespace fastdiff::cuda
