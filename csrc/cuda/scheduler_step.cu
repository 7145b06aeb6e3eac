// One step of a linear sampler: the next sample, the new history entry and one more combination, in one pass over all
// operands
//
// Latents are small, so the cost is the launch: one kernel serves every mixture of element types. Terms of a step
// cancel, and an fp32 result would show what each addition lost: where there is one, sums are in fp64.
#include "device.cuh"

namespace fastdiff::cuda {
namespace {

using Args = cpu::SchedulerStepArgs;

constexpr int kBlock = 128;

// A value with coefficient 0 is not in the sum, be it infinite: a step may clip it before.
template <class Sum, int width>
__device__ __forceinline__ void add(Sum (&sum)[width], double c, const Sum (&v)[width]) {
  if (c == 0) return;
#pragma unroll
  for (int i = 0; i < width; ++i) sum[i] = fma(static_cast<Sum>(c), v[i], sum[i]);
}

template <class Sum, int width>
__device__ __forceinline__ void write(void* to, DType dtype, int64_t at, int64_t left, const Sum (&sum)[width]) {
  float v[width];
#pragma unroll
  for (int i = 0; i < width; ++i) v[i] = static_cast<float>(sum[i]);
  with_type(to, dtype, [&](auto* p) { store(p + at, left, v); });
}

template <class Sum, int width>
__global__ void __launch_bounds__(kBlock, 8) scheduler_step_kernel(const __grid_constant__ Args args) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) * width, left = args.numel - at;
  if (left <= 0) return;
  Sum next[width] = {}, entry[width] = {}, kept[width] = {};
  const auto add_operand = [&](const Args::Operand& t) {
    float v[width];
    with_type(t.data, t.dtype, [&](auto* p) { load(p + at, left, v); });
    Sum wide[width];
#pragma unroll
    for (int i = 0; i < width; ++i) wide[i] = v[i];
    add(next, t.in_next, wide);
    if (args.kept) add(kept, t.in_kept, wide);
    add(entry, t.in_entry, wide);
  };
  add_operand(args.sample);
  add_operand(args.model_output);
  if (args.entry) {
    const Sum bound = static_cast<Sum>(args.clip);
#pragma unroll
    for (int i = 0; i < width; ++i)
      if (args.clip >= 0) entry[i] = entry[i] > bound ? bound : entry[i] < -bound ? -bound : entry[i];  // NaN stays
    add(next, args.entry_in_next, entry);
    if (args.kept) add(kept, args.entry_in_kept, entry);
    write(args.entry, args.entry_dtype, at, left, entry);
  }
  if (args.noise.data) add_operand(args.noise);
#pragma unroll
  for (int h = 0; h < Args::kMaxHistory; ++h)
    if (h < args.history_count) add_operand(args.history[h]);
  write(args.prev, args.prev_dtype, at, left, next);
  if (args.kept) write(args.kept, args.kept_dtype, at, left, kept);
}

}  // namespace

const char* scheduler_step(const Args& args, Stream stream) {
  if (args.numel == 0) return nullptr;
  bool packs = packable(args.prev) && packable(args.entry) && packable(args.kept);
  for (const Args::Operand* t : {&args.sample, &args.model_output, &args.noise}) packs = packs && packable(t->data);
  for (const Args::Operand& t : args.history) packs = packs && packable(t.data);
  const bool wide = args.prev_dtype == DType::f32 || (args.entry && args.entry_dtype == DType::f32) ||
                    (args.kept && args.kept_dtype == DType::f32);
  const auto with = [&](auto sum, auto width) {
    return launch(scheduler_step_kernel<decltype(sum), width>, ceil_div(args.numel, kBlock * width),
                  dim3(kBlock), 0, stream, args);
  };
  const auto with_width = [&](auto sum) {
    return packs ? with(sum, std::integral_constant<int, 4>()) : with(sum, std::integral_constant<int, 1>());
  };
  return wide ? with_width(double()) : with_width(float());
}

}  // namespace fastdiff::cuda
