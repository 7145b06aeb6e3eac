// The gradients of adaln_modulate and gate_residual, row by row as in the forward.
//
// With n = norm(x), out = n * factor + offset, and g the gradient of out:
//
//   doffset = sum g, dfactor = sum g * n                          over the tokens of a sample
//   dx = rstd * (g * factor - mean(g * factor) - n * mean(g * factor * n))    means over the row
//
// and without the first mean for an RMS norm, which does not subtract one either.
#include "adaln_backward.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.h"
#include "row_norm.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kRows = 16;       // rows whose sums stay in fp32
constexpr int64_t kSerial = 16384;  // values that one thread finishes before others have woken up

struct Total {
  Vec part[kUnroll] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  float value() const { return total(part); }
};

// Sums over rows, per column: fp32 for some rows, then double.
class ColumnSums {
 public:
  ColumnSums(int64_t columns, double* total) : near(new float[columns]()), columns_(columns), total_(total) {}
  void flush() {
    for (int64_t i = 0; i < columns_; ++i) total_[i] += near[i], near[i] = 0.0f;
  }
  std::unique_ptr<float[]> near;

 private:
  int64_t columns_;
  double* total_;
};

// rows(b, first token, end, totals...) on parts of each sample; then sums[k], k < count, of shape (batch, columns).
template <int count, class Body>
void over_samples(int64_t batch, int64_t tokens, int64_t columns, float* const (&sums)[count], const Body& rows) {
  const int64_t most = (4 * num_threads() + batch - 1) / batch;
  const int64_t chunks = num_threads() == 1 ? 1 : std::clamp<int64_t>(tokens * columns / kSerial, 1, most);
  const int64_t chunk = (tokens + chunks - 1) / chunks, tasks = batch * chunks;
  std::vector<double> totals(tasks * count * columns);
  parallel_for(0, tasks, std::max<int64_t>(1, kSerial / (chunk * columns)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % chunks * chunk;
      rows(task / chunks, first, std::min(first + chunk, tokens), &totals[task * count * columns]);
    }
  });
  for (int64_t b = 0; b < batch; ++b)
    for (int k = 0; k < count; ++k)
      for (int64_t i = 0; i < columns; ++i) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += totals[((b * chunks + c) * count + k) * columns + i];
        sums[k][b * columns + i] = static_cast<float>(sum);
      }
}

// norm(x) into normal; returns rstd.
template <class T>
float normalize(const T* x, float* normal, int64_t n, float eps, bool rms) {
  const RowNorm norm = measure_row(x, n, eps, rms);
  const Vec shift(norm.centre), factor(norm.factor), offset(norm.offset);
  for_each_vec(n, [&](int64_t i, auto lanes) {
    store(normal + i, fma(load(x + i, lanes) - shift, factor, offset), lanes);
  });
  return norm.factor;
}

template <class T>
void adaln(const AdalnBackwardArgs& a) {
  const int64_t n = a.columns;
  float* const results[] = {a.dfactor, a.doffset};
  over_samples(a.batch, a.tokens, n, results, [&](int64_t b, int64_t first, int64_t end, double* totals) {
    ColumnSums dfactor(n, totals), doffset(n, totals + n);
    const std::unique_ptr<float[]> rows(new float[2 * n]);
    float *normal = rows.get(), *factor = normal + n;
    if (a.factor)
      std::copy_n(a.factor + b * a.factor_batch_stride, n, factor);
    else
      std::fill_n(factor, n, 1.0f);
    for (int64_t token = first; token < end; ++token) {
      const int64_t at = (b * a.tokens + token) * n;
      const T *grad = static_cast<const T*>(a.grad) + at, *more = static_cast<const T*>(a.grad_x);
      T* dx = static_cast<T*>(a.dx) + at;
      const float rstd = normalize(static_cast<const T*>(a.x) + at, normal, n, a.eps, a.rms);
      Total sum, slope;
      for_each_vec(n, [&](int64_t i, int k, auto lanes) {
        const Vec g = load(grad + i, lanes), normed = load(normal + i, lanes), d = g * load(factor + i, lanes);
        store(&dfactor.near[i], fma(g, normed, load(&dfactor.near[i], lanes)), lanes);
        store(&doffset.near[i], g + load(&doffset.near[i], lanes), lanes);
        sum.part[k] = sum.part[k] + d;
        slope.part[k] = fma(d, normed, slope.part[k]);
      });
      const Vec scale(rstd), mean(a.rms ? 0.0f : sum.value() / n), share(slope.value() / n);
      for_each_vec(n, [&](int64_t i, int, auto lanes) {
        const Vec d = load(grad + i, lanes) * load(factor + i, lanes);
        Vec result = fnma(load(normal + i, lanes), share, d - mean) * scale;
        if (more) result = result + load(more + at + i, lanes);
        store(dx + i, result, lanes);
      });
      if ((token - first) % kRows == kRows - 1) dfactor.flush(), doffset.flush();
    }
    dfactor.flush(), doffset.flush();
  });
}

template <class T>
void gate(const GateBackwardArgs& a) {
  const int64_t n = a.columns;
  float* const results[] = {a.dgate};
  over_samples(a.batch, a.tokens, n, results, [&](int64_t b, int64_t first, int64_t end, double* totals) {
    ColumnSums dgate(n, totals);
    const float* gate = a.gate + b * a.gate_batch_stride;
    for (int64_t token = first; token < end; ++token) {
      const int64_t at = (b * a.tokens + token) * n;
      const T *grad = static_cast<const T*>(a.grad) + at, *x = static_cast<const T*>(a.x) + at;
      T* dx = static_cast<T*>(a.dx) + at;
      for_each_vec(n, [&](int64_t i, int, auto lanes) {
        const Vec g = load(grad + i, lanes);
        store(dx + i, g * load(gate + i, lanes), lanes);
        store(&dgate.near[i], fma(g, load(x + i, lanes), load(&dgate.near[i], lanes)), lanes);
      });
      if ((token - first) % kRows == kRows - 1) dgate.flush();
    }
    dgate.flush();
  });
}

}  // namespace

void adaln_backward(const AdalnBackwardArgs& args) {
  dispatch(args.dtype, [&](auto tag) { adaln<decltype(tag)>(args); });
}

void gate_backward(const GateBackwardArgs& args) {
  dispatch(args.dtype, [&](auto tag) { gate<decltype(tag)>(args); });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
