// The augmentation of kernels/augment/augment_triton.py on a CPU: ragged uint8 images -> finished views, one image a thread.
//
// Everything is float32 on the scale 0 to 255. A view is kept as three planes whose rows are padded to whole vectors,
// so that few loops have a tail; all of it (600 kB at 224 px) stays in the second-level cache of a core.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// As Spec in kernels/augment/augment_cpu.py, which a test compares with it.
extern "C" struct Spec {
    int32_t size;         // output height and width, pixels
    int32_t cubic;        // 0: bilinear
    int32_t blur_kernel;  // pixels, odd
    int32_t jitter, grayscale, blur, solarize;  // 0: never drawn, whatever the parameters hold
    float threshold;      // solarize: values at or above are inverted
    float mean[3];        // on the scale 0 to 255, as std
    float std[3];
};

namespace {

// Columns of the parameters and operations of the jitter, as Column and Adjustment in kernels/augment/layout.py, which a
// test compares with them.
enum Column { TOP, LEFT, HEIGHT, WIDTH, FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE = 13, BLUR, SOLARIZE, COLUMNS };
enum Adjustment { OP_BRIGHTNESS, OP_CONTRAST, OP_SATURATION, OP_HUE };

// Numbers in a vector: those of a register, since compilers take some operations on longer vectors apart one by one.
#ifdef __AVX512F__
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
constexpr int BLOCK = WIDE / 3;  // rows of a view that are made together: a vector holds a pixel of each
using Floats = float __attribute__((vector_size(4 * WIDE)));
using Ints = int32_t __attribute__((vector_size(4 * WIDE)));
using Shorts = int16_t __attribute__((vector_size(2 * WIDE)));
using Bytes = uint8_t __attribute__((vector_size(WIDE)));
using Pixel = float __attribute__((vector_size(16)));  // red, green, blue, and what comes next

using Buffer = std::vector<Floats>;  // aligned to whole vectors, with AVX-512 to cache lines
inline float* floats(Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

template <class T>
inline T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

template <class T>
inline void store(void* to, T value) {
    std::memcpy(to, &value, sizeof(T));
}

inline Floats widened(const uint8_t* from) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(from)));
#else
    // In steps, for which compilers have instructions.
    const Shorts shorts = __builtin_convertvector(load<Bytes>(from), Shorts);
    return __builtin_convertvector(__builtin_convertvector(shorts, Ints), Floats);
#endif
}

template <class T>
inline T clamp(T x) {
    x = x > T{} ? x : T{};
    const T top = T{} + 255.0f;
    return x < top ? x : top;
}

inline Floats least(Floats a, Floats b) { return a < b ? a : b; }
inline Floats most(Floats a, Floats b) { return a > b ? a : b; }
inline Floats luma(Floats r, Floats g, Floats b) { return 0.2989f * r + 0.587f * g + 0.114f * b; }

