// adaln_modulate, adaln_modulate_dual, gate_residual and gate_residual_adaln: one row kernel
//
// A row (a few KB) stays in L1 over the two or three passes of its norm, so each tensor is read and written once.
// What modulates is brought to fp32 once per distinct row: per sample, that is once per sample and thread.
#include "adaln.h"

#include <algorithm>
#include <new>

#include "parallel.h"
#include "row_norm.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

struct Scratch {
  explicit Scratch(int64_t columns)
      : pitch((columns + 15) / 16 * 16),
        data(static_cast<float*>(::operator new(6 * pitch * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  float* row(int i) const { return data + i * pitch; }
  int64_t pitch;
  float* data;
};

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Walks over the rows of all operands in the order of x's leading axes.
class Position {
 public:
  Position(const int64_t (&size)[Rows::kAxes], int64_t row) : size_(size) {
    for (int axis = Rows::kAxes; axis-- > 0; row /= size[axis]) index_[axis] = row % size[axis];
  }
  void advance() {
    for (int axis = Rows::kAxes; axis-- > 0;) {
      if (++index_[axis] < size_[axis]) return;
      index_[axis] = 0;
    }
  }
  const void* of(const Rows& rows) const {
    if (!rows.data) return nullptr;
    int64_t offset = 0;
    for (int axis = 0; axis < Rows::kAxes; ++axis) offset += index_[axis] * rows.stride[axis];
    return static_cast<const char*>(rows.data) + offset * element_size(rows.dtype);
  }

 private:
  const int64_t (&size_)[Rows::kAxes];
  int64_t index_[Rows::kAxes];
};

void widen(const void* row, DType dtype, float* out, int64_t n) {
  dispatch(dtype, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(row);
    for_each_vec(n, [&](int64_t i, int, auto lanes) { store(out + i, load(from + i, lanes), lanes); });
  });
}

// out = body(out, row)
template <class Body>
void combine(const void* row, DType dtype, float* out, int64_t n, const Body& body) {
  dispatch(dtype, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(row);
    for_each_vec(n, [&](int64_t i, int, auto lanes) {
      store(out + i, body(load(out + i, lanes), load(from + i, lanes)), lanes);
    });
  });
}

// The affine map after the norm, a * n + b with a = weight (1 + scale), b = bias (1 + scale) + shift, in fp32.
class Affine {
 public:
  Affine(const AdalnArgs& args, const Rows& scale, const Rows& shift, float* a, float* b)
      : a(a), b(b), args_(args), scale_rows_(scale), shift_rows_(shift) {}
  void at(const Position& position) {
    const void* scale = position.of(scale_rows_);
    const void* shift = position.of(shift_rows_);
    if (ready_ && scale == scale_ && shift == shift_) return;
    ready_ = true, scale_ = scale, shift_ = shift;
    const int64_t n = args_.columns;
    const auto set = [&](const Rows& rows, float* out, float otherwise) {
      if (rows.data) return widen(rows.data, rows.dtype, out, n);
      for (int64_t i = 0; i < n; ++i) out[i] = otherwise;
    };
    set(args_.weight, a, 1.0f);
    set(args_.bias, b, 0.0f);
    if (scale) {
      const auto times = [](Vec value, Vec s) { return fma(value, s, value); };
      combine(scale, scale_rows_.dtype, a, n, times);
      if (args_.bias.data) combine(scale, scale_rows_.dtype, b, n, times);
    }
    if (shift) combine(shift, shift_rows_.dtype, b, n, [](Vec value, Vec s) { return value + s; });
  }

  float *const a, *const b;

