// out = hidden * gelu(gate), with the exact GELU x * Phi(x)
#include "device.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int kBlock = 256;

template <class T, int width>
__global__ void __launch_bounds__(kBlock) geglu_kernel(const T* x, T* out, int64_t rows, int64_t columns,
                                                       uint32_t across) {
  const int64_t row = Grid2d::row(across), c = Grid2d::pack(across) * width;
  if (row >= rows || c >= columns) return;
  const T* hidden = x + row * 2 * columns + c;
  float h[width], g[width];
  load(hidden, h);
  load(hidden + columns, g);
#pragma unroll
  for (int i = 0; i < width; ++i) h[i] *= g[i] * normcdff(g[i]);
  store(out + row * columns + c, h);
}

}  // namespace

const char* geglu(const cpu::GegluArgs& args, Stream stream) {
  if (args.rows == 0 || args.columns == 0) return nullptr;
  const bool packs = packable(args.x) && packable(args.out) && packable(args.columns, args.dtype);
  return dispatch(args.dtype, packs, [&](auto tag, auto width) {
    using T = decltype(tag);
    const Grid2d grid(args.rows, ceil_div(args.columns, width), kBlock);
    return launch(geglu_kernel<T, width>, grid.blocks, grid.threads, 0, stream, static_cast<const T*>(args.x),
                  static_cast<T*>(args.out), args.rows, args.columns, grid.across);
  });
}

}  // namespace fastdiff::cuda
