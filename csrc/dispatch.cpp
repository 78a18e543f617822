#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>

#include "cpu/kernels.h"
#include "parallel.h"

namespace tersor {
namespace {

using Table = std::vector<const tersor_kernel*>;

template <size_t N>
void append(Table& table, const tersor_kernel (&kernels)[N]) {
  for (const tersor_kernel& kernel : kernels) table.push_back(&kernel);
}

void sort(Table& table) {
  std::stable_sort(table.begin(), table.end(),
                   [](auto* a, auto* b) { return a->priority > b->priority; });
}

std::shared_ptr<const Table> built_in() {
  auto table = std::make_shared<Table>();
  append(*table, kScalarKernels);
#ifdef TERSOR_HAVE_AVX2
  append(*table, kAvx2Kernels);
#endif
#ifdef TERSOR_HAVE_AVX512VNNI
  append(*table, kAvx512VnniKernels);
#endif
#ifdef TERSOR_HAVE_AVX512BF16
  append(*table, kAvx512Bf16Kernels);
#endif
  sort(*table);
  return table;
}

// Replaced as a whole, so that a call in flight keeps the table it began with.
std::shared_ptr<const Table>& current() {
  static std::shared_ptr<const Table> table = built_in();
  return table;
}

std::shared_ptr<const Table> table() { return std::atomic_load(&current()); }

std::mutex adding;

// Activations of at most this many tokens are prepared at once: the workspace stays small.
constexpr int64_t kSlab = 512;
// A thread is worth waking for about this many multiply-adds.
constexpr int64_t kWorkPerThread = 1 << 17;

// Grows, and stays with its thread.
class Workspace {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(bytes, std::align_val_t{TERSOR_ALIGN});
      size_ = bytes;
    }
    return data_;
  }
  ~Workspace() { release(); }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t{TERSOR_ALIGN});
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Printable, not empty, and ended within its field.
template <size_t N>
bool is_name(const char (&text)[N]) {
  const char* end = std::find(text, text + N, '\0');
  return end != text && end != text + N &&
         std::all_of(text, end, [](char c) { return c > ' ' && c < 127; });
}

std::string shape_text(const tersor_spec& s) {
  const std::string zeros =
      s.of ? std::to_string(s.kept) + ":" + std::to_string(s.of) + " " : std::string();
  return zeros + "W" + std::to_string(s.bits) + (s.activation == TERSOR_A8 ? "A8" : "A16") +
         (s.asymmetric ? " asymmetric, n=" : " symmetric, n=") + std::to_string(s.n) +
         " k=" + std::to_string(s.k) + " g=" + std::to_string(s.g);
}

}  // namespace

std::vector<const tersor_kernel*> kernels() { return *table(); }

void add_kernels(const tersor_kernel_table& offered) {
  if (offered.abi != TERSOR_KERNEL_ABI || offered.kernel_size != sizeof(tersor_kernel))
    throw Error("kernels were built for version " + std::to_string(offered.abi) +
                " of tersor/kernel.h, this is version " + std::to_string(TERSOR_KERNEL_ABI) +
                "; build that package again");
  std::lock_guard<std::mutex> lock(adding);
  auto next = std::make_shared<Table>(*table());
  for (uint32_t i = 0; i < offered.count; ++i) {
    const tersor_kernel& k = offered.kernels[i];
    if (!k.name || !k.isa || !k.layout || !k.unavailable || !k.refuses || !k.packed_bytes ||
        !k.pack || !k.unpack || !k.workspace_bytes || !k.gemm || k.column_step < 1)
      throw Error(std::string("kernel '") + (k.name ? k.name : "?") + "' lacks a required field");
    if (std::strlen(k.layout) >= sizeof(PackedHeader::layout))
      throw Error(std::string("kernel '") + k.name + "': its layout's name is over 31 characters");
    for (const tersor_kernel* other : *next)
      if (!std::strcmp(other->name, k.name))
        throw Error(std::string("there is a kernel named '") + k.name + "' already");
    next->push_back(&k);
  }
  sort(*next);
  std::atomic_store(&current(), std::shared_ptr<const Table>(std::move(next)));
}

