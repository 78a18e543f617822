// The CUDA part as the rest of the library sees it; no header of CUDA is needed to read this one.
//
// Weights, activations and results are in the memory of a device, and everything is launched on a
// stream of the caller's: nothing here waits or changes the current device of the
// thread, and nothing allocates but the first call of a stream, and of a capture, some counters. A
// build without CUDA has the same functions (no_cuda.cpp), which say so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/codebook.h"
#include "kernel.h"

namespace tersor::cuda {

struct GridArgs;  // arguments.h
struct SolveArgs;

// A weight in CUDA order.
struct Spec : tersor_spec {
  bool two_level;  // see layout.h; a view of it in portable order has the scales of the rows [n],
                   // and the multipliers for zeros
};

// Where a call runs: the number of the device, and a cudaStream_t.
struct Target {
  int device;
  void* stream;
};

// Why no CUDA kernel can run in this process, or nullptr where some device can be used.
const char* unavailable();
// The architectures that this build has code for ("75 80 90a"); empty without CUDA.
std::string architectures();

struct Row {
  std::string name;
  int arch;
};
// The kernels of products, in the order that they are asked.
std::vector<Row> kernels();

// Why a device cannot run the kernels of this build, or nothing where it can.
std::string refuses(int device);
// Why weights of this spec cannot be in CUDA order, or nullptr where they can.
const char* refuses(const Spec& spec);
// Bytes of such a weight, which has no header: what it is, only its owner knows.
size_t packed_bytes(const Spec& spec);

// Portable order to CUDA order and back, where zeros are left out only of weights that keep to the
// pattern of the spec; all pointers of the device of `target`. packed: 128-byte
// aligned. These and those below throw Error where the driver refuses a launch.
void pack(const Spec& spec, const tersor_view& view, void* packed, Target target);
void unpack(const Spec& spec, const void* packed, const tersor_view& view, Target target);
// (code - zero) * scale of rows [begin, end), [end - begin, k] of enum tersor_dtype `dtype`.
void dequantize(const Spec& spec, const void* packed, int64_t begin, int64_t end, void* to,
                int32_t dtype, Target target);

// The kernel that serves m tokens of the dtype on a device, by its name, or empty: then a caller
// dequantizes, and multiplies with the library of its own. outliers: some columns of x may stay in
// 16 bits beside int8 ones.
std::string serves(const Spec& spec, int64_t m, int32_t dtype, int device, bool outliers);
// The capture into a graph that the stream is in, or 0: what was launched before it is not in the
// graph.
uint64_t capture(Target target);
// Of the workspace of any call on a device, at 128 bytes; what is in it before and after is
// nothing.
size_t workspace_bytes(int device);

// Activations [m, k] of 16 bits, whose rows begin at 16 bytes, that are to be int8 (layout_int8.h):
// for all weights with that k and g.
struct Activations {
  const void* x;
  int64_t m, k, g, ldx;
  int32_t dtype;       // enum tersor_dtype
  const float* scale;  // [1], of all tokens, or nullptr for one of each token's own
  float outliers;      // columns with a finite value beyond this stay in 16 bits; 0: none
};
// Of such activations as int8, at 128 bytes.
size_t quantized_bytes(int64_t m, int64_t k, int64_t g);
void quantize(const Activations& from, void* quantized, Target target);

// Some tokens of them, for a call: `first` is a multiple of 64.
struct Quantized {
  const void* quantized;  // or nullptr, where a weight takes activations of 16 bits
  int64_t m, first;       // of all tokens
  bool outliers;
};

// y = x * dequantize(W)^T + bias, or false where no kernel serves. Rows of x begin at 16 bytes.
// args.workspace as above; args.spec is that of the weight.
bool linear(const Spec& spec, const tersor_args& args, const Quantized& int8, Target target);

// Of the column solver (solve/solve.h): the grids of a weight, and one block of columns.
void search_grid(const GridArgs& args, Target target);
void solve_block(const SolveArgs& args, Target target);

// --- weights of indices into sixteen values (codebook.h) ----------------------------------------

struct CodebookSpec {
  int64_t n, k, g;  // g: weights that share a scale
  bool doubled;     // scales are int8, with a step for each 256 and a mean
};

// A weight in portable order, as tersor.adapters.codebook has it, on a device.
struct CodebookView {
  uint8_t* codes;  // [n * k / 2], two to a byte
  void* scales;    // [n * k / g] float32, or int8
  float* steps;    // [n * k / g / 256], rounded up, or nullptr
  float* mean;     // [1] or nullptr
};

struct CodebookCall {
  CodebookSpec spec;
  RoundedValues values;  // of `dtype`
  int64_t m;
  const void *packed, *x;
  void* y;
  int64_t ldx, ldy;
  int32_t dtype;  // enum tersor_dtype of x and y
  const float* bias;
  void* workspace;
};

// As the functions above.
const char* refuses(const CodebookSpec& spec);
size_t packed_bytes(const CodebookSpec& spec);
void pack(const CodebookSpec& spec, const CodebookView& view, void* packed, Target target);
void unpack(const CodebookSpec& spec, const void* packed, const CodebookView& view, Target target);
// values [16], on the host.
void dequantize(const CodebookSpec& spec, const float* values, const void* packed, int64_t begin,
                int64_t end, void* to, int32_t dtype, Target target);
std::string serves(const CodebookSpec& spec, int64_t m, int32_t dtype, int device);
bool linear(const CodebookCall& call, Target target);

}  // namespace tersor::cuda
