// out = silu(gate) * x
//
// Memory bound: two reads and one write per element. Work is cut by elements, not rows: a row may be a whole image.
#include "swiglu.h"

#include "parallel.h"
#include "simd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

template <class T>
void part(const T* gate, const T* x, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::size <= n; i += Vec::size) {
    prefetch(gate + i, kPrefetch);
    prefetch(x + i, kPrefetch);
    store(out + i, silu_for<T>(load(gate + i)) * load(x + i));
  }
  if (i < n) store(out + i, silu_for<T>(load(gate + i, n - i)) * load(x + i, n - i), n - i);
}

}  // namespace

void swiglu(const SwigluArgs& args) {
  const int64_t columns = args.columns;
  dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(0, args.rows * columns, 16384, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t row = begin / columns, column = begin % columns;
        const int64_t n = end - begin < columns - column ? end - begin : columns - column;
        part(static_cast<const T*>(args.gate) + row * args.gate_stride + column,
             static_cast<const T*>(args.x) + row * args.x_stride + column, static_cast<T*>(args.out) + begin, n);
        begin += n;
      }
    });
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
