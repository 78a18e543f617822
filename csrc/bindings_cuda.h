#pragma once

#include <nanobind/nanobind.h>

namespace tersor {

// Adds what bindings_cuda.cpp has to a module.
void bind_cuda(nanobind::module_ m);

}  // namespace tersor