const std::string& forced_isa() {
  static const std::string forced = [] {
    const char* text = std::getenv("TERSOR_ISA");
    const std::string wanted = text ? text : "";
    if (wanted.empty()) return wanted;
    const char* missing = nullptr;
    std::string known;
    bool found = false;
    for (const tersor_kernel* kernel : *table()) {
      const std::string isa = kernel->isa;
      if ((", " + known + ",").find(", " + isa + ",") == std::string::npos)
        known += (known.empty() ? "" : ", ") + isa;
      if (isa != wanted) continue;
      found = true;
      missing = kernel->unavailable();
    }
    if (!found)
      throw Error("TERSOR_ISA=" + wanted + ": no such instruction set here; choose from " + known);
    if (missing) throw Error("TERSOR_ISA=" + wanted + ": this machine lacks it (" + missing + ")");
    return wanted;
  }();
  return forced;
}

const char* refusal(const tersor_kernel& kernel, const tersor_spec& spec, int64_t m, int32_t dtype,
                    const char* layout) {
  if (layout && std::strcmp(kernel.layout, layout)) return "reads another packed layout";
  if (const char* reason = kernel.refuses(&spec, m, dtype)) return reason;
  if (!forced_isa().empty() && forced_isa() != kernel.isa) return "TERSOR_ISA forces another";
  return kernel.unavailable();
}

const tersor_kernel& select(const tersor_spec& spec, int64_t m, int32_t dtype, const char* layout) {
  const auto all = table();
  for (const tersor_kernel* kernel : *all)
    if (!refusal(*kernel, spec, m, dtype, layout)) return *kernel;
  std::string message = "no kernel serves " + shape_text(spec) + " m=" + std::to_string(m) + ":";
  for (const tersor_kernel* kernel : *all)
    message +=
        std::string(" ") + kernel->name + " " + refusal(*kernel, spec, m, dtype, layout) + ";";
  message.back() = '.';
  throw Error(message);
}

const tersor_kernel& named(const std::string& name) {
  const auto all = table();
  for (const tersor_kernel* kernel : *all)
    if (kernel->name == name) return *kernel;
  throw Error("there is no kernel named '" + name + "'");
}

void check(const tersor_spec& s) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (s.n < 1 || s.k < 1 || s.n > kMost || s.k > kMost)
    throw Error("n and k must be from 1 to 2^31 - 1, not " + std::to_string(s.n) + " and " +
                std::to_string(s.k));
  if (s.n > std::numeric_limits<int64_t>::max() / 16 / (s.k + 64))
    throw Error("a weight of " + std::to_string(s.n) + " x " + std::to_string(s.k) +
                " is too large to address");
  if (s.bits != 4 && s.bits != 8 && s.bits != 16)
    throw Error("codes are stored in 4 or 8 bits, and values in 16, not " + std::to_string(s.bits));
  if (s.bits == 16 && (s.g != s.k || s.asymmetric || s.scale_dtype == TERSOR_F32 || !s.of ||
                       s.activation != TERSOR_A16))
    throw Error(
        "16-bit weights are bfloat16 or float16 values with a pattern of zeros, without scales or "
        "zero points, for activations that are not quantized");
  if (s.g < 1 || s.k % s.g || (s.g != s.k && s.g % 16))
    throw Error("the group must be k, or a multiple of 16 that divides k; g=" +
                std::to_string(s.g) + " k=" + std::to_string(s.k));
  if (s.scale_dtype < TERSOR_F32 || s.scale_dtype > TERSOR_F16)
    throw Error("scales must be float32, bfloat16 or float16");
  if (s.activation != TERSOR_A16 && s.activation != TERSOR_A8)
    throw Error("activations enter the product as 16 bits or as int8");
  if (s.asymmetric != 0 && s.asymmetric != 1) throw Error("asymmetric must be 0 or 1");
  if ((s.of || s.kept) && (s.kept < 1 || s.kept >= s.of || s.of > 128 || s.k % s.of))
    throw Error(
        "a pattern keeps at least 1 and fewer than all of some columns, at most 128, that "
        "divide k; it is " +
        std::to_string(s.kept) + ":" + std::to_string(s.of) + " for k=" + std::to_string(s.k));
}

