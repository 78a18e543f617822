// The reference: plain C++, any machine. It says what the other files compute; where they differ,
// they are wrong. The 16 rows of a tile are the innermost loop, which any compiler vectorises.
#include "cpu/features.h"
#include "cpu/kernels.h"
#include "cpu/tile16.h"
#include "cpu/tile16_pack.h"
#include "cpu/tile16_prepare.h"

namespace {

// As a constant, which is not there for values without scales.
template <int BITS>
float scale_of(const tersor_spec& s, const uint8_t* scales, int64_t i) {
  return BITS == 16 ? 1.0f : load_element(scales, i, s.scale_dtype);
}

template <int BITS>
int32_t code_of(const uint8_t* lines, int64_t row, int64_t column) {
  constexpr int64_t kColumns = BITS == 4 ? 8 : 4;
  const int64_t j = column % kColumns;
  const uint8_t byte = lines[column / kColumns * kLineBytes + row * 4 + j % 4];
  return BITS == 8 ? byte : j < 4 ? byte & 15 : byte >> 4;
}

struct Dense {
  static constexpr bool kSparse = false;

  template <int BITS, class Sum, class Element>
  static void add(const uint8_t* lines, int64_t begin, int64_t end, const int32_t* zero,
                  const Element* x, Sum* sum) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t r = 0; r < kTileRows; ++r)
        sum[r] += static_cast<Sum>(code_of<BITS>(lines, r, i) - zero[r]) * static_cast<Sum>(x[i]);
  }
};

// "tile16s24": a four at a time, whose two codes meet the columns that its pattern names.
struct Sparse {
  static constexpr bool kSparse = true;

  static int pattern_of(const uint8_t* patterns, int64_t row, int64_t unit, int f) {
    uint64_t bits = 0;
    for (int q = 0; q < 3; ++q) {
      uint16_t half;
      __builtin_memcpy(&half, patterns + q * kLineBytes + row * 4 + f * 2, 2);
      bits |= static_cast<uint64_t>(half & 0xfff) << (12 * q);
      bits |= static_cast<uint64_t>(half >> 12) << (36 + 4 * q);
    }
    return static_cast<int>(bits >> (3 * unit) & 7);
  }

  template <int BITS, class Sum, class Element>
  static void add(const uint8_t* lines, int64_t begin, int64_t end, const int32_t*,
                  const Element* x, Sum* sum) {
    for (int64_t i = begin; i < end; i += 4) {
      const uint8_t* step = lines + i / kSparseColumns * sparse_step_bytes(BITS);
      const int64_t unit = i % kSparseColumns / 8;
      const int f = static_cast<int>(i / 4 % 2);
      const uint8_t* codes = step + sparse_codes_at(BITS, unit);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int p = pattern_of(step, r, unit, f);
        for (int j = 0; j < 2; ++j) {
          const uint8_t byte = codes[r * 4 + 2 * f + j];
          // The code less its midpoint: its highest bit is the sign.
          const int shift = BITS == 8 ? 24 : unit % 2 ? 24 : 28;
          const int32_t code =
              static_cast<int32_t>(static_cast<uint32_t>(byte) << shift) >> (32 - BITS);
          sum[r] += static_cast<Sum>(code) * static_cast<Sum>(x[i + kKeptColumns[p][j]]);
        }
      }
    }
  }
};

// The same with values in place of codes.
template <int32_t DTYPE>
struct SparseValues {
  static constexpr bool kSparse = true;

  template <int BITS>
  static void add(const uint8_t* lines, int64_t begin, int64_t end, const int32_t*, const float* x,
                  float* sum) {
    for (int64_t i = begin; i < end; i += 4) {
      const uint8_t* step = lines + i / kSparseColumns * sparse_step_bytes(16);
      const int64_t unit = i % kSparseColumns / 8;
      const int f = static_cast<int>(i / 4 % 2);
      const uint8_t* values = step + sparse_codes_at(16, unit) + f * kLineBytes;
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int p = Sparse::pattern_of(step, r, unit, f);
        for (int j = 0; j < 2; ++j)
          sum[r] += load_element(values, 2 * r + j, DTYPE) * x[i + kKeptColumns[p][j]];
      }
    }
  }
};

