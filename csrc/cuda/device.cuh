// What all CUDA kernels share: memory access in packs of up to 16 bytes, launching, shared memory.
//
// The kernels are also compiled by g++ against tests/cuda_emulation, which checks every access made through here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace fastdiff::cuda {

using cpu::DType;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a launch

// More than 48 KB of shared memory must be asked for. These are dynamic and static together, of which a kernel that has
// both has at most 16 KB static; the emulation counts.
constexpr size_t kUnaskedShared = 32 << 10;

#ifdef FASTDIFF_CUDA_EMULATION
// A variable in shared memory: FASTDIFF_SHARED(float[32], partial);
#define FASTDIFF_SHARED(type, name)                     \
  static ::emulation::StaticShared<type> name##_memory; \
  auto& name = name##_memory.use()
inline void check_read(const void* p, size_t bytes, size_t alignment) { emulation::check(p, bytes, alignment, false); }
inline void check_write(const void* p, size_t bytes, size_t alignment) { emulation::check(p, bytes, alignment, true); }
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared());
}
inline int multiprocessors() { return emulation::kMultiprocessors; }
inline int64_t shared_memory_limit() { return emulation::kSharedLimit; }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, dim3 block, size_t shared, Stream,
                   Arguments... arguments) {
  if (blocks > kMaxBlocks) return "the call needs more than 2^31 blocks";
  const size_t limit = shared > kUnaskedShared ? emulation::kSharedLimit : emulation::kUnaskedLimit;
  emulation::run(__PRETTY_FUNCTION__, dim3(blocks), block, shared, limit, [=] { kernel(arguments...); });
  return nullptr;
}
#else
#define FASTDIFF_SHARED(type, name) __shared__ std::type_identity_t<type> name
__device__ inline void check_read(const void*, size_t, size_t) {}
__device__ inline void check_write(const void*, size_t, size_t) {}
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char fastdiff_shared_memory[];
  return reinterpret_cast<T*>(fastdiff_shared_memory);
}

// An attribute of the current device, asked for once per device.
template <cudaDeviceAttr attribute>
int device_attribute() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not yet
  int device = 0, value = 0;
  cudaGetDevice(&device);
  if (device < kDevices) value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    cudaDeviceGetAttribute(&value, attribute, device);
    if (device < kDevices) known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}
