// Pages of 2 MB where the system has them: memory in pages of 4 KB waits for page tables, and falls on the sets of a
// physically indexed cache as it comes.
#pragma once

#include <cstdint>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cmx {

constexpr int64_t kHugePage = 2 << 20;

// `data` at a multiple of kHugePage, not yet written
inline void use_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace cmx
