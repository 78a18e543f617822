// What a build without CUDA says (TERSOR_CUDA=off, or auto where there is no compiler for it).
#include "cuda/cuda.h"
#include "dispatch.h"

namespace tersor::cuda {
namespace {

constexpr const char* kWhy =
    "tersor was built without CUDA (TERSOR_CUDA=off, or no CUDA 12.5 was found)";

[[noreturn]] void refuse() { throw Error(kWhy); }

}  // namespace

const char* unavailable() { return kWhy; }
std::string architectures() { return {}; }
std::vector<Row> kernels() { return {}; }
const char* refuses(const Spec&) { return kWhy; }
std::string refuses(int) { return kWhy; }
size_t packed_bytes(const Spec&) { refuse(); }
void pack(const Spec&, const tersor_view&, void*, Target) { refuse(); }
void unpack(const Spec&, const void*, const tersor_view&, Target) { refuse(); }
void dequantize(const Spec&, const void*, int64_t, int64_t, void*, int32_t, Target) { refuse(); }
std::string serves(const Spec&, int64_t, int32_t, int, bool) { refuse(); }
uint64_t capture(Target) { refuse(); }
size_t workspace_bytes(int) { refuse(); }
size_t quantized_bytes(int64_t, int64_t, int64_t) { refuse(); }
void quantize(const Activations&, void*, Target) { refuse(); }
bool linear(const Spec&, const tersor_args&, const Quantized&, Target) { refuse(); }
void search_grid(const GridArgs&, Target) { refuse(); }
void solve_block(const SolveArgs&, Target) { refuse(); }

const char* refuses(const CodebookSpec&) { return kWhy; }
size_t packed_bytes(const CodebookSpec&) { refuse(); }
void pack(const CodebookSpec&, const CodebookView&, void*, Target) { refuse(); }
void unpack(const CodebookSpec&, const void*, const CodebookView&, Target) { refuse(); }
void dequantize(const CodebookSpec&, const float*, const void*, int64_t, int64_t, void*, int32_t,
                Target) {
  refuse();
}
std::string serves(const CodebookSpec&, int64_t, int32_t, int) { refuse(); }
bool linear(const CodebookCall&, Target) { refuse(); }

}  // namespace tersor::cuda
