// The functions cuda_... of the Python module tersor._core: checks every argument that has no type
// in Python any more. Arrays of a device come as addresses, with the bytes that are there.
#include "bindings_cuda.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cuda/cuda.h"
#include "cuda/layout_int8.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using tersor::Error;
namespace cuda = tersor::cuda;

constexpr size_t kAlignment = 128;  // of packed weights

int64_t element_bytes(int dtype) {
  if (dtype < TERSOR_F32 || dtype > TERSOR_F16)
    throw Error("values must be float32, bfloat16 or float16");
  return dtype == TERSOR_F32 ? 4 : 2;
}

void check_address(uintptr_t address, size_t alignment, const char* what) {
  if (!address || address % alignment)
    throw Error(std::string(what) + " must be given, and aligned to " + std::to_string(alignment) +
                " bytes");
}

void check_packed(uintptr_t packed, size_t size, size_t bytes) {
  check_address(packed, kAlignment, "a packed weight");
  if (size != bytes)
    throw Error("the packed weight has " + std::to_string(size) + " bytes; it should have " +
                std::to_string(bytes));
}

std::optional<std::string> text(const char* reason) {
  if (reason) return reason;
  return std::nullopt;
}

cuda::Spec checked(int64_t n, int64_t k, int64_t g, int bits, bool asymmetric, int scale_dtype,
                   int activation, int kept, int of, bool two_level) {
  const cuda::Spec spec{{n, k, g, bits, asymmetric ? 1 : 0, scale_dtype, activation, kept, of},
                        two_level};
  tersor::check(spec);
  return spec;
}

// A weight in CUDA order: checked once, when it is made.
struct Weight {
  cuda::Spec spec;
  size_t bytes;

  Weight(int64_t n, int64_t k, int64_t g, int bits, bool asymmetric, int scale_dtype,
         int activation, int kept, int of, bool two_level)
      : spec(checked(n, k, g, bits, asymmetric, scale_dtype, activation, kept, of, two_level)) {
    if (const char* why = cuda::refuses(spec)) throw Error(why);
    bytes = cuda::packed_bytes(spec);
  }

  void check_packed(uintptr_t packed, size_t size) const { ::check_packed(packed, size, bytes); }

  tersor_view view(uintptr_t codes, uintptr_t scales, uintptr_t zeros) const {
    check_address(codes, spec.bits == 16 ? 2 : 1, "codes");
    if (spec.bits != 16)
      check_address(scales, static_cast<size_t>(element_bytes(spec.scale_dtype)), "scales");
    else if (scales)
      throw Error("16-bit weights have no scales");
    if ((zeros != 0) != (spec.asymmetric != 0 || spec.two_level))
      throw Error("zeros come with an asymmetric weight, multipliers with a two-level grid");
    return {reinterpret_cast<uint8_t*>(codes), reinterpret_cast<void*>(scales),
            reinterpret_cast<uint8_t*>(zeros)};
  }
};

cuda::Target target(int device, uintptr_t stream) {
  if (device < 0) throw Error("a CUDA device has a number from 0 on");
  return {device, reinterpret_cast<void*>(stream)};
}

void pack(const Weight& w, uintptr_t codes, uintptr_t scales, uintptr_t zeros, uintptr_t packed,
          size_t size, int device, uintptr_t stream) {
  w.check_packed(packed, size);
  cuda::pack(w.spec, w.view(codes, scales, zeros), reinterpret_cast<void*>(packed),
             target(device, stream));
}

void unpack(const Weight& w, uintptr_t packed, size_t size, uintptr_t codes, uintptr_t scales,
            uintptr_t zeros, int device, uintptr_t stream) {
  w.check_packed(packed, size);
  cuda::unpack(w.spec, reinterpret_cast<const void*>(packed), w.view(codes, scales, zeros),
               target(device, stream));
}

void dequantize(const Weight& w, uintptr_t packed, size_t size, int64_t begin, int64_t end,
                uintptr_t to, int dtype, int device, uintptr_t stream) {
  w.check_packed(packed, size);
  check_address(to, static_cast<size_t>(element_bytes(dtype)), "the destination");
  if (begin < 0 || begin >= end || end > w.spec.n)
    throw Error("rows must be a range of those from 0 to " + std::to_string(w.spec.n));
  cuda::dequantize(w.spec, reinterpret_cast<const void*>(packed), begin, end,
                   reinterpret_cast<void*>(to), dtype, target(device, stream));
}

