#pragma once

#include "isa.h"

namespace fastdiff::cpu {

// All tensors have numel elements in one memory order; null where not given.
struct SchedulerStepArgs {
  static constexpr int kMaxHistory = 8;
  // An fp64 number in two floats: one would err by as much as a rounding of an fp32 result.
  struct Coefficient {
    float high = 0, low = 0;
    Coefficient() = default;
    Coefficient(double c) : high(static_cast<float>(c)), low(static_cast<float>(c - high)) {}
  };
  struct Operand {
    const void* data = nullptr;
    DType dtype = DType::f32;
    Coefficient coefficient;  // in the next sample
    Coefficient in_kept;      // in the kept combination
  };
  Operand sample, model_output, noise, history[kMaxHistory];
  int history_count = 0;
  Coefficient entry_coefficient, entry_in_kept;  // of the new entry in the other two results
  Coefficient entry_sample, entry_output;  // of sample and model output in the new entry
  float clip = -1;                         // bound of the new entry; negative: none
  void* prev = nullptr;
  DType prev_dtype = DType::f32;
  void* entry = nullptr;  // null: none wanted
  DType entry_dtype = DType::f32;
  void* kept = nullptr;  // null: none wanted
  DType kept_dtype = DType::f32;
  int64_t numel = 0;
};
FASTDIFF_CPU_KERNEL(scheduler_step, SchedulerStepArgs)

}  // namespace fastdiff::cpu
