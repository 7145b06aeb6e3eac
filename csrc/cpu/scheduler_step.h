#pragma once

#include "isa.h"

namespace fastdiff::cpu {

// All tensors have numel elements in one memory order; null where not given.
struct SchedulerStepArgs {
  static constexpr int kMaxHistory = 8;
  struct Operand {
    const void* data = nullptr;
    DType dtype = DType::f32;
    double in_next = 0, in_kept = 0, in_entry = 0;  // its coefficients in the three results
  };
  Operand sample, model_output, noise, history[kMaxHistory];
  int history_count = 0;
  double entry_in_next = 0, entry_in_kept = 0;  // of the new entry in the other two results
  double clip = -1;                             // bound of the new entry; negative: none
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
