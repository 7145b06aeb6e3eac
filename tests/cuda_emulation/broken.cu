// Small kernels, each with one mistake that the emulation must notice, beside correct ones that it must not touch.
#include <stdexcept>
#include <string>

#include "ptx.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int kThreads = 64;

// out[i] = x[63 - i] by way of shared memory.
template <bool barrier>
__global__ void reverse(const float* x, float* out) {
  FASTDIFF_SHARED(float[kThreads], values);
  values[threadIdx.x] = load_one(x + threadIdx.x);
  if (barrier) __syncthreads();
  store_one(out + threadIdx.x, values[kThreads - 1 - threadIdx.x]);
}

// out[i] = x[63 - i] + (1 + x[63 - i]): the same shared memory twice, so that writing must wait for reading.
template <bool barrier>
__global__ void reverse_twice(const float* x, float* out) {
  float* values = dynamic_shared<float>();
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = load_one(x + threadIdx.x) + static_cast<float>(round);
    __syncthreads();
    sum += values[kThreads - 1 - threadIdx.x];
    if (barrier) __syncthreads();
  }
  store_one(out + threadIdx.x, sum);
}

__global__ void copy(const float* x, float* out, int shift) {
  store_one(out + threadIdx.x, load_one(x + threadIdx.x + shift));
}
__global__ void copy_to(const float* x, float* out, int shift) {
  store_one(out + threadIdx.x + shift, load_one(x + threadIdx.x));
}
__global__ void write_input(const float* x, float* out) {
  store_one(const_cast<float*>(x) + threadIdx.x, 0.0f);
  store_one(out + threadIdx.x, 0.0f);
}
__global__ void copy_packs(const float* x, float* out, int shift) {
  if (threadIdx.x >= 15) return;
  float pack[4];
  load(x + 4 * threadIdx.x + shift, pack);
  store(out + 4 * threadIdx.x, pack);
}

// Vectors of 4 to where only the first may be.
__global__ void write_packs(const float* x, float* out, int shift) {
  if (threadIdx.x >= 15) return;
  float pack[4];
  load(x + 4 * threadIdx.x, pack);
  store(out + 4 * threadIdx.x + shift, pack);
}
__global__ void straddle(const float* x, float* out) {
  float pack[2];
  load(x + 64 - 2 * (threadIdx.x % 2), pack);
  store(out + threadIdx.x / 2 * 2, pack);
}

__global__ void half_written(const float* x, float* out) {
  float* values = dynamic_shared<float>();
  if (threadIdx.x % 2 == 0) values[threadIdx.x] = load_one(x + threadIdx.x);
  __syncthreads();
  store_one(out + threadIdx.x, values[threadIdx.x]);
}

__global__ void past_shared(const float* x, float* out) {
  float* values = dynamic_shared<float>();
  values[threadIdx.x + 1] = load_one(x + threadIdx.x);
  __syncthreads();
  store_one(out + threadIdx.x, values[threadIdx.x + 1]);
}

// `bytes` of static shared memory.
template <int bytes>
__global__ void use_static_shared(const float* x, float* out) {
  FASTDIFF_SHARED(float[bytes / sizeof(float)], values);
  values[threadIdx.x] = load_one(x + threadIdx.x);
  store_one(out + threadIdx.x, values[threadIdx.x]);
}

__global__ void barrier_of_some(const float* x, float* out) {
  float v = load_one(x + threadIdx.x);
  if (threadIdx.x < 16) __syncthreads();
  else v += __shfl_xor_sync(kAllLanes, v, 1);
  store_one(out + threadIdx.x, v);
}

__global__ void masks_differ(const float* x, float* out) {
  const unsigned mask = threadIdx.x % 2 ? kAllLanes : 0x7fffffffu;
  store_one(out + threadIdx.x, __shfl_xor_sync(mask, load_one(x + threadIdx.x), 2));
}

