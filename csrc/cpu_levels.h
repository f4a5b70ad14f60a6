// The CPU kernels of one instruction set, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace cmx {

struct CpuKernels {
  const char* name;
  int64_t lanes;          // channels of a block of a blocked View
  int64_t tile_channels;  // output channels of a packed panel of pointwise weights
  bool bf16_products;     // bfloat16 activations are multiplied as bfloat16 pairs
  bool (*pairs_depthwise)(Dtype, int64_t kw);

  // packing: one task per panel of tile_channels, or per block of lanes channels; sizes in bytes
  int64_t (*packed_depthwise_bytes)(Dtype, int64_t c, int64_t kh, int64_t kw);
  int64_t (*packed_pointwise_bytes)(Dtype, int64_t c_out, int64_t c_in);
  void (*pack_depthwise)(const View& weight, int64_t block, void* out);  // weight as a View [1, c, kh, kw]
  void (*pack_pointwise)(const View& weight, int64_t panel, void* out);  // weight as a View [1, c_out, 1, c_in]

  int64_t (*stage_scratch_bytes)(const Stage&);
  void (*stage_band)(const Stage&, int64_t n, int64_t y0, char* scratch);
  int64_t (*depthwise_scratch_bytes)(const DepthwiseStage&);
  void (*depthwise_band)(const DepthwiseStage&, int64_t n, int64_t block, int64_t y0, char* scratch);
  void (*pool_block)(const PoolHead&, int64_t n, int64_t block);
  void (*classify)(const PoolHead&, int64_t class_begin, int64_t class_end);

  double (*peak_flop)(Dtype, int64_t rounds);  // runs that many FLOP on registers alone and returns their number
};

const CpuKernels& cpu_kernels();               // the level in use
const std::vector<std::string>& cpu_levels();  // compiled and runnable here, slowest first
void set_cpu_level(const std::string& name);   // throws std::invalid_argument

}  // namespace cmx
