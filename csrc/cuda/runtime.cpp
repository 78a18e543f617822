// The host side of the CUDA kernels: which one serves, with how many workers, and its launch. Plain
// C++ over the CUDA runtime, which is linked statically and finds the driver when it is first
// asked.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "cuda/arguments.h"
#include "cuda/cuda.h"
#include "cuda/kernels.h"
#include "cuda/layout_int8.h"
#include "dispatch.h"

namespace tersor::cuda {
namespace {

// Tiles that there are counters for, the same for all calls.
constexpr int64_t kMostTiles = 16384;
constexpr size_t kCounterBytes = kMostTiles * sizeof(int);
// More tokens than this are better multiplied with a weight that is dequantized once.
constexpr int64_t kMostTokens = 128;
constexpr int64_t kMostCodebookTokens = 64;
// Columns of int8 products that can be summed in int32: of 8-bit codes one may be 255 * 128, and of
// 4-bit codes on a two-level grid 120 * 128.
constexpr int64_t most_summed(int bits) { return bits == 8 ? 65793 : 131071; }
// The shortest stretch of steps that is worth a worker of its own.
constexpr int32_t kLeastSteps = 4;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw Error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

const std::vector<Gemm>& gemms() {
  static const std::vector<Gemm> all = [] {
    std::vector<Gemm> table = mma_gemms_f16();
    for (const Gemm& gemm : mma_gemms_bf16()) table.push_back(gemm);
    for (const Gemm& gemm : int8_gemms()) table.push_back(gemm);
    for (const Gemm& gemm : codebook_gemms()) table.push_back(gemm);
    for (const Gemm& gemm : row_gemms()) table.push_back(gemm);
    for (const Gemm& gemm : outlier_gemms()) table.push_back(gemm);
    for (const Gemm& gemm : sparse_gemms_f16()) table.push_back(gemm);
    for (const Gemm& gemm : sparse_gemms_bf16()) table.push_back(gemm);
#ifdef TERSOR_HAVE_CUDA90A
    for (const Gemm& gemm : wgmma_gemms()) table.push_back(gemm);
#endif
    return table;
  }();
  return all;
}

// Makes a device current for as long as it lives, and then the one that was.
class Current {
 public:
  explicit Current(int device) : device_(device) {
    check(cudaGetDevice(&before_), "no current device");
    if (before_ != device_) check(cudaSetDevice(device_), "the device cannot be used");
  }
  ~Current() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int device_, before_ = 0;
};

// What a device is, found out once.
struct Device {
  int arch = 0;
  int multiprocessors = 0;
  std::string why;               // no kernel can run; empty where some can
  std::vector<size_t> resident;  // for each of gemms(): workers that run at once, 0 where it cannot

  explicit Device(int number) {
    const Current current(number);
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number), "attributes");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number), "attributes");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, number),
          "attributes");
    arch = major * 10 + minor;
    for (const Gemm& gemm : gemms()) resident.push_back(arch < gemm.arch ? 0 : workers(gemm));
    for (const bool grid : {false, true})
      for (const bool pattern : {false, true})
        cudaFuncSetAttribute(solve_kernel(grid, pattern),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, kSolveShared);
    cudaFuncAttributes found;
    const cudaError_t status = cudaFuncGetAttributes(&found, search_grid_kernel());
    if (status != cudaSuccess)
      why = "tersor was built for " + architectures() + ", and this GPU is " +
            std::to_string(arch) + " (" + cudaGetErrorString(status) + ")";
    preload();
    cudaGetLastError();  // a kernel without code for this device is no error of the next call
  }

  // Loads what else a call may launch, which the runtime would put off to the first time: that may
  // be while a graph is captured, when nothing can be loaded.
  static void preload() {
    for (const int32_t dtype : {TERSOR_F32, TERSOR_BF16, TERSOR_F16}) {
      cudaFuncAttributes found;
      for (const void* function :
           {quantize_kernel(dtype), dequantize_kernel(dtype), dequantize_sparse_kernel(dtype),
            dequantize_codebook_kernel(dtype)})
        cudaFuncGetAttributes(&found, function);
      if (dtype == TERSOR_F32) continue;
      for (const void* function : {quantize_others_kernel(dtype), outlier_kernel(dtype)})
        cudaFuncGetAttributes(&found, function);
    }
  }

  size_t workers(const Gemm& gemm) const {
    int each = 0;
    if (cudaFuncSetAttribute(gemm.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(gemm.shared)) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, gemm.function, gemm.threads,
                                                      gemm.shared) != cudaSuccess)
      return 0;
    return static_cast<size_t>(each) * multiprocessors;
  }
};

