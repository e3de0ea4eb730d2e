// Takes an image through its steps. Geometry is collected; colours are collected after it; and when
// a step needs the whole image (a statistic, a neighbourhood, geometry once more), or there is none
// left, the rows are made: sampled, coloured, and stored.
#include "augment/augment_cpu.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "augment/axes.h"
#include "augment/composite.h"
#include "augment/pixel.h"
#include "common/cpu.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace {

const AugmentKernels& kernels() {
#if defined(__x86_64__)
  return pick(augment_portable, augment_avx2, augment_avx512, augment_avx512bf16);
#else
  return augment_portable;
#endif
}

constexpr int kUint8 = 3;
constexpr int64_t size_of(int dtype) { return dtype == kUint8 ? 1 : (dtype == kFloat32 ? 4 : 2); }

// Memory that a thread keeps for its next image: fresh pages cost more than arithmetic.
class Kept {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = std::aligned_alloc(64, bytes);
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(memory_);
  }
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() { std::free(memory_); }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

constexpr int64_t kSlack = 64;
int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// What a thread needs for one row.
struct RowMemory {
  Kept bytes, words, floats;
  AugmentScratch scratch;
  float* planes[3];

  void take(int64_t source_width, int64_t width) {
    const int64_t plane = source_width + 2 * kSlack, stride = padded(width);
    scratch.row = bytes.take<uint8_t>(6 * plane);
    for (int c = 0; c < 3; ++c) scratch.planes[c] = scratch.row + (3 + c) * plane;
    scratch.offsets = words.take<int32_t>(3 * stride);
    scratch.columns = scratch.offsets + stride;
    scratch.weights_y = reinterpret_cast<uint16_t*>(scratch.columns + stride);
    float* const f = floats.take<float>(6 * stride);
    for (int c = 0; c < 3; ++c) planes[c] = f + c * stride;
    scratch.cover = f + 3 * stride;
    scratch.x = f + 4 * stride;
    scratch.y = f + 5 * stride;
  }
};

thread_local RowMemory row_memory;

// What a thread needs for one image.
struct ImageMemory {
  Kept floats[2], bytes[2], base, mixed, sums;
  AxesTables tables;
  std::vector<AugmentPixelOp> ops;
  std::vector<float> lookup;  // of kTable, of which at most one waits
};

thread_local ImageMemory image_memory;

class Run {
 public:
  Run(const AugmentBatch& batch, int64_t image, int threads)
      : batch_(batch), image_(image), threads_(threads), channels_(batch.channels),
        source_(batch.sources[image]) {
    memory_.ops.clear();
    map_.start(source_.height, source_.width);
  }

  void run() {
    const int32_t* op = batch_.ops + image_ * batch_.steps;
    const double* p = batch_.parameters + image_ * batch_.steps * kAugmentParameters;
    for (int64_t k = 0; k < batch_.steps; ++k, p += kAugmentParameters) step(op[k], p);
    finish();
  }

 private:
  int64_t height() const { return map_.height(); }
  int64_t width() const { return map_.width(); }
  int64_t stride() const { return padded(width()); }

  void step(int32_t op, const double* p) {
    switch (op) {
      case kNothing:
        return;
      case kGeometry:
        if (buffered_ || !memory_.ops.empty()) as_source();
        if (!map_.add(p)) {
          as_source();
          map_.add(p);
        }
        return;
      case kContrast: {
        const double mean = gray_mean();
        double q[kAugmentParameters] = {p[0], p[0], p[0]};
        for (int c = 3; c < 6; ++c) q[c] = (1 - p[0]) * mean;
        q[6] = 1;
        return later(kAffine, q);
      }
      case kAutocontrast:
        return autocontrast();
      case kEqualize:
        return equalize();
      case kSharpness:
        return sharpen(float(p[0]));
      case kBlur:
        return blur(p);
      case kMixBegin:
        as_buffer();
        save(memory_.base, 1, false);
        return save(memory_.mixed, 0, false);
      case kMixAdd:
        as_buffer();
        save(memory_.mixed, float(p[0]), true);
        return restore();
      case kMixEnd: {
        as_buffer();
        float* const mixed = room(memory_.mixed);
        const float share = float(p[0]);
        for (int64_t i = 0; i < size(); ++i)
          buffer_[i] = (1 - share) * buffer_[i] + share * mixed[i];
        return;
      }
      default:
        return later(op, p);
    }
  }

