// Packing for every kernel of the "tile16" layout. Baseline code: it runs on any machine.
#include "cpu/tile16.h"

#include <cstring>

#include "cpu/tile16_pack.h"

namespace tersor::tile16 {

size_t packed_bytes(const tersor_spec* s) {
  const Tile16 t(*s);
  return static_cast<size_t>(t.tiles * t.tile_bytes);
}

namespace {

void pack_tile(const tersor_spec& s, const Tile16& t, const tersor_view& view, uint8_t* tile,
               int64_t row, int64_t rows) {
  std::memset(tile, 0, static_cast<size_t>(t.tile_bytes));
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* codes = view.codes + (row + r) * s.k;
    for (int64_t l = 0; l < t.lines; ++l) {
      uint8_t* word = tile + l * kLineBytes + r * 4;
      const int64_t column = l * t.columns_per_line;
      const int64_t columns = smaller(t.columns_per_line, s.k - column);
      for (int64_t j = 0; j < columns; ++j)
        word[j % 4] |= static_cast<uint8_t>(j < 4 ? codes[column + j] : codes[column + j] << 4);
    }
    const auto* scales =
        static_cast<const uint8_t*>(view.scales) + (row + r) * t.groups * t.scale_bytes;
    for (int64_t c = 0; c < t.groups; ++c) {
      const int64_t at = c * kTileRows + r;
      std::memcpy(tile + t.scales_at + at * t.scale_bytes, scales + c * t.scale_bytes,
                  static_cast<size_t>(t.scale_bytes));
      if (s.asymmetric) tile[t.zeros_at + at] = view.zeros[(row + r) * t.groups + c];
    }
  }
}

void unpack_tile(const tersor_spec& s, const Tile16& t, const uint8_t* tile,
                 const tersor_view& view, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* codes = view.codes + (row + r) * s.k;
    for (int64_t l = 0; l < t.lines; ++l) {
      const uint8_t* word = tile + l * kLineBytes + r * 4;
      const int64_t column = l * t.columns_per_line;
      const int64_t columns = smaller(t.columns_per_line, s.k - column);
      for (int64_t j = 0; j < columns; ++j) {
        const uint8_t byte = word[j % 4];
        codes[column + j] = s.bits == 8 ? byte : j < 4 ? byte & 15 : byte >> 4;
      }
    }
    auto* scales = static_cast<uint8_t*>(view.scales) + (row + r) * t.groups * t.scale_bytes;
    for (int64_t c = 0; c < t.groups; ++c) {
      const int64_t at = c * kTileRows + r;
      std::memcpy(scales + c * t.scale_bytes, tile + t.scales_at + at * t.scale_bytes,
                  static_cast<size_t>(t.scale_bytes));
      if (s.asymmetric) view.zeros[(row + r) * t.groups + c] = tile[t.zeros_at + at];
    }
  }
}

}  // namespace

void pack(const tersor_spec* s, const tersor_view* view, void* packed, int64_t begin, int64_t end) {
  const Tile16 t(*s);
  for (int64_t row = begin; row < end; row += kTileRows)
    pack_tile(*s, t, *view, static_cast<uint8_t*>(packed) + row / kTileRows * t.tile_bytes, row,
              smaller(kTileRows, end - row));
}

void unpack(const tersor_spec* s, const void* packed, const tersor_view* view, int64_t begin,
            int64_t end) {
  const Tile16 t(*s);
  for (int64_t row = begin; row < end; row += kTileRows)
    unpack_tile(*s, t, static_cast<const uint8_t*>(packed) + row / kTileRows * t.tile_bytes, *view,
                row, smaller(kTileRows, end - row));
}

size_t workspace_a8(const tersor_spec* s, int64_t m, int32_t) {
  return static_cast<size_t>(Prepared(*s, m, 1).bytes);
}

size_t workspace_bf16(const tersor_spec* s, int64_t m, int32_t) {
  return static_cast<size_t>(Prepared(*s, m, 2).bytes);
}

size_t workspace_f32(const tersor_spec* s, int64_t m, int32_t) {
  return static_cast<size_t>(Prepared(*s, m, 4).bytes);
}

#define TERSOR_REFUSE(bits_, activation_)                                 \
  if (s->activation != activation_)                                       \
    return activation_ == TERSOR_A8 ? "computes with int8 activations"    \
                                    : "computes with 16-bit activations"; \
  if (s->bits != bits_) return "is for " #bits_ "-bit codes";             \
  return nullptr;

const char* refuses_w4a8(const tersor_spec* s, int64_t, int32_t) { TERSOR_REFUSE(4, TERSOR_A8) }
const char* refuses_w8a8(const tersor_spec* s, int64_t, int32_t) { TERSOR_REFUSE(8, TERSOR_A8) }
const char* refuses_w4a16(const tersor_spec* s, int64_t, int32_t) { TERSOR_REFUSE(4, TERSOR_A16) }
const char* refuses_w8a16(const tersor_spec* s, int64_t, int32_t) { TERSOR_REFUSE(8, TERSOR_A16) }

#undef TERSOR_REFUSE

// At m = 0 the question is about the weight alone: other kernels of the layout serve the other
// dtypes.
const char* refuses_w4bf16(const tersor_spec* s, int64_t m, int32_t dtype) {
  if (m > 0 && dtype != TERSOR_BF16) return "takes bfloat16 activations only";
  return refuses_w4a16(s, m, dtype);
}
const char* refuses_w8bf16(const tersor_spec* s, int64_t m, int32_t dtype) {
  if (m > 0 && dtype != TERSOR_BF16) return "takes bfloat16 activations only";
  return refuses_w8a16(s, m, dtype);
}

}  // namespace tersor::tile16
