// The Python module tersor._core: checks every argument, releases the GIL, calls the core.
// Only this file and those that begin with bindings_cuda know Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "bindings_cuda.h"
#include "dispatch.h"
#include "outliers.h"
#include "parallel.h"
#include "solve/solve.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using tersor::Error;

template <class T, int D>
using Array = nb::ndarray<T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;
using Codes = Array<uint8_t, 2>;
using Bytes = Array<uint8_t, 1>;
using Grid = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32, bfloat16, float16
using Elements = Grid;  // codes, uint8, or the values of a 16-bit weight

int32_t dtype_of(const nb::dlpack::dtype& type) {
  const auto code = static_cast<nb::dlpack::dtype_code>(type.code);
  if (code == nb::dlpack::dtype_code::Float && type.bits == 32) return TERSOR_F32;
  if (code == nb::dlpack::dtype_code::Bfloat && type.bits == 16) return TERSOR_BF16;
  if (code == nb::dlpack::dtype_code::Float && type.bits == 16) return TERSOR_F16;
  throw Error("scales and values must be float32, bfloat16 or float16");
}

std::string shape_text(int64_t rows, int64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

// A weight as the Python layer holds it, with the spec it implies.
struct Weight {
  tersor_spec spec;
  tersor_view view;
};

Weight portable(const Elements& codes, const std::optional<Grid>& scales,
                const std::optional<Codes>& zeros, int bits, int activation, int kept, int of) {
  const auto n = static_cast<int64_t>(codes.shape(0)), k = static_cast<int64_t>(codes.shape(1));
  const auto groups = scales ? static_cast<int64_t>(scales->shape(1)) : 1;
  if (bits == 16) {
    if (scales || zeros) throw Error("16-bit weights have no scales and no zero points");
  } else if (codes.dtype() != nb::dtype<uint8_t>() || !scales) {
    throw nb::type_error("codes of 4 or 8 bits are uint8, and come with scales");
  } else if (groups < 1 || k % groups || static_cast<int64_t>(scales->shape(0)) != n) {
    throw Error("scales must be [n, k / g]; they are " +
                shape_text(static_cast<int64_t>(scales->shape(0)), groups) + " for codes " +
                shape_text(n, k));
  }
  if (zeros && (zeros->shape(0) != scales->shape(0) || zeros->shape(1) != scales->shape(1)))
    throw Error("zeros must have the shape of the scales");
  Weight w{{n, k, k / groups, bits, zeros ? 1 : 0, dtype_of((scales ? *scales : codes).dtype()),
            activation, kept, of},
           {static_cast<uint8_t*>(codes.data()), scales ? scales->data() : nullptr,
            zeros ? zeros->data() : nullptr}};
  tersor::check(w.spec);
  return w;
}

void check_range(const uint8_t* codes, int64_t count, int bits, const char* what) {
  uint8_t all = 0;
  for (int64_t i = 0; i < count; ++i) all |= codes[i];
  if (all >> bits) throw Error(std::string(what) + " must be below " + std::to_string(1 << bits));
}

// Whether every row keeps to the pattern: the caller promises a kernel that it does.
bool follows_pattern(const Weight& w, int kept, int of) {
  const int64_t n = w.spec.n, k = w.spec.k, g = w.spec.g;
  const auto is_zero = [&](int64_t row, int64_t j) {
    const int64_t at = row * k + j;
    if (w.spec.bits == 16) return !(w.view.codes[2 * at] | (w.view.codes[2 * at + 1] & 0x7f));
    const int zero = w.view.zeros ? w.view.zeros[row * (k / g) + j / g] : 1 << (w.spec.bits - 1);
    return w.view.codes[at] == zero;
  };
  std::atomic<bool> holds{true};
  tersor::parallel_for(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && holds; ++row)
      for (int64_t i = 0; i < k; i += of) {
        int found = 0;
        for (int64_t j = i; j < i + of; ++j) found += !is_zero(row, j);
        if (found > kept) holds = false;
      }
  });
  return holds;
}

