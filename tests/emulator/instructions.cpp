// Every function of csrc/cuda/ptx.cuh on random data, printed as hexadecimal words, one line a function.
// Compiled twice: with g++ -DCMX_EMULATED, where they are the emulator's models, and with nvcc, where they are the GPU's
// instructions. The lines must agree (tests/test_cuda_device.py).
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/ptx.cuh"

using namespace cmx;

constexpr int WORDS = 1024;  // of random input; a quarter of it per lane operand
constexpr int RESULTS = 16;  // words a lane writes

struct Input {
  uint32_t words[WORDS];  // pairs of 16-bit numbers between -2 and 2
  float numbers[WORDS];
};

template <class T>
__global__ void instructions_kernel(const Input* in, uint32_t* out, int which) {
  CMX_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  uint32_t* const mine = out + lane * RESULTS;
  const uint32_t *a = in->words + lane * 4, *b = in->words + 256 + lane * 2;
  const float* const c = in->numbers + lane * 4;
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  switch (which) {
    case 0:
    case 1:
      if (which == 0)
        multiply_k16<T>(d, a, b, c);
      else
        multiply_k8<T>(d, a, b, c);
      for (int i = 0; i < 4; ++i) memcpy(mine + i, d + i, 4);
      break;
    case 2:  // rows in a scattered order, every one 16-byte aligned
    case 3:
    case 6:
      for (int i = lane; i < WORDS / 4; i += 32)
        copy_async<16>(shared + 16 * i, in->words + 4 * i, which != 3 || i % 3 != 0);
      commit_copies();
      wait_for_copies<0>();
      __syncwarp();
      {
        uint32_t r[4];
        const uint32_t row = shared_address(shared + 16 * (lane * 37 % 256));
        which == 6 ? load_matrices<true>(r, row) : load_matrices(r, row);
        for (int i = 0; i < 4; ++i) mine[i] = r[i];
      }
      break;
    case 4:
      for (int i = lane; i < WORDS / 4; i += 32) {
        copy_async<8>(shared + 8 * i, in->words + 2 * i, i % 5 != 0);
        copy_async<4>(shared + WORDS * 2 + 4 * i, in->words + WORDS - 1 - i, i % 7 != 0);
      }
      commit_copies();
      wait_for_copies<0>();
      __syncwarp();
      for (int i = 0; i < RESULTS; ++i)
        mine[i] = get<uint32_t>(shared + (i % 2 ? WORDS * 2 : 0) + 4 * (lane * RESULTS / 2 + i / 2));
      break;
    case 5:
      for (int i = 0; i < 4; ++i) {
        const float special[4] = {c[0] * 40.f, c[1], i % 2 ? INFINITY : -INFINITY, NAN};
        const float v[3] = {exp2_approx(special[i]), reciprocal_approx(special[i]), max0_or_nan(special[i])};
        memcpy(mine + 3 * i, v, 12);
      }
      break;
    case 7: mine[0] = halves<false>(a[0], a[1]), mine[1] = halves<true>(a[0], a[1]); break;
  }
}

template <class T>
static void run(const Input* in, uint32_t* out, const char* type) {
  const char* names[] = {
      "mma.m16n8k16",     "mma.m16n8k8",       "cp.async.16+ldmatrix",       "cp.async.16 with zeros",
      "cp.async.8 and 4", "ex2, rcp, max.NaN", "cp.async.16+ldmatrix.trans", "prmt"};
  for (int which = 0; which < 8; ++which) {
    for (int i = 0; i < 32 * RESULTS; ++i) out[i] = 0;
    const Launch how{.grid = 1, .threads = 32, .shared_bytes = 4 * WORDS, .chained = false};
    if (launch(instructions_kernel<T>, how, in, out, which)) std::printf("%s: not launched\n", names[which]);
#ifndef CMX_EMULATED
    if (cudaError_t error = cudaDeviceSynchronize()) std::printf("%s: %s\n", names[which], cudaGetErrorString(error));
#endif
    std::printf("%s %s:", names[which], type);
    for (int i = 0; i < 32 * RESULTS; ++i) std::printf(" %08x", out[i]);
    std::printf("\n");
  }
}

int main() {
  Input* in;
  uint32_t* out;
#ifdef CMX_EMULATED
  std::vector<char> memory(sizeof(Input) + 32 * RESULTS * 4 + 16);
  in = reinterpret_cast<Input*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) & ~uintptr_t(15));
  out = reinterpret_cast<uint32_t*>(in + 1);
#else
  if (cudaError_t error = cudaMallocManaged(&in, sizeof(Input) + 32 * RESULTS * 4)) {
    std::printf("%s\n", cudaGetErrorString(error));
    return 1;
  }
  out = reinterpret_cast<uint32_t*>(in + 1);
#endif
  for (const bool brain : {true, false}) {
    std::mt19937 dice(3);
    for (int i = 0; i < WORDS; ++i) {
      const float low = static_cast<int>(dice() % 2001) / 500.f - 2, high = static_cast<int>(dice() % 2001) / 500.f - 2;
      uint16_t halves[2];
      if (brain) {
        const bf16 pair[2] = {bf16(low), bf16(high)};
        memcpy(halves, pair, 4);
      } else {
        const fp16 pair[2] = {fp16(low), fp16(high)};
        memcpy(halves, pair, 4);
      }
      memcpy(&in->words[i], halves, 4);
      in->numbers[i] = static_cast<int>(dice() % 2001) / 500.f - 2;
    }
    brain ? run<bf16>(in, out, "bf16") : run<fp16>(in, out, "fp16");
  }
}
