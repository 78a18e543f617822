// The CUDA kernels as C functions that run on the CPU, for tests/test_cuda_emulated.py.
#define TERSOR_EMULATED

#include "cuda/gemm_mma.cuh"
#include "cuda/gemm_wgmma.cuh"
#include "cuda/layout_int8.h"
#include "cuda/outliers.cuh"
#include "cuda/pack.cuh"
#include "cuda/pack_codebook.cuh"
#include "cuda/pack_sparse.cuh"
#include "cuda/quantize.cuh"

namespace {

using namespace tersor::cuda;
using emulator::Region;

Region region(const void* at, int64_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(at);
  return {begin, begin + bytes};
}

Shape shape(const int64_t* s) {
  return shape_of(s[0], s[1], s[2], static_cast<int>(s[3]), s[4] != 0, static_cast<int>(s[5]),
                  s[6] != 0, s[7] != 0);
}

struct Run {
  int resident;  // workers that the pretended machine runs at once
  unsigned seed;
  bool eager;
};

template <class Kernel, class Args, class Body>
void gemm(Args& a, const Run& run, Body body, std::vector<Region> readable = {}) {
  constexpr int kTokens = Kernel::kTokens, kBlocks = Kernel::kBlocks;
  const int row_tiles = (a.w.row_blocks + kBlocks - 1) / kBlocks;
  a.token_tiles = (a.m + kTokens - 1) / kTokens;
  a.partition = partition_of(row_tiles * a.token_tiles, a.w.steps, run.resident, 2);
  std::vector<float> partials(size_t{2} * a.partition.workers * Kernel::kTile + 4, NAN);
  a.partials = partials.data();
  a.partials += (16 - reinterpret_cast<uintptr_t>(a.partials) % 16) % 16 / 4;
  std::vector<int> arrived(a.partition.tiles, 0);
  a.arrived = arrived.data();
  int64_t bytes = a.w.bytes;
  if constexpr (std::is_same_v<Args, CodebookArgs>)
    bytes = codebook_shape_of(a.w.n, a.w.k, a.w.g, a.doubled).bytes;
  readable.push_back(region(a.packed, bytes));
  readable.push_back(region(a.partials, int64_t{8} * a.partition.workers * Kernel::kTile));
  if (readable.size() == 2) readable.push_back(region(a.x, ((a.m - 1) * a.ldx + a.w.k) * 2));
  emulator::launch(a.partition.workers, Kernel::kThreads, Kernel::kSharedBytes, readable, run.seed,
                   run.eager, body);
  for (int each : arrived)
    if (each) emulator::fail("a counter is left behind");
}

template <class Product, int kTokens, int kBlocks>
void mma(LinearArgs a, const Run& run) {
  using Kernel = MmaGemm<Product, kTokens, kBlocks>;
  gemm<Kernel>(a, run, [&] { Kernel::run(a); });
}

template <class T, int kBits>
void sparse(const LinearArgs& a, int tokens, const Run& run) {
  using Product = SparseProduct<T, kBits>;
  if (tokens == 8) return mma<Product, 8, 2>(a, run);
  if (tokens == 16) return mma<Product, 16, 2>(a, run);
  if (tokens == 32) return mma<Product, 32, 2>(a, run);
  if (tokens == 64) return mma<Product, 64, 2>(a, run);
  emulator::fail("there is no such kernel");
}

// A call's tokens from `first` on, of those that quantize() was given.
struct Quantized {
  const uint8_t* memory;
  Int8Layout at;
  int64_t first;
};

template <class Product, int kTokens, int kBlocks, bool kOutliers = false>
void int8(LinearArgs a, const Quantized& q, const Run& run) {
  using Kernel = MmaGemm<Product, kTokens, kBlocks, kOutliers>;
  std::vector<Region> readable = {region(q.memory, q.at.rows * q.at.columns),
                                  region(q.memory + q.at.sums_at, q.at.rows * q.at.w.groups * 4)};
  if (kOutliers) readable.push_back(region(a.x, ((a.m - 1) * a.ldx + a.w.k) * 2));
  a.exact = a.x, a.ld_exact = a.ldx;
  a.x = q.memory + q.first * q.at.columns, a.ldx = q.at.columns;
  a.x_scales = reinterpret_cast<const float*>(q.memory + q.at.scales_at) + q.first;
  a.x_sums = reinterpret_cast<const int32_t*>(q.memory + q.at.sums_at) + q.first;
  a.x_rows = q.at.rows;
  a.outliers = reinterpret_cast<const uint64_t*>(q.memory + q.at.outliers_at);
  a.w.k = static_cast<int32_t>(q.at.columns);
  gemm<Kernel>(a, run, [&] { Kernel::run(a); }, readable);
}

template <class T, int kBits, int kTokens>
void wgmma(const LinearArgs& a, const Run& run) {
  using Kernel = WgmmaGemm<T, kBits, kTokens>;
  BoxedArgs boxed{a, tensor_map(a.x, a.m, a.w.k, a.ldx, kTokens)};
  gemm<Kernel>(boxed.linear, run, [&] { Kernel::run(boxed); });
}

template <class T, int kTokens, int kBlocks, int kCopies>
void codebook(CodebookArgs a, const Run& run) {
  using Kernel = MmaGemm<CodebookProduct<T, kCopies>, kTokens, kBlocks>;
  gemm<Kernel>(a, run, [&] { Kernel::run(a); });
}

template <class T>
void codebook(const CodebookArgs& a, int tokens, const Run& run) {
  if (tokens == 8) return codebook<T, 8, 1, 32>(a, run);
  if (tokens == 16) return codebook<T, 16, 1, 32>(a, run);
  if (tokens == 32) return codebook<T, 32, 2, 16>(a, run);
  if (tokens == 64) return codebook<T, 64, 1, 16>(a, run);
  emulator::fail("there is no kernel with so many tokens");
}

CodebookShape codebook_shape(const int64_t* s) {
  return codebook_shape_of(s[0], s[1], s[2], s[3] != 0);
}

template <class T, int kBits>
void gemm(const LinearArgs& a, const Quantized& q, const std::string& kind, int tokens,
          const Run& run) {
  using Product = FloatProduct<T, kBits>;
  using Int8 = Int8Product<T, kBits>;
  if (kind == "mma" && tokens == 8) return mma<Product, 8, 1>(a, run);
  if (kind == "mma" && tokens == 16) return mma<Product, 16, 1>(a, run);
  if (kind == "mma" && tokens == 32) return mma<Product, 32, 2>(a, run);
  if (kind == "mma" && tokens == 64) return mma<Product, 64, 1>(a, run);
  if (kind == "int8" && tokens == 8) return int8<Int8, 8, 1>(a, q, run);
  if (kind == "int8" && tokens == 16) return int8<Int8, 16, 1>(a, q, run);
  if (kind == "int8" && tokens == 32) return int8<Int8, 32, 2>(a, q, run);
  if (kind == "int8" && tokens == 64) return int8<Int8, 64, 2>(a, q, run);
  if (kind == "outliers" && tokens == 8) return int8<Int8, 8, 1, true>(a, q, run);
  if (kind == "outliers" && tokens == 16) return int8<Int8, 16, 1, true>(a, q, run);
  if (kind == "outliers" && tokens == 32) return int8<Int8, 32, 2, true>(a, q, run);
  if (kind == "outliers" && tokens == 64) return int8<Int8, 64, 1, true>(a, q, run);
  if (kind == "rows" && tokens == 8) return int8<RowProduct<T, kBits>, 8, 1>(a, q, run);
  if (kind == "rows" && tokens == 16) return int8<RowProduct<T, kBits>, 16, 1>(a, q, run);
  if (kind == "rows" && tokens == 32) return int8<RowProduct<T, kBits>, 32, 2>(a, q, run);
  if (kind == "rows" && tokens == 64) return int8<RowProduct<T, kBits>, 64, 2>(a, q, run);
  if (kind == "wgmma" && tokens == 64) return wgmma<T, kBits, 64>(a, run);
  if (kind == "wgmma" && tokens == 128) return wgmma<T, kBits, 128>(a, run);
  emulator::fail("there is no kernel " + kind);
}

}  // namespace

