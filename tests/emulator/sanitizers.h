// What the emulator tells AddressSanitizer and ThreadSanitizer: no-ops in an ordinary build.
#pragma once

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define CMX_NO_TSAN __attribute__((no_sanitize("thread")))
#else
#define CMX_NO_TSAN
#endif

namespace cmx::emulator {

// The emulator's own bookkeeping is invisible to TSan.
struct Invisible {
#ifdef __SANITIZE_THREAD__
  Invisible() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Invisible() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Invisible() {}
  ~Invisible() {}
#endif
};

inline void release([[maybe_unused]] void* p) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(p);
#endif
}

inline void acquire([[maybe_unused]] void* p) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(p);
#endif
}

}  // namespace cmx::emulator
