// Where the time of a stage goes, for those who ask.
#pragma once

#include <time.h>

#include <cstdint>

#include "vec.h"

namespace cmx::CMX_ISA {

// Adds the time until its end to a total, if there is one
struct Timer {
  int64_t *total, begin;
  explicit Timer(int64_t* t) : total(t), begin(t ? now() : 0) {}
  ~Timer() {
    if (total) __atomic_fetch_add(total, now() - begin, __ATOMIC_RELAXED);
  }
  static int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
  }
};

}  // namespace cmx::CMX_ISA
