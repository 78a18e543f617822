// Packing for every kernel of the "tile16" layout. Baseline code: it runs on any machine.
#include "cpu/tile16.h"

#include <cstring>

#include "cpu/tile16_pack.h"

namespace tersor::tile16 {

size_t packed_bytes(const tersor_spec* s) {
  const Tile16 t(*s);
  return static_cast<size_t>(t.tiles * t.tile_bytes);
}

size_t sparse_packed_bytes(const tersor_spec* s) {
  const Tile16 t(*s, true);
  return static_cast<size_t>(t.tiles * t.tile_bytes);
}

namespace {

// ---- Codes of one row: `row` is where its first word is in the tile
// ------------------------------

void pack_codes(const tersor_spec& s, const Tile16& t, const uint8_t* codes, uint8_t* row) {
  for (int64_t l = 0; l < t.steps; ++l) {
    uint8_t* word = row + l * kLineBytes;
    const int64_t column = l * t.columns_per_step;
    const int64_t columns = smaller(t.columns_per_step, s.k - column);
    for (int64_t j = 0; j < columns; ++j)
      word[j % 4] |= static_cast<uint8_t>(j < 4 ? codes[column + j] : codes[column + j] << 4);
  }
}

void unpack_codes(const tersor_spec& s, const Tile16& t, const uint8_t* row, uint8_t* codes) {
  for (int64_t l = 0; l < t.steps; ++l) {
    const uint8_t* word = row + l * kLineBytes;
    const int64_t column = l * t.columns_per_step;
    const int64_t columns = smaller(t.columns_per_step, s.k - column);
    for (int64_t j = 0; j < columns; ++j) {
      const uint8_t byte = word[j % 4];
      codes[column + j] = s.bits == 8 ? byte : j < 4 ? byte & 15 : byte >> 4;
    }
  }
}

// ---- The same with zeros left out
// ----------------------------------------------------------------

constexpr int64_t kUnits = kSparseColumns / 8;

// The pattern that keeps all codes of a four that are not `zero`; of several, the first.
int pattern_of(const uint8_t* four, uint8_t zero) {
  for (int p = 0; p < 5; ++p) {
    bool holds = true;
    for (int j = 0; j < 4; ++j)
      holds &= four[j] == zero || j == kKeptColumns[p][0] || j == kKeptColumns[p][1];
    if (holds) return p;
  }
  return 5;
}

// The patterns of one row's step as bits, 48 for either half f: those of fours 2i + f.
struct Patterns {
  uint64_t half[2] = {};

  void set(int64_t unit, int f, int pattern) {
    half[f] |= static_cast<uint64_t>(pattern) << (3 * unit);
  }
  int get(int64_t unit, int f) const { return static_cast<int>(half[f] >> (3 * unit) & 7); }

  // Lines 0 to 2 hold 12 bits each, and in the rest of their 16 four bits of what follows.
  uint16_t line(int q, int f) const {
    return static_cast<uint16_t>((half[f] >> (12 * q) & 0xfff) | (half[f] >> (36 + 4 * q) & 15)
                                                                     << 12);
  }
  void add_line(int q, int f, uint16_t bits) {
    half[f] |= static_cast<uint64_t>(bits & 0xfff) << (12 * q);
    half[f] |= static_cast<uint64_t>(bits >> 12) << (36 + 4 * q);
  }