// Lane i of the result is lane from[i] of a and b one after the other.
inline Floats shuffled(Floats a, Floats b, Ints from) {
#ifdef __clang__
    Floats out;
    for (int i = 0; i < WIDE; i++) out[i] = from[i] < WIDE ? a[from[i]] : b[from[i] - WIDE];
    return out;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

inline int padded(int n) { return (n + WIDE - 1) / WIDE * WIDE; }

// A matrix of WIDE rows in place: each step exchanges the halves of blocks with those half a block down.
template <int HALF>
inline void exchange(Floats* rows) {
    Ints first, second;
    for (int i = 0; i < WIDE; i++) {
        first[i] = i & HALF ? WIDE + i - HALF : i;
        second[i] = i & HALF ? WIDE + i : i + HALF;
    }
    for (int i = 0; i < WIDE; i++) {
        if (i & HALF) continue;
        const Floats a = rows[i], b = rows[i + HALF];
        rows[i] = shuffled(a, b, first);
        rows[i + HALF] = shuffled(a, b, second);
    }
}

inline void transpose(Floats* rows) {
    exchange<1>(rows), exchange<2>(rows), exchange<4>(rows);
    if constexpr (WIDE == 16) exchange<8>(rows);
}

float filter(float distance, bool cubic) {
    const float d = std::fabs(distance);
    if (!cubic) return std::max(0.0f, 1 - d);
    if (d < 1) return (1.5f * d - 2.5f) * d * d + 1;  // Keys 1981, a = -1/2
    return d < 2 ? ((-0.5f * d + 2.5f) * d - 4) * d + 2 : 0;
}

// Antialiased resize of one axis: output pixel i is the sum over k of weight[i * taps + k] * input[start[i] + k].
struct Axis {
    int taps = 0;
    std::vector<int> start;
    std::vector<float> weight;

    void plan(int size, int length, bool cubic, bool flip) {
        const float scale = float(length) / size, wider = std::max(1.0f, scale), support = wider * (cubic ? 2 : 1);
        taps = std::min(length, int(std::ceil(2 * support)));
        start.assign(size, 0);
        weight.assign(size_t(size) * taps, 0.0f);
        for (int i = 0; i < size; i++) {
            const float center = (i + 0.5f) * scale;
            const int place = flip ? size - 1 - i : i;
            const int first = std::clamp(int(std::floor(center - support + 0.5f)), 0, length - taps);
            float* w = &weight[size_t(place) * taps];
            float sum = 0;
            for (int k = 0; k < taps; k++) sum += w[k] = filter((first + k + 0.5f - center) / wider, cubic);
            for (int k = 0; k < taps; k++) w[k] /= sum;
            start[place] = first;
        }
    }
};

struct Row {
    float *r, *g, *b;
};

struct Job {
    const uint8_t* image;
    int width;              // pixels of a row of the image
    const float* drawn;     // its row of the parameters
    const Spec* spec;
};

// One view in the making; made once a thread, so that memory is not asked for again.
class View {
   public:
    explicit View(const Spec& spec)
        : size_(spec.size), stride_(padded(spec.size)), planes_(size_t(3) * stride_ * size_ / WIDE) {}

    void crop(const Job& job) {
        const int tall = int(job.drawn[HEIGHT]), wide = int(job.drawn[WIDTH]);
        down_.plan(size_, tall, job.spec->cubic, false);
        across_.plan(size_, wide, job.spec->cubic, job.drawn[FLIP] > 0);
        line_.resize(padded(3 * wide) / WIDE + 1);
        columns_.resize(wide + 1);
    }

    // Rows [y, y + BLOCK) of the crop into the planes, fewer at the end; returns how many.
    int resize_rows(const Job& job, int y) {
        const size_t pitch = size_t(3) * job.width;
        const uint8_t* corner = job.image + size_t(job.drawn[TOP]) * pitch + 3 * size_t(job.drawn[LEFT]);
        const int rows = std::min(BLOCK, size_ - y), wide = int(job.drawn[WIDTH]);
        float *line = floats(line_), *columns = floats(columns_);
        for (int row = 0; row < rows; row++) {
            resize_down(corner + down_.start[y + row] * pitch, pitch, &down_.weight[size_t(y + row) * down_.taps], 3 * wide);
            // The last lane of each pixel is where the next row's red goes.
            for (int x = 0; x < wide; x++) store(columns + WIDE * x + 3 * row, load<Pixel>(line + 3 * x));
        }
        Floats square[WIDE] = {};
        for (int x = 0; x < stride_; x += WIDE) {
            const int count = std::min(WIDE, size_ - x);
            for (int i = 0; i < count; i++) {
                const Floats* from = &columns_[across_.start[x + i]];
                const float* w = &across_.weight[size_t(x + i) * across_.taps];
                Floats sum{};
                for (int k = 0; k < across_.taps; k++) sum += w[k] * from[k];
                square[i] = clamp(sum);
            }
            transpose(square);
            for (int row = 0; row < rows; row++) {
                const Row to = at(y + row);
                store(to.r + x, square[3 * row]), store(to.g + x, square[3 * row + 1]), store(to.b + x, square[3 * row + 2]);
            }
        }
        return rows;
    }

    void blur(float sigma, int kernel) {
        std::vector<float> taps = gaussian(sigma, kernel);
        const int reach = int(taps.size()) - 1;
        line_.resize((stride_ + 2 * reach) / WIDE + 2);
        spare_.resize(size_t(stride_) * size_ / WIDE);
        for (int channel = 0; channel < 3; channel++) {
            float *plane = floats(planes_) + size_t(channel) * stride_ * size_, *spare = floats(spare_);
            for (int y = 0; y < size_; y++) blur_row(plane + size_t(y) * stride_, spare + size_t(y) * stride_, taps);
            for (int y = 0; y < size_; y += 2) blur_columns(plane + size_t(y) * stride_, y, taps);
        }
    }

    Row at(int y) {
        float* row = floats(planes_) + size_t(y) * stride_;
        const size_t plane = size_t(stride_) * size_;
        return {row, row + plane, row + 2 * plane};
    }

    int stride() const { return stride_; }

   private:
    void resize_down(const uint8_t* source, size_t pitch, const float* weight, int length) {
        float* line = floats(line_);
        int j = 0;
        for (; j + WIDE <= length; j += WIDE) {
            Floats sum{};
            for (int k = 0; k < down_.taps; k++) {
                sum += weight[k] * widened(source + k * pitch + j);
            }
            store(line + j, sum);
        }
        for (; j < length; j++) {
            float sum = 0;
            for (int k = 0; k < down_.taps; k++) sum += weight[k] * source[k * pitch + j];
            line[j] = sum;
        }
    }

    // Weights of the distances 0 to reach; what adds less than 1e-8 is left out.
    std::vector<float> gaussian(float sigma, int kernel) const {
        const int whole = std::min(kernel / 2, size_ - 1);
        const int reach = std::min(whole, int(std::ceil(sigma * 6.07f)));
        std::vector<float> taps(reach + 1);
        float sum = 0;
        for (int k = 0; k <= reach; k++) sum += (k ? 2 : 1) * (taps[k] = std::exp(-0.5f * k * k / (sigma * sigma)));
        for (float& tap : taps) tap /= sum;
        return taps;
    }

    int mirrored(int i) const {
        i = std::abs(i);
        return size_ - 1 - std::abs(size_ - 1 - i);
    }

    void blur_row(const float* row, float* out, const std::vector<float>& taps) {
        const int reach = int(taps.size()) - 1;
        float* middle = floats(line_) + reach;
        std::memcpy(middle, row, sizeof(float) * size_);
        for (int k = 1; k <= reach; k++) middle[-k] = row[mirrored(-k)], middle[size_ - 1 + k] = row[mirrored(size_ - 1 + k)];
        for (int x = 0; x < stride_; x += WIDE) {
            Floats sum = taps[0] * load<Floats>(middle + x);
            for (int k = 1; k <= reach; k++)
                sum += taps[k] * (load<Floats>(middle + x - k) + load<Floats>(middle + x + k));
            store(out + x, sum);
        }
    }

    // Rows y and y + 1 together: what is k below the one is k + 1 below the other, and loaded once.
    void blur_columns(float* out, int y, const std::vector<float>& taps) {
        const int reach = int(taps.size()) - 1, last = y + (y + 1 < size_) + reach;
        const auto rows = [&](int i) { return floats(spare_) + size_t(mirrored(std::min(i, last))) * stride_; };
        for (int x = 0; x < stride_; x += WIDE) {
            Floats above = load<Floats>(rows(y) + x), below = load<Floats>(rows(y + 1) + x);
            Floats first = taps[0] * above, second = taps[0] * below;
            for (int k = 1; k <= reach; k++) {
                const Floats next_above = load<Floats>(rows(y - k) + x), next_below = load<Floats>(rows(y + 1 + k) + x);
                first += taps[k] * (next_above + below);
                second += taps[k] * (above + next_below);
                above = next_above, below = next_below;
            }
            store(out + x, first);
            if (y + 1 < size_) store(out + stride_ + x, second);
        }
    }

    int size_, stride_;
    Buffer planes_, spare_, line_, columns_;
    Axis down_, across_;
};

// factor * x + other.
void blend_constant(Row row, int n, float factor, float other) {
    for (float* plane : {row.r, row.g, row.b})
        for (int i = 0; i < n; i += WIDE) store(plane + i, clamp(factor * load<Floats>(plane + i) + other));
}

void saturate(Row row, int n, float factor) {
    for (int i = 0; i < n; i += WIDE) {
        const Floats r = load<Floats>(row.r + i), g = load<Floats>(row.g + i), b = load<Floats>(row.b + i);
        const Floats other = (1 - factor) * luma(r, g, b);
        store(row.r + i, clamp(factor * r + other));
        store(row.g + i, clamp(factor * g + other));
        store(row.b + i, clamp(factor * b + other));
    }
}

// Hue turned at constant HSV saturation and value; a sixth of the circle is the unit.
void turn_hue(Row row, int n, float turns) {
    const Floats zero{}, one = zero + 1.0f, six = zero + 6.0f;
    const auto ramp = [&](Floats x) { return least(most(x, zero), one); };
    const auto magnitude = [&](Floats x) { return most(x, -x); };
    for (int i = 0; i < n; i += WIDE) {
        const Floats r = load<Floats>(row.r + i), g = load<Floats>(row.g + i), b = load<Floats>(row.b + i);
        const Floats high = most(r, most(g, b)), low = least(r, least(g, b)), span = high - low;
        const Floats tiny = zero + 1e-9f, unit = one / most(span, tiny);
        const Floats from_red = (g - b) * unit, from_green = (b - r) * unit + 2.0f, from_blue = (r - g) * unit + 4.0f;
        Floats hue = high == r ? from_red : (high == g ? from_green : from_blue);
        hue += 6 * turns;
        hue = hue < zero ? hue + six : hue;
        hue = hue >= six ? hue - six : hue;
        store(row.r + i, low + span * ramp(magnitude(hue - 3.0f) - 1.0f));
        store(row.g + i, low + span * ramp(2.0f - magnitude(hue - 2.0f)));
        store(row.b + i, low + span * ramp(2.0f - magnitude(hue - 4.0f)));
    }
}

void gray(Row row, int n) {
    for (int i = 0; i < n; i += WIDE) {
        const Floats y = luma(load<Floats>(row.r + i), load<Floats>(row.g + i), load<Floats>(row.b + i));
        store(row.r + i, y), store(row.g + i, y), store(row.b + i, y);
    }
}

double gray_sum(Row row, int size) {
    Floats sums{};
    int x = 0;
    for (; x + WIDE <= size; x += WIDE) sums += luma(load<Floats>(row.r + x), load<Floats>(row.g + x), load<Floats>(row.b + x));
    double sum = 0;
    for (; x < size; x++) sum += 0.2989f * row.r[x] + 0.587f * row.g[x] + 0.114f * row.b[x];
    for (int i = 0; i < WIDE; i++) sum += sums[i];
    return sum;
}

// The jitter's turns [from, to) on one row.
void jitter(Row row, int n, const float* drawn, int from, int to, float mean) {
    for (int turn = from; turn < to; turn++) {
        const int operation = int(drawn[ORDER + turn]);
        const float factor = drawn[BRIGHTNESS + operation];
        if (operation == OP_HUE) {
            if (factor != 0) turn_hue(row, n, factor);
        } else if (factor != 1) {
            if (operation == OP_SATURATION) saturate(row, n, factor);
            else blend_constant(row, n, factor, operation == OP_CONTRAST ? (1 - factor) * mean : 0);
        }
    }
}

// A third of three vectors, interleaved: lane i is of plane (i + WIDE * third) % 3.
template <int THIRD>
inline Floats interleaved(Floats r, Floats g, Floats b) {
    Ints two, three;
    for (int i = 0; i < WIDE; i++) {
        const int at = WIDE * THIRD + i, from = at / 3;
        two[i] = at % 3 == 1 ? WIDE + from : from;
        three[i] = at % 3 == 2 ? WIDE + from : i;
    }
    return shuffled(shuffled(r, g, two), b, three);
}

// Solarized where drawn, normalized, interleaved.
void finish(Row row, const Job& job, float* out) {
    const Spec& spec = *job.spec;
    const float above = spec.solarize && job.drawn[SOLARIZE] > 0 ? spec.threshold : 1e9f;
    const auto value = [&](const float* plane, int channel) {
        const float factor = 1 / spec.std[channel], shift = -spec.mean[channel] / spec.std[channel];
        const Floats x = load<Floats>(plane);
        return (x >= above ? 255.0f - x : x) * factor + shift;
    };
    for (int x = 0; x < spec.size; x += WIDE) {
        const Floats r = value(row.r + x, 0), g = value(row.g + x, 1), b = value(row.b + x, 2);
        const Floats pixels[] = {interleaved<0>(r, g, b), interleaved<1>(r, g, b), interleaved<2>(r, g, b)};
        if (x + WIDE <= spec.size)
            for (int third = 0; third < 3; third++) store(out + 3 * x + WIDE * third, pixels[third]);
        else
            std::memcpy(out + 3 * x, pixels, 3 * sizeof(float) * (spec.size - x));
    }
}

void make(View& view, const Job& job, float* out) {
    const Spec& spec = *job.spec;
    const int size = spec.size, n = view.stride(), turns = spec.jitter ? 4 : 0;
    const float* drawn = job.drawn;
    int contrast = 0;  // its turn: the first that needs the mean of the whole view
    while (contrast < turns && int(drawn[ORDER + contrast]) != OP_CONTRAST) contrast++;
    if (drawn[CONTRAST] == 1) contrast = turns;
    double sum = 0;
    view.crop(job);
    for (int y = 0; y < size;) {
        for (int end = y + view.resize_rows(job, y); y < end; y++) {
            jitter(view.at(y), n, drawn, 0, contrast, 0);
            if (contrast < turns) sum += gray_sum(view.at(y), size);
        }
    }
    const float mean = float(sum / (double(size) * size)), sigma = spec.blur ? drawn[BLUR] : 0;
    for (int y = 0; y < size; y++) {
        const Row row = view.at(y);
        jitter(row, n, drawn, contrast, turns, mean);
        if (spec.grayscale && drawn[GRAYSCALE] > 0) gray(row, n);
        if (sigma <= 0) finish(row, job, out + size_t(3) * size * y);
    }
    if (sigma <= 0) return;
    view.blur(sigma, spec.blur_kernel);
    for (int y = 0; y < size; y++) finish(view.at(y), job, out + size_t(3) * size * y);
}

void make(View& view, const Job& job, uint8_t* out) {  // the crop alone, rounded, in planes
    const int size = job.spec->size;
    view.crop(job);
    for (int y = 0; y < size; y += view.resize_rows(job, y)) continue;
    for (int y = 0; y < size; y++) {
        const Row row = view.at(y);
        const float* planes[] = {row.r, row.g, row.b};
        for (int channel = 0; channel < 3; channel++)
            for (int x = 0; x < size; x++)
                out[(size_t(channel) * size + y) * size + x] = uint8_t(planes[channel][x] + 0.5f);
    }
}

bool sound(const float* drawn, int height, int width) {
    const auto inside = [](float start, float length, int side) {
        return start >= 0 && length >= 1 && start + length <= side;
    };
    if (!inside(drawn[TOP], drawn[HEIGHT], height) || !inside(drawn[LEFT], drawn[WIDTH], width)) return false;
    for (int turn = 0; turn < 4; turn++)
        if (!(drawn[ORDER + turn] >= 0 && drawn[ORDER + turn] < 4)) return false;
    return true;
}

template <class T>
int64_t run(const uint8_t* const* images, const int32_t* heights, const int32_t* widths, const float* parameters,
            int64_t count, const Spec* spec, T* out, int32_t threads) {
    for (int64_t i = 0; i < count; i++)
        if (!sound(parameters + i * COLUMNS, heights[i], widths[i])) return i;
    std::atomic<int64_t> next{0};
    const size_t step = size_t(3) * spec->size * spec->size;
    const auto work = [&] {
        View view(*spec);
        for (int64_t i; (i = next++) < count;)
            make(view, Job{images[i], widths[i], parameters + i * COLUMNS, spec}, out + i * step);
    };
    std::vector<std::thread> others;
    for (int64_t k = 1; k < std::min<int64_t>(threads, count); k++) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return -1;
}

}  // namespace

// Views (count, size, size, 3) float32 of images (height, width, 3) and parameters (count, COLUMNS).
// Returns -1, or the number of the first image whose box does not lie in it or whose order is none.
extern "C" int64_t augment_views(const uint8_t* const* images, const int32_t* heights, const int32_t* widths,
                                 const float* parameters, int64_t count, const Spec* spec, float* out,
                                 int32_t threads) {
    return run(images, heights, widths, parameters, count, spec, out, threads);
}

// Crops alone, flipped where drawn: (count, 3, size, size) uint8; arguments and result as for augment_views.
extern "C" int64_t crop_views(const uint8_t* const* images, const int32_t* heights, const int32_t* widths,
                              const float* parameters, int64_t count, const Spec* spec, uint8_t* out,
                              int32_t threads) {
    return run(images, heights, widths, parameters, count, spec, out, threads);
}