nb::dict description(const tersor_kernel& kernel) {
  nb::dict d;
  d["name"] = kernel.name;
  d["isa"] = kernel.isa;
  d["layout"] = kernel.layout;
  d["priority"] = kernel.priority;
  d["unavailable"] = kernel.unavailable();
  d["address"] = reinterpret_cast<uintptr_t>(&kernel);
  return d;
}

void register_kernels(const nb::object& capsule) {
  auto* table = static_cast<const tersor_kernel_table*>(
      PyCapsule_GetPointer(capsule.ptr(), TERSOR_KERNEL_CAPSULE));
  if (!table) throw nb::python_error();
  tersor::add_kernels(*table);
  capsule.inc_ref();  // the table lives as long as the process
}

tersor_spec spec_of(int64_t n, int64_t k, int64_t g, int bits, bool asymmetric, int scale_dtype,
                    int activation, int kept, int of) {
  const tersor_spec spec{n, k, g, bits, asymmetric ? 1 : 0, scale_dtype, activation, kept, of};
  tersor::check(spec);
  return spec;
}

// Whether at most `kept` of every `of` codes of a row are not its zero point.
bool keeps_pattern(const Elements& codes, const std::optional<Grid>& scales,
                   const std::optional<Codes>& zeros, int bits, int kept, int of) {
  const Weight w = portable(codes, scales, zeros, bits, TERSOR_A16, kept, of);
  if (of < 1) throw Error("a pattern is kept:of, such as 2:4");
  nb::gil_scoped_release release;
  return follows_pattern(w, kept, of);
}

size_t packed_bytes(const Elements& codes, const std::optional<Grid>& scales,
                    const std::optional<Codes>& zeros, int bits, int activation, int kept, int of) {
  const Weight w = portable(codes, scales, zeros, bits, activation, kept, of);
  return tersor::packed_bytes(tersor::select(w.spec, 0, TERSOR_F32), w.spec);
}

void pack(const Elements& codes, const std::optional<Grid>& scales,
          const std::optional<Codes>& zeros, int bits, int activation, const Bytes& packed,
          int kept, int of) {
  const Weight w = portable(codes, scales, zeros, bits, activation, kept, of);
  const tersor_kernel& kernel = tersor::select(w.spec, 0, TERSOR_F32);
  if (packed.shape(0) != tersor::packed_bytes(kernel, w.spec) ||
      reinterpret_cast<uintptr_t>(packed.data()) % TERSOR_ALIGN)
    throw Error("the destination must be packed_bytes() long and aligned to 64 bytes");
  nb::gil_scoped_release release;
  if (bits != 16) check_range(w.view.codes, w.spec.n * w.spec.k, bits, "codes");
  if (zeros) check_range(w.view.zeros, w.spec.n * (w.spec.k / w.spec.g), bits, "zeros");
  if (of && !follows_pattern(w, kept, of))
    throw Error("the " + std::string(bits == 16 ? "values" : "codes") + " are not " +
                std::to_string(kept) + ":" + std::to_string(of));
  tersor::pack(kernel, w.spec, w.view, packed.data());
}

// The header of a packed weight that came from outside, with a kernel of its layout.
const tersor::PackedHeader& trusted(const void* packed, size_t bytes) {
  const tersor::PackedHeader& head = tersor::header(packed, bytes);
  tersor::check(head.spec);
  return head;
}

nb::dict packed_spec(const Bytes& packed) {
  const auto& head = trusted(packed.data(), packed.shape(0));
  nb::dict d;
  d["layout"] = head.layout;
  d["n"] = head.spec.n;
  d["k"] = head.spec.k;
  d["g"] = head.spec.g;
  d["bits"] = head.spec.bits;
  d["asymmetric"] = head.spec.asymmetric != 0;
  d["scale_dtype"] = head.spec.scale_dtype;
  d["activation"] = head.spec.activation;
  d["kept"] = head.spec.kept;
  d["of"] = head.spec.of;
  return d;
}