const Device& device(int number) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Device>> all;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const char* why = unavailable()) throw Error(why);
  int count = 0;
  check(cudaGetDeviceCount(&count), "no device");
  if (number < 0 || number >= count)
    throw Error("there is no CUDA device " + std::to_string(number) + " here, of " +
                std::to_string(count));
  if (all.size() < static_cast<size_t>(count)) all.resize(count);
  if (!all[number]) all[number] = std::make_unique<Device>(number);
  return *all[number];
}

Shape shape(const Spec& s) {
  const int scale_bytes = s.bits == 16 ? 0 : s.scale_dtype == TERSOR_F32 ? 4 : 2;
  return shape_of(s.n, s.k, s.g, s.bits, s.asymmetric != 0, scale_bytes, s.of != 0, s.two_level);
}

// A kernel, and how it will divide the work.
struct Plan {
  const Gemm* gemm = nullptr;  // nullptr: none serves
  int32_t token_tiles = 0;
  Partition partition{};
};

Plan plan(const Shape& w, int64_t m, int32_t dtype, int number, int bits, Sort sort) {
  const Device& on = device(number);
  Plan best;
  int64_t least = INT64_MAX;
  for (size_t i = 0; i < gemms().size(); ++i) {
    const Gemm& gemm = gemms()[i];
    if (!on.resident[i] || gemm.bits != bits || gemm.dtype != dtype || gemm.sort != sort) continue;
    const int64_t rows = (int64_t{w.row_blocks} + gemm.blocks - 1) / gemm.blocks;
    const int64_t tokens = (m + gemm.tokens - 1) / gemm.tokens, tiles = rows * tokens;
    if (tiles > kMostTiles || tiles * w.steps > INT32_MAX / 2) continue;
    // Every tile of tokens reads W again: as few as can be, then the narrowest, and among equals
    // the last in the table, whose instructions are newer.
    const int64_t cost = tokens * (kMostTokens + 1) + gemm.tokens;
    if (cost > least) continue;
    least = cost;
    best.gemm = &gemm;
    best.token_tiles = static_cast<int32_t>(tokens);
    best.partition = partition_of(static_cast<int32_t>(tiles), w.steps,
                                  static_cast<int32_t>(on.resident[i]), kLeastSteps);
  }
  return best;
}

Plan plan(const Spec& spec, int64_t m, int32_t dtype, int number, bool outliers) {
  if (const char* why = refuses(spec)) throw Error(std::string("a weight in CUDA order: ") + why);
  const bool int8 = spec.activation == TERSOR_A8;
  const bool whole = int8 && (spec.two_level || (!spec.asymmetric && spec.g == spec.k));
  if (m < 1 || (m > kMostTokens && !int8)) return {};
  if (spec.bits == 16 && spec.scale_dtype != dtype) return {};  // values have the dtype of x
  const Sort sort = spec.of    ? Sort::sparse
                    : !int8    ? Sort::plain
                    : outliers ? Sort::outliers
                    : whole    ? Sort::rows
                               : Sort::int8;
  if (outliers && spec.two_level)
    throw Error(
        "outliers need a scale for each group; set them before the layer is moved to the GPU, or "
        "move it "
        "to the CPU and back");
  return plan(shape(spec), m, dtype, number, spec.bits, sort);
}

CodebookShape shape(const CodebookSpec& s) { return codebook_shape_of(s.n, s.k, s.g, s.doubled); }

Plan plan(const CodebookSpec& spec, int64_t m, int32_t dtype, int number) {
  if (const char* why = refuses(spec)) throw Error(std::string("a weight in CUDA order: ") + why);
  if (m < 1 || m > kMostCodebookTokens) return {};
  return plan(shape(spec).w, m, dtype, number, 4, Sort::codebook);
}

// Tells the memory engine where x is; nothing is launched.
TensorMap tensor_map(const tersor_args& call, int32_t tokens) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "the driver has no cuTensorMapEncodeTiled");
    if (!function) throw Error("CUDA: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap made;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(call.spec.k),
                              static_cast<cuuint64_t>(call.m)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(call.ldx) * 2};
  const cuuint32_t box[2] = {kBlock, static_cast<cuuint32_t>(tokens)}, step[2] = {1, 1};
  const CUresult status = encode(
      &made,
      call.dtype == TERSOR_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(call.x), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error("CUDA: x cannot be described to the memory engine (error " +
                std::to_string(status) + ")");
  TensorMap map;
  static_assert(sizeof map == sizeof made && alignof(TensorMap) >= alignof(CUtensorMap),
                "the driver's own struct");
  std::memcpy(&map, &made, sizeof map);
  return map;
}

