#include "outliers.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/tile16.h"
#include "cpu/tile16_pack.h"
#include "dispatch.h"
#include "parallel.h"

namespace tersor {
namespace {

constexpr char kDense[] = "tile16", kSparse[] = "tile16s24";
constexpr int64_t kTokens = 512;    // that are in float32 at a time
constexpr int64_t kColumns = 64;    // of W that are dequantized at a time
constexpr int64_t kWork = 1 << 16;  // elements that a thread is worth waking for

// The bits of an element without its sign grow with its absolute value. limit: the largest that is
// not beyond the threshold.
template <class Word>
void mark(const tersor_args& a, Word limit, Word infinity, uint8_t* beyond) {
  const auto* x = static_cast<const Word*>(a.x);
  parallel_for(a.spec.k, std::max<int64_t>(64, kWork / a.m), [&](int64_t begin, int64_t end) {
    for (int64_t token = 0; token < a.m; ++token)
      for (int64_t i = begin; i < end; ++i) {
        const auto bits = static_cast<Word>(x[token * a.ldx + i] & static_cast<Word>(~Word{}) >> 1);
        beyond[i] |= static_cast<uint8_t>(bits > limit && bits < infinity);
      }
  });
}

// The columns of x with a finite value beyond the threshold, in their order.
void find_columns(const tersor_args& a, float threshold, std::vector<int32_t>& columns) {
  thread_local std::vector<uint8_t> beyond;
  beyond.assign(static_cast<size_t>(a.spec.k), 0);
  if (a.dtype == TERSOR_F32) {
    mark<uint32_t>(a, float_to_bits(threshold), 0x7f800000u, beyond.data());
  } else {
    const bool half = a.dtype == TERSOR_F16;
    uint16_t limit = half ? to_f16(threshold) : to_bf16(threshold);
    if ((half ? from_f16(limit) : from_bf16(limit)) > threshold) --limit;
    mark<uint16_t>(a, limit, half ? 0x7c00 : 0x7f80, beyond.data());
  }
  columns.clear();
  for (int64_t i = 0; i < a.spec.k; ++i)
    if (beyond[i]) columns.push_back(static_cast<int32_t>(i));
}

// Tokens of x in float32: the columns [m, count], and the rest [m, k] with zeros in their place.
void divide(const tersor_args& a, const std::vector<int32_t>& columns, float* rest, float* exact) {
  const int64_t k = a.spec.k, count = static_cast<int64_t>(columns.size());
  parallel_for(a.m, std::max<int64_t>(1, kWork / k), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      float* row = rest + token * k;
      for (int64_t i = 0; i < k; ++i) row[i] = load_element(a.x, token * a.ldx + i, a.dtype);
      for (int64_t j = 0; j < count; ++j) {
        exact[token * count + j] = row[columns[j]];
        row[columns[j]] = 0;
      }
    }
  });
}

// sums [m, n] += exact * W[:, columns]^T, a tile of rows at a time; the order of additions does not
// depend on the threads.
void add_columns(const PackedHeader& head, const tersor_args& a,
                 const std::vector<int32_t>& columns, const float* exact, float* sums,
                 int64_t stride) {
  const auto read =
      std::strcmp(head.layout, kSparse) ? tile16::read_columns : tile16::sparse_read_columns;
  const int64_t n = a.spec.n, count = static_cast<int64_t>(columns.size());
  const int64_t grain = std::max<int64_t>(1, kWork / (a.m * count * kTileRows));
  parallel_for(ceil_div(n, kTileRows), grain, [&](int64_t begin, int64_t end) {
    float values[kColumns * kTileRows];
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t from = 0; from < count; from += kColumns) {
        const int64_t some = smaller(kColumns, count - from);
        read(&a.spec, a.packed, tile, columns.data() + from, some, values);
        const size_t bytes = sizeof(float) * smaller(kTileRows, n - tile * kTileRows);
        for (int64_t token = 0; token < a.m; ++token) {
          float sum[kTileRows] = {};
          float* at = sums + token * stride + tile * kTileRows;
          std::memcpy(sum, at, bytes);
          for (int64_t j = 0; j < some; ++j)
            for (int64_t r = 0; r < kTileRows; ++r)
              sum[r] += exact[token * count + from + j] * values[j * kTileRows + r];
          std::memcpy(at, sum, bytes);
        }
      }
  });
}

// Grows, and stays with its thread.
float* room(std::vector<float>& memory, int64_t floats) {
  if (memory.size() < static_cast<size_t>(floats)) memory.resize(static_cast<size_t>(floats));
  return memory.data();
}

}  // namespace

bool has_columns(const char* layout) {
  return !std::strcmp(layout, kDense) || !std::strcmp(layout, kSparse);
}

void run_with_outliers(const PackedHeader& head, const tersor_args& args, float threshold) {
  thread_local std::vector<int32_t> columns;
  thread_local std::vector<float> rest_room, exact_room, sums_room;
  find_columns(args, threshold, columns);
  if (columns.empty()) return run(select(args.spec, args.m, args.dtype, head.layout), args);
  const int64_t n = args.spec.n, k = args.spec.k, element = args.dtype == TERSOR_F32 ? 4 : 2;
  const bool in_place = args.dtype == TERSOR_F32;
  for (int64_t from = 0; from < args.m; from += kTokens) {
    tersor_args part = args;
    part.m = smaller(kTokens, args.m - from);
    part.x = static_cast<const uint8_t*>(args.x) + from * args.ldx * element;
    float* rest = room(rest_room, part.m * k);
    float* exact = room(exact_room, part.m * static_cast<int64_t>(columns.size()));
    divide(part, columns, rest, exact);
    part.x = rest, part.ldx = k, part.dtype = TERSOR_F32;
    auto* y = static_cast<uint8_t*>(args.y) + from * args.ldy * element;
    auto* sums = in_place ? reinterpret_cast<float*>(y) : room(sums_room, part.m * n);
    part.y = sums, part.ldy = in_place ? args.ldy : n;
    run(select(part.spec, part.m, TERSOR_F32, head.layout), part);
    add_columns(head, part, columns, exact, sums, part.ldy);
    if (in_place) continue;
    parallel_for(part.m, std::max<int64_t>(1, kWork / n), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token)
        for (int64_t i = 0; i < n; ++i)
          store_element(y, token * args.ldy + i, args.dtype, sums[token * n + i]);
    });
  }
}

}  // namespace tersor
