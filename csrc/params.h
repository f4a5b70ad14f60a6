// One plain struct per kernel: sizes, strides in elements, pointers. No torch below this line of the architecture.
#pragma once

#include <cstdint>

#include "lists.h"

namespace cmx {

#define X(name) name,
enum class Dtype : int { CMX_FOR_EACH_DTYPE(X) };
enum class Act : int { CMX_FOR_EACH_ACTIVATION(X) };
#undef X

inline int64_t size_of(Dtype d) { return d == Dtype::float32 ? 4 : 2; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Activations. Strided: [n, c, h, w] anywhere. Blocked: [n][c / lanes][h][w][lanes], channels beyond c are zero; paired:
// of bfloat16, with two neighbouring pixels in a word, [n][c / lanes][h][w / 2][lanes][2].
struct View {
  void* data;
  Dtype dtype;
  int64_t n, c, h, w;
  int64_t sn, sc, sh, sw;  // strided only
  bool blocked, paired = false;
};

// What follows a convolution: act(. + bias) * scale + shift, float32 [channels rounded up to lanes]
struct Constants {
  const float *bias, *scale, *shift;
};

struct Depthwise {
  const void* weight;  // packed by pack_depthwise
  Constants constants;
  int64_t kh, kw;
  bool residual;
};

// What a weight is packed for: rows of pixels by vectors of channels, the same by Strassen, planes by tiles
enum class Form { plain, strassen, planes };

struct Pointwise {
  const void* weight;  // packed by pack_pointwise
  Constants constants;
  const void* next;  // the weights that will be read after these, or null
  Form form;
};

// What all workers spent in the two halves of a stage
struct StageTimes {
  int64_t producer, product;  // nanoseconds; added up atomically
};

struct Ahead {
  const char* data;
  int64_t bytes;
};

// One pass over the activations, in bands of rows: a producer fills a panel [pixel][channel], a product consumes it.
struct Stage {
  enum class Producer { patches, depthwise, copy } producer;
  View in, out;
  int64_t ph, pw;       // patches: stride = kernel
  Depthwise depthwise;  // producer depthwise
  Pointwise pointwise;
  Act act;
  int64_t rows;       // output rows of a band
  int64_t part;       // pixels of the panel that one sweep over the weights takes: they stay in L2
  Ahead after[3];     // what is read after this stage's weights: asked for during the product
  bool between;       // the output is another stage's input, or pooled: as exact as its dtype needs it
  StageTimes* times;  // null: not asked for
  char* panel;        // Form::planes: of all workers
};

// A stage of Form::planes has two steps: all workers fill one panel with `rows` rows of all images, then they multiply it.
struct PlanesShape {
  int64_t units, cell_rows;  // of what is filled: blocks of channels (patches: 1), rows of cells of an image
  int64_t pairs, blocks;     // of what is multiplied: pairs of cells, of all images; blocks of output channels
  int64_t panel_bytes, pair_bytes, block_bytes;
  int64_t fill_scratch, product_scratch;  // of a worker
};
struct PlanesFill {
  int64_t y0, image, image_end, unit, unit_end, cell_row, cell_row_end;
};
struct PlanesProduct {
  int64_t y0, pair, pair_end, block, block_end;
  int64_t share, share_end;  // blocks of the same worker: it goes on with the next, or with the first
  bool last_round;           // then in the next stage
};

struct DepthwiseStage {
  View in, out;
  Depthwise depthwise;
  Act act;
  int64_t rows;
};

// ---- training. Vectors of channels are float32 [rows][channels rounded up to lanes].

// X = (act(x) - mean) * scale + shift, rows (mean, scale, shift); without rows X is x.
struct Activation {
  View x;
  const float* rows;
};

// da = (p * grad + q * (act(a) - mean) + r) * act'(a), rows (p, q, r, mean)
struct PreActivation {
  View grad, a;
  const float* rows;
};

// A piece of a sum over pixels, vectors of [lanes] each
// kOrigin: a value near the mean; kOffset: the mean less it; kSquares: squared deviations
enum Moments { kOrigin, kOffset, kSquares, kMomentPieces };
enum Sums { kSum, kCentred, kSumPieces };  // of a gradient, and of the gradient times (act(x) - mean)

// a = dwconv(X, weight) + bias
struct DepthwiseTrain {
  Activation in;
  View a;
  Act act;
  const void* weight;  // packed as float32
  const float* bias;
  int64_t kh, kw, rows;
  float* moments;  // [n][block][row of the image][kMomentPieces][lanes]
};

struct DepthwiseBackward {
  PreActivation out;
  Activation in;
  View dx;
  Act act;
  const void* flipped;  // the weight rotated by half a turn, of an odd size, packed as float32
  int64_t kh, kw, rows;
  bool residual, need_input, need_weight;
  float *sums, *dbias, *dweight;  // [n][block]: [kSumPieces][lanes], [lanes], [kh * kw][lanes]
};

// Products over chunks of pixels of one image; all Views are one row of pixels but the image that patches come from.
struct ProductInput {
  Activation in, skip;  // a skip without data is none
  View image;           // if it has data, the input is its patches
  int64_t ph, pw, columns, channels;
};

struct ProductTrain {
  ProductInput in;
  View a;
  Act act;
  const void* weight;  // packed
  const float* bias;
  int64_t chunk;   // pixels
  float* moments;  // [n][chunk][block][kMomentPieces][lanes]
};

struct ProductBackward {
  PreActivation out;
  ProductInput in;
  View dx;
  Act act;
  const void* transposed;  // the weight transposed, packed
  int64_t chunk;
  bool need_input, need_weight;
  float *sums, *dbias;  // of a chunk: [block][kSumPieces][lanes], [block][lanes]
  // weight gradient of a group of chunks, each in a slot of a multiple of 16 pixels
  void *da, *panel;  // [c_out][pixel], pitch `pixels`; the input, packed as a product's weight
  int64_t pixels;
  float* dweight;  // [c_out][channels rounded up to lanes]
};

struct PoolHead {
  View in;
  float* pooled;       // [n, c]
  const void* weight;  // [classes, c] contiguous, in the dtype of `in`
  const float* bias;   // [classes] or null
  int64_t classes;
  void* out;  // [n, classes] in the dtype of `in`
};

}  // namespace cmx
