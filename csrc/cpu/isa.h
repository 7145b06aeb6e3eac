// Which instruction set serves this process, and how a kernel is declared for all of them.
//
// Every kernel file in this folder is compiled once per instruction set with -DFASTDIFF_ISA=<name> (the
// list and its flags are in setup.py) and puts its code into namespace fastdiff::cpu::FASTDIFF_ISA. The
// build defines FASTDIFF_HAVE_<ISA> for each set the compiler could produce.
#pragma once

#include <cstdint>

namespace fastdiff::cpu {

enum class Isa : int { none = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The best set that is both compiled in and supported by this CPU and operating system; detected once.
// The environment variable FASTDIFF_CPU_ISA (none, avx2, avx512, avx512_bf16, amx) lowers it.
Isa isa();
const char* isa_name(Isa);

// Whether the CPU is one of AMD's; see prefetch_pays in simd.h.
bool is_amd();

// Element types of the kernels, in the order of csrc/ops/tensor_args.h.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace fastdiff::cpu

#ifdef FASTDIFF_HAVE_AVX2
#define FASTDIFF_IF_AVX2(...) __VA_ARGS__
#else
#define FASTDIFF_IF_AVX2(...)
#endif
#ifdef FASTDIFF_HAVE_AVX512
#define FASTDIFF_IF_AVX512(...) __VA_ARGS__
#else
#define FASTDIFF_IF_AVX512(...)
#endif
#ifdef FASTDIFF_HAVE_AVX512_BF16
#define FASTDIFF_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define FASTDIFF_IF_AVX512_BF16(...)
#endif

// Declares `bool name(const Args&)` in fastdiff::cpu: it runs the variant for isa() and returns false when
// none is compiled in (the caller turns that into an error; the constraint table refuses earlier).
#define FASTDIFF_CPU_KERNEL(name, Args)                                                        \
  FASTDIFF_IF_AVX2(namespace avx2 { void name(const Args&); })                                 \
  FASTDIFF_IF_AVX512(namespace avx512 { void name(const Args&); })                             \
  FASTDIFF_IF_AVX512_BF16(namespace avx512_bf16 { void name(const Args&); })                   \
  inline bool name(const Args& args) {                                                         \
    const Isa best = isa();                                                                    \
    FASTDIFF_IF_AVX512_BF16(if (best >= Isa::avx512_bf16) return avx512_bf16::name(args), true;) \
    FASTDIFF_IF_AVX512(if (best >= Isa::avx512) return avx512::name(args), true;)              \
    FASTDIFF_IF_AVX2(if (best >= Isa::avx2) return avx2::name(args), true;)                    \
    (void)best, (void)args;                                                                    \
    return false;                                                                              \
  }