 private:
  const AdalnArgs& args_;
  const Rows &scale_rows_, &shift_rows_;
  bool ready_ = false;
  const void *scale_ = nullptr, *shift_ = nullptr;
};

// y = residual + gate * x; `wide`, unless null, receives y as rounded, which is not to stream then.
template <class T>
void gated_row(const T* x, const float* gate, const T* residual, T* y, float* wide, int64_t n, bool past) {
  for_each_vec(n, [&](int64_t i, int, auto lanes) {
    write(y + i, fma(load(gate + i, lanes), load(x + i, lanes), load(residual + i, lanes)), lanes, past);
    if (wide) store(wide + i, load(y + i, lanes), lanes);
  });
}

// The inputs of the next row, fetched while this one is being normalised: the hardware fetches during the first
// pass only. Rows are taken to follow each other; where they do not, this does nothing.
template <class X>
struct Next {
  const X *x, *residual;  // residual may be null
  void fetch(int64_t i) const {
    prefetch(x + i);
    if (residual) prefetch(residual + i);
  }
};

// out = norm(x) * a + b; with `out2`, also out2 = norm(x) * a2 + b2
template <bool rms, class S, class X, class T>
void norm_row(const S* x, Next<X> next, const Affine& affine, T* out, const Affine& affine2, T* out2, int64_t n,
              float eps, bool past) {
  const RowNorm norm = measure_row<rms>(x, n, eps);
  const Vec shift(norm.centre), factor(norm.factor), offset(norm.offset);
  const float *a = affine.a, *b = affine.b, *a2 = affine2.a, *b2 = affine2.b;
  const bool ahead = prefetch_pays<X>();
  const auto modulate = [&]<bool both>() {
    for_each_vec(n, [&](int64_t i, int, auto lanes) {
      if (ahead) next.fetch(i);
      Vec d = load(x + i, lanes);
      if constexpr (!rms) d = d - shift;
      d = fma(d, factor, offset);
      write(out + i, fma(d, load(a + i, lanes), load(b + i, lanes)), lanes, past);
      if constexpr (both) write(out2 + i, fma(d, load(a2 + i, lanes), load(b2 + i, lanes)), lanes, past);
    });
  };
  out2 ? modulate.template operator()<true>() : modulate.template operator()<false>();
}

template <class T>
void rows(const AdalnArgs& args, int64_t begin, int64_t end, bool past) {
  const int64_t n = args.columns;
  const Scratch scratch(n);
  float *wide = scratch.row(0), *gate_copy = scratch.row(1);
  Affine affine(args, args.scale, args.shift, scratch.row(2), scratch.row(3));
  Affine affine2(args, args.scale2, args.shift2, scratch.row(4), scratch.row(5));
  const void* last_gate = nullptr;
  if (args.residual.data && !args.gate.data) std::fill_n(gate_copy, n, 1.0f);
  Position position(args.size, begin);
  for (int64_t row = begin; row < end; ++row, position.advance()) {
    const T* x = static_cast<const T*>(position.of(args.x));
    const T* residual = static_cast<const T*>(position.of(args.residual));
    if (residual) {
      const void* gate = position.of(args.gate);
      if (gate != last_gate) widen(gate, args.gate.dtype, gate_copy, n), last_gate = gate;
      gated_row(x, gate_copy, residual, static_cast<T*>(args.y) + row * n, args.out ? wide : nullptr, n,
                past && !args.out);
    }
    if (!args.out) continue;
    affine.at(position);
    if (args.out2) affine2.at(position);
    const Next<T> next{x + n, residual ? residual + n : nullptr};
    dispatch(args.out_dtype, [&](auto tag) {
      using Out = decltype(tag);
      Out* out = static_cast<Out*>(args.out) + row * n;
      Out* out2 = args.out2 ? static_cast<Out*>(args.out2) + row * n : nullptr;
      const auto normalize = [&]<bool rms>() {
        if (residual)
          norm_row<rms>(wide, next, affine, out, affine2, out2, n, args.eps, past);
        else
          norm_row<rms>(x, next, affine, out, affine2, out2, n, args.eps, past);
      };
      args.rms ? normalize.template operator()<true>() : normalize.template operator()<false>();
    });
  }
}

}  // namespace

void adaln(const AdalnArgs& args) {
  const int64_t count = args.size[0] * args.size[1] * args.size[2] * args.size[3];
  if (args.columns == 0) return;
  bool past = false;  // of the results that nothing here reads
  dispatch(args.out ? args.out_dtype : args.x.dtype, [&](auto tag) {
    const auto streamable = [&](const void* result) {
      return streams(static_cast<const decltype(tag)*>(result), count * args.columns, args.columns);
    };
    past = streamable(args.out ? args.out : args.y) && (!args.out2 || streamable(args.out2));
  });
  dispatch(args.x.dtype, [&](auto tag) {
    parallel_for(0, count, 8192 / args.columns + 1, [&](int64_t begin, int64_t end) {
      rows<decltype(tag)>(args, begin, end, past);
      if (past) finish_streaming();
    });
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