void check_rows(uintptr_t x, int64_t m, int64_t k, int64_t ldx, int dtype) {
  if (dtype != TERSOR_BF16 && dtype != TERSOR_F16) throw Error("x must be bfloat16 or float16");
  if (m < 1 || m > INT32_MAX || ldx < k || ldx > INT32_MAX || ldx % 8)
    throw Error(
        "m must be from 1 to 2^31 - 1; rows must not overlap, and those of x begin at "
        "multiples of 16 bytes");
  check_address(x, 16, "x");
}

void check_quantized(uintptr_t quantized, size_t size, int64_t m, int64_t k, int64_t g) {
  check_address(quantized, kAlignment, "int8 activations");
  const size_t needed = cuda::quantized_bytes(m, k, g);
  if (size != needed)
    throw Error("the int8 activations have " + std::to_string(size) + " bytes; they should have " +
                std::to_string(needed));
}

// x [m, k] as int8, for weights with that k and g. outliers: 0, or beyond which columns stay in 16
// bits; scale: 0, or the address of the scale of all tokens.
void quantize(uintptr_t x, int64_t m, int64_t k, int64_t g, int64_t ldx, int dtype, float outliers,
              uintptr_t scale, uintptr_t quantized, size_t size, int device, uintptr_t stream) {
  if (k < 16 || k % 16 || k > INT32_MAX) throw Error("k must be a multiple of 16 on a GPU");
  if (g < 1 || k % g || !cuda::is_group(k, g))
    throw Error("the group must be 32, a multiple of 64, or the whole row");
  check_rows(x, m, k, ldx, dtype);
  check_quantized(quantized, size, m, k, g);
  if (!(outliers >= 0 && outliers <= std::numeric_limits<float>::max()))
    throw Error("the threshold of outliers must be a positive number");
  if (scale && outliers > 0) throw Error("outliers are kept apart from scales of each token");
  if (scale % 4) throw Error("the scale must be aligned to 4 bytes");
  cuda::quantize({reinterpret_cast<const void*>(x), m, k, g, ldx, dtype,
                  reinterpret_cast<const float*>(scale), outliers},
                 reinterpret_cast<void*>(quantized), target(device, stream));
}

// Of a call: what both kinds of weight ask of x, y, bias and workspace.
void check_call(int64_t n, int64_t k, uintptr_t x, int64_t m, int64_t ldx, int dtype,
                uintptr_t bias, uintptr_t y, int64_t ldy, uintptr_t workspace,
                size_t workspace_size, int device) {
  check_rows(x, m, k, ldx, dtype);
  if (ldy < n || ldy > INT32_MAX) throw Error("rows of y must not overlap");
  check_address(y, 2, "y");
  check_address(workspace, kAlignment, "the workspace");
  if (bias % 4) throw Error("bias must be aligned to 4 bytes");
  if (workspace_size < cuda::workspace_bytes(device))
    throw Error("the workspace is smaller than workspace_bytes()");
}

// The hot path; false where no kernel serves so many tokens. quantized: of a weight for int8
// activations the `tokens` of a call of quantize, of which these are some, from `first` on.
bool linear(const Weight& w, uintptr_t packed, size_t size, uintptr_t x, int64_t m, int64_t ldx,
            int dtype, uintptr_t bias, uintptr_t y, int64_t ldy, uintptr_t workspace,
            size_t workspace_size, uintptr_t quantized, size_t quantized_size, int64_t tokens,
            int64_t first, bool outliers, int device, uintptr_t stream) {
  w.check_packed(packed, size);
  check_call(w.spec.n, w.spec.k, x, m, ldx, dtype, bias, y, ldy, workspace, workspace_size, device);
  if (w.spec.activation == TERSOR_A8) {
    if (tokens < 1 || tokens > INT32_MAX || first < 0 || first % cuda::kMostInt8Tokens ||
        m > tokens - first)
      throw Error(
          "the tokens of a call are some of those that were quantized, from a multiple of " +
          std::to_string(cuda::kMostInt8Tokens) + " on");
    check_quantized(quantized, quantized_size, tokens, w.spec.k, w.spec.g);
  } else if (quantized || outliers) {
    throw Error("this weight takes activations of 16 bits");
  }
  return cuda::linear(
      w.spec,
      {w.spec, m, reinterpret_cast<const void*>(packed), reinterpret_cast<const void*>(x),
       reinterpret_cast<void*>(y), ldx, ldy, dtype, reinterpret_cast<const float*>(bias), nullptr,
       reinterpret_cast<void*>(workspace)},
      {reinterpret_cast<const void*>(quantized), tokens, first, outliers}, target(device, stream));
}

