// Which kernels there are, which of them this machine can run, and which one serves a request.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "format.h"
#include "kernel.h"

namespace tersor {

// An argument was wrong: the message says which, and what would be right.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Kernels of this tree and those added since, best priority first.
std::vector<const tersor_kernel*> kernels();

// Adds the kernels of another package. The table must live as long as the process. Throws Error
// when it was made for another version of kernel.h or a name is taken.
void add_kernels(const tersor_kernel_table& table);

// The ISA that TERSOR_ISA forces, or "". Throws Error for a name that no kernel has, or that this
// machine lacks.
const std::string& forced_isa();

// Why the kernel cannot serve, or nullptr if it can. m = 0: at no particular m and dtype.
// layout: only kernels of this layout, or nullptr.
const char* refusal(const tersor_kernel& kernel, const tersor_spec& spec, int64_t m, int32_t dtype,
                    const char* layout);

// The best kernel that serves, or an Error naming everything that was tried, and why not.
const tersor_kernel& select(const tersor_spec& spec, int64_t m, int32_t dtype,
                            const char* layout = nullptr);
const tersor_kernel& named(const std::string& name);

// Throws Error unless every field is in its documented range and no size overflows.
void check(const tersor_spec& spec);

// Whole packed weights, header included. `kernel`: the one whose layout is made.
size_t packed_bytes(const tersor_kernel& kernel, const tersor_spec& spec);
void pack(const tersor_kernel& kernel, const tersor_spec& spec, const tersor_view& view, void* dst);
void unpack(const void* packed, size_t bytes, const tersor_view& view);
// The header of a packed weight, or an Error saying what is wrong with it.
const PackedHeader& header(const void* packed, size_t bytes);

// y = x * W^T + bias with the given kernel, whose layout the packed weight must have; args.packed
// points behind the header, args.workspace is ignored. Checked by the caller.
void run(const tersor_kernel& kernel, tersor_args args);

}  // namespace tersor
