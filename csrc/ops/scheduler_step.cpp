#include "../cpu/scheduler_step.h"

#include <algorithm>

#include "tensor_args.h"

namespace fastdiff {
namespace {

using Args = cpu::SchedulerStepArgs;

// Hands out the operands in the memory order of `sample`, copying those that are laid out otherwise.
class Operands {
 public:
  explicit Operands(const Tensor& sample) : sample_(sample), contiguous_(sample.is_contiguous()) {}

  Args::Operand read(const Tensor& t, double coefficient, const char* name) {
    const auto equal = [](auto a, auto b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); };
    STD_TORCH_CHECK(equal(t.sizes(), sample_.sizes()), "fastdiff: ", name, " must have sample's shape");
    const void* data = t.const_data_ptr();
    if (contiguous_ && !t.is_contiguous()) {
      copies_.push_back(torch::stable::contiguous(t));
      data = copies_.back().const_data_ptr();
    } else if (!contiguous_) {
      STD_TORCH_CHECK(equal(t.strides(), sample_.strides()), "fastdiff: ", name, " must be laid out like sample");
    }
    return {data, dtype_of(t, name), coefficient};
  }

 private:
  const Tensor& sample_;
  bool contiguous_;
  std::vector<Tensor> copies_;
};

// Whether every element between the first and the last in memory is one of t's.
bool is_dense(const Tensor& t) {
  int64_t span = 1;
  for (size_t axis = 0; axis < t.sizes().size(); ++axis) span += (t.sizes()[axis] - 1) * t.strides()[axis];
  return span == t.numel();
}

Tensor result_like(const Tensor& sample, ScalarType dtype) {
  return dtype == sample.scalar_type()
             ? empty_output_like(sample)
             : empty_output({sample.sizes().begin(), sample.sizes().end()},
                            {sample.strides().begin(), sample.strides().end()}, dtype, sample);
}

}  // namespace

std::tuple<Tensor, Tensor> scheduler_step(const Tensor& sample, const Tensor& model_output,
                                          const std::vector<Tensor>& history, const std::optional<Tensor>& noise,
                                          const std::vector<double>& prev, const std::vector<double>& entry,
                                          std::optional<double> clip, std::optional<ScalarType> prev_dtype,
                                          std::optional<ScalarType> entry_dtype) {
  STD_TORCH_CHECK(history.size() <= Args::kMaxHistory && prev.size() == 4 + history.size() &&
                      (entry.empty() || entry.size() == 2),
                  "fastdiff: scheduler_step takes up to 8 history tensors, 4 + as many coefficients in prev and 2 or "
                  "none in entry");
  STD_TORCH_CHECK(sample.is_contiguous() || is_dense(sample), "fastdiff: sample must be dense in memory");
  Operands operands(sample);
  Args args;
  args.numel = sample.numel();
  args.sample = operands.read(sample, prev[0], "sample");
  args.model_output = operands.read(model_output, prev[1], "model_output");
  if (noise) args.noise = operands.read(*noise, prev[3], "noise");
  for (const Tensor& t : history) {
    args.history[args.history_count] = operands.read(t, prev[4 + args.history_count], "a history tensor");
    ++args.history_count;
  }

  Tensor next = result_like(sample, prev_dtype.value_or(sample.scalar_type()));
  args.prev = next.mutable_data_ptr();
  args.prev_dtype = dtype_of(next, "prev_dtype");
  const ScalarType kept = entry_dtype.value_or(model_output.scalar_type());
  Tensor new_entry = entry.empty() ? empty_output({0}, {1}, kept, sample) : result_like(sample, kept);
  if (!entry.empty()) {
    args.entry = new_entry.mutable_data_ptr();
    args.entry_dtype = dtype_of(new_entry, "entry_dtype");
    args.entry_sample = entry[0];
    args.entry_output = entry[1];
    args.entry_coefficient = prev[2];
    if (clip) args.clip = static_cast<float>(*clip);
  }
  if (args.numel > 0) require(cpu::scheduler_step(args), "scheduler_step");
  return {next, new_entry};
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("scheduler_step", TORCH_BOX(&scheduler_step)); }

}  // namespace fastdiff