// A weight of indices into sixteen values, in CUDA order: checked once, when it is made.
struct CodebookWeight {
  cuda::CodebookSpec spec;
  std::vector<float> values;
  cuda::RoundedValues bf16, f16;
  size_t bytes;

  CodebookWeight(int64_t n, int64_t k, int64_t g, bool doubled, const std::vector<float>& given)
      : spec{n, k, g, doubled}, values(given) {
    tersor::check(common());
    if (const char* why = cuda::refuses(spec)) throw Error(why);
    const auto usable = [](float value) { return value >= -1 && value <= 1; };
    if (values.size() != cuda::kValues || !std::all_of(values.begin(), values.end(), usable))
      throw Error("a codebook has 16 values from -1 to 1");
    bf16 = cuda::rounded_values(values.data(), TERSOR_BF16);
    f16 = cuda::rounded_values(values.data(), TERSOR_F16);
    bytes = cuda::packed_bytes(spec);
  }

  // What such a weight has of a spec of codes.
  tersor_spec common() const {
    return {spec.n, spec.k, spec.g, 4, 0, TERSOR_F32, TERSOR_A16, 0, 0};
  }

  void check_packed(uintptr_t packed, size_t size) const { ::check_packed(packed, size, bytes); }

  cuda::CodebookView view(uintptr_t codes, uintptr_t scales, uintptr_t steps,
                          uintptr_t mean) const {
    check_address(codes, 1, "codes");
    check_address(scales, spec.doubled ? 1 : 4, "scales");
    if ((steps != 0) != spec.doubled || (mean != 0) != spec.doubled)
      throw Error("steps and a mean come with double quantization, and only there");
    if (steps % 4 || mean % 4) throw Error("steps and the mean must be aligned to 4 bytes");
    return {reinterpret_cast<uint8_t*>(codes), reinterpret_cast<void*>(scales),
            reinterpret_cast<float*>(steps), reinterpret_cast<float*>(mean)};
  }
};

void codebook_pack(const CodebookWeight& w, uintptr_t codes, uintptr_t scales, uintptr_t steps,
                   uintptr_t mean, uintptr_t packed, size_t size, int device, uintptr_t stream) {
  w.check_packed(packed, size);
  cuda::pack(w.spec, w.view(codes, scales, steps, mean), reinterpret_cast<void*>(packed),
             target(device, stream));
}

void codebook_unpack(const CodebookWeight& w, uintptr_t packed, size_t size, uintptr_t codes,
                     uintptr_t scales, uintptr_t steps, uintptr_t mean, int device,
                     uintptr_t stream) {
  w.check_packed(packed, size);
  cuda::unpack(w.spec, reinterpret_cast<const void*>(packed), w.view(codes, scales, steps, mean),
               target(device, stream));
}

void codebook_dequantize(const CodebookWeight& w, uintptr_t packed, size_t size, int64_t begin,
                         int64_t end, uintptr_t to, int dtype, int device, uintptr_t stream) {
  w.check_packed(packed, size);
  check_address(to, static_cast<size_t>(element_bytes(dtype)), "the destination");
  if (begin < 0 || begin >= end || end > w.spec.n)
    throw Error("rows must be a range of those from 0 to " + std::to_string(w.spec.n));
  cuda::dequantize(w.spec, w.values.data(), reinterpret_cast<const void*>(packed), begin, end,
                   reinterpret_cast<void*>(to), dtype, target(device, stream));
}

