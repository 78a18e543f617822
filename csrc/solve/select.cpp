#include <string>

#include "dispatch.h"
#include "solve/lanes.h"

namespace tersor::solve {

const Lanes& lanes() {
  static const Lanes& chosen = []() -> const Lanes& {
    [[maybe_unused]] const std::string& forced = forced_isa();
#if TERSOR_HAVE_AVX512
    if (forced != "scalar" && forced != "avx2" && !kAvx512Lanes.missing()) return kAvx512Lanes;
#endif
#if TERSOR_HAVE_AVX2
    if (forced != "scalar" && !kAvx2Lanes.missing()) return kAvx2Lanes;
#endif
    return kBaselineLanes;
  }();
  return chosen;
}

}  // namespace tersor::solve
