// Augmentation of images: what one image goes through, step by step. Geometry composes into one
// map, so that each output pixel is sampled once; what is done to colours happens to a row of
// floats (0 to 255) that is still in the first cache. gradsmith_kernels/augment/reference.py is the
// definition.
#pragma once

#include <stdint.h>

// The order of OPS in gradsmith_kernels/augment/steps.py, which also says what the parameters are.
enum AugmentOp : int32_t {
  kNothing,
  kGeometry,
  kAffine,
  kSaturation,
  kHue,
  kSolarize,
  kPosterize,
  kGamma,
  kContrast,
  kAutocontrast,
  kEqualize,
  kSharpness,
  kBlur,
  kNoise,
  kErase,
  kMixBegin,
  kMixAdd,
  kMixEnd,
  kTable,  // what kEqualize becomes once the histogram is known
};

constexpr int kAugmentParameters = 20;

enum Interpolation : int { kNearest = 0, kBilinear = 1, kBicubic = 2 };

// Pixel (y, x, c) is at[y * row + x * pixel + c * plane].
struct AugmentImage {
  const uint8_t* at;
  int64_t height, width, row, pixel, plane;
};

// For each output column where it starts to read and with which weights, of 2^14 in sum.
struct AugmentColumns {
  int64_t first, count;    // the source's columns that are read at all; `start` counts from first
  int taps;                // for each column, padded with zeros to an even number
  const int32_t* start;    // [n]
  const int16_t* weights;  // [n, taps]
  // The same for shuffles of 16 bytes, which feed 4 columns: if all their taps are that near.
  bool windows;
  int32_t* bases;   // [n / 4]
  uint8_t* masks;   // [n / lanes, taps / 2, 4 * lanes]
  int16_t* pairs;   // [n / lanes, taps / 2, 2 * lanes]
};

// For each output row likewise; weights are of 2^16 in sum (bicubic: of 2^14, with signs).
struct AugmentRows {
  int most;                 // taps of any row
  const int32_t *start, *taps;
  const uint16_t* weights;  // [rows, most]
};

// Whatever lies outside of an image on the way here is `fill`: for each column and each row the
// share of the pixel that is inside.
struct AugmentAxes {
  AugmentImage source;
  int channels;
  int64_t width;  // of the output
  bool with_signs, covered;
  AugmentRows rows;
  AugmentColumns columns;
  const float *cover_x, *cover_y;
  float fill[3];
};

struct AugmentFrame {
  double m[9], width, height;
};

constexpr int kMostFrames = 4;

// Output point (x, y, 1) -> source point m * (x, y, 1), divided by its last element.
struct AugmentMap {
  AugmentImage source;
  int channels;
  int64_t width;  // of the output
  double m[9];
  int interpolation;
  bool projective;
  float half_width;        // of the filter: 1, or more where the image shrinks
  int64_t x0, y0, x1, y1;  // the part of the source that exists
  int frames;              // images on the way, outside of which is `fill`
  AugmentFrame frame[kMostFrames];
  float fill[3];
};

struct AugmentPixelOp {
  int32_t op, stream;  // stream: tells the random numbers of the image's steps apart
  float p[kAugmentParameters];
  const float* table;  // kTable: [channels, 256]; kNoise: the normal distribution's quantiles
  uint64_t seed, place;
  int64_t height, width;
};

// Memory of one thread for one row.
struct AugmentScratch {
  uint8_t *row, *planes[3];
  int32_t *offsets, *columns;  // of a map: where the pixel is, and its weights
  uint16_t* weights_y;
  float *cover, *x, *y;
};

struct AugmentKernels {
  int lanes;
  void (*pack_columns)(const AugmentColumns&, int64_t width);
  // One row of the output as planes of floats; writes whole vectors.
  void (*axes_row)(const AugmentAxes&, int64_t row, const AugmentScratch&, float* const* planes);
  void (*map_row)(const AugmentMap&, int64_t row, const AugmentScratch&, float* const* planes);
  void (*pixels)(const AugmentPixelOp*, int count, int channels, int64_t row, int64_t width,
                 float* const* planes);
  float (*gray_sum)(float* const* planes, int channels, int64_t width);
  void (*range)(const float* plane, int64_t width, float* low, float* high);
  // to[x] = sum over k of rows[k][x] * weights[k]
  void (*weighted_rows)(const float* const* rows, const float* weights, int taps, int64_t width,
                        float* to);
  // The same along a row; `from` has taps / 2 more elements at each end.
  void (*weighted_columns)(const float* from, const float* weights, int taps, int64_t width,
                           float* to);
  // to = a * x + b * y, within [0, 255]
  void (*blend)(const float* x, float a, const float* y, float b, int64_t width, float* to);
  void (*store)(const float* plane, int64_t width, void* to, int dtype);
  // A row of an RGB image straight to the output, whose planes are given: sampled, coloured and
  // stored while it is in registers. False, and nothing done, if it has to go step by step.
  bool (*whole_row)(const AugmentAxes&, int64_t row, const AugmentScratch&,
                    const AugmentPixelOp*, int count, void* const* outputs, int dtype);
  // x = keep * x + (1 - keep) * y, and y = keep * y + (1 - keep) * x, of dtype
  void (*mix)(void* x, void* y, float keep, int64_t elements, int dtype);
};

extern const AugmentKernels augment_portable, augment_avx2, augment_avx512, augment_avx512bf16;