  void later(int32_t op, const double* p, const float* table = nullptr) {
    AugmentPixelOp pixel{};
    pixel.op = op;
    for (int k = 0; k < kAugmentParameters; ++k) pixel.p[k] = float(p[k]);
    pixel.table = op == kNoise ? batch_.normal : table;
    pixel.stream = op == kNoise ? int32_t(uint32_t(p[3])) : 0;
    pixel.seed = batch_.seed;
    pixel.place = batch_.places[image_];
    pixel.height = height();
    pixel.width = width();
    memory_.ops.push_back(pixel);
  }

  // f(row, the row's planes) for every row, its colours done. With `keep` the planes are those of
  // the buffer.
  template <class F>
  void rows(float* keep, F&& f) {
    rows(keep, f, [](auto&&...) { return false; });
  }

  // `whole` may take a row that is along the axes all by itself.
  template <class F, class W>
  void rows(float* keep, F&& f, W&& whole) {
    const bool aligned = map_.aligned();
    AugmentAxes axes;
    AugmentMap map;
    if (!buffered_ && aligned) axes = memory_.tables.make(map_, source_, channels_, kernels_);
    if (!buffered_ && !aligned) map = as_map();
    const int count = int(memory_.ops.size());
    const AugmentPixelOp* const ops = memory_.ops.data();
    const int64_t plane = height() * stride();
    const auto some = [&](int64_t begin, int64_t end) {
      RowMemory& memory = row_memory;
      memory.take(source_.width, width());
      for (int64_t row = begin; row < end; ++row) {
        if (!buffered_ && aligned && whole(axes, row, memory.scratch)) continue;
        float* planes[3];
        float* const base = buffered_ ? buffer_ : keep;
        for (int c = 0; c < channels_; ++c)
          planes[c] = base ? base + c * plane + row * stride() : memory.planes[c];
        if (!buffered_ && aligned) kernels_.axes_row(axes, row, memory.scratch, planes);
        if (!buffered_ && !aligned) kernels_.map_row(map, row, memory.scratch, planes);
        if (count) kernels_.pixels(ops, count, channels_, row, width(), planes);
        f(row, planes);
      }
    };
    if (threads_ > 1)
      parallel_for(threads_, height(), INT64_MAX,
                   [&](int64_t begin, int64_t end) { some(begin, end); });
    else
      some(0, height());
    memory_.ops.clear();
  }

  AugmentMap as_map() const {
    AugmentMap a{};
    a.source = source_;
    a.channels = channels_;
    a.width = width();
    std::copy(map_.m, map_.m + 9, a.m);
    a.interpolation = map_.interpolation;
    a.projective = map_.projective();
    a.half_width = map_.half_width() > 1 + 1e-6f ? map_.half_width() : 1;
    a.x0 = map_.x0, a.y0 = map_.y0, a.x1 = map_.x1, a.y1 = map_.y1;
    a.frames = map_.frames;
    std::copy(map_.frame, map_.frame + map_.frames, a.frame);
    for (int c = 0; c < 3; ++c) a.fill[c] = float(map_.fill[c]);
    return a;
  }

  int64_t size() const { return channels_ * height() * stride(); }

  // The image so far, as floats; `see` looks at each row on the way.
  template <class F>
  void as_buffer(F&& see) {
    if (!buffered_) {
      float* const to = room(memory_.floats[at_]);
      rows(to, see);
      buffer_ = to;
      buffered_ = true;
    } else {
      rows(nullptr, see);
    }
  }
  void as_buffer() {
    if (buffered_ && memory_.ops.empty()) return;
    as_buffer([](int64_t, float* const*) {});
  }

  // The image so far as bytes, which geometry reads.
  void as_source() {
    const int64_t plane = height() * width();
    uint8_t* const to = memory_.bytes[next_].take<uint8_t>(channels_ * plane + kSlack);
    const int64_t w = width();
    rows(nullptr, [&](int64_t row, float* const* planes) {
      for (int c = 0; c < channels_; ++c)
        kernels_.store(planes[c], w, to + c * plane + row * w, kUint8);
    });
    next_ = 1 - next_;
    source_ = {to, height(), width(), width(), 1, plane};
    map_.start(source_.height, source_.width);
    buffered_ = false;
  }

  double gray_mean() {
    double* const sums = memory_.sums.take<double>(height());
    as_buffer([&](int64_t row, float* const* planes) {
      sums[row] = kernels_.gray_sum(planes, channels_, width());
    });
    double total = 0;
    for (int64_t row = 0; row < height(); ++row) total += sums[row];
    return total / double(height() * width());
  }

  void autocontrast() {
    as_buffer();
    double q[kAugmentParameters] = {};
    for (int c = 0; c < channels_; ++c) {
      float low = 255, high = 0;
      for (int64_t row = 0; row < height(); ++row)
        kernels_.range(buffer_ + (c * height() + row) * stride(), width(), &low, &high);
      q[c] = high > low ? 255.0 / (double(high) - low) : 1;
      q[3 + c] = high > low ? -low * q[c] : 0;
    }
    q[6] = 1;
    later(kAffine, q);
  }

