// out = hidden * gelu(gate), with hidden and gate the two halves of each row
//
// Memory bound: two reads and one write per element.
#include "geglu.h"

#include "gelu.h"
#include "parallel.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

void geglu(const GegluArgs& args) {
  const int64_t columns = args.columns;
  dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* x = static_cast<const T*>(args.x);
    T* out = static_cast<T*>(args.out);
    const bool past = streams(out, args.rows * columns, columns);
    parallel_for(0, args.rows, 8192 / (columns + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* hidden = x + row * 2 * columns;
        const T* gate = hidden + columns;
        T* y = out + row * columns;
        int64_t i = 0;
        for (; i + Vec::size <= columns; i += Vec::size) {
          prefetch(hidden + i, kPrefetch);
          prefetch(gate + i, kPrefetch);
          write(y + i, load(hidden + i) * erf_gelu<T>(load(gate + i)), All{}, past);
        }
        if (const int64_t n = columns - i)
          store(y + i, load(hidden + i, n) * erf_gelu<T>(load(gate + i, n)), n);
      }
      if (past) finish_streaming();
    });
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
