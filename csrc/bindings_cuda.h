#pragma once

#include <nanobind/nanobind.h>

namespace tersor {

// What bindings_cuda.cpp and bindings_cuda_solve.cpp add to a module.
void bind_cuda(nanobind::module_ m);
void bind_cuda_solve(nanobind::module_ m);

}  // namespace tersor