void unpack(const Bytes& packed, const Elements& codes, const std::optional<Grid>& scales,
            const std::optional<Codes>& zeros) {
  const auto& head = trusted(packed.data(), packed.shape(0));
  const Weight w = portable(codes, scales, zeros, head.spec.bits, head.spec.activation,
                            head.spec.kept, head.spec.of);
  if (std::memcmp(&w.spec, &head.spec, sizeof w.spec))
    throw Error("the destination's shapes and dtypes are not those of the packed weight");
  nb::gil_scoped_release release;
  tersor::unpack(packed.data(), packed.shape(0), w.view);
}

// threshold: 0, or beyond which columns of x stay in 16 bits. x_scale: 0, or of int8 activations
// the address of their scale.
void multiply(uintptr_t x, int64_t m, int64_t k, int64_t ldx, int dtype, uintptr_t packed,
              size_t packed_size, uintptr_t bias, uintptr_t y, int64_t n, int64_t ldy,
              float threshold, uintptr_t x_scale) {
  const void* weight = reinterpret_cast<const void*>(packed);
  const auto& head = trusted(weight, packed_size);
  if (n != head.spec.n || k != head.spec.k)
    throw Error("the weight is " + shape_text(head.spec.n, head.spec.k) + ", the call is for " +
                shape_text(n, k));
  if (dtype < TERSOR_F32 || dtype > TERSOR_F16)
    throw Error("x must be float32, bfloat16 or float16");
  if (m < 0 || m > INT32_MAX || ldx < k || ldy < n || ldx > INT32_MAX || ldy > INT32_MAX)
    throw Error("m must be from 0 to 2^31 - 1, and rows must not overlap");
  if (m == 0) return;
  const uintptr_t element = dtype == TERSOR_F32 ? 4 : 2;
  if (!x || !y || x % element || y % element || bias % 4)
    throw Error("x, y and bias must be given and aligned to their elements");
  if (x_scale) {
    if (head.spec.activation != TERSOR_A8)
      throw Error("a scale is of int8 activations; this weight takes 16-bit ones");
    if (x_scale % 4) throw Error("the scale of x must be aligned to 4 bytes");
    const float scale = *reinterpret_cast<const float*>(x_scale);
    if (!(scale > 0 && scale <= std::numeric_limits<float>::max()))
      throw Error("the scale of x must be positive and finite");
  }
  const tersor_kernel& kernel = tersor::select(head.spec, m, dtype, head.layout);
  if (kernel.packed_bytes(&head.spec) != head.bytes)
    throw Error("these bytes are not a packed weight");
  const tersor_args args{head.spec,
                         m,
                         &head + 1,
                         reinterpret_cast<const void*>(x),
                         reinterpret_cast<void*>(y),
                         ldx,
                         ldy,
                         dtype,
                         reinterpret_cast<const float*>(bias),
                         reinterpret_cast<const float*>(x_scale),
                         nullptr};
  nb::gil_scoped_release release;
  if (threshold > 0)
    tersor::run_with_outliers(head, args, threshold);
  else
    tersor::run(kernel, args);
}

// The hot path: addresses and sizes as integers, since an array object costs microseconds each.
void linear(uintptr_t x, int64_t m, int64_t k, int64_t ldx, int dtype, uintptr_t packed,
            size_t packed_size, uintptr_t bias, uintptr_t y, int64_t n, int64_t ldy,
            uintptr_t x_scale) {
  multiply(x, m, k, ldx, dtype, packed, packed_size, bias, y, n, ldy, 0, x_scale);
}

// The same where columns with a value beyond the threshold stay in 16 bits (LLM.int8()).
void linear_outliers(uintptr_t x, int64_t m, int64_t k, int64_t ldx, int dtype, uintptr_t packed,
                     size_t packed_size, uintptr_t bias, uintptr_t y, int64_t n, int64_t ldy,
                     float threshold) {
  const auto& head = trusted(reinterpret_cast<const void*>(packed), packed_size);
  if (head.spec.activation != TERSOR_A8)
    throw Error("outliers are kept apart from int8 activations; this weight takes 16-bit ones");
  if (!tersor::has_columns(head.layout))
    throw Error(std::string("outliers need a kernel whose weights can be read by columns; layout "
                            "'") +
                head.layout + "' is of another package: uninstall it, or leave outliers out");
  if (!(threshold > 0 && threshold <= std::numeric_limits<float>::max()))
    throw Error("the threshold of outliers must be a positive number");
  multiply(x, m, k, ldx, dtype, packed, packed_size, bias, y, n, ldy, threshold, 0);
}

