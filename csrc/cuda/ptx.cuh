// All inline PTX, each wrapper with a twin that tests/cuda_emulation runs. Tensor cores: sm_80 and newer.
#pragma once

#include "device.cuh"

namespace fastdiff::cuda {

// Two values of T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  Pack<T, 2> pack{from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, &pack, sizeof bits);
  return bits;
}
template <class T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

#ifdef FASTDIFF_CUDA_EMULATION

inline void copy_async(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 16, valid ? 16 : 0);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int groups_left>
void wait_copies() {
  emulation::wait_copies(groups_left);
}
inline float exp2_fast(float x) { return std::exp2(x); }

template <bool transposed>
void load_matrices(uint32_t (&out)[4], const void* row) {
  emulation::check(row, 16, 16, false);
  emulation::collective("ldmatrix", kAllLanes, row, out, [](const void* const* rows, void* const* outs, unsigned) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = transposed ? lane % 4 * 2 + i : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + i;
          std::memcpy(&pair[i], static_cast<const uint16_t*>(rows[matrix * 8 + r]) + c, 2);
        }
        std::memcpy(static_cast<uint32_t*>(outs[lane]) + matrix, pair, 4);
      }
  });
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    T a[8], b[4];
    float c[4];
  } in;
  std::memcpy(in.a, a, 16), std::memcpy(in.b, &b0, 4), std::memcpy(in.b + 2, &b1, 4), std::memcpy(in.c, c, 16);
  emulation::collective("mma.sync", kAllLanes, &in, c, [](const void* const* ins, void* const* outs, unsigned) {
    static float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const In& from = *static_cast<const In*>(ins[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) A[g + i / 2 % 2 * 8][t + i % 2 + i / 4 * 8] = to_float(from.a[i]);
      for (int i = 0; i < 4; ++i) B[t + i % 2 + i / 2 * 8][g] = to_float(from.b[i]);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = static_cast<const In*>(ins[lane])->c[i];
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
        static_cast<float*>(outs[lane])[i] = sum;
      }
  });
}

#else

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory, or zeros, some time before the group they are committed with is waited for.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// 2^x within 2 ulp.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8, and gets of each matrix
// the elements (i / 4, 2 (i % 4)) and the next; of the transposed matrices if asked for.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b, with a 16x16, b 16x8 and c 16x8. With g = lane / 4 and t = 2 (lane % 4) a lane holds
//   of a the pairs at (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8), of b those at rows t and t + 8 of column g,
//   of c the pairs at (g, t), (g + 8, t).
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace fastdiff::cuda