void launch(const void* function, int blocks, int threads, size_t shared, const void* args,
            Target target) {
  void* parameters[] = {const_cast<void*>(args)};
  check(cudaLaunchKernel(function, dim3(blocks), dim3(threads), parameters, shared,
                         static_cast<cudaStream_t>(target.stream)),
        "a kernel could not be launched");
}

// For the kernels whose threads go through all elements by themselves.
void launch_over(const void* function, int64_t elements, const void* args, Target target) {
  const Device& on = device(target.device);
  const Current current(target.device);
  const int64_t blocks = (elements + kPackThreads - 1) / kPackThreads;
  const int64_t most = int64_t{on.multiprocessors} * 32;
  launch(function, static_cast<int>(std::max<int64_t>(1, std::min(blocks, most))), kPackThreads, 0,
         args, target);
}

}  // namespace

const char* unavailable() {
  static const std::string why = [] {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && count > 0) return std::string();
    cudaGetLastError();
    if (status == cudaErrorInsufficientDriver)
      return "no NVIDIA driver was found, or one that is too old for CUDA " +
             std::to_string(CUDART_VERSION / 1000);
    return std::string("no NVIDIA GPU can be used (") +
           cudaGetErrorString(count == 0 && status == cudaSuccess ? cudaErrorNoDevice : status) +
           ")";
  }();
  return why.empty() ? nullptr : why.c_str();
}

std::string architectures() { return TERSOR_CUDA_ARCHITECTURES; }

std::vector<Row> kernels() {
  std::vector<Row> rows;
  for (const Gemm& gemm : gemms()) rows.push_back({gemm.name, gemm.arch});
  return rows;
}

const char* refuses(const Spec& spec) {
  if (spec.of) {
    if (spec.kept != 2 || spec.of != 4) return "of patterns of zeros a GPU knows 2:4 alone";
    if (spec.bits == 8 || spec.activation == TERSOR_A8)
      return "zeros are left out on a GPU of 4-bit codes and of 16-bit values, with 16-bit "
             "activations";
  }
  if (spec.n % 16 || spec.k % 16) return "n and k must be multiples of 16 on a GPU";
  if (!is_group(spec.k, spec.g)) return "the group must be 32, a multiple of 64, or the whole row";
  if (spec.activation == TERSOR_A8 && (spec.two_level ? spec.k : spec.g) > most_summed(spec.bits))
    return "with int8 activations, at most 65793 columns of 8 bits, and 131071 of 4, can share a "
           "scale on a GPU";
  if (spec.two_level && (spec.bits != 4 || spec.asymmetric || spec.activation != TERSOR_A8))
    return "a two-level grid is of symmetric 4-bit codes, for int8 activations";
  return nullptr;
}

size_t packed_bytes(const Spec& spec) { return static_cast<size_t>(shape(spec).bytes); }

void pack(const Spec& spec, const tersor_view& view, void* packed, Target target) {
  const PackArgs args{shape(spec), static_cast<uint8_t*>(packed), view.codes,
                      static_cast<uint8_t*>(view.scales), view.zeros};
  launch_over(spec.of ? pack_sparse_kernel() : pack_kernel(), spec.n * spec.k * spec.bits / 32,
              &args, target);
}

void unpack(const Spec& spec, const void* packed, const tersor_view& view, Target target) {
  const PackArgs args{shape(spec), static_cast<uint8_t*>(const_cast<void*>(packed)), view.codes,
                      static_cast<uint8_t*>(view.scales), view.zeros};
  launch_over(spec.of ? unpack_sparse_kernel() : unpack_kernel(), spec.n * spec.k, &args, target);
}

void dequantize(const Spec& spec, const void* packed, int64_t begin, int64_t end, void* to,
                int32_t dtype, Target target) {
  const DequantizeArgs args{
      shape(spec), spec.scale_dtype, static_cast<const uint8_t*>(packed), begin, end, to};
  launch_over(spec.of ? dequantize_sparse_kernel(dtype) : dequantize_kernel(dtype),
              (end - begin) * spec.k, &args, target);
}

std::string refuses(int number) { return device(number).why; }

std::string serves(const Spec& spec, int64_t m, int32_t dtype, int number, bool outliers) {
  const Plan chosen = plan(spec, m, dtype, number, outliers);
  return chosen.gemm ? chosen.gemm->name : "";
}

