// LLM.int8() on the CPU (Dettmers et al., arXiv:2208.07339).
#pragma once

#include "format.h"
#include "kernel.h"

namespace tersor {

// Whether single columns of a weight in this layout can be read, which run_with_outliers needs.
bool has_columns(const char* layout);

// y = x * dequantize(W)^T + bias, where the columns of x that hold a finite value beyond the
// threshold in one of the m tokens are multiplied in float32, and the others as int8 with scales of
// their own. Where there is none beyond it, the bits are those of run(). A value that is not finite
// chooses no column: its own token alone is spoilt by it.
//
// head: of a packed weight for int8 activations, with has_columns(head.layout); args: as for run().
void run_with_outliers(const PackedHeader& head, const tersor_args& args, float threshold);

}  // namespace tersor