extern "C" {

int64_t packed_bytes(const int64_t* s) { return shape(s).bytes; }

void pack(const int64_t* s, uint8_t* packed, uint8_t* codes, uint8_t* scales, uint8_t* zeros,
          int workers) {
  const PackArgs a{shape(s), packed, codes, scales, zeros};
  emulator::launch(workers, kPackThreads, 0, {}, 0, false,
                   [&] { a.w.sparse ? pack_sparse_body(a) : pack_body(a); });
}

void unpack(const int64_t* s, uint8_t* packed, uint8_t* codes, uint8_t* scales, uint8_t* zeros,
            int workers) {
  const PackArgs a{shape(s), packed, codes, scales, zeros};
  emulator::launch(workers, kPackThreads, 0, {}, 0, false,
                   [&] { a.w.sparse ? unpack_sparse_body(a) : unpack_body(a); });
}

}  // extern "C"

namespace {

template <class To>
void dequantize_to(const DequantizeArgs& a) {
  a.w.sparse ? dequantize_sparse_body<To>(a) : dequantize_body<To>(a);
}

}  // namespace

extern "C" {

// to_dtype: enum tersor_dtype.
void dequantize(const int64_t* s, int scale_dtype, const uint8_t* packed, int64_t begin,
                int64_t end, void* to, int to_dtype, int workers) {
  const DequantizeArgs a{shape(s), scale_dtype, packed, begin, end, to};
  emulator::launch(workers, kPackThreads, 0, {}, 0, false, [&] {
    if (to_dtype == TERSOR_F32) return dequantize_to<float>(a);
    if (to_dtype == TERSOR_BF16) return dequantize_to<Bits<Bfloat>>(a);
    dequantize_to<Bits<Half>>(a);
  });
}

int64_t quantized_bytes(int64_t m, int64_t k, int64_t g) { return Int8Layout(m, k, g).bytes; }

}  // extern "C"