// Gives memory that has been freed back to the system. The allocator would keep it: tensors of a
// few megabytes leave holes in its heap, which grew by a block's worth every few blocks.
void trim_memory() {
#if defined(__GLIBC__)
  nb::gil_scoped_release release;
  malloc_trim(0);
#endif
}

// Pairs of (kernel, reason why it does not serve or None), best first.
nb::list explain(int64_t n, int64_t k, int64_t g, int bits, bool asymmetric, int scale_dtype,
                 int activation, int64_t m, int dtype, int kept, int of) {
  const tersor_spec spec = spec_of(n, k, g, bits, asymmetric, scale_dtype, activation, kept, of);
  nb::list rows;
  for (const tersor_kernel* kernel : tersor::kernels())
    rows.append(nb::make_tuple(kernel->name, tersor::refusal(*kernel, spec, m, dtype, nullptr)));
  return rows;
}

// ---- The solver -----------------------------------------------------------------------------

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Memory that a tensor made of it will own.
template <class T>
struct Fresh {
  T* data;
  nb::capsule owner;

  explicit Fresh(int64_t count)
      : data(new T[count]), owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); }) {}
  nb::ndarray<T, nb::pytorch> tensor(int64_t rows, int64_t columns) const {
    return {data, {static_cast<size_t>(rows), static_cast<size_t>(columns)}, owner};
  }
  nb::ndarray<T, nb::pytorch> tensor(int64_t count) const {
    return {data, {static_cast<size_t>(count)}, owner};
  }
};

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The damping that was used, the number of dead columns, and R's diagonal [k].
nb::tuple factor(const Array<float, 2>& gram, double damp) {
  const auto k = static_cast<int64_t>(gram.shape(0));
  if (k < 1 || gram.shape(1) != gram.shape(0))
    throw Error("a Gram matrix is square, not " +
                shape_text(k, static_cast<int64_t>(gram.shape(1))));
  const Fresh<float> pivots(k);
  tersor::solve::Factored result;
  {
    nb::gil_scoped_release release;
    result = tersor::solve::factor(gram.data(), k, damp, pivots.data);
  }
  return nb::make_tuple(result.damp, result.dead, pivots.tensor(k));
}

