#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void define_direct_step(pybind11::module_& m);

}  // namespace fastdiff
