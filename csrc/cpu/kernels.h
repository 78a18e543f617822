// The tables of the CPU kernels, one per file. A table may be absent from a build (another
// architecture, an old compiler): dispatch.cpp names those that are there.
#pragma once

#include "kernel.h"

namespace tersor {

extern const tersor_kernel kScalarKernels[10];
extern const tersor_kernel kAvx2Kernels[10];
extern const tersor_kernel kAvx512VnniKernels[10];
extern const tersor_kernel kAvx512Bf16Kernels[5];

}  // namespace tersor
