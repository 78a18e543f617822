// What this processor and its operating system offer. Baseline code.
#pragma once

namespace tersor {

// NULL if present, else what is missing.
const char* nothing_missing();
const char* avx2_missing();
const char* avx512vnni_missing();
const char* avx512bf16_missing();

}  // namespace tersor