// out[i] = x[63 - i], copied asynchronously from `shift` elements on to `to` elements on.
template <bool wait, bool barrier>
__global__ void copy_asynchronously(const float* x, float* out, int shift, int to) {
  float* values = dynamic_shared<float>();
  if (threadIdx.x < kThreads / 4) copy_async(values + 4 * threadIdx.x + to, x + 4 * threadIdx.x + shift, true);
  commit_copies();
  if (wait) wait_copies<0>();
  if (barrier) __syncthreads();
  store_one(out + threadIdx.x, values[kThreads - 1 - threadIdx.x]);
  wait_copies<0>();
}

// Both warps have the matrices' rows in shared memory, `shift` elements of two bytes off.
__global__ void matrices(const float* x, float* out, int shift) {
  float* values = dynamic_shared<float>();
  values[threadIdx.x] = load_one(x + threadIdx.x);
  __syncthreads();
  uint32_t found[4];
  load_matrices<false>(found, reinterpret_cast<const __half*>(values) + threadIdx.x % 16 * 8 + shift);
  store_one(out + threadIdx.x, static_cast<float>(found[0]));
}

const char* run(const std::string& name, const float* x, float* out) {
  const bool most = name.starts_with("32 KB");
  const size_t shared = most ? 32 << 10 : kThreads * sizeof(float);
  const auto with = [&](auto kernel, auto... more) { return launch(kernel, 2, dim3(kThreads), shared, nullptr, x, out, more...); };
  if (name == "reverse") return with(reverse<true>);
  if (name == "reverse, no barrier") return with(reverse<false>);
  if (name == "reverse twice") return with(reverse_twice<true>);
  if (name == "reverse twice, no barrier after reading") return with(reverse_twice<false>);
  if (name == "copy") return with(copy, 0);
  if (name == "copy beyond the end") return with(copy, 1);
  if (name == "copy from before the start") return with(copy, -1);
  if (name == "copy to beyond the end") return with(copy_to, 1);
  if (name == "write the input") return with(write_input);
  if (name == "packs") return with(copy_packs, 0);
  if (name == "packs, misaligned") return with(copy_packs, 1);
  if (name == "shared memory half written") return with(half_written);
  if (name == "past shared memory") return with(past_shared);
  if (name == "32 KB of dynamic and 16 of static shared memory") return with(use_static_shared<16 << 10>);
  if (name == "32 KB of dynamic and more of static shared memory") return with(use_static_shared<(16 << 10) + 4>);
  if (name == "barrier of some") return with(barrier_of_some);
  if (name == "masks differ") return with(masks_differ);
  if (name == "packs, written misaligned") return with(write_packs, 1);
  if (name == "packs, written beyond the end") return with(write_packs, 8);
  if (name == "packs over the end") return with(straddle);
  if (name == "asynchronous copy") return with(copy_asynchronously<true, true>, 0, 0);
  if (name == "asynchronous copy, not waited for") return with(copy_asynchronously<false, true>, 0, 0);
  if (name == "asynchronous copy, no barrier") return with(copy_asynchronously<true, false>, 0, 0);
  if (name == "asynchronous copy, misaligned") return with(copy_asynchronously<true, true>, 1, 0);
  if (name == "asynchronous copy to a misaligned place") return with(copy_asynchronously<true, true>, 0, 1);
  if (name == "asynchronous copy beyond the end") return with(copy_asynchronously<true, true>, 4, 0);
  if (name == "matrices") return with(matrices, 0);
  if (name == "matrices, misaligned") return with(matrices, 4);
  if (name == "matrices past shared memory") return with(matrices, 8);
  return "no such kernel";
}

}  // namespace
}  // namespace fastdiff::cuda

// Runs a kernel from x to out, of 64 floats each; writes the error, if any, to message.
extern "C" __attribute__((visibility("default"))) void run_kernel(const char* name, const float* x, float* out,
                                                                  char* message, size_t size) {
  emulation::allow(x, 64 * sizeof(float), false);
  emulation::allow(out, 64 * sizeof(float), true);
  std::string error;
  try {
    if (const char* refused = fastdiff::cuda::run(name, x, out)) error = refused;
  } catch (const std::runtime_error& e) {
    error = e.what();
  }
  emulation::forget_allowed();
  std::strncpy(message, error.c_str(), size - 1);
}