// Codes [n, k] on a grid, float values [n, k] without one.
nb::object solve_columns(const Matrix& w, const Matrix& unit, const std::optional<Matrix>& scales,
                         const std::optional<Codes>& zeros,
                         const std::optional<Indices>& group_of_column, int levels,
                         const std::optional<Codes>& mask, const std::optional<Vector>& pivots,
                         double share, int64_t kept, int64_t of) {
  const auto n = static_cast<int64_t>(w.shape(0)), k = static_cast<int64_t>(w.shape(1));
  const auto groups = scales ? static_cast<int64_t>(scales->shape(1)) : 0;
  if (n < 1 || k < 1) throw Error("the weight is empty");
  if (unit.shape(0) != w.shape(1) || unit.shape(1) != w.shape(1))
    throw Error("the factor must be " + shape_text(k, k));
  if (scales.has_value() != group_of_column.has_value() || (zeros && !scales))
    throw Error("a grid is scales, a group for each column, and zeros where it has them");
  if (scales) {
    if (groups < 1 || scales->shape(0) != w.shape(0))
      throw Error("scales must be [" + std::to_string(n) + ", groups]");
    if (zeros && (zeros->shape(0) != scales->shape(0) || zeros->shape(1) != scales->shape(1)))
      throw Error("zeros must have the shape of the scales");
    if (group_of_column->shape(0) != w.shape(1))
      throw Error("each of the " + std::to_string(k) + " columns needs a group");
    if (levels < 2 || levels > 256) throw Error("levels must be from 2 to 256");
  }
  if ((mask ? 1 : 0) + (share != 0) + (of != 0) > 1)
    throw Error("give a mask, a share or a pattern, not two of them");
  if (mask && (mask->shape(0) != w.shape(0) || mask->shape(1) != w.shape(1)))
    throw Error("the mask must be " + shape_text(n, k));
  if (!(share >= 0 && share < 1)) throw Error("the share must be at least 0 and less than 1");
  if (of != 0 && (of < 2 || of > tersor::solve::kMaxPattern || (of & (of - 1)) || k % of ||
                  kept < 1 || kept >= of))
    throw Error(
        "a pattern keeps at least 1 and fewer than all of each 2, 4, 8, 16, 32, 64 or 128 "
        "columns, a number that divides " +
        std::to_string(k));
  if ((share != 0 || of != 0) && !(pivots && pivots->shape(0) == w.shape(1)))
    throw Error("a share or a pattern needs " + std::to_string(k) + " pivots");
  tersor::solve::Columns problem{};
  problem.n = n;
  problem.k = k;
  problem.w = w.data();
  problem.u = unit.data();
  if (scales) {
    problem.groups = groups;
    problem.scales = scales->data();
    problem.zeros = zeros ? zeros->data() : nullptr;
    problem.group_of_column = group_of_column->data();
    problem.levels = levels;
  }
  problem.sparsity = {mask ? mask->data() : nullptr, share, kept, of,
                      pivots ? pivots->data() : nullptr};
  if (scales) {
    const Fresh<uint8_t> codes(n * k);
    {
      nb::gil_scoped_release release;
      tersor::solve::solve_columns(problem, codes.data, nullptr);
    }
    return nb::cast(codes.tensor(n, k));
  }
  const Fresh<float> values(n * k);
  {
    nb::gil_scoped_release release;
    tersor::solve::solve_columns(problem, nullptr, values.data);
  }
  return nb::cast(values.tensor(n, k));
}

