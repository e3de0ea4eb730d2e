// What the bindings call: a batch of images of any sizes through their chains of steps, on the
// instruction set and the threads at hand.
#pragma once

#include "augment/augment.h"

// Image i does steps[i] with the parameters beside them, and ends in outputs[i], planes of
// [height, width] in dtype (kUint8 of augment_cpu.cpp, or one of common/dtype.h).
struct AugmentBatch {
  int64_t images, steps;
  int channels, dtype;
  const AugmentImage* sources;       // [images]
  const int32_t* ops;                // [images, steps]
  const double* parameters;          // [images, steps, kAugmentParameters]
  char* const* outputs;              // [images]
  uint64_t seed;
  const uint64_t* places;            // [images]: in the run, for what is random by the pixel
  const float* normal;               // quantiles of the normal distribution, [65536], or null
};

void augment(const AugmentBatch&, int threads);

// numbers[i] is in (0, 1): word i % 4 of the counter (place, stream, i / 4). [places, count]
void uniform_numbers(const uint64_t* places, int64_t count_of_places, uint64_t seed,
                     uint32_t stream, int64_t count, double* numbers);

// images: pairs of neighbours, [2 * pairs, elements], changed in place; keep[pair] is the share of
// itself that each of the two keeps.
void mix_pairs(char* images, int64_t pairs, int64_t elements, int dtype, const float* keep,
               int threads);

// The two of a pair, [channels, height, width] each, exchange boxes[pair]: top, left, bottom and
// right.
void swap_boxes(char* images, int64_t pairs, int64_t channels, int64_t height, int64_t width,
                int64_t element_size, const int64_t* boxes, int threads);
