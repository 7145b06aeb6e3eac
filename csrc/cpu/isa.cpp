#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdiff::cpu {
namespace {

constexpr const char* kNames[] = {"none", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__) || defined(_M_X64)
// Linux hands out the 8 KiB tile registers per process, on request.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  __builtin_cpu_init();
  Isa best = Isa::none;
#ifdef FASTDIFF_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))  // every such CPU has F16C
    best = Isa::avx2;
#endif
#ifdef FASTDIFF_HAVE_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (best == Isa::avx2 && avx512) best = Isa::avx512;
#endif
#ifdef FASTDIFF_HAVE_AVX512_BF16
  if (best == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) best = Isa::avx512_bf16;
#endif
#ifdef FASTDIFF_HAVE_AMX
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool amx_bf16 = (edx >> 22) & 1, amx_tile = (edx >> 24) & 1;
  if (best == Isa::avx512_bf16 && amx_bf16 && amx_tile && amx_permitted()) best = Isa::amx;
#endif
  return best;
}
#else
Isa detect() { return Isa::none; }
#endif

Isa lowered(Isa best) {
  const char* wanted = std::getenv("FASTDIFF_CPU_ISA");
  if (!wanted) return best;
  for (int i = 0; i <= static_cast<int>(Isa::amx); ++i)
    if (!std::strcmp(wanted, kNames[i])) return i < static_cast<int>(best) ? static_cast<Isa>(i) : best;
  return Isa::none;  // a misspelt name must not run on another set unseen
}

}  // namespace

Isa isa() {
  static const Isa best = lowered(detect());
  return best;
}

bool is_amd() {
#if defined(__x86_64__) || defined(_M_X64)
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  return amd;
#else
  return false;
#endif
}

const char* isa_name(Isa i) { return kNames[static_cast<int>(i)]; }

}  // namespace fastdiff::cpu