nb::tuple search_grid(const Matrix& w, int64_t group, int bits, bool symmetric, bool clip,
                      int scale_dtype) {
  const auto n = static_cast<int64_t>(w.shape(0)), k = static_cast<int64_t>(w.shape(1));
  if (n < 1 || k < 1) throw Error("the weight is empty");
  if (group < 1 || k % group)
    throw Error("a group of " + std::to_string(group) + " does not divide " + std::to_string(k) +
                " columns");
  if (bits < 2 || bits > 8) throw Error("bits must be from 2 to 8");
  if (scale_dtype < TERSOR_F32 || scale_dtype > TERSOR_F16)
    throw Error("scale_dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  const int64_t groups = k / group;
  const Fresh<float> scales(n * groups);
  const Fresh<uint8_t> zeros(symmetric ? 0 : n * groups);
  {
    nb::gil_scoped_release release;
    tersor::solve::search_grid({n, k, group, w.data(), bits, symmetric, clip, scale_dtype},
                               scales.data, symmetric ? nullptr : zeros.data);
  }
  return nb::make_tuple(scales.tensor(n, groups),
                        symmetric ? nb::none() : nb::cast(zeros.tensor(n, groups)));
}

// The scales [n, groups] of search_grid on a two-level grid.
nb::object two_level_scales(const Matrix& w, const Matrix& scales, int scale_dtype) {
  const auto n = static_cast<int64_t>(w.shape(0)), k = static_cast<int64_t>(w.shape(1));
  const auto groups = static_cast<int64_t>(scales.shape(1));
  if (n < 1 || k < 1) throw Error("the weight is empty");
  if (static_cast<int64_t>(scales.shape(0)) != n || groups < 1 || k % groups)
    throw Error("scales must have a row for each of the weight, and divide its columns");
  if (scale_dtype < TERSOR_F32 || scale_dtype > TERSOR_F16)
    throw Error("scale_dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  for (int64_t i = 0; i < n * groups; ++i)
    if (!(scales.data()[i] > 0 && std::isfinite(scales.data()[i])))
      throw Error("the scales must be positive and finite");
  const Fresh<float> made(n * groups);
  {
    nb::gil_scoped_release release;
    std::copy(scales.data(), scales.data() + n * groups, made.data);
    tersor::solve::put_on_two_levels({n, k, k / groups, w.data(), 4, true, true, scale_dtype},
                                     made.data);
  }
  return nb::cast(made.tensor(n, groups));
}

}  // namespace

// Arrays are never converted: a copy of a destination would be filled and thrown away.
NB_MODULE(_core, m) {
  m.attr("__version__") = TERSOR_VERSION;
  m.attr("KERNEL_ABI") = TERSOR_KERNEL_ABI;
  // Bad input is a TersorError, wherever it is found.
  nb::exception<Error>(m, "NativeError",
                       nb::module_::import_("tersor.errors").attr("TersorError").ptr());

  m.def("kernels", [] {
    nb::list rows;
    for (const tersor_kernel* kernel : tersor::kernels()) rows.append(description(*kernel));
    return rows;
  });
  m.def("register_kernels", register_kernels, "capsule"_a);
  m.def("forced_isa", [] { return tersor::forced_isa(); });
  m.def("explain", explain, "n"_a, "k"_a, "g"_a, "bits"_a, "asymmetric"_a, "scale_dtype"_a,
        "activation"_a, "m"_a, "dtype"_a, "kept"_a = 0, "of"_a = 0);
  m.def("keeps_pattern", keeps_pattern, "codes"_a.noconvert(), "scales"_a.noconvert().none(),
        "zeros"_a.noconvert().none(), "bits"_a, "kept"_a, "of"_a);
  m.def("packed_bytes", packed_bytes, "codes"_a.noconvert(), "scales"_a.noconvert().none(),
        "zeros"_a.noconvert().none(), "bits"_a, "activation"_a, "kept"_a = 0, "of"_a = 0);
  m.def("pack", pack, "codes"_a.noconvert(), "scales"_a.noconvert().none(),
        "zeros"_a.noconvert().none(), "bits"_a, "activation"_a, "packed"_a.noconvert(),
        "kept"_a = 0, "of"_a = 0);
  m.def("packed_spec", packed_spec, "packed"_a.noconvert());
  m.def("unpack", unpack, "packed"_a.noconvert(), "codes"_a.noconvert(),
        "scales"_a.noconvert().none(), "zeros"_a.noconvert().none());
  m.def("linear", linear);
  m.def("linear_outliers", linear_outliers);

  m.def("factor", factor, "gram"_a.noconvert(), "damp"_a);
  m.def("solve_columns", solve_columns, "w"_a.noconvert(), "unit"_a.noconvert(),
        "scales"_a.noconvert().none(), "zeros"_a.noconvert().none(),
        "group_of_column"_a.noconvert().none(), "levels"_a, nb::kw_only(),
        "mask"_a.noconvert().none() = nb::none(), "pivots"_a.noconvert().none() = nb::none(),
        "share"_a = 0.0, "kept"_a = 0, "of"_a = 0);
  m.def("search_grid", search_grid, "w"_a.noconvert(), "group"_a, "bits"_a, "symmetric"_a, "clip"_a,
        "scale_dtype"_a = static_cast<int>(TERSOR_F32));
  m.def("two_level_scales", two_level_scales, "w"_a.noconvert(), "scales"_a.noconvert(),
        "scale_dtype"_a);

  m.def("trim_memory", trim_memory);

  tersor::bind_cuda(m);
  tersor::bind_cuda_solve(m);

  m.def("thread_count", tersor::thread_count);
  m.def("set_thread_count", tersor::set_thread_count, "count"_a);
  m.def("threads_backend",
        [] { return tersor::backend() == tersor::Backend::openmp ? "openmp" : "pool"; });
  m.def("set_threads_backend", [](const std::string& name) {
    if (name != "openmp" && name != "pool") throw Error("the backend is 'openmp' or 'pool'");
    tersor::set_backend(name == "openmp" ? tersor::Backend::openmp : tersor::Backend::pool);
  });
}