namespace {

template <class T>
void quantize_as(const QuantizeArgs& q, float outliers, uint64_t* found, unsigned seed,
                 bool eager) {
  QuantizeArgs a = q;
  a.outliers = found;
  const auto run = [&](auto body) {
    emulator::launch(a.rows, kQuantizeThreads, kQuantizeShared, {}, seed, eager, body);
  };
  if (outliers <= 0) return run([&] { quantize_body<Bits<T>>(a); });
  const OutlierArgs o{a.x, a.ldx, a.m, a.w.k, outliers, found};
  emulator::launch(a.w.steps, kOutlierThreads, kOutlierShared,
                   {region(a.x, ((a.m - 1) * a.ldx + a.w.k) * 2)}, seed, false,
                   [&] { find_outliers_body<T>(o); });
  run([&] { quantize_body<Bits<T>, true>(a); });
}

}  // namespace

extern "C" {

// room: tokens that the memory is for, m or more. outliers: 0 for none; scale: or nullptr.
void quantize(const uint16_t* x, int m, int64_t room, int64_t k, int64_t g, int64_t ldx, int dtype,
              float outliers, const float* scale, uint8_t* quantized, unsigned seed, int eager) {
  const Int8Layout at(room, k, g);
  const QuantizeArgs a{at.w,
                       x,
                       ldx,
                       m,
                       static_cast<int32_t>(at.rows),
                       scale,
                       reinterpret_cast<int8_t*>(quantized),
                       reinterpret_cast<float*>(quantized + at.scales_at),
                       reinterpret_cast<int32_t*>(quantized + at.sums_at),
                       nullptr};
  auto* found = reinterpret_cast<uint64_t*>(quantized + at.outliers_at);
  dtype == TERSOR_F16 ? quantize_as<Half>(a, outliers, found, seed, eager != 0)
                      : quantize_as<Bfloat>(a, outliers, found, seed, eager != 0);
}

// quantized: of quantize(), for the kinds that take int8: tokens from `first` on.
void linear(const int64_t* s, int scale_dtype, const uint8_t* packed, const uint16_t* x,
            uint16_t* y, const float* bias, int m, int64_t ldx, int64_t ldy, int dtype,
            const char* kind, int tokens, int resident, unsigned seed, int eager,
            const uint8_t* quantized, int64_t room, int64_t first) {
  LinearArgs a{};
  a.w = shape(s);
  a.scale_dtype = scale_dtype;
  a.packed = packed;
  a.x = x, a.y = y, a.bias = bias;
  a.ldx = ldx, a.ldy = ldy, a.m = m;
  const Quantized q{quantized, Int8Layout(room, a.w.k, a.w.g), first};
  const Run run{resident, seed, eager != 0};
  const bool half = dtype == TERSOR_F16;
  if (a.w.sparse && a.w.bits == 16)
    half ? sparse<Half, 16>(a, tokens, run) : sparse<Bfloat, 16>(a, tokens, run);
  else if (a.w.sparse)
    half ? sparse<Half, 4>(a, tokens, run) : sparse<Bfloat, 4>(a, tokens, run);
  else if (a.w.bits == 4)
    half ? gemm<Half, 4>(a, q, kind, tokens, run) : gemm<Bfloat, 4>(a, q, kind, tokens, run);
  else
    half ? gemm<Half, 8>(a, q, kind, tokens, run) : gemm<Bfloat, 8>(a, q, kind, tokens, run);
}

// s: n, k, g, doubled.
int64_t codebook_bytes(const int64_t* s) { return codebook_shape(s).bytes; }

// values [16] as floats; returns the unit.
float codebook_rounded(const float* values, int dtype, float* rounded) {
  const RoundedValues made = rounded_values(values, dtype);
  for (int i = 0; i < kValues; ++i)
    rounded[i] = dtype == TERSOR_F16 ? from_f16(made.values[i]) : from_bf16(made.values[i]);
  return made.unit;
}

void codebook_pack(const int64_t* s, uint8_t* packed, uint8_t* codes, uint8_t* scales, float* steps,
                   float* mean, int workers, int back) {
  const CodebookPackArgs a{codebook_shape(s), packed, codes, scales, steps, mean};
  emulator::launch(workers, kPackThreads, 0, {}, 0, false,
                   [&] { back ? unpack_codebook_body(a) : pack_codebook_body(a); });
}

void codebook_dequantize(const int64_t* s, const uint8_t* packed, const float* values,
                         int64_t begin, int64_t end, void* to, int to_dtype, int workers) {
  CodebookDequantizeArgs a{codebook_shape(s), packed, {}, begin, end, to};
  std::copy_n(values, kValues, a.values);
  emulator::launch(workers, kPackThreads, 0, {}, 0, false, [&] {
    if (to_dtype == TERSOR_F32) return dequantize_codebook_body<float>(a);
    if (to_dtype == TERSOR_BF16) return dequantize_codebook_body<Bits<Bfloat>>(a);
    dequantize_codebook_body<Bits<Half>>(a);
  });
}

void codebook_linear(const int64_t* s, const uint8_t* packed, const float* values,
                     const uint16_t* x, uint16_t* y, const float* bias, int m, int64_t ldx,
                     int64_t ldy, int dtype, int tokens, int resident, unsigned seed, int eager) {
  const CodebookShape shape = codebook_shape(s);
  CodebookArgs a{};
  a.w = shape.w;
  a.packed = packed;
  a.x = x, a.y = y, a.bias = bias;
  a.ldx = ldx, a.ldy = ldy, a.m = m;
  a.codebook = rounded_values(values, dtype);
  a.doubled = shape.doubled, a.row_groups = shape.row_groups;
  a.scale_steps = reinterpret_cast<const float*>(packed + shape.steps_at);
  a.mean = reinterpret_cast<const float*>(packed + shape.mean_at);
  const Run run{resident, seed, eager != 0};
  dtype == TERSOR_F16 ? codebook<Half>(a, tokens, run) : codebook<Bfloat>(a, tokens, run);
}

// Of each worker the first step; of each step its worker, and the slot of that worker for its tile.
// Returns the workers.
int divide(int tiles, int steps, int resident, int least, int* rows) {
  const Partition p = partition_of(tiles, steps, resident, least);
  const int all = tiles * steps;
  for (int i = 0; i < p.workers; ++i) rows[i] = p.begin(i);
  for (int i = 0; i < all; ++i) {
    rows[all + i] = p.worker_of(i);
    rows[2 * all + i] = p.slot(rows[all + i], i / steps);
  }
  return p.workers;
}

void use_barriers(int yes) { emulator::machine().barriers = yes != 0; }

}  // extern "C"