size_t workspace_bytes(int number) {
  const Device& on = device(number);
  size_t most = 0;
  for (size_t i = 0; i < gemms().size(); ++i)
    most = std::max(most, 2 * on.resident[i] * gemms()[i].tile_bytes);
  return most;
}

size_t quantized_bytes(int64_t m, int64_t k, int64_t g) {
  return static_cast<size_t>(Int8Layout(m, k, g).bytes);
}

void quantize(const Activations& from, void* quantized, Target target) {
  const Int8Layout at(from.m, from.k, from.g);
  auto* begin = static_cast<uint8_t*>(quantized);
  QuantizeArgs args{};
  args.w = at.w;
  args.x = from.x, args.ldx = from.ldx;
  args.m = static_cast<int32_t>(from.m), args.rows = static_cast<int32_t>(at.rows);
  args.scale = from.scale;
  args.codes = reinterpret_cast<int8_t*>(begin);
  args.scales = reinterpret_cast<float*>(begin + at.scales_at);
  args.sums = reinterpret_cast<int32_t*>(begin + at.sums_at);
  const Current current(target.device);
  const bool apart = from.outliers > 0;
  if (apart) {
    auto* found = reinterpret_cast<uint64_t*>(begin + at.outliers_at);
    const OutlierArgs columns{from.x,        from.ldx, args.m, static_cast<int32_t>(from.k),
                              from.outliers, found};
    launch(outlier_kernel(from.dtype), at.w.steps, kOutlierThreads, kOutlierShared, &columns,
           target);
    args.outliers = found;
  }
  launch(apart ? quantize_others_kernel(from.dtype) : quantize_kernel(from.dtype), args.rows,
         kQuantizeThreads, kQuantizeShared, &args, target);
}

uint64_t capture(Target target) {
  const Current current(target.device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(target.stream), &status, &id),
        "the stream");
#else
  check(cudaStreamGetCaptureInfo_v2(static_cast<cudaStream_t>(target.stream), &status, &id),
        "the stream");
#endif
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

namespace {

// Lets this thread allocate while a stream is captured: nothing of it goes into the graph.
class Relaxed {
 public:
  Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "the mode of captures"); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int* new_counters() {
  const Relaxed relaxed;
  void* made = nullptr;
  cudaStream_t aside = nullptr;
  check(cudaMalloc(&made, kCounterBytes), "no memory for counters");
  check(cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking), "no stream");
  check(cudaMemsetAsync(made, 0, kCounterBytes, aside), "counters");
  check(cudaStreamSynchronize(aside), "counters");
  check(cudaStreamDestroy(aside), "a stream");
  return static_cast<int*>(made);
}

// Counters of the tiles of a call, which are zero before it and after. Calls on one stream come one
// after the other, and can have the same. A capture has its own for each of its streams: its graph
// may run at any time, so they are never freed (64 KiB each), nor taken from a caller's memory.
int* counters(Target target) {
  static std::mutex mutex;
  static std::map<std::tuple<int, void*, uint64_t>, int*> all;
  const std::lock_guard<std::mutex> lock(mutex);
  int*& found = all[{target.device, target.stream, capture(target)}];
  if (!found) found = new_counters();
  return found;
}

// What a tersor_args and a CodebookCall say alike.
template <class Call>
void describe(LinearArgs& args, const Call& call, const Plan& chosen, Target target) {
  args.packed = static_cast<const uint8_t*>(call.packed);
  args.x = call.x;
  args.y = static_cast<uint16_t*>(call.y);
  args.bias = call.bias;
  args.ldx = call.ldx, args.ldy = call.ldy;
  args.m = static_cast<int32_t>(call.m);
  args.token_tiles = chosen.token_tiles;
  args.partition = chosen.partition;
  args.arrived = counters(target);
  args.partials = static_cast<float*>(call.workspace);
}

}  // namespace