// Element: int8_t with int32_t sums, or float with float sums.
template <class Layout, int BITS, class Element, class Sum>
void gemm(const tersor_args* a, int64_t begin, int64_t end) {
  const tersor_spec& s = a->spec;
  const Tile16 tile(s, Layout::kSparse);
  const Prepared p(s, a->m, sizeof(Element));
  const auto* work = static_cast<const uint8_t*>(a->workspace);
  const auto* token_scale = reinterpret_cast<const float*>(work + p.scales_at);
  for (int64_t row = begin; row < end; row += kTileRows) {
    const uint8_t* lines =
        static_cast<const uint8_t*>(a->packed) + row / kTileRows * tile.tile_bytes;
    for (int64_t token = 0; token < a->m; ++token) {
      const auto* x = reinterpret_cast<const Element*>(work + token * p.stride);
      float total[kTileRows] = {};
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
        const int64_t group = chunk / p.chunks_per_group;
        int32_t zero[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r)
          zero[r] = s.asymmetric ? lines[tile.zeros_at + group * kTileRows + r] : 1 << (BITS - 1);
        Sum sum[kTileRows] = {};
        Layout::template add<BITS>(lines, p.chunk_begin(s, chunk), p.chunk_end(s, chunk), zero, x,
                                   sum);
        for (int64_t r = 0; r < kTileRows; ++r)
          total[r] += scale_of<BITS>(s, lines + tile.scales_at, group * kTileRows + r) *
                      static_cast<float>(sum[r]);
      }
      const float by = sizeof(Element) == 1 ? token_scale[token] : 1.0f;
      for (int64_t r = 0; r < smaller(kTileRows, s.n - row); ++r)
        store_element(a->y, token * a->ldy + row + r, a->dtype,
                      total[r] * by + (a->bias ? a->bias[row + r] : 0.0f));
    }
  }
}

}  // namespace

namespace tersor {

using namespace tile16;

const tersor_kernel kScalarKernels[] = {
    kernel("w4a8_scalar", "scalar", 0, nothing_missing, refuses_w4a8, workspace_a8, prepare_a8,
           gemm<Dense, 4, int8_t, int32_t>),
    kernel("w8a8_scalar", "scalar", 0, nothing_missing, refuses_w8a8, workspace_a8, prepare_a8,
           gemm<Dense, 8, int8_t, int32_t>),
    kernel("w4a16_scalar", "scalar", 0, nothing_missing, refuses_w4a16, workspace_f32, prepare_f32,
           gemm<Dense, 4, float, float>),
    kernel("w8a16_scalar", "scalar", 0, nothing_missing, refuses_w8a16, workspace_f32, prepare_f32,
           gemm<Dense, 8, float, float>),
    sparse_kernel("s24w4a8_scalar", "scalar", 5, nothing_missing, sparse_refuses_w4a8, workspace_a8,
                  prepare_a8, gemm<Sparse, 4, int8_t, int32_t>),
    sparse_kernel("s24w8a8_scalar", "scalar", 5, nothing_missing, sparse_refuses_w8a8, workspace_a8,
                  prepare_a8, gemm<Sparse, 8, int8_t, int32_t>),
    sparse_kernel("s24w4a16_scalar", "scalar", 5, nothing_missing, sparse_refuses_w4a16,
                  workspace_f32, prepare_sparse_f32, gemm<Sparse, 4, float, float>),
    sparse_kernel("s24w8a16_scalar", "scalar", 5, nothing_missing, sparse_refuses_w8a16,
                  workspace_f32, prepare_sparse_f32, gemm<Sparse, 8, float, float>),
    sparse_kernel("s24bf16_scalar", "scalar", 5, nothing_missing, sparse_refuses_bf16,
                  workspace_f32, prepare_sparse_f32,
                  gemm<SparseValues<TERSOR_BF16>, 16, float, float>),
    sparse_kernel("s24f16_scalar", "scalar", 5, nothing_missing, sparse_refuses_f16, workspace_f32,
                  prepare_sparse_f32, gemm<SparseValues<TERSOR_F16>, 16, float, float>),
};

}  // namespace tersor
