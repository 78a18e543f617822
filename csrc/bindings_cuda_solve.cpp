// The column solver on a GPU as functions of the Python module tersor._core: arrays come as tensors
// of the device, and are checked here.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <string>

#include "bindings_cuda.h"
#include "cuda/arguments.h"
#include "cuda/cuda.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using tersor::Error;
namespace cuda = tersor::cuda;

template <class T, int D>
using Array = nb::ndarray<T, nb::ndim<D>, nb::c_contig, nb::device::cuda>;
using Matrix = Array<float, 2>;
using Bytes = Array<uint8_t, 2>;
using Strided = nb::ndarray<uint8_t, nb::ndim<2>, nb::device::cuda>;
using Vector = Array<float, 1>;
using Indices = Array<int32_t, 1>;

// That an array is [rows, columns] and on the device of the others.
template <class Given>
void check_matrix(const Given& array, int64_t rows, int64_t columns, int device, const char* what) {
  if (static_cast<int64_t>(array.shape(0)) != rows ||
      static_cast<int64_t>(array.shape(1)) != columns)
    throw Error(std::string(what) + " must be [" + std::to_string(rows) + ", " +
                std::to_string(columns) + "]");
  if (array.device_id() != device)
    throw Error(std::string(what) + " must be on the device of the weight");
}

template <class Given>
void check_vector(const Given& array, int64_t length, int device, const char* what) {
  if (static_cast<int64_t>(array.shape(0)) != length || array.device_id() != device)
    throw Error(std::string(what) + " must be [" + std::to_string(length) +
                "] on the device of the weight");
}

template <class Given>
auto pointer(const std::optional<Given>& array) {
  return array ? array->data() : nullptr;
}

cuda::Target target(int device, uintptr_t stream) {
  return {device, reinterpret_cast<void*>(stream)};
}

void search_grid(const Matrix& w, int64_t group, int bits, bool symmetric, bool clip,
                 int scale_dtype, const Matrix& scales, const std::optional<Bytes>& zeros,
                 uintptr_t stream) {
  const auto n = static_cast<int64_t>(w.shape(0)), k = static_cast<int64_t>(w.shape(1));
  const int device = w.device_id();
  if (n < 1 || k < 1) throw Error("the weight is empty");
  if (group < 1 || k % group)
    throw Error("a group of " + std::to_string(group) + " does not divide " + std::to_string(k) +
                " columns");
  if (bits < 2 || bits > 8) throw Error("bits must be from 2 to 8");
  if (scale_dtype < TERSOR_F32 || scale_dtype > TERSOR_F16)
    throw Error("scale_dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  check_matrix(scales, n, k / group, device, "scales");
  if (zeros.has_value() == symmetric) throw Error("zeros are those of an asymmetric grid");
  if (zeros) check_matrix(*zeros, n, k / group, device, "zeros");
  cuda::search_grid({n * (k / group), group, w.data(), bits, symmetric, clip, scale_dtype,
                     scales.data(), pointer(zeros)},
                    target(device, stream));
}

void solve_block(const Matrix& w, const Matrix& unit, const Matrix& values, int64_t first,
                 int64_t width, const std::optional<Matrix>& scales,
                 const std::optional<Bytes>& zeros, const std::optional<Indices>& group_of_column,
                 int levels, const std::optional<Strided>& keep,
                 const std::optional<Vector>& pivots, int kept, int of,
                 const std::optional<Bytes>& codes, const std::optional<Matrix>& errors,
                 const std::optional<Matrix>& losses, uintptr_t stream) {
  const auto n = static_cast<int64_t>(w.shape(0)), k = static_cast<int64_t>(w.shape(1));
  const int device = w.device_id();
  if (n < 1 || k < 1 || k > INT32_MAX) throw Error("the weight is empty, or too wide");
  if (first < 0 || first % cuda::kSolveColumns || width < 1 || width > cuda::kSolveColumns ||
      first + width > k)
    throw Error("a block begins at a multiple of 128 columns, and has up to 128");
  check_matrix(unit, k, k, device, "the factor");
  check_matrix(values, n, k, device, "values");
  if (scales.has_value() != group_of_column.has_value() || scales.has_value() != codes.has_value())
    throw Error("a grid is scales, a group for each column, and codes");
  int64_t groups = 0;
  if (scales) {
    groups = static_cast<int64_t>(scales->shape(1));
    check_matrix(*scales, n, groups, device, "scales");
    check_vector(*group_of_column, k, device, "the groups of columns");
    check_matrix(*codes, n, k, device, "codes");
    if (groups < 1 || levels < 2 || levels > 256)
      throw Error("there must be groups, and from 2 to 256 levels");
  }
  if (zeros) {
    if (!scales) throw Error("zeros come with scales");
    check_matrix(*zeros, n, groups, device, "zeros");
  }
  if (keep) {
    check_matrix(*keep, n, width, device, "the weights to keep");
    // (Some versions of torch say anything of the stride of a dimension of one.)
    if ((width > 1 && keep->stride(1) != 1) || (n > 1 && keep->stride(0) < width))
      throw Error("rows of the weights to keep must be contiguous");
  }
  if (of != 0 && (of < 2 || of > 16 || (of & (of - 1)) || width % of || kept < 1 || kept >= of))
    throw Error("the kernel chooses at least 1 and fewer than all of 2, 4, 8 or 16 columns");
  if (of != 0 && keep) throw Error("give weights to keep, or a pattern");
  if ((of != 0 || losses) && !pivots) throw Error("a pattern, and losses, need pivots");
  if (pivots) check_vector(*pivots, k, device, "pivots");
  if (losses) {
    if (scales || keep || of) throw Error("losses are those of weights that are left as they are");
    check_matrix(*losses, n, width, device, "losses");
  }
  if (errors.has_value() == losses.has_value()) throw Error("give errors or losses");
  if (errors) check_matrix(*errors, n, cuda::kSolveColumns, device, "errors");
  cuda::SolveArgs args{};
  args.n = n, args.k = k, args.groups = groups;
  args.first = static_cast<int32_t>(first), args.width = static_cast<int32_t>(width);
  args.w = w.data(), args.unit = unit.data(), args.values = values.data();
  args.scales = pointer(scales), args.zeros = pointer(zeros);
  args.group_of_column = pointer(group_of_column), args.levels = levels;
  args.kept = kept, args.of = of;
  args.keep = pointer(keep), args.keep_stride = keep ? keep->stride(0) : 0;
  args.pivots = pointer(pivots), args.codes = pointer(codes);
  args.errors = pointer(errors), args.losses = pointer(losses);
  cuda::solve_block(args, target(device, stream));
}

}  // namespace

void tersor::bind_cuda_solve(nb::module_ m) {
  m.def("cuda_search_grid", ::search_grid, "w"_a.noconvert(), "group"_a, "bits"_a, "symmetric"_a,
        "clip"_a, "scale_dtype"_a, "scales"_a.noconvert(), "zeros"_a.noconvert().none(),
        "stream"_a);
  m.def("cuda_solve_block", ::solve_block, "w"_a.noconvert(), "unit"_a.noconvert(),
        "values"_a.noconvert(), "first"_a, "width"_a, nb::kw_only(), "scales"_a.noconvert().none(),
        "zeros"_a.noconvert().none(), "group_of_column"_a.noconvert().none(), "levels"_a,
        "keep"_a.noconvert().none(), "pivots"_a.noconvert().none(), "kept"_a, "of"_a,
        "codes"_a.noconvert().none(), "errors"_a.noconvert().none(), "losses"_a.noconvert().none(),
        "stream"_a);
}
