/*
 * The loops over a photo that photos/image.py would leave to Pillow and numpy: `squash` is Pillow's
 * BOX to the bit, `mask` is what numpy computes there to the bit, `scans` counts as it does. Tests
 * hold them against each other; where this library is not installed, Pillow and numpy run.
 *
 * Pillow's BOX gives each of the averaged samples the same weight, so one multiplication of their
 * sum is enough. It averages along the rows, rounds, then along the columns; so does this, but a
 * row is added to its square's line at once: no picture is held in between.
 *
 * For any processor, by the vectors of gcc and clang. To be compiled with -ffp-contract=off: a
 * multiply-add in one step rounds otherwise than numpy.
 */

#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#ifdef _WIN32
#define PUBLIC __declspec(dllexport)
#else
#define PUBLIC __attribute__((visibility("default")))
#endif

typedef uint32_t numbers __attribute__((vector_size(16)));
typedef float floats __attribute__((vector_size(16)));

/* Bits after the point of Pillow's weights (Resample.c: 32 − 8 bits of a sample − 2). */
#define PRECISION 22

/* Apache Arrow's C data interface, by which Pillow shows an image's own memory. */
struct arrow_array {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct arrow_array **children;
    struct arrow_array *dictionary;
    void (*release)(struct arrow_array *);
    void *private_data;
};

/* Which of `length` samples output `index` of `size` is the mean of, by Resample.c's own steps. */
static int32_t average_of(int32_t index, int64_t length, int32_t size, int32_t *first) {
    double scale = (double)length / size, filter_scale = scale < 1 ? 1 : scale;
    double centre = (index + 0.5) * scale, support = 0.5 * filter_scale;
    double per_sample = 1 / filter_scale;
    int64_t from = (int64_t)(centre - support + 0.5), to = (int64_t)(centre + support + 0.5);
    int32_t count = 0;
    from = from < 0 ? 0 : from;
    to = to > length ? length : to;
    for (int64_t at = from; at < to; ++at) {
        double x = (at - centre + 0.5) * per_sample;
        if (x > -0.5 && x <= 0.5 && !count++)
            *first = (int32_t)at;
    }
    return count;
}

static uint32_t weight_of(int32_t count) {
    return count ? (uint32_t)(0.5 + 1.0 / count * (1 << PRECISION)) : 0;
}

static numbers load(const void *at) {
    numbers four;
    memcpy(&four, at, sizeof four);
    return four;
}

static floats load_floats(const float *at) {
    floats four;
    memcpy(&four, at, sizeof four);
    return four;
}

/* The four bytes of a pixel. */
static numbers samples(const uint8_t *at) {
    return (numbers){at[0], at[1], at[2], at[3]};
}

static numbers mean(numbers sum, uint32_t weight) {
    numbers rounded = (sum * weight + (1 << (PRECISION - 1))) >> PRECISION;
    numbers most = (numbers){0} + 255, over = (numbers)(rounded > most);
    return (rounded & ~over) | (most & over);
}

/*
 * image: RGB, four bytes a pixel, width x height.
 * scratch: 6 x size.
 * square: [size][size][3].
 */
PUBLIC void pixels_squash(const struct arrow_array *image, int64_t width, int64_t height,
                          int32_t size, int32_t *scratch, uint8_t *square) {
    const uint8_t *pixels = image->children[0]->buffers[1];
    int32_t *first = scratch, *count = scratch + size;
    uint32_t *sums = (uint32_t *)scratch + 2 * size;
    for (int32_t x = 0; x < size; ++x)
        count[x] = average_of(x, width, size, &first[x]);
    for (int32_t y = 0; y < size; ++y) {
        int32_t top = 0, rows = average_of(y, height, size, &top);
        memset(sums, 0, 4 * size * sizeof *sums);
        for (int64_t row = top; row < top + rows; ++row) {
            const uint8_t *line = pixels + 4 * width * row;
            for (int32_t x = 0; x < size; ++x) {
                const uint8_t *at = line + 4 * (int64_t)first[x];
                numbers sum = {0};
                for (int32_t i = 0; i < count[x]; ++i, at += 4)
                    sum += samples(at);
                sum = load(sums + 4 * x) + mean(sum, weight_of(count[x]));
                memcpy(sums + 4 * x, &sum, sizeof sum);
            }
        }
        for (int32_t x = 0; x < size; ++x, square += 3) {
            numbers rgb = mean(load(sums + 4 * x), weight_of(rows));
            for (int32_t i = 0; i < 3; ++i)
                square[i] = (uint8_t)rgb[i];
        }
    }
}

/* The source sample before output `index` of `length`, and the share of the next. */
static int32_t position(int64_t index, int64_t length, int64_t source, float *share) {
    double at = (index + 0.5) * ((double)source / length) - 0.5;
    at = at < 0 ? 0 : at > source - 1 ? source - 1 : at;
    int32_t before = (int32_t)at;
    *share = (float)(at - before);
    return before;
}

