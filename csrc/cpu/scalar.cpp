// The reference: plain C++, any machine. It says what the other files compute; where they differ,
// they are wrong. The 16 rows of a tile are the innermost loop, which any compiler vectorises.
#include "cpu/features.h"
#include "cpu/kernels.h"
#include "cpu/tile16.h"
#include "cpu/tile16_pack.h"
#include "cpu/tile16_prepare.h"

namespace {

template <int BITS>
int32_t code_of(const uint8_t* lines, int64_t row, int64_t column) {
  constexpr int64_t kColumns = BITS == 4 ? 8 : 4;
  const int64_t j = column % kColumns;
  const uint8_t byte = lines[column / kColumns * kLineBytes + row * 4 + j % 4];
  return BITS == 8 ? byte : j < 4 ? byte & 15 : byte >> 4;
}

// Element: int8_t with int32_t sums, or float with float sums.
template <int BITS, class Element, class Sum>
void gemm(const tersor_args* a, int64_t begin, int64_t end) {
  const tersor_spec& s = a->spec;
  const Tile16 tile(s);
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
        for (int64_t i = p.chunk_begin(s, chunk); i < p.chunk_end(s, chunk); ++i)
          for (int64_t r = 0; r < kTileRows; ++r)
            sum[r] +=
                static_cast<Sum>(code_of<BITS>(lines, r, i) - zero[r]) * static_cast<Sum>(x[i]);
        for (int64_t r = 0; r < kTileRows; ++r)
          total[r] += load_element(lines + tile.scales_at, group * kTileRows + r, s.scale_dtype) *
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
           gemm<4, int8_t, int32_t>),
    kernel("w8a8_scalar", "scalar", 0, nothing_missing, refuses_w8a8, workspace_a8, prepare_a8,
           gemm<8, int8_t, int32_t>),
    kernel("w4a16_scalar", "scalar", 0, nothing_missing, refuses_w4a16, workspace_f32, prepare_f32,
           gemm<4, float, float>),
    kernel("w8a16_scalar", "scalar", 0, nothing_missing, refuses_w8a16, workspace_f32, prepare_f32,
           gemm<8, float, float>),
};

}  // namespace tersor