// As linear.
bool codebook_linear(const CodebookWeight& w, uintptr_t packed, size_t size, uintptr_t x, int64_t m,
                     int64_t ldx, int dtype, uintptr_t bias, uintptr_t y, int64_t ldy,
                     uintptr_t workspace, size_t workspace_size, int device, uintptr_t stream) {
  w.check_packed(packed, size);
  check_call(w.spec.n, w.spec.k, x, m, ldx, dtype, bias, y, ldy, workspace, workspace_size, device);
  return cuda::linear(
      {w.spec, dtype == TERSOR_BF16 ? w.bf16 : w.f16, m, reinterpret_cast<const void*>(packed),
       reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), ldx, ldy, dtype,
       reinterpret_cast<const float*>(bias), reinterpret_cast<void*>(workspace)},
      target(device, stream));
}

}  // namespace

void tersor::bind_cuda(nb::module_ m) {
  nb::class_<Weight>(m, "CudaWeight")
      .def(nb::init<int64_t, int64_t, int64_t, int, bool, int, int, int, int, bool>(), "n"_a, "k"_a,
           "g"_a, "bits"_a, "asymmetric"_a, "scale_dtype"_a, "activation"_a, "kept"_a, "of"_a,
           "two_level"_a)
      .def_ro("bytes", &Weight::bytes);
  m.def("cuda_unavailable", [] { return text(cuda::unavailable()); });
  m.def("cuda_architectures", cuda::architectures);
  m.def(
      "cuda_refuses_device",
      [](int device) {
        const std::string reason = cuda::refuses(target(device, 0).device);
        return text(reason.empty() ? nullptr : reason.c_str());
      },
      "device"_a);
  m.def("cuda_kernels", [] {
    nb::list rows;
    for (const cuda::Row& row : cuda::kernels()) rows.append(nb::make_tuple(row.name, row.arch));
    return rows;
  });
  m.def(
      "cuda_refuses",
      [](int64_t n, int64_t k, int64_t g, int bits, bool asymmetric, int scale_dtype,
         int activation, int kept, int of, bool two_level) {
        return text(cuda::refuses(
            checked(n, k, g, bits, asymmetric, scale_dtype, activation, kept, of, two_level)));
      },
      "n"_a, "k"_a, "g"_a, "bits"_a, "asymmetric"_a, "scale_dtype"_a, "activation"_a, "kept"_a,
      "of"_a, "two_level"_a);
  m.def(
      "cuda_serves",
      [](const Weight& w, int64_t m, int dtype, int device, bool outliers) {
        element_bytes(dtype);
        return cuda::serves(w.spec, m, dtype, device, outliers);
      },
      "weight"_a, "m"_a, "dtype"_a, "device"_a, "outliers"_a = false);
  m.def("cuda_workspace_bytes", cuda::workspace_bytes, "device"_a);
  m.def("cuda_pack", ::pack);  // not that of tersor, which packs for the CPU
  m.def("cuda_unpack", ::unpack);
  m.def("cuda_dequantize", dequantize);
  m.def("cuda_capture",
        [](int device, uintptr_t stream) { return cuda::capture(target(device, stream)); });
  m.def("cuda_quantize", quantize);
  m.def("cuda_linear", linear);

  nb::class_<CodebookWeight>(m, "CudaCodebookWeight")
      .def(nb::init<int64_t, int64_t, int64_t, bool, const std::vector<float>&>(), "n"_a, "k"_a,
           "g"_a, "doubled"_a, "values"_a)
      .def_ro("bytes", &CodebookWeight::bytes);
  m.def(
      "cuda_codebook_refuses",
      [](int64_t n, int64_t k, int64_t g, bool doubled) {
        if (n < 1 || k < 1) throw Error("n and k must be 1 or more");
        return text(cuda::refuses(cuda::CodebookSpec{n, k, g, doubled}));
      },
      "n"_a, "k"_a, "g"_a, "doubled"_a);
  m.def(
      "cuda_codebook_serves",
      [](const CodebookWeight& w, int64_t m, int dtype, int device) {
        element_bytes(dtype);
        return cuda::serves(w.spec, m, dtype, device);
      },
      "weight"_a, "m"_a, "dtype"_a, "device"_a);
  m.def("cuda_codebook_pack", codebook_pack);
  m.def("cuda_codebook_unpack", codebook_unpack);
  m.def("cuda_codebook_dequantize", codebook_dequantize);
  m.def("cuda_codebook_linear", codebook_linear);
}
