// The part of CUDA that csrc/cuda uses, run on the host: the blocks of a grid in sequence, the threads of a block as
// fibers that give way to each other at barriers and warp collectives only, in an order drawn from a seed. A kernel
// that needs a barrier it does not have computes something else under another order.
//
// What is checked, each with a message that names kernel, block and thread:
//   * memory that kernels reach through the functions of device.cuh and ptx.cuh: bounds, read-only, alignment;
//   * shared memory starts as NaN in every block, and a guard zone behind it must survive the block;
//   * static and dynamic shared memory together stay within what the launch asked for;
//   * barriers and warp collectives that not all threads reach, or that lanes reach with different masks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_types.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct CUstream_st*;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

struct Where {
  dim3 thread, block, block_size, grid_size;
};
extern Where where;  // of the fiber that runs

void barrier();

// All lanes of `mask` arrive with their input; the last one calls combine(in, out, mask), both indexed by lane.
using Combine = void (*)(const void* const* in, void* const* out, unsigned mask);
void collective(const char* name, unsigned mask, const void* in, void* out, Combine combine);
unsigned lane();

// Ends the launch with an error that names the place.
[[noreturn]] void fail(const std::string& message);

// Memory the next launch may use; nothing else passes check(). Forgotten when a front has launched all its kernels.
void allow(const void* data, size_t bytes, bool writable);
void forget_allowed();
void check(const void* data, size_t bytes, size_t alignment, bool write);

constexpr size_t kSharedLimit = 99 << 10;  // the smallest opt-in limit of the supported architectures (sm_89, sm_120)
constexpr size_t kUnaskedLimit = 48 << 10;  // where more is not asked for
constexpr int kMultiprocessors = 132;
void* dynamic_shared();
void add_static_shared(void* data, size_t bytes);
extern int64_t launches;
void count_static_shared(size_t bytes);  // of the current launch
template <class T>
class StaticShared {
 public:
  StaticShared() { add_static_shared(&value_, sizeof value_); }
  T& use() {
    if (std::exchange(used_in_, launches) != launches) count_static_shared(sizeof value_);
    return value_;
  }

 private:
  alignas(128) T value_;
  int64_t used_in_ = 0;
};

// cp.async: the copy happens when the group is waited for, and until then the destination is NaN.
void copy_async(void* to, const void* from, size_t bytes, size_t valid);
void commit_copies();
void wait_copies(int groups_left);

// shared: dynamic shared memory; limit: of all shared memory; both in bytes.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared, size_t limit, const std::function<void()>& body);

template <class T>
T exchange(const char* name, unsigned mask, T value, int source) {
  struct In {
    T value;
    int source;
  } in{value, source};
  T out = value;
  collective(name, mask, &in, &out, [](const void* const* ins, void* const* outs, unsigned lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!(lanes >> i & 1)) continue;
      const In& mine = *static_cast<const In*>(ins[i]);
      if (!(lanes >> mine.source & 1)) fail("a shuffle reads lane " + std::to_string(mine.source) + ", not in its mask");
      std::memcpy(outs[i], &static_cast<const In*>(ins[mine.source])->value, sizeof(T));
    }
  });
  return out;
}

}  // namespace emulation

#define threadIdx (::emulation::where.thread)
#define blockIdx (::emulation::where.block)
#define blockDim (::emulation::where.block_size)
#define gridDim (::emulation::where.grid_size)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) {
  emulation::collective("__syncwarp", mask, nullptr, nullptr, [](const void* const*, void* const*, unsigned) {});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = emulation::lane() / width * width;
  return emulation::exchange("__shfl_sync", mask, value, base + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emulation::lane(), source = lane ^ bits;
  return emulation::exchange("__shfl_xor_sync", mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulation::lane(), source = lane + delta;
  return emulation::exchange("__shfl_down_sync", mask, value, source / width == lane / width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned out = 0;
  emulation::collective("__ballot_sync", mask, &predicate, &out,
                        [](const void* const* in, void* const* outs, unsigned lanes) {
                          unsigned votes = 0;
                          for (int i = 0; i < 32; ++i)
                            if ((lanes >> i & 1) && *static_cast<const int*>(in[i])) votes |= 1u << i;
                          for (int i = 0; i < 32; ++i)
                            if (lanes >> i & 1) *static_cast<unsigned*>(outs[i]) = votes;
                        });
  return out;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Accurate where the GPU's are approximate: the difference shows on a GPU only.
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float normcdff(float x) { return static_cast<float>(0.5 * std::erfc(-0.70710678118654752440 * x)); }
