// The bit layout of a packed weight in memory ("kernel order"). It is made when a weight is loaded
// and never written to disk, so it may change from release to release.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace tersor {

// Every packed weight begins with this header, so that a call can check what it was handed.
//
//   offset 0       8        40                  88       96            128
//          | magic | layout | spec              | bytes  | zeros ...   | the kernel's own bytes ...
//
struct PackedHeader {
  char magic[8];
  char layout[32];
  tersor_spec spec;
  uint64_t bytes;  // of the kernel's part that follows
  uint8_t reserved[32];
};
static_assert(sizeof(tersor_spec) == 48, "the header's offsets are drawn above");
static_assert(sizeof(PackedHeader) == 128 && sizeof(PackedHeader) % TERSOR_ALIGN == 0,
              "what follows the header stays aligned");

inline constexpr char kPackedMagic[8] = {'t', 'e', 'r', 's', 'o', 'r', '0', '2'};

}  // namespace tersor
