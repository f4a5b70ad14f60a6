#include "cpu_levels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cmx_isa_levels.h"

namespace cmx {

#define X(level)               \
  namespace level {            \
  const CpuKernels& kernels(); \
  }
CMX_FOR_EACH_ISA(X)
#undef X

// Tiles: there are some, and Linux, which saves them only for those who ask, lets this process have them
static bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

static bool runs_here(const std::string& level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (level == "avx2") return avx2;
  if (level == "avx512") return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (level == "avx512bf16") return bf16;
  if (level == "amx") return bf16 && has_tiles();
#endif
  return level == "baseline";
}

static const std::vector<const CpuKernels*>& runnable() {
  static const std::vector<const CpuKernels*> found = [] {
    std::vector<const CpuKernels*> v;
#define X(level) \
  if (runs_here(#level)) v.push_back(&level::kernels());
    CMX_FOR_EACH_ISA(X)
#undef X
    return v;
  }();
  return found;
}

// vdpbf16ps in every second cycle, vfmadd231ps two in each: half of its rate (90 of 195 GFLOP/s a core, Emerald Rapids)
static bool multiplies_pairs_slowly() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") && !__builtin_cpu_is("cooperlake");
#else
  return false;
#endif
}

// The last that runs here, but for a level of pairs where those are slow: products are float32's then
static const CpuKernels& fastest() {
  const auto& all = runnable();
  size_t last = all.size() - 1;
  while (last && all[last]->bf16_products && !all[last]->tiles && multiplies_pairs_slowly()) last--;
  return *all[last];
}

static std::atomic<const CpuKernels*> in_use{nullptr};

const CpuKernels& cpu_kernels() {
  if (const CpuKernels* k = in_use.load(std::memory_order_relaxed)) return *k;
  static const CpuKernels& found = fastest();
  return found;
}

const std::vector<std::string>& cpu_levels() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> v;
    for (const CpuKernels* k : runnable()) v.emplace_back(k->name);
    return v;
  }();
  return names;
}

void set_cpu_level(const std::string& name) {
  for (const CpuKernels* k : runnable())
    if (name == k->name) {
      in_use.store(k, std::memory_order_relaxed);
      return;
    }
  std::string wanted;
  for (const std::string& level : cpu_levels()) wanted += (wanted.empty() ? "" : ", ") + level;
  throw std::invalid_argument("isa level: got '" + name + "', wanted one of " + wanted);
}

static std::atomic<bool>& strassen() {
  static std::atomic<bool> allowed = [] {
    const char* given = std::getenv("CMX_STRASSEN");
    return !given || std::string(given) != "0";
  }();
  return allowed;
}

bool strassen_allowed() { return strassen(); }
void allow_strassen(bool allowed) { strassen() = allowed; }

static std::atomic<bool> timing{false};
static StageTimes times[3];

StageTimes* stage_times(Stage::Producer producer) { return timing ? &times[(int)producer] : nullptr; }

void time_stages(bool wanted) {
  for (StageTimes& t : times) t = {};
  timing = wanted;
}

}  // namespace cmx