  // As torchvision: the cumulative histogram, less its last step, in 255 steps.
  void equalize() {
    as_buffer();
    std::vector<float>& table = memory_.lookup;
    table.assign(size_t(256 * channels_), 0);
    for (int c = 0; c < channels_; ++c) {
      int64_t counts[4][256] = {};
      for (int64_t row = 0; row < height(); ++row) {
        const float* const v = buffer_ + (c * height() + row) * stride();
        for (int64_t x = 0; x < width(); ++x)
          ++counts[x & 3][std::min(255, int(std::nearbyintf(v[x])))];
      }
      int64_t last = 0, below = 0;
      for (int i = 0; i < 256; ++i) {
        for (int k = 1; k < 4; ++k) counts[0][i] += counts[k][i];
        if (counts[0][i]) last = counts[0][i];
      }
      const int64_t wide = (height() * width() - last) / 255;
      for (int i = 0; i < 256; ++i) {
        const int64_t level = wide ? (below + wide / 2) / wide : i;
        table[size_t(256 * c + i)] = float(std::min<int64_t>(level, 255));
        below += counts[0][i];
      }
    }
    const double none[kAugmentParameters] = {};
    later(kTable, none, table.data());
  }

  template <class F>
  void each_row(F&& f) {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) f(row);
    };
    if (threads_ > 1)
      parallel_for(threads_, channels_ * height(), INT64_MAX,
                   [&](int64_t begin, int64_t end) { some(begin, end); });
    else
      some(0, channels_ * height());
  }

  // Room for the image as floats; vectors may be read across its end.
  float* room(Kept& memory) const { return memory.take<float>(size() + kSlack); }
  float* other() {
    at_ = 1 - at_;
    return room(memory_.floats[at_]);
  }

  void sharpen(float factor) {
    as_buffer();
    if (height() <= 2 || width() <= 2) return;
    float* const to = other();
    const int64_t h = height(), w = width(), s = stride();
    each_row([&](int64_t of_all) {
      const int64_t row = of_all % h;
      const float* const x = buffer_ + of_all * s;
      float* const out = to + of_all * s;
      std::memcpy(out, x, size_t(w) * sizeof(float));
      if (row == 0 || row == h - 1) return;
      RowMemory& memory = row_memory;
      memory.take(source_.width, w);
      static const float kSide[3] = {1 / 13.0f, 1 / 13.0f, 1 / 13.0f};
      static const float kBoth[4] = {1 / 13.0f, 1 / 13.0f, 1 / 13.0f, 4 / 13.0f};
      // Sums of three rows, then of three columns; and four more times the middle.
      float *const column = memory.scratch.x, *const sums = memory.scratch.y;
      const float* const three[3] = {x - s, x, x + s};
      const float one[3] = {1, 1, 1};
      kernels_.weighted_rows(three, one, 3, w, column);
      kernels_.weighted_columns(column, kSide, 3, w - 2, sums);
      const float* const two[2] = {sums, x + 1};
      const float of_two[2] = {1, kBoth[3]};
      kernels_.weighted_rows(two, of_two, 2, w - 2, column);
      kernels_.blend(x + 1, factor, column, 1 - factor, w - 2, sums);
      std::memcpy(out + 1, sums, size_t(w - 2) * sizeof(float));
    });
    buffer_ = to;
  }

  void blur(const double* p) {
    as_buffer();
    float* const to = other();
    const int64_t h = height(), w = width(), s = stride();
    const int across = int(p[0]), down = int(p[2]);
    const std::vector<float> weights_x = gaussian(across, p[1]), weights_y = gaussian(down, p[3]);
    const auto mirrored = [](int64_t i, int64_t n) {
      i = i < 0 ? -i : i;
      return i >= n ? 2 * (n - 1) - i : i;
    };
    each_row([&](int64_t of_all) {
      const int64_t row = of_all % h, first = of_all - row;
      std::vector<const float*> from(static_cast<size_t>(down));
      for (int k = 0; k < down; ++k)
        from[size_t(k)] = buffer_ + (first + mirrored(row + k - down / 2, h)) * s;
      std::vector<float> line(size_t(s + across + 16));
      float* const middle = line.data() + across / 2;
      kernels_.weighted_rows(from.data(), weights_y.data(), down, w, middle);
      for (int64_t x = w; x < w + across / 2; ++x) middle[x] = middle[mirrored(x, w)];
      for (int64_t x = -(across / 2); x < 0; ++x) middle[x] = middle[mirrored(x, w)];
      kernels_.weighted_columns(line.data(), weights_x.data(), across, w, to + of_all * s);
    });
    buffer_ = to;
  }

  static std::vector<float> gaussian(int taps, double sigma) {
    std::vector<double> w(static_cast<size_t>(taps));
    double total = 0;
    for (int k = 0; k < taps; ++k) {
      const double at = (k - (taps - 1) / 2.0) / sigma;
      total += w[size_t(k)] = std::exp(-0.5 * at * at);
    }
    std::vector<float> out(w.size());
    for (size_t k = 0; k < w.size(); ++k) out[k] = float(w[k] / total);
    return out;
  }

  void save(Kept& where, float weight, bool add) {
    float* const to = room(where);
    for (int64_t i = 0; i < size(); ++i) to[i] = weight * buffer_[i] + (add ? to[i] : 0);
  }

  void restore() {
    buffer_ = room(memory_.floats[at_]);
    std::memcpy(buffer_, room(memory_.base), size_t(size()) * sizeof(float));
    buffered_ = true;
  }

  void finish() {
    char* const out = batch_.outputs[image_];
    const int64_t w = width(), plane = height() * w, bytes = size_of(batch_.dtype);
    const int count = int(memory_.ops.size());
    const AugmentPixelOp* const ops = memory_.ops.data();
    const auto at = [&](int64_t row, int c) { return out + (c * plane + row * w) * bytes; };
    rows(
        nullptr,
        [&](int64_t row, float* const* planes) {
          for (int c = 0; c < channels_; ++c)
            kernels_.store(planes[c], w, at(row, c), batch_.dtype);
        },
        [&](const AugmentAxes& axes, int64_t row, const AugmentScratch& scratch) {
          void* const outputs[3] = {at(row, 0), at(row, 1), at(row, 2)};
          return kernels_.whole_row(axes, row, scratch, ops, count, outputs, batch_.dtype);
        });
  }

  const AugmentBatch& batch_;
  const int64_t image_;
  const int threads_, channels_;
  const AugmentKernels& kernels_ = kernels();
  ImageMemory& memory_ = image_memory;
  AugmentImage source_;
  Composite map_;
  float* buffer_ = nullptr;  // the image as floats, if `buffered_`: then no geometry is due
  bool buffered_ = false;
  int next_ = 0, at_ = 0;  // of memory_.bytes, of memory_.floats
};

}  // namespace

