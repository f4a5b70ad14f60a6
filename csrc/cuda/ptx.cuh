// One function per PTX instruction: inline assembly under nvcc, its meaning in C++ where the kernels are emulated.
// The meanings are a reading of the PTX manual; tests/test_cuda_device.py compares each with the hardware.
#pragma once

#include "platform.cuh"

namespace cmx {

template <class T>
constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<bf16> = true;

// Typed access to raw bytes: one access of the full width (a memcpy between char* compiles to single bytes)
template <class V>
__device__ __forceinline__ V get(const void* p) {
#ifdef CMX_EMULATED
  emulator::note_access(p, sizeof(V));
#endif
  return *static_cast<const V*>(p);
}
template <class V>
__device__ __forceinline__ void put(void* p, V v) {
#ifdef CMX_EMULATED
  emulator::note_write(p, sizeof(V));
#endif
  *static_cast<V*>(p) = v;
}

// 16 bytes to global memory in one access, also in loops where the compiler would take put() apart
__device__ __forceinline__ void store16(void* p, uint4 v) {
#ifdef CMX_EMULATED
  put(p, v);
#else
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
#endif
}

// A byte address in shared memory, as ldmatrix and cp.async take it, and back
#ifdef CMX_EMULATED
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::machine.shared);
}
inline unsigned char* shared_pointer(uint32_t address) {
  if (address >= emulator::kShared) emulator::fail("shared address out of range");
  return emulator::machine.shared + address;
}
#else
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ unsigned char* shared_pointer(uint32_t address) {
  return static_cast<unsigned char*>(__cvta_shared_to_generic(address));
}
#endif

