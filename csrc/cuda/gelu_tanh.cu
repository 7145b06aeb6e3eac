// out = x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
#include "device.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int kBlock = 256;

template <class T, int width>
__global__ void __launch_bounds__(kBlock) gelu_tanh_kernel(const T* x, T* out, int64_t numel) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) * width;
  if (at >= numel) return;
  float v[width];
  load(x + at, numel - at, v);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const float t = v[i] < -30.0f ? -30.0f : v[i];  // where the result is 0, also of -Inf; NaN stays
    const float twice_u = t * (1.5957691216f + 0.0713548162726f * t * t);
    v[i] = __fdividef(t, 1.0f + exp_for<T>(-twice_u));
  }
  store(out + at, numel - at, v);
}

}  // namespace

const char* gelu_tanh(const cpu::GeluTanhArgs& args, Stream stream) {
  if (args.numel == 0) return nullptr;
  return dispatch(args.dtype, packable(args.x) && packable(args.out), [&](auto tag, auto width) {
    using T = decltype(tag);
    return launch(gelu_tanh_kernel<T, width>, ceil_div(args.numel, kBlock * width), dim3(kBlock), 0, stream,
                  static_cast<const T*>(args.x), static_cast<T*>(args.out), args.numel);
  });
}

}  // namespace fastdiff::cuda
