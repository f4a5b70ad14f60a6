// The CPU kernels of one instruction set, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace cmx {

struct CpuKernels {
  const char* name;
  int64_t lanes;                  // channels of a block of a blocked View
  int64_t tile_channels;          // output channels of a packed panel of pointwise weights
  bool tiles;                     // products are tiles, whose operands come from L2
  bool bf16_products;             // bfloat16 activations are multiplied as bfloat16 pairs
  int64_t (*panel_bytes)(Dtype);  // of a number between the two halves of a stage
  bool (*pairs_depthwise)(Dtype, int64_t kw);
  int64_t (*band_step)(Dtype);  // bands of a depthwise convolution begin at multiples of it: sums do not depend on them

  // packing: one task per panel of tile_channels, or per block of lanes channels; sizes in bytes
  int64_t (*packed_depthwise_bytes)(Dtype, int64_t c, int64_t kh, int64_t kw);
  int64_t (*packed_pointwise_bytes)(Dtype, int64_t c_out, int64_t c_in);
  void (*pack_depthwise)(const View& weight, int64_t block, void* out);  // weight as a View [1, c, kh, kw]
  void (*pack_pointwise)(const View& weight, int64_t panel, void* out);  // weight as a View [1, c_out, 1, c_in]

  Form (*stack_form)(Dtype, int64_t c_out, int64_t c_in, bool strassen);  // of the products of a stack of blocks
  int64_t (*packed_stack_bytes)(Form, Dtype, int64_t c_out, int64_t c_in);
  int64_t (*stack_tasks)(Form, int64_t c_out);
  void (*pack_stack)(Form, const View& weight, int64_t task, void* out);

  int64_t (*stage_scratch_bytes)(const Stage&);
  void (*stage_band)(const Stage&, int64_t n, int64_t y0, char* scratch);
  PlanesShape (*planes_shape)(const Stage&, int64_t y0);  // of the band that begins there
  void (*planes_fill)(const Stage&, const PlanesFill&, char* scratch);
  void (*planes_product)(const Stage&, const PlanesProduct&, char* scratch);
  int64_t (*depthwise_scratch_bytes)(const DepthwiseStage&);
  void (*depthwise_band)(const DepthwiseStage&, int64_t n, int64_t block, int64_t y0, char* scratch);
  int64_t pool_blocks_at_once;
  void (*pool_blocks)(const PoolHead&, int64_t n, int64_t first);
  void (*classify)(const PoolHead&, int64_t class_begin, int64_t class_end);

  // training
  int64_t (*depthwise_train_scratch_bytes)(const DepthwiseTrain&);
  void (*depthwise_train_band)(const DepthwiseTrain&, int64_t n, int64_t block, int64_t y0, char* scratch);
  int64_t (*depthwise_backward_scratch_bytes)(const DepthwiseBackward&);
  void (*depthwise_backward_plane)(const DepthwiseBackward&, int64_t n, int64_t block, char* scratch);
  int64_t (*chunk_step)(Dtype);  // pixels of a chunk come in multiples of it
  int64_t (*product_scratch_bytes)(Dtype, int64_t chunk, int64_t c_in, int64_t c_out);
  void (*product_train_chunk)(const ProductTrain&, int64_t n, int64_t m0, char* scratch);
  void (*product_backward_chunk)(const ProductBackward&, int64_t n, int64_t m0, int64_t slot, char* scratch);
  void (*weight_gradient)(const ProductBackward&, int64_t first, int64_t count);  // rows of the weight
  int64_t (*group_da_bytes)(Dtype, int64_t pixels, int64_t c_out);
  int64_t (*group_input_bytes)(Dtype, int64_t pixels, int64_t channels);

  double (*peak_flop)(Dtype, int64_t rounds);  // runs that many FLOP on registers alone and returns their number
};

const CpuKernels& cpu_kernels();               // the level in use
const std::vector<std::string>& cpu_levels();  // compiled and runnable here, slowest first
void set_cpu_level(const std::string& name);   // throws std::invalid_argument
bool strassen_allowed();                       // CMX_STRASSEN, on if it is not set
void allow_strassen(bool);
StageTimes* stage_times(Stage::Producer);  // null as long as nobody asked for them
void time_stages(bool);                    // from zero on
void release_memory();                     // that bind_memory.h keeps

}  // namespace cmx