size_t packed_bytes(const tersor_kernel& kernel, const tersor_spec& spec) {
  return sizeof(PackedHeader) + kernel.packed_bytes(&spec);
}

void pack(const tersor_kernel& kernel, const tersor_spec& spec, const tersor_view& view,
          void* dst) {
  PackedHeader head{};
  std::memcpy(head.magic, kPackedMagic, sizeof head.magic);
  std::strncpy(head.layout, kernel.layout, sizeof head.layout - 1);
  head.spec = spec;
  head.bytes = kernel.packed_bytes(&spec);
  std::memcpy(dst, &head, sizeof head);
  void* body = static_cast<uint8_t*>(dst) + sizeof head;
  const int64_t step = kernel.column_step;
  parallel_for((spec.n + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    kernel.pack(&spec, &view, body, begin * step, std::min(end * step, spec.n));
  });
}

const PackedHeader& header(const void* packed, size_t bytes) {
  const auto* head = static_cast<const PackedHeader*>(packed);
  if (reinterpret_cast<uintptr_t>(packed) % TERSOR_ALIGN)
    throw Error("a packed weight must be aligned to 64 bytes");
  if (bytes < sizeof *head || std::memcmp(head->magic, kPackedMagic, sizeof head->magic) ||
      !is_name(head->layout))
    throw Error("these bytes are not a packed weight");
  if (head->bytes > bytes - sizeof *head)
    throw Error("a packed weight of " + std::to_string(head->bytes) + " bytes is cut off after " +
                std::to_string(bytes - sizeof *head));
  return *head;
}

void unpack(const void* packed, size_t bytes, const tersor_view& view) {
  const PackedHeader& head = header(packed, bytes);
  const tersor_spec& spec = head.spec;
  // Any kernel of the layout will do, also one that this machine could not run. What the layout can
  // hold, and in how many bytes, only its kernels know.
  for (const tersor_kernel* kernel : *table()) {
    if (std::strcmp(kernel->layout, head.layout) || kernel->refuses(&spec, 0, TERSOR_F32) ||
        kernel->packed_bytes(&spec) != head.bytes)
      continue;
    const void* body = &head + 1;
    const int64_t step = kernel->column_step;
    return parallel_for((spec.n + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
      kernel->unpack(&spec, body, &view, begin * step, std::min(end * step, spec.n));
    });
  }
  throw Error("no kernel reads " + std::to_string(head.bytes) + " bytes of layout '" + head.layout +
              "' as " + shape_text(spec));
}

void run(const tersor_kernel& kernel, tersor_args args) {
  thread_local Workspace workspace;
  const tersor_spec& spec = args.spec;
  const int64_t element = args.dtype == TERSOR_F32 ? 4 : 2;
  const auto* x = static_cast<const uint8_t*>(args.x);
  auto* y = static_cast<uint8_t*>(args.y);
  const int64_t total = args.m, step = kernel.column_step;
  for (int64_t from = 0; from < total; from += kSlab) {
    args.m = std::min(kSlab, total - from);
    args.x = x + from * args.ldx * element;
    args.y = y + from * args.ldy * element;
    args.workspace = workspace.at_least(kernel.workspace_bytes(&spec, args.m, args.dtype));
    if (kernel.prepare)
      parallel_for(args.m, std::max<int64_t>(1, kWorkPerThread / 8 / spec.k),
                   [&](int64_t begin, int64_t end) { kernel.prepare(&args, begin, end); });
    parallel_for((spec.n + step - 1) / step,
                 std::max<int64_t>(1, kWorkPerThread / (args.m * spec.k * step)),
                 [&](int64_t begin, int64_t end) {
                   kernel.gemm(&args, begin * step, std::min(end * step, spec.n));
                 });
  }
}

}  // namespace tersor