bool linear(const Spec& spec, const tersor_args& call, const Quantized& int8, Target target) {
  const Plan chosen = plan(spec, call.m, call.dtype, target.device, int8.outliers);
  if (!chosen.gemm) return false;
  LinearArgs args{};
  args.w = shape(spec);
  args.scale_dtype = spec.scale_dtype;
  const Current current(target.device);
  describe(args, call, chosen, target);
  BoxedArgs boxed;
  const void* given = &args;
  if (chosen.gemm->boxed) {
    boxed = {args, tensor_map(call, chosen.gemm->tokens)};
    given = &boxed;
  }
  if (takes_int8(chosen.gemm->sort)) {
    const Int8Layout at(int8.m, spec.k, spec.g);
    // The rows that the tiles of this kernel read are there.
    if (int64_t{chosen.token_tiles} * chosen.gemm->tokens > at.rows - int8.first) return false;
    const auto* begin = static_cast<const uint8_t*>(int8.quantized);
    args.exact = call.x, args.ld_exact = call.ldx;
    args.x = begin + int8.first * at.columns, args.ldx = at.columns;
    args.x_scales = reinterpret_cast<const float*>(begin + at.scales_at) + int8.first;
    args.x_sums = reinterpret_cast<const int32_t*>(begin + at.sums_at) + int8.first;
    args.x_rows = at.rows;
    args.outliers = reinterpret_cast<const uint64_t*>(begin + at.outliers_at);
    args.w.k = static_cast<int32_t>(at.columns);  // whole steps: what is beyond k is zero
  }
  launch(chosen.gemm->function, chosen.partition.workers, chosen.gemm->threads, chosen.gemm->shared,
         given, target);
  return true;
}

void search_grid(const GridArgs& args, Target target) {
  launch_over(search_grid_kernel(), args.count * kLanes, &args, target);
}

void solve_block(const SolveArgs& args, Target target) {
  device(target.device);  // its kernels may have their shared memory from then on
  const Current current(target.device);
  launch(solve_kernel(args.scales != nullptr, args.of != 0),
         static_cast<int>((args.n + kSolveRows - 1) / kSolveRows), kSolveThreads, kSolveShared,
         &args, target);
}

// --- weights of indices into sixteen values ------------------------------------------------------

const char* refuses(const CodebookSpec& spec) {
  if (spec.k % 16) return "k must be a multiple of 16 on a GPU";
  if (spec.g < 1 || spec.k % spec.g || !is_group(spec.k, spec.g))
    return "blocks must divide a row, and be 32, a multiple of 64, or the whole row";
  if ((spec.n + 2 * kBlock) > INT32_MAX / (spec.k / spec.g))
    return "the weight has too many blocks for one kernel";
  return nullptr;
}

size_t packed_bytes(const CodebookSpec& spec) { return static_cast<size_t>(shape(spec).bytes); }

void pack(const CodebookSpec& spec, const CodebookView& view, void* packed, Target target) {
  const CodebookPackArgs args{shape(spec), static_cast<uint8_t*>(packed),
                              view.codes,  static_cast<uint8_t*>(view.scales),
                              view.steps,  view.mean};
  launch_over(pack_codebook_kernel(), spec.n * spec.k / 8, &args, target);
}

void unpack(const CodebookSpec& spec, const void* packed, const CodebookView& view, Target target) {
  const CodebookPackArgs args{shape(spec), static_cast<uint8_t*>(const_cast<void*>(packed)),
                              view.codes,  static_cast<uint8_t*>(view.scales),
                              view.steps,  view.mean};
  launch_over(unpack_codebook_kernel(), spec.n * spec.k / 2, &args, target);
}

void dequantize(const CodebookSpec& spec, const float* values, const void* packed, int64_t begin,
                int64_t end, void* to, int32_t dtype, Target target) {
  CodebookDequantizeArgs args{shape(spec), static_cast<const uint8_t*>(packed), {}, begin, end, to};
  std::copy_n(values, kValues, args.values);
  launch_over(dequantize_codebook_kernel(dtype), (end - begin) * spec.k, &args, target);
}

std::string serves(const CodebookSpec& spec, int64_t m, int32_t dtype, int number) {
  const Plan chosen = plan(spec, m, dtype, number);
  return chosen.gemm ? chosen.gemm->name : "";
}

bool linear(const CodebookCall& call, Target target) {
  const Plan chosen = plan(call.spec, call.m, call.dtype, target.device);
  if (!chosen.gemm) return false;
  const CodebookShape s = shape(call.spec);
  CodebookArgs args{};
  args.w = s.w;
  const Current current(target.device);
  describe(args, call, chosen, target);
  args.codebook = call.values;
  args.doubled = s.doubled, args.row_groups = s.row_groups;
  args.scale_steps = reinterpret_cast<const float*>(args.packed + s.steps_at);
  args.mean = reinterpret_cast<const float*>(args.packed + s.mean_at);
  launch(chosen.gemm->function, chosen.partition.workers, chosen.gemm->threads, chosen.gemm->shared,
         &args, target);
  return true;
}

}  // namespace tersor::cuda
