/*
 * The loops over a photo that photos/image.py would leave to Pillow and numpy: `squash` is Pillow's
 * BOX to the bit, `mask` is what numpy computes there to the bit, `scans` counts as it does. Tests
 * hold them against each other; where this library does not load, Pillow and numpy run.
 *
 * Pillow's BOX gives each of the averaged samples the same weight, so one multiplication of their
 * sum is enough. It averages along the rows, rounds, then along the columns; so does this, but a
 * row is added to its square's line at once: no picture is held in between.
 *
 * Built for x86-64-v2, below which numpy does not run either. It has no multiply-add in one step,
 * which would round otherwise than numpy.
 */

#include <stdint.h>
#include <string.h>

#include <smmintrin.h>

#define PUBLIC __attribute__((visibility("default")))

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

static __m128i mean(__m128i sum, uint32_t weight) {
    __m128i product = _mm_mullo_epi32(sum, _mm_set1_epi32((int)weight));
    product = _mm_add_epi32(product, _mm_set1_epi32(1 << (PRECISION - 1)));
    return _mm_min_epi32(_mm_srli_epi32(product, PRECISION), _mm_set1_epi32(255));
}

/*
 * image: RGB, four bytes a pixel, width x height.
 * scratch: 6 x size.
 * square: [size][size][3].
 */
PUBLIC void pixels_squash(const struct arrow_array *image, int64_t width, int64_t height,
                          int32_t size, int32_t *scratch, uint8_t *square) {
    const uint8_t *pixels = image->children[0]->buffers[1];
    int32_t *first = scratch, *count = scratch + size, *sums = scratch + 2 * size;
    for (int32_t x = 0; x < size; ++x)
        count[x] = average_of(x, width, size, &first[x]);
    for (int32_t y = 0; y < size; ++y) {
        int32_t top = 0, rows = average_of(y, height, size, &top);
        memset(sums, 0, 4 * size * sizeof *sums);
        for (int64_t row = top; row < top + rows; ++row) {
            const uint8_t *line = pixels + 4 * width * row;
            for (int32_t x = 0; x < size; ++x) {
                const uint8_t *at = line + 4 * (int64_t)first[x];
                __m128i sum = _mm_setzero_si128();
                for (int32_t i = 0; i < count[x]; ++i, at += 4)
                    sum = _mm_add_epi32(sum, _mm_cvtepu8_epi32(_mm_loadu_si32(at)));
                __m128i *total = (__m128i *)(sums + 4 * x);
                sum = mean(sum, weight_of(count[x]));
                _mm_storeu_si128(total, _mm_add_epi32(_mm_loadu_si128(total), sum));
            }
        }
        for (int32_t x = 0; x < size; ++x, square += 3) {
            __m128i rgb = mean(_mm_loadu_si128((__m128i *)(sums + 4 * x)), weight_of(rows));
            rgb = _mm_packus_epi32(rgb, rgb);
            int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(rgb, rgb));
            memcpy(square, &bytes, 3);
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
static uint8_t pack(__m128 left, __m128 right, __m128 threshold) {
    __m128 high = _mm_cmpgt_ps(left, threshold), low = _mm_cmpgt_ps(right, threshold);
    return (uint8_t)(_mm_movemask_ps(_mm_shuffle_ps(high, high, 0x1B)) << 4 |
                     _mm_movemask_ps(_mm_shuffle_ps(low, low, 0x1B)));
}

/* One row of the probability at the photo's width, and its mask. */
static void widen(const float *row, int64_t columns, int64_t stride, const int32_t *left,
                  const float *across, __m128 threshold, float *wide, uint8_t *packed) {
    for (int64_t x = 0; x < 8 * stride; ++x) {
        float before = row[left[x]], after = row[left[x] + (left[x] + 1 < columns)];
        wide[x] = before + (after - before) * across[x];
    }
    for (int64_t byte = 0; byte < stride; ++byte)
        packed[byte] =
            pack(_mm_loadu_ps(wide + 8 * byte), _mm_loadu_ps(wide + 8 * byte + 4), threshold);
}

static __m128 between(const float *upper, const float *lower, __m128 share) {
    __m128 above = _mm_loadu_ps(upper), step = _mm_sub_ps(_mm_loadu_ps(lower), above);
    return _mm_add_ps(above, _mm_mul_ps(step, share));
}

/*
 * probability: [rows][columns].
 * scratch: 34 x stride, where stride is that of the mask: ceil(width / 8).
 * mask: [height][stride]; padding bits are not cleared.
 */
PUBLIC void pixels_mask(const float *probability, int64_t rows, int64_t columns, int64_t width,
                        int64_t height, float threshold, float *scratch, uint8_t *mask) {
    int64_t stride = (width + 7) / 8, wide = 8 * stride, at = -1;
    float *across = scratch, *upper = scratch + wide, *lower = scratch + 2 * wide;
    int32_t *left = (int32_t *)(scratch + 3 * wide);
    uint8_t *above = (uint8_t *)(scratch + 4 * wide), *below = above + stride;
    __m128 limit = _mm_set1_ps(threshold);
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
                widen(probability + top * columns, columns, stride, left, across, limit, upper,
                      above);
            }
            int64_t next = top + 1 < rows ? top + 1 : top;
            widen(probability + next * columns, columns, stride, left, across, limit, lower, below);
            at = top;
        }
        __m128 share = _mm_set1_ps(down);
        for (int64_t byte = 0; byte < stride; ++byte) {
            const float *a = upper + 8 * byte, *b = lower + 8 * byte;
            mask[byte] = above[byte] == below[byte]
                             ? above[byte]
                             : pack(between(a, b, share), between(a + 4, b + 4, share), limit);
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