inline int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }
inline int64_t shared_memory_limit() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, dim3 block, size_t shared, Stream stream,
                   Arguments... arguments) {
  if (blocks > kMaxBlocks) return "the call needs more than 2^31 blocks";
  cudaError_t status = cudaSuccess;
  if (shared > kUnaskedShared)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status == cudaSuccess) {
    kernel<<<dim3(blocks), block, shared, stream>>>(arguments...);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
#endif

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// The smallest power of two that is not below n, at most `most`.
inline int power_of_two(int64_t n, int most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// Elements that fill 16 bytes.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T v[n];
};

// What one instruction moves at most, and how to have it write that: assignments are sometimes cut into words.
#ifdef FASTDIFF_CUDA_EMULATION
using Vector = Pack<uint32_t, 4>;
inline void write_vector(Vector* p, const Vector& v) { *p = v; }
#else
using Vector = uint4;
__device__ __forceinline__ void write_vector(Vector* p, const Vector& v) { __stwb(p, v); }
#endif

// `width` elements from p on, which is aligned to a pack. Packs are written to global memory only.
template <int width, class T>
__device__ __forceinline__ void load(const T* p, float (&out)[width]) {
  check_read(p, sizeof(Pack<T, width>), alignof(Pack<T, width>));
  const auto pack = *reinterpret_cast<const Pack<T, width>*>(p);
#pragma unroll
  for (int i = 0; i < width; ++i) out[i] = to_float(pack.v[i]);
}
template <int width, class T>
__device__ __forceinline__ void store(T* p, const float (&in)[width]) {
  Pack<T, width> pack;
#pragma unroll
  for (int i = 0; i < width; ++i) pack.v[i] = from_float<T>(in[i]);
  check_write(p, sizeof pack, alignof(Pack<T, width>));
  if constexpr (sizeof pack % sizeof(Vector) == 0) {
    Vector vectors[sizeof pack / sizeof(Vector)];
    memcpy(vectors, &pack, sizeof pack);
#pragma unroll
    for (size_t i = 0; i < sizeof pack / sizeof(Vector); ++i)
      write_vector(reinterpret_cast<Vector*>(p) + i, vectors[i]);
  } else {
    *reinterpret_cast<Pack<T, width>*>(p) = pack;
  }
}
template <class T>
__device__ __forceinline__ float load_one(const T* p) {
  float value[1];
  load(p, value);
  return value[0];
}
template <class T>
__device__ __forceinline__ void store_one(T* p, float value) {
  store(p, {value});
}

// The same where only `left` elements exist; the others are 0, and stay unwritten.
template <int width, class T>
__device__ __forceinline__ void load(const T* p, int64_t left, float (&out)[width]) {
  if (left >= width) return load(p, out);
#pragma unroll
  for (int i = 0; i < width; ++i) out[i] = i < left ? load_one(p + i) : 0.0f;
}
template <int width, class T>
__device__ __forceinline__ void store(T* p, int64_t left, const float (&in)[width]) {
  if (left >= width) return store(p, in);
#pragma unroll
  for (int i = 0; i < width; ++i)
    if (i < left) store_one(p + i, in[i]);
}

// Calls body with p, typed: a branch that a whole block takes alike.
template <class Body>
__device__ __forceinline__ void with_type(const void* p, DType dtype, const Body& body) {
  if (dtype == DType::f32) body(static_cast<const float*>(p));
  else if (dtype == DType::bf16) body(static_cast<const __nv_bfloat16*>(p));
  else body(static_cast<const __half*>(p));
}
template <class Body>
__device__ __forceinline__ void with_type(void* p, DType dtype, const Body& body) {
  if (dtype == DType::f32) body(static_cast<float*>(p));
  else if (dtype == DType::bf16) body(static_cast<__nv_bfloat16*>(p));
  else body(static_cast<__half*>(p));
}

// A value of a channel, or `absent`.
__device__ __forceinline__ float value(const cpu::ChannelValues& v, int64_t b, int64_t c, float absent) {
  float result = absent;
  if (v.data)
    with_type(v.data, v.dtype, [&](auto* p) { result = load_one(p + b * v.batch_stride + c * v.channel_stride); });
  return result;
}

// v = combine(v, t), t being `width` parameters, if there are any.
template <int width, class Combine>
__device__ __forceinline__ void apply(const void* data, DType dtype, int64_t at, float (&v)[width], Combine combine) {
  if (!data) return;
  float t[width];
  with_type(data, dtype, [&](auto* p) { load(p + at, t); });
#pragma unroll
  for (int i = 0; i < width; ++i) v[i] = combine(v[i], t[i]);
}

// Whether packs can be used: data, and a stride in elements, are multiples of 16 bytes.
inline bool packable(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
inline bool packable(int64_t stride, DType dtype) { return stride * (dtype == DType::f32 ? 4 : 2) % 16 == 0; }

// Blocks of `block` threads over rows and the packs in a row; `across` blocks lie side by side.
struct Grid2d {
  Grid2d(int64_t rows, int64_t packs, int block) {
    const unsigned columns = power_of_two(packs, block);
    threads = dim3(columns, block / columns);
    across = static_cast<uint32_t>(ceil_div(packs, columns));
    blocks = ceil_div(rows, threads.y) * across;
  }
  int64_t blocks;
  dim3 threads;
  uint32_t across;

  static __device__ __forceinline__ int64_t row(uint32_t across) {
    return static_cast<int64_t>(blockIdx.x / across) * blockDim.y + threadIdx.y;
  }
  static __device__ __forceinline__ int64_t pack(uint32_t across) {
    return static_cast<int64_t>(blockIdx.x % across) * blockDim.x + threadIdx.x;
  }
};

// Calls body with a value of the element type, and with the width of a pack of it or 1.
template <class Body>
const char* dispatch(DType dtype, bool packs, const Body& body) {
  const auto with_width = [&](auto tag) {
    return packs ? body(tag, std::integral_constant<int, kPack<decltype(tag)>>())
                 : body(tag, std::integral_constant<int, 1>());
  };
  if (dtype == DType::f32) return with_width(float());
  return dtype == DType::bf16 ? with_width(__nv_bfloat16()) : with_width(__half());
}

// exp(x), as accurately as T can hold.
template <class T>
__device__ __forceinline__ float exp_for(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  else return __expf(x);
}

// silu(x), as accurately as T can hold.
template <class T>
__device__ __forceinline__ float silu(float x) {
  return __fdividef(x, 1.0f + exp_for<T>(-x));
}

}  // namespace fastdiff::cuda
