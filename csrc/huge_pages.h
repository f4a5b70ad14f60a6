// Pages of 2 MB, where the system has them: one entry of the TLB instead of 512, and the sets of L2 fill evenly.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cmx {

constexpr int64_t kHugePage = 2 << 20;

// For memory at a multiple of kHugePage that is not yet written
inline void use_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace cmx
