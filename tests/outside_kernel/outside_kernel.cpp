// A kernel that lives outside tersor: 4-bit weights, activations as they are, one row at a time.
//
// It has a layout of its own, because a kernel may store a weight as it likes. One output row is
//
//   | k codes, two a byte, the even column low | k/g scales (float) | k/g zero points (float) |
//     padded to a multiple of 4 bytes
//
// so that row i starts at i * row_bytes and any range of rows can be packed or computed alone.

#include <pybind11/pybind11.h>
#include <tersor/kernel.h>

#include <cmath>
#include <cstring>

namespace {

float from_half(uint16_t bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                    : exponent == 0 ? std::ldexp(float(fraction), -24)
                                    : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

uint16_t to_half(float value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // The last place of the result, then round to nearest even in units of it: what overflows the
  // fraction carries into the exponent by itself.
  int exponent = magnitude < std::ldexp(1.0f, -14) ? -14 : std::ilogb(magnitude);
  int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | uint16_t(units + ((exponent + 14) << 10));
}

float load(const void* base, int64_t index, int32_t dtype) {
  if (dtype == TERSOR_F32) return static_cast<const float*>(base)[index];
  uint16_t bits = static_cast<const uint16_t*>(base)[index];
  if (dtype == TERSOR_F16) return from_half(bits);
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

void store(void* base, int64_t index, int32_t dtype, float value) {
  if (dtype == TERSOR_F32) {
    static_cast<float*>(base)[index] = value;
    return;
  }
  uint16_t bits;
  if (dtype == TERSOR_F16) {
    bits = to_half(value);
  } else {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    bits = std::isnan(value) ? 0x7fc0 : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  static_cast<uint16_t*>(base)[index] = bits;
}

// Scales are stored as float but must come back in the checkpoint's dtype to the last bit: every
// bfloat16 and float16 is a float, so the way there and back is exact.
int64_t code_bytes(const tersor_spec* spec) { return (spec->k + 7) / 8 * 4; }
int64_t groups(const tersor_spec* spec) { return spec->k / spec->g; }
int64_t row_bytes(const tersor_spec* spec) { return code_bytes(spec) + 8 * groups(spec); }

const char* unavailable() { return nullptr; }

const char* refuses(const tersor_spec* spec, int64_t, int32_t) {
  if (spec->bits != 4) return "stores 4-bit codes only";
  if (spec->activation != TERSOR_A16) return "takes activations as they are";
  return nullptr;
}

size_t packed_bytes(const tersor_spec* spec) { return size_t(spec->n * row_bytes(spec)); }

void pack(const tersor_spec* spec, const tersor_view* view, void* packed, int64_t begin,
          int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    auto* codes = static_cast<uint8_t*>(packed) + i * row_bytes(spec);
    auto* scales = reinterpret_cast<float*>(codes + code_bytes(spec));
    float* zeros = scales + groups(spec);
    std::memset(codes, 0, size_t(code_bytes(spec)));
    for (int64_t j = 0; j < spec->k; ++j)
      codes[j / 2] |= uint8_t(view->codes[i * spec->k + j] << 4 * (j % 2));
    for (int64_t u = 0; u < groups(spec); ++u) {
      scales[u] = load(view->scales, i * groups(spec) + u, spec->scale_dtype);
      zeros[u] = view->zeros ? view->zeros[i * groups(spec) + u] : 8.0f;
    }
  }
}

void unpack(const tersor_spec* spec, const void* packed, const tersor_view* view, int64_t begin,
            int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    auto* codes = static_cast<const uint8_t*>(packed) + i * row_bytes(spec);
    auto* scales = reinterpret_cast<const float*>(codes + code_bytes(spec));
    const float* zeros = scales + groups(spec);
    for (int64_t j = 0; j < spec->k; ++j)
      view->codes[i * spec->k + j] = codes[j / 2] >> 4 * (j % 2) & 15;
    for (int64_t u = 0; u < groups(spec); ++u) {
      store(view->scales, i * groups(spec) + u, spec->scale_dtype, scales[u]);
      if (view->zeros) view->zeros[i * groups(spec) + u] = uint8_t(zeros[u]);
    }
  }
}

size_t workspace_bytes(const tersor_spec*, int64_t, int32_t) { return 0; }

void gemm(const tersor_args* args, int64_t begin, int64_t end) {
  const tersor_spec* spec = &args->spec;
  for (int64_t i = begin; i < end; ++i) {
    auto* codes = static_cast<const uint8_t*>(args->packed) + i * row_bytes(spec);
    auto* scales = reinterpret_cast<const float*>(codes + code_bytes(spec));
    const float* zeros = scales + groups(spec);
    for (int64_t t = 0; t < args->m; ++t) {
      float sum = args->bias ? args->bias[i] : 0.0f;
      for (int64_t u = 0; u < groups(spec); ++u) {
        float part = 0.0f;
        for (int64_t j = u * spec->g; j < (u + 1) * spec->g; ++j) {
          float weight = float(codes[j / 2] >> 4 * (j % 2) & 15) - zeros[u];
          part += weight * load(args->x, t * args->ldx + j, args->dtype);
        }
        sum += part * scales[u];
      }
      store(args->y, t * args->ldy + i, args->dtype, sum);
    }
  }
}

const tersor_kernel kernel = {
    "outside_w4a16", "scalar", "outside_rows", 100,  1,
    unavailable,     refuses,  packed_bytes,   pack, unpack,
    workspace_bytes, nullptr,  gemm,
};

const tersor_kernel_table table = {TERSOR_KERNEL_ABI, sizeof(tersor_kernel), 1, &kernel};

}  // namespace

PYBIND11_MODULE(outside_kernel, module) {
  module.def("kernels", [] { return pybind11::capsule(&table, TERSOR_KERNEL_CAPSULE); });
}
