// out = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as gelu.h computes it
//
// One read and one write per element: memory bound beyond the last-level cache.
#include "gelu_tanh.h"

#include "gelu.h"
#include "parallel.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

void gelu_tanh(const GeluTanhArgs& args) {
  constexpr int64_t kBlock = 4096;  // elements per unit of work: a few microseconds
  dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* x = static_cast<const T*>(args.x);
    T* out = static_cast<T*>(args.out);
    const bool past = streams(out, args.numel, kBlock);
    parallel_for(0, (args.numel + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
      int64_t i = begin * kBlock;
      const int64_t stop = end * kBlock < args.numel ? end * kBlock : args.numel;
      for (; i + Vec::size <= stop; i += Vec::size) {
        prefetch(x + i, kPrefetch);
        write(out + i, tanh_gelu<T>(load(x + i)), All{}, past);
      }
      if (i < stop) store(out + i, tanh_gelu<T>(load(x + i, stop - i)), stop - i);
      if (past) finish_streaming();
    });
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