// In every kernel that launch() launches (platform.cuh), before it touches global memory: waits until all kernels before it on the
// stream have ended, and allows the next one to be launched. Kernels for devices older than 9.0 start after the end anyway.
__device__ __forceinline__ void begin_chained() {
#ifdef CMX_EMULATED
  emulator::begin_chained();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Copies 16, 8 or 4 bytes to shared memory in the background; zeros where !inside, and `from` is not read.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
#ifdef CMX_EMULATED
  emulator::copy_async(to, from, Bytes, inside ? Bytes : 0);
#else
  const int filled = inside ? Bytes : 0;
  if constexpr (Bytes == 16)  // past L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(filled)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(Bytes),
                 "r"(filled)
                 : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#ifdef CMX_EMULATED
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Groups` of this thread's groups are in flight.
template <int Groups>
__device__ __forceinline__ void wait_for_copies() {
#ifdef CMX_EMULATED
  emulator::wait_for_copies(Groups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#endif
}

// Asks for the line of an address in memory to be brought to L2: nothing waits for it, and no value depends on it.
__device__ __forceinline__ void prefetch_to_l2([[maybe_unused]] const void* p) {
#ifndef CMX_EMULATED
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Four 8x8 matrices of 16-bit numbers. Lane i brings the address of row i % 8 of matrix i / 8; lane 4g + t gets, of each,
// elements 2t and 2t+1 of row g. TRANSPOSED: elements g of rows 2t and 2t+1.
template <bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
#ifdef CMX_EMULATED
  uint32_t rows[32];
  if (row % 16) emulator::fail("ldmatrix: a row is not 16-byte aligned");
  emulator::show(row, rows);
  const int g = emulator::self().lane / 4, t = emulator::self().lane % 4;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      const int of = TRANSPOSED ? 2 * t + j : g, element = TRANSPOSED ? g : 2 * t + j;
      std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * j, shared_pointer(rows[8 * i + of]) + 2 * element, 2);
    }
#else
#define CMX_LOAD(form)                                                          \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" form ".b16 {%0,%1,%2,%3}, [%4];" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                 \
               : "r"(row)                                                       \
               : "memory")
  if constexpr (TRANSPOSED)
    CMX_LOAD(".trans.shared");
  else
    CMX_LOAD(".shared");
#undef CMX_LOAD
#endif
}

#ifdef CMX_EMULATED
template <class T>
inline float half_of(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  T v;
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}

// d = a b + c for a [16][K], b [K][8]. Lane 4g + t holds
//   a rows g and g+8, columns 2t, 2t+1 (and + 8): a[0] (g, 2t..), a[1] (g+8, 2t..), a[2] (g, 2t+8..), a[3] (g+8, 2t+8..)
//   b rows 2t, 2t+1 (and + 8) of column g;   c, d: rows g, g, g+8, g+8 of columns 2t, 2t+1, 2t, 2t+1
template <class T, int K>
inline void multiply_emulated(float (&d)[4], const uint32_t* a, const uint32_t* b, const float* c) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine{}, all[32];
  std::memcpy(mine.a, a, K * 1);
  std::memcpy(mine.b, b, K / 2);
  emulator::show(mine, all);
  const int g = emulator::self().lane / 4, t = emulator::self().lane % 4;
  float result[4];
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * t + e % 2;
    result[e] = c[e];
    for (int k = 0; k < K; ++k)
      result[e] += half_of<T>(all[4 * g + k % 8 / 2].a[e / 2 + k / 8 * 2], k % 2) *
                   half_of<T>(all[4 * column + k % 8 / 2].b[k / 8], k % 2);
  }
  std::memcpy(d, result, sizeof result);
}
#endif

// d = a b + c on a tensor core, 16x16 by 16x8. The layout of the operands over the lanes is written above.
template <class T>
__device__ __forceinline__ void multiply_k16(float (&d)[4], const uint32_t* a, const uint32_t* b, const float* c) {
#ifdef CMX_EMULATED
  multiply_emulated<T, 16>(d, a, b, c);
#else
#define CMX_MULTIPLY(type)                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type           \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
  if constexpr (is_bf16<T>)
    CMX_MULTIPLY("bf16");
  else
    CMX_MULTIPLY("f16");
#undef CMX_MULTIPLY
#endif
}

// d = a b + c on a tensor core, 16x8 by 8x8
template <class T>
__device__ __forceinline__ void multiply_k8(float (&d)[4], const uint32_t* a, const uint32_t* b, const float* c) {
#ifdef CMX_EMULATED
  multiply_emulated<T, 8>(d, a, b, c);
#else
#define CMX_MULTIPLY(type)                                                                                       \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
  if constexpr (is_bf16<T>)
    CMX_MULTIPLY("bf16");
  else
    CMX_MULTIPLY("f16");
#undef CMX_MULTIPLY
#endif
}

// The lower halves of two words in one, a's below; or the upper ones
template <bool UPPER>
__device__ __forceinline__ uint32_t halves(uint32_t a, uint32_t b) {
#ifdef CMX_EMULATED
  return UPPER ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
#else
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "n"(UPPER ? 0x7632 : 0x5410));
  return r;
#endif
}

// 2^x to 2 ulp; results below 2^-126 become 0
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef CMX_EMULATED
  const float r = std::exp2(x);
  return r < 1.17549435e-38f ? 0.f : r;
#else
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#endif
}

// 1 / x to 1 ulp
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef CMX_EMULATED
  return 1.f / x;
#else
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#endif
}

// x y, at least 0 and at most 1; 0 for NaN
__device__ __forceinline__ float multiply_saturated(float x, float y) {
#ifdef CMX_EMULATED
  const float r = x * y;
  return r > 0 ? r < 1 ? r : 1.f : 0.f;
#else
  float r;
  asm("mul.sat.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
#endif
}

// max(x, 0), and NaN for NaN
__device__ __forceinline__ float max0_or_nan(float x) {
#ifdef CMX_EMULATED
  return x != x ? x : x > 0 ? x : 0.f;
#else
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(x));
  return r;
#endif
}

}  // namespace cmx
