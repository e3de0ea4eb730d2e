#include <pybind11/stl.h>

#include <vector>

#include "augment/augment_cpu.h"
#include "common/bindings.h"

namespace {

// sources: [images, 6] of int64: address, height, width, strides of row, pixel and channel.
// ops: [images, steps] of int32; parameters: [images, steps, kAugmentParameters] of float64.
// outputs: [images] addresses. shape: images, steps, channels.
void augment_binding(uintptr_t sources, uintptr_t ops, uintptr_t parameters, uintptr_t outputs,
                     const std::tuple<int64_t, int64_t, int>& shape, int dtype, uint64_t seed,
                     uintptr_t places, uintptr_t normal, int threads) {
  const auto& [images, steps, channels] = shape;
  std::vector<AugmentImage> list(static_cast<size_t>(images));
  const int64_t* s = pointer<const int64_t>(sources);
  for (auto& image : list) {
    image = {pointer<const uint8_t>(uintptr_t(s[0])), s[1], s[2], s[3], s[4], s[5]};
    s += 6;
  }
  const AugmentBatch batch{images,
                           steps,
                           channels,
                           dtype,
                           list.data(),
                           pointer<const int32_t>(ops),
                           pointer<const double>(parameters),
                           pointer<char* const>(outputs),
                           seed,
                           pointer<const uint64_t>(places),
                           pointer<const float>(normal)};
  augment(batch, threads);
}

void uniform_numbers_binding(uintptr_t places, int64_t count_of_places, uint64_t seed,
                             uint32_t stream, int64_t count, uintptr_t numbers) {
  uniform_numbers(pointer<const uint64_t>(places), count_of_places, seed, stream, count,
                  pointer<double>(numbers));
}

void mix_pairs_binding(uintptr_t images, int64_t pairs, int64_t elements, int dtype, uintptr_t keep,
                       int threads) {
  mix_pairs(pointer<char>(images), pairs, elements, dtype, pointer<const float>(keep), threads);
}

// shape: images, channels, height, width. boxes: [images / 2, 4] of int64.
void swap_boxes_binding(uintptr_t images,
                        const std::tuple<int64_t, int64_t, int64_t, int64_t>& shape,
                        int64_t element_size, uintptr_t boxes, int threads) {
  const auto& [count, channels, height, width] = shape;
  swap_boxes(pointer<char>(images), count / 2, channels, height, width, element_size,
             pointer<const int64_t>(boxes), threads);
}

}  // namespace

BINDINGS(augment) {
  m.def("augment", augment_binding, NoGil());
  m.def("augment_mix_pairs", mix_pairs_binding, NoGil());
  m.def("augment_swap_boxes", swap_boxes_binding, NoGil());
  m.def("augment_uniform_numbers", uniform_numbers_binding, NoGil());
}