void augment(const AugmentBatch& batch, int threads) {
  if (batch.images >= threads || threads <= 1) {
    parallel_tasks(threads, batch.images,
                   [&](int64_t image, int) { Run(batch, image, 1).run(); });
    return;
  }
  for (int64_t image = 0; image < batch.images; ++image) Run(batch, image, threads).run();
}

void uniform_numbers(const uint64_t* places, int64_t count_of_places, uint64_t seed,
                     uint32_t stream, int64_t count, double* numbers) {
  for (int64_t i = 0; i < count_of_places; ++i, numbers += count)
    for (int64_t k = 0; k < count; k += 4) {
      const Random words = philox({{uint32_t(places[i]), uint32_t(places[i] >> 32), stream,
                                    uint32_t(k / 4)}},
                                  seed);
      for (int64_t j = k; j < count && j < k + 4; ++j)
        numbers[j] = (words.word[j - k] + 0.5) * 0x1p-32;
    }
}

void mix_pairs(char* images, int64_t pairs, int64_t elements, int dtype, const float* keep,
               int threads) {
  // In pieces, so that two threads share one pair as well.
  constexpr int64_t kPiece = 1 << 14;
  const AugmentKernels& table = kernels();
  const int64_t bytes = size_of(dtype), pieces = (elements + kPiece - 1) / kPiece;
  parallel_for(threads, pairs * pieces, 4 * pairs * elements * bytes,
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t pair = task / pieces, first = task % pieces * kPiece;
                   char* const x = images + (2 * pair * elements + first) * bytes;
                   table.mix(x, x + elements * bytes, keep[pair],
                             std::min(kPiece, elements - first), dtype);
                 }
               });
}

void swap_boxes(char* images, int64_t pairs, int64_t channels, int64_t height, int64_t width,
                int64_t element_size, const int64_t* boxes, int threads) {
  const int64_t image = channels * height * width * element_size;
  parallel_for(threads, pairs, 4 * pairs * image, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t *const box = boxes + 4 * pair, bytes = (box[3] - box[1]) * element_size;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t y = box[0]; y < box[2]; ++y) {
          char* const x =
              images + 2 * pair * image + ((c * height + y) * width + box[1]) * element_size;
          std::swap_ranges(x, x + bytes, x + image);
        }
    }
  });
}