/* Eight pixels as bits, the leftmost highest. */
static uint8_t pack(floats left, floats right, float threshold) {
#ifdef __SSE2__
    __m128 limit = _mm_set1_ps(threshold);
    __m128 high = _mm_cmpgt_ps((__m128)left, limit), low = _mm_cmpgt_ps((__m128)right, limit);
    return (uint8_t)(_mm_movemask_ps(_mm_shuffle_ps(high, high, 0x1B)) << 4 |
                     _mm_movemask_ps(_mm_shuffle_ps(low, low, 0x1B)));
#else
    floats limit = (floats){0} + threshold;
    numbers bits = ((numbers)(left > limit) & (numbers){128, 64, 32, 16}) |
                   ((numbers)(right > limit) & (numbers){8, 4, 2, 1});
    return (uint8_t)(bits[0] | bits[1] | bits[2] | bits[3]);
#endif
}

static void store(float *at, floats four) {
    memcpy(at, &four, sizeof four);
}

/*
 * One row of the probability at the photo's width, and its mask. All pixels between two samples
 * take four at a time; what is written beyond the last of them the next samples write again.
 */
static void widen(const float *row, int64_t columns, int64_t stride, const int32_t *left,
                  const float *across, float threshold, float *wide, uint8_t *packed) {
    int64_t length = 8 * stride, x = 0;
    while (x < length) {
        int64_t column = left[x], start = x;
        float before = row[column], step = row[column + (column + 1 < columns)] - before;
        for (; x + 4 <= length && left[x] == column; x += 4)
            store(wide + x, before + step * load_floats(across + x));
        if (x > start)
            while (left[x - 1] != column)
                --x;
        for (; x < length && left[x] == column; ++x)
            wide[x] = before + step * across[x];
    }
    for (int64_t byte = 0; byte < stride; ++byte)
        packed[byte] =
            pack(load_floats(wide + 8 * byte), load_floats(wide + 8 * byte + 4), threshold);
}

static floats between(const float *upper, const float *lower, float share) {
    floats above = load_floats(upper);
    return above + (load_floats(lower) - above) * share;
}

/*
 * probability: [rows][columns].
 * scratch: 34 x stride, where stride is that of the mask: ceil(width / 8).
 * mask: [height][stride]; padding bits are not cleared.
 */
PUBLIC void pixels_mask(const float *probability, int64_t rows, int64_t columns, int64_t width,
                        int64_t height, float threshold, float *scratch, uint8_t *mask) {
    int64_t stride = (width + 7) / 8, wide = 8 * stride, at = -1, differing = 0;
    float *across = scratch, *upper = scratch + wide, *lower = scratch + 2 * wide;
    int32_t *left = (int32_t *)(scratch + 3 * wide), *differ = left + wide;
    uint8_t *above = (uint8_t *)(differ + stride), *below = above + stride;
    for (int64_t x = 0; x < wide; ++x)
        left[x] = position(x, width, columns, &across[x]);
    for (int64_t y = 0; y < height; ++y, mask += stride) {
        float down;
        int64_t top = position(y, height, rows, &down);
        if (top != at) {
            if (top == at + 1 && y) {
                float *former = upper;
                uint8_t *packed = above;
                upper = lower, lower = former;
                above = below, below = packed;
            } else {
                widen(probability + top * columns, columns, stride, left, across, threshold,
                      upper, above);
            }
            int64_t next = top + 1 < rows ? top + 1 : top;
            widen(probability + next * columns, columns, stride, left, across, threshold, lower,
                  below);
            differing = 0;
            for (int32_t byte = 0; byte < stride; ++byte) {
                differ[differing] = byte;
                differing += above[byte] != below[byte];
            }
            at = top;
        }
        memcpy(mask, above, stride);
        for (int64_t i = 0; i < differing; ++i) {
            const float *a = upper + 8 * differ[i], *b = lower + 8 * differ[i];
            mask[differ[i]] = pack(between(a, b, down), between(a + 4, b + 4, down), threshold);
        }
    }
}

/*
 * How many scans a JPEG has, by its markers up to the end of image, as libjpeg walks through them:
 * TEM and markers that are not assigned have no length, and one below 2 is that of nothing.
 */
PUBLIC int64_t pixels_scans(const uint8_t *data, int64_t size) {
    const uint8_t *at = data + 2, *last = data + size - 1;
    int64_t scans = 0;
    while (at < last && (at = memchr(at, 0xFF, last - at))) {
        uint8_t marker = at[1];
        if (marker < 0xC0 || marker == 0xFF) { /* stuffed, fill bytes, without a length */
            ++at;
            continue;
        }
        if ((marker >= 0xD0 && marker <= 0xD8) || (marker >= 0xF0 && marker != 0xFE)) {
            at += 2;
            continue;
        }
        if (marker == 0xD9)
            break;
        scans += marker == 0xDA;
        if (last - at < 3)
            break;
        int64_t length = at[2] << 8 | at[3];
        length = length < 2 ? 2 : length;
        if (last - at < 2 + length)
            break;
        at += 2 + length;
    }
    return scans;
}
