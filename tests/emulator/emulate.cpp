// The CUDA kernels as C functions that run on the CPU, for tests/test_cuda_emulated.py.
#define TERSOR_EMULATED

#include "cuda/gemm_mma.cuh"
#include "cuda/gemm_wgmma.cuh"
#include "cuda/pack.cuh"

namespace {

using namespace tersor::cuda;
using emulator::Region;

Region region(const void* at, int64_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(at);
  return {begin, begin + bytes};
}

Shape shape(const int64_t* s) {
  return shape_of(s[0], s[1], s[2], static_cast<int>(s[3]), s[4] != 0, static_cast<int>(s[5]));
}

struct Run {
  int resident;  // workers that the pretended machine runs at once
  unsigned seed;
  bool eager;
};

template <class Kernel, class Body>
void gemm(LinearArgs& a, const Run& run, Body body) {
  constexpr int kTokens = Kernel::kTokens, kBlocks = Kernel::kBlocks;
  const int row_tiles = (a.w.row_blocks + kBlocks - 1) / kBlocks;
  a.token_tiles = (a.m + kTokens - 1) / kTokens;
  a.partition = partition_of(row_tiles * a.token_tiles, a.w.steps, run.resident, 2);
  std::vector<float> partials(size_t{2} * a.partition.workers * Kernel::kTile + 4, NAN);
  a.partials = partials.data();
  a.partials += (16 - reinterpret_cast<uintptr_t>(a.partials) % 16) % 16 / 4;
  std::vector<int> arrived(a.partition.tiles, 0);
  a.arrived = arrived.data();
  emulator::launch(a.partition.workers, Kernel::kThreads, Kernel::kSharedBytes,
                   {region(a.packed, a.w.bytes), region(a.x, ((a.m - 1) * a.ldx + a.w.k) * 2),
                    region(a.partials, int64_t{8} * a.partition.workers * Kernel::kTile)},
                   run.seed, run.eager, body);
  for (int each : arrived)
    if (each) emulator::fail("a counter is left behind");
}

template <class T, int kBits, int kTokens, int kBlocks>
void mma(LinearArgs a, const Run& run) {
  using Kernel = MmaGemm<T, kBits, kTokens, kBlocks>;
  gemm<Kernel>(a, run, [&] { Kernel::run(a); });
}

template <class T, int kBits, int kTokens>
void wgmma(const LinearArgs& a, const Run& run) {
  using Kernel = WgmmaGemm<T, kBits, kTokens>;
  BoxedArgs boxed{a, tensor_map(a.x, a.m, a.w.k, a.ldx, kTokens)};
  gemm<Kernel>(boxed.linear, run, [&] { Kernel::run(boxed); });
}

template <class T, int kBits>
void gemm(const LinearArgs& a, const std::string& kind, int tokens, const Run& run) {
  if (kind == "mma" && tokens == 8) return mma<T, kBits, 8, 1>(a, run);
  if (kind == "mma" && tokens == 16) return mma<T, kBits, 16, 1>(a, run);
  if (kind == "mma" && tokens == 32) return mma<T, kBits, 32, 2>(a, run);
  if (kind == "mma" && tokens == 64) return mma<T, kBits, 64, 2>(a, run);
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
  emulator::launch(workers, kPackThreads, 0, {}, 0, false, [&] { pack_body(a); });
}

void unpack(const int64_t* s, uint8_t* packed, uint8_t* codes, uint8_t* scales, uint8_t* zeros,
            int workers) {
  const PackArgs a{shape(s), packed, codes, scales, zeros};
  emulator::launch(workers, kPackThreads, 0, {}, 0, false, [&] { unpack_body(a); });
}

// to_dtype: enum tersor_dtype.
void dequantize(const int64_t* s, int scale_dtype, const uint8_t* packed, int64_t begin,
                int64_t end, void* to, int to_dtype, int workers) {
  const DequantizeArgs a{shape(s), scale_dtype, packed, begin, end, to};
  emulator::launch(workers, kPackThreads, 0, {}, 0, false, [&] {
    if (to_dtype == TERSOR_F32) return dequantize_body<float>(a);
    if (to_dtype == TERSOR_BF16) return dequantize_body<Bits<Bfloat>>(a);
    dequantize_body<Bits<Half>>(a);
  });
}

void linear(const int64_t* s, int scale_dtype, const uint8_t* packed, const uint16_t* x,
            uint16_t* y, const float* bias, int m, int64_t ldx, int64_t ldy, int dtype,
            const char* kind, int tokens, int resident, unsigned seed, int eager) {
  LinearArgs a{};
  a.w = shape(s);
  a.scale_dtype = scale_dtype;
  a.packed = packed;
  a.x = x, a.y = y, a.bias = bias;
  a.ldx = ldx, a.ldy = ldy, a.m = m;
  const Run run{resident, seed, eager != 0};
  const bool half = dtype == TERSOR_F16;
  if (a.w.bits == 4)
    half ? gemm<Half, 4>(a, kind, tokens, run) : gemm<Bfloat, 4>(a, kind, tokens, run);
  else
    half ? gemm<Half, 8>(a, kind, tokens, run) : gemm<Bfloat, 8>(a, kind, tokens, run);
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