  // To and from the pattern lines of a step.
  void store(uint8_t* row) const {
    for (int q = 0; q < 3; ++q)
      for (int f = 0; f < 2; ++f) {
        const uint16_t bits = line(q, f);
        std::memcpy(row + q * kLineBytes + 2 * f, &bits, 2);
      }
  }
  static Patterns load(const uint8_t* row) {
    Patterns patterns;
    for (int q = 0; q < 3; ++q)
      for (int f = 0; f < 2; ++f) {
        uint16_t bits;
        std::memcpy(&bits, row + q * kLineBytes + 2 * f, 2);
        patterns.add_line(q, f, bits);
      }
    return patterns;
  }
};

void pack_sparse_codes(const tersor_spec& s, const Tile16& t, const uint8_t* codes, uint8_t* row) {
  const auto zero = static_cast<uint8_t>(1 << (s.bits - 1));
  for (int64_t i = 0; i < t.steps; ++i, codes += kSparseColumns, row += t.step_bytes) {
    Patterns patterns;
    for (int64_t unit = 0; unit < kUnits; ++unit)
      for (int f = 0; f < 2; ++f) {
        const uint8_t* four = codes + unit * 8 + f * 4;
        const int pattern = pattern_of(four, zero);
        patterns.set(unit, f, pattern);
        for (int j = 0; j < 2; ++j) {
          const auto code = static_cast<uint8_t>(four[kKeptColumns[pattern][j]] ^ zero);
          row[sparse_codes_at(s.bits, unit) + 2 * f + j] |=
              static_cast<uint8_t>(s.bits == 8 ? code : code << unit % 2 * 4);
        }
      }
    patterns.store(row);
  }
}

void unpack_sparse_codes(const tersor_spec& s, const Tile16& t, const uint8_t* row,
                         uint8_t* codes) {
  const auto zero = static_cast<uint8_t>(1 << (s.bits - 1));
  std::memset(codes, zero, static_cast<size_t>(s.k));
  for (int64_t i = 0; i < t.steps; ++i, codes += kSparseColumns, row += t.step_bytes) {
    const Patterns patterns = Patterns::load(row);
    for (int64_t unit = 0; unit < kUnits; ++unit)
      for (int f = 0; f < 2; ++f) {
        const int pattern = patterns.get(unit, f);
        for (int j = 0; j < 2; ++j) {
          const uint8_t byte = row[sparse_codes_at(s.bits, unit) + 2 * f + j];
          const uint8_t code = s.bits == 8 ? byte : byte >> unit % 2 * 4 & 15;
          codes[unit * 8 + f * 4 + kKeptColumns[pattern][j]] = code ^ zero;
        }
      }
  }
}

// ---- 16-bit values with zeros left out; the sign of a zero is not kept
// ----------------------------------------------------------------------------

void pack_values(const tersor_spec&, const Tile16& t, const uint8_t* values, uint8_t* row) {
  for (int64_t i = 0; i < t.steps; ++i, values += 2 * kSparseColumns, row += t.step_bytes) {
    Patterns patterns;
    for (int64_t unit = 0; unit < kUnits; ++unit)
      for (int f = 0; f < 2; ++f) {
        const uint8_t* four = values + 2 * (unit * 8 + f * 4);
        uint8_t kept[4];
        for (int j = 0; j < 4; ++j) kept[j] = (four[2 * j] | (four[2 * j + 1] & 0x7f)) != 0;
        const int pattern = pattern_of(kept, 0);
        patterns.set(unit, f, pattern);
        for (int j = 0; j < 2; ++j)
          if (kept[kKeptColumns[pattern][j]])
            std::memcpy(row + sparse_codes_at(16, unit) + f * kLineBytes + 2 * j,
                        four + 2 * kKeptColumns[pattern][j], 2);
      }
    patterns.store(row);
  }
}

void unpack_values(const tersor_spec& s, const Tile16& t, const uint8_t* row, uint8_t* values) {
  std::memset(values, 0, static_cast<size_t>(2 * s.k));
  for (int64_t i = 0; i < t.steps; ++i, values += 2 * kSparseColumns, row += t.step_bytes) {
    const Patterns patterns = Patterns::load(row);
    for (int64_t unit = 0; unit < kUnits; ++unit)
      for (int f = 0; f < 2; ++f)
        for (int j = 0; j < 2; ++j)
          std::memcpy(values + 2 * (unit * 8 + f * 4 + kKeptColumns[patterns.get(unit, f)][j]),
                      row + sparse_codes_at(16, unit) + f * kLineBytes + 2 * j, 2);
  }
}

// ---- Single columns
// ------------------------------------------------------------------------------

// `row`: where the first word of a row is in the tile.
int code_at(const tersor_spec& s, const Tile16& t, const uint8_t* row, int64_t column) {
  const int64_t j = column % t.columns_per_step;
  const uint8_t byte = row[column / t.columns_per_step * kLineBytes + j % 4];
  return s.bits == 8 ? byte : j < 4 ? byte & 15 : byte >> 4;
}

int sparse_code_at(const tersor_spec& s, const Tile16& t, const uint8_t* row, int64_t column) {
  const int zero = 1 << (s.bits - 1);
  const int64_t unit = column % kSparseColumns / 8;
  const int f = static_cast<int>(column / 4 % 2);
  row += column / kSparseColumns * t.step_bytes;
  const int pattern = Patterns::load(row).get(unit, f);
  for (int j = 0; j < 2; ++j) {
    if (kKeptColumns[pattern][j] != column % 4) continue;
    const uint8_t byte = row[sparse_codes_at(s.bits, unit) + 2 * f + j];
    return (s.bits == 8 ? byte : byte >> unit % 2 * 4 & 15) ^ zero;
  }
  return zero;
}

template <class CodeAt>
void read(const tersor_spec& s, const Tile16& t, CodeAt code, const void* packed, int64_t index,
          const int32_t* columns, int64_t count, float* values) {
  const uint8_t* tile = static_cast<const uint8_t*>(packed) + index * t.tile_bytes;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t at = columns[c] / s.g * kTileRows + r;
      const int zero = s.asymmetric ? tile[t.zeros_at + at] : 1 << (s.bits - 1);
      values[c * kTileRows + r] = static_cast<float>(code(s, t, tile + r * 4, columns[c]) - zero) *
                                  load_element(tile + t.scales_at, at, s.scale_dtype);
    }
}

// ---- Whole tiles
// ---------------------------------------------------------------------------------

// Of a row in portable order.
int64_t code_bytes(const tersor_spec& s) { return s.bits == 16 ? 2 * s.k : s.k; }

void pack_tile(const tersor_spec& s, const Tile16& t, bool sparse, const tersor_view& view,
               uint8_t* tile, int64_t row, int64_t rows) {
  std::memset(tile, 0, static_cast<size_t>(t.tile_bytes));
  for (int64_t r = 0; r < rows; ++r) {
    const auto pack = !sparse ? pack_codes : s.bits == 16 ? pack_values : pack_sparse_codes;
    pack(s, t, view.codes + (row + r) * code_bytes(s), tile + r * 4);
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

void unpack_tile(const tersor_spec& s, const Tile16& t, bool sparse, const uint8_t* tile,
                 const tersor_view& view, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto unpack = !sparse ? unpack_codes : s.bits == 16 ? unpack_values : unpack_sparse_codes;
    unpack(s, t, tile + r * 4, view.codes + (row + r) * code_bytes(s));
    auto* scales = static_cast<uint8_t*>(view.scales) + (row + r) * t.groups * t.scale_bytes;
    for (int64_t c = 0; c < t.groups; ++c) {
      const int64_t at = c * kTileRows + r;
      std::memcpy(scales + c * t.scale_bytes, tile + t.scales_at + at * t.scale_bytes,
                  static_cast<size_t>(t.scale_bytes));
      if (s.asymmetric) view.zeros[(row + r) * t.groups + c] = tile[t.zeros_at + at];
    }
  }
}

void pack_tiles(const tersor_spec* s, bool sparse, const tersor_view* view, void* packed,
                int64_t begin, int64_t end) {
  const Tile16 t(*s, sparse);
  for (int64_t row = begin; row < end; row += kTileRows)
    pack_tile(*s, t, sparse, *view, static_cast<uint8_t*>(packed) + row / kTileRows * t.tile_bytes,
              row, smaller(kTileRows, end - row));
}

void unpack_tiles(const tersor_spec* s, bool sparse, const void* packed, const tersor_view* view,
                  int64_t begin, int64_t end) {
  const Tile16 t(*s, sparse);
  for (int64_t row = begin; row < end; row += kTileRows)
    unpack_tile(*s, t, sparse, static_cast<const uint8_t*>(packed) + row / kTileRows * t.tile_bytes,
                *view, row, smaller(kTileRows, end - row));
}

}  // namespace

void pack(const tersor_spec* s, const tersor_view* view, void* packed, int64_t begin, int64_t end) {
  pack_tiles(s, false, view, packed, begin, end);
}

void unpack(const tersor_spec* s, const void* packed, const tersor_view* view, int64_t begin,
            int64_t end) {
  unpack_tiles(s, false, packed, view, begin, end);
}

void sparse_pack(const tersor_spec* s, const tersor_view* view, void* packed, int64_t begin,
                 int64_t end) {
  pack_tiles(s, true, view, packed, begin, end);
}

void sparse_unpack(const tersor_spec* s, const void* packed, const tersor_view* view, int64_t begin,
                   int64_t end) {
  unpack_tiles(s, true, packed, view, begin, end);
}

void read_columns(const tersor_spec* s, const void* packed, int64_t tile, const int32_t* columns,
                  int64_t count, float* values) {
  read(*s, Tile16(*s), code_at, packed, tile, columns, count, values);
}

void sparse_read_columns(const tersor_spec* s, const void* packed, int64_t tile,
                         const int32_t* columns, int64_t count, float* values) {
  read(*s, Tile16(*s, true), sparse_code_at, packed, tile, columns, count, values);
}

size_t workspace_a8(const tersor_spec* s, int64_t m, int32_t) {
  return static_cast<size_t>(Prepared(*s, m, 1).bytes);
}

size_t workspace_bf16(const tersor_spec* s, int64_t m, int32_t) {
  return static_cast<size_t>(Prepared(*s, m, 2).bytes);
}

size_t workspace_picked(const tersor_spec* s, int64_t m, int32_t) {
  return static_cast<size_t>(Prepared(*s, m, m <= kPickedTokens ? 8 : 2).bytes);
}

size_t workspace_f32(const tersor_spec* s, int64_t m, int32_t) {
  return static_cast<size_t>(Prepared(*s, m, 4).bytes);
}

namespace {

const char* refuses(const tersor_spec& s, int32_t bits, int32_t activation) {
  if (s.activation != activation)
    return activation == TERSOR_A8 ? "computes with int8 activations"
                                   : "computes with 16-bit activations";
  if (s.bits != bits)
    return bits == 4 ? "is for 4-bit codes" : bits == 8 ? "is for 8-bit codes" : "is for 16 bits";
  return nullptr;
}

// At m = 0 the question is about the weight alone: other kernels of the layout serve the other
// dtypes.
const char* refuses_all_but_bf16(const tersor_spec& s, int32_t bits, int64_t m, int32_t dtype) {
  if (m > 0 && dtype != TERSOR_BF16) return "takes bfloat16 activations only";
  return refuses(s, bits, TERSOR_A16);
}

const char* refuses_all_but_24(const tersor_spec& s) {
  if (s.kept != 2 || s.of != 4) return "is for weights with 2:4 zeros";
  if (s.asymmetric) return "is for symmetric weights";
  if (s.g % kSparseColumns)
    return s.bits == 16 ? "is for a multiple of 128 columns"
                        : "is for groups of a multiple of 128 columns";
  return nullptr;
}

}  // namespace

const char* refuses_w4a8(const tersor_spec* s, int64_t, int32_t) {
  return refuses(*s, 4, TERSOR_A8);
}
const char* refuses_w8a8(const tersor_spec* s, int64_t, int32_t) {
  return refuses(*s, 8, TERSOR_A8);
}
const char* refuses_w4a16(const tersor_spec* s, int64_t, int32_t) {
  return refuses(*s, 4, TERSOR_A16);
}
const char* refuses_w8a16(const tersor_spec* s, int64_t, int32_t) {
  return refuses(*s, 8, TERSOR_A16);
}
const char* refuses_w4bf16(const tersor_spec* s, int64_t m, int32_t dtype) {
  return refuses_all_but_bf16(*s, 4, m, dtype);
}
const char* refuses_w8bf16(const tersor_spec* s, int64_t m, int32_t dtype) {
  return refuses_all_but_bf16(*s, 8, m, dtype);
}

const char* sparse_refuses_bf16(const tersor_spec* s, int64_t, int32_t) {
  const char* reason = refuses_all_but_24(*s);
  if (!reason && s->bits == 16 && s->scale_dtype != TERSOR_BF16) reason = "is for bfloat16 weights";
  return reason ? reason : refuses(*s, 16, TERSOR_A16);
}
const char* sparse_refuses_bf16bf16(const tersor_spec* s, int64_t m, int32_t dtype) {
  const char* reason = sparse_refuses_bf16(s, m, dtype);
  return reason ? reason : refuses_all_but_bf16(*s, 16, m, dtype);
}
const char* sparse_refuses_f16(const tersor_spec* s, int64_t, int32_t) {
  const char* reason = refuses_all_but_24(*s);
  if (!reason && s->bits == 16 && s->scale_dtype != TERSOR_F16) reason = "is for float16 weights";
  return reason ? reason : refuses(*s, 16, TERSOR_A16);
}
const char* sparse_refuses_w4a8(const tersor_spec* s, int64_t, int32_t) {
  const char* reason = refuses_all_but_24(*s);
  return reason ? reason : refuses(*s, 4, TERSOR_A8);
}
const char* sparse_refuses_w8a8(const tersor_spec* s, int64_t, int32_t) {
  const char* reason = refuses_all_but_24(*s);
  return reason ? reason : refuses(*s, 8, TERSOR_A8);
}
const char* sparse_refuses_w4a16(const tersor_spec* s, int64_t, int32_t) {
  const char* reason = refuses_all_but_24(*s);
  return reason ? reason : refuses(*s, 4, TERSOR_A16);
}
const char* sparse_refuses_w8a16(const tersor_spec* s, int64_t, int32_t) {
  const char* reason = refuses_all_but_24(*s);
  return reason ? reason : refuses(*s, 8, TERSOR_A16);
}
const char* sparse_refuses_w4bf16(const tersor_spec* s, int64_t m, int32_t dtype) {
  const char* reason = refuses_all_but_24(*s);
  return reason ? reason : refuses_all_but_bf16(*s, 4, m, dtype);
}
const char* sparse_refuses_w8bf16(const tersor_spec* s, int64_t m, int32_t dtype) {
  const char* reason = refuses_all_but_24(*s);
  return reason ? reason : refuses_all_but_bf16(*s, 8, m, dtype);
}

}  // namespace tersor::tile16
