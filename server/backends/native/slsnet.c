/*
 * SLSNet's generator on processors with AVX-512 and its bfloat16 products (Zen 4, Cooper Lake,
 * Sapphire Rapids and later).
 *
 * Why by hand: two thirds of the network are two attentions over 64 x 64 positions. A general
 * runtime writes their 4096 x 4096 weights to memory and reads them again; here a tile of them
 * lives in registers and L1 (as in FlashAttention, Dao et al. 2022), with exponentials of a few
 * instructions. What multiplies bfloat16 adds up in float32. What is sensitive stays float32: the
 * stem, the residual stream, channel attention's energies, the query-key products of the small
 * attentions (which reach thousands), and every softmax.
 *
 * Maps are [position][channel]. Each map of the residual stream is kept twice: float32, and
 * bfloat16 as the next product takes it. Work is cut into the same pieces and summed in the same
 * order whatever the number of threads and images, so an image's answer is the same bits in any
 * company.
 *
 * Built by `python -m server.backends.native.build`, described in docs/cpu-engine.md.
 */
#include <immintrin.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef __m512 vec;

enum { SIDE = 128, LANES = 16, MOST_THREADS = 64 };

/* ---- threads ------------------------------------------------------------------------------- */

/*
 * A step of the work is so many pieces; each thread takes pieces until there are none, then waits
 * for those that others have taken. Nobody waits for a thread as such: one that the system does not
 * let run has taken nothing, and when it comes it finds the steps done, walks through them and
 * goes.
 */
enum { MOST_STEPS = 256, OPEN = 1 << 30, SPINS = 3000 };

typedef struct {
    _Atomic uint32_t state; /* OPEN while it may be joined, plus the threads that are in it */
    _Atomic int sleepers;
    int images, first;            /* that threads take one by one; 0 where all are on the one */
    _Atomic int next[MOST_STEPS]; /* piece of each step */
    _Atomic uint32_t done[MOST_STEPS]; /* pieces of each step */
} Team;

/* A thread on its way through the steps; without a team it does all pieces itself. */
typedef struct {
    Team *team;
    int step, next, count, taken;
} Member;

static long futex(void *word, int operation, uint32_t value) {
    return syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

/* The next piece of this step; `count` or more when none is left. */
INLINE int next_piece(Member *me, int count) {
    if (!me->team)
        return me->next++;
    int piece = atomic_fetch_add_explicit(&me->team->next[me->step], 1, memory_order_relaxed);
    me->count = count;
    me->taken += piece < count;
    return piece;
}

#define FOR_PIECES(piece, count) for (int piece; (piece = next_piece(me, count)) < (count);)

/* The end of a step: until all its pieces are done. */
static void team_wait(Member *me) {
    Team *team = me->team;
    if (!team) {
        me->next = 0;
        return;
    }
    _Atomic uint32_t *done = &team->done[me->step];
    const uint32_t count = me->count, taken = me->taken;
    me->step++;
    me->taken = 0;
    if (taken && atomic_fetch_add(done, taken) + taken == count && atomic_load(&team->sleepers))
        futex(done, FUTEX_WAKE_PRIVATE, INT32_MAX);
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(done, memory_order_acquire) == count)
            return;
        _mm_pause();
    }
    atomic_fetch_add(&team->sleepers, 1);
    for (uint32_t seen; (seen = atomic_load(done)) != count;)
        futex(done, FUTEX_WAIT_PRIVATE, seen);
    atomic_fetch_sub(&team->sleepers, 1);
}

/* ---- numbers ------------------------------------------------------------------------------- */

INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store_bf16(bf16 *to, vec x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

INLINE __m512i widen(const bf16 *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}

INLINE vec load_bf16(const bf16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(widen(from), 16));
}

INLINE __m512i lane_numbers(void) {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

INLINE vec dot2(vec sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

INLINE __m512i pair(const bf16 *at) {
    int32_t bits;
    memcpy(&bits, at, 4);
    return _mm512_set1_epi32(bits);
}

/* 2^x for x in [-126, 127]; relative error 1e-4, far below bfloat16's 4e-3. */
INLINE vec exp2_rough(vec x) {
    const vec shift = _mm512_set1_ps(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec rounded = _mm512_add_ps(x, shift);
    vec f = _mm512_sub_ps(x, _mm512_sub_ps(rounded, shift));
    vec p = _mm512_fmadd_ps(_mm512_set1_ps(0.0550887f), f, _mm512_set1_ps(0.2426041f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6932762f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999289f));
    __m512i e = _mm512_slli_epi32(_mm512_castps_si512(rounded), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), e));
}

/* e^x for x <= 0, to float32's precision. */
INLINE vec exp_exact(vec x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    vec p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* ---- convolution --------------------------------------------------------------------------- */

enum {
    ROWS = 8
}; /* positions (or queries) of a tile; times two vectors of 16 it fills 16 registers */

/* Weights as the products read them: [outputs / (16 * vecs)][tap][inputs / 2][vecs][16][2]. */
typedef struct {
    int taps, inputs, outputs, vecs;
    int dy[9], dx[9];
    bf16 *weights;
    float *bias;
} Conv;

typedef struct {
    const bf16 *in;
    int in_height, in_width;
    int in_stride;         /* of the input: positions a step of the output moves */
    int height, width;     /* of the output, or of one phase of it */
    int out_stride;        /* 2 for a phase of a deconvolution */
    int out_y, out_x;      /* of a phase */
    const float *residual; /* added; may be the same memory as out32 */
    int relu;
    float *out32; /* either may be NULL */
    bf16 *out16;
    int out_channels; /* a position's channels in out, of which this writes the first */
} Place;

/* A bias of none, and the channels of a position outside. */
static float zeros[128] __attribute__((aligned(64)));

INLINE void conv_tile(const Conv *c, const Place *p, const int rows, const int vecs, int block,
                      int y, int x) {
    vec sum[16][2];
    const float *bias = c->bias + block * LANES * vecs;
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++)
            sum[i][v] = _mm512_loadu_ps(bias + v * LANES);
    const int pairs = c->inputs / 2;
    const bf16 *weights = c->weights + (size_t)block * c->taps * pairs * vecs * 32;
    for (int t = 0; t < c->taps; t++, weights += (size_t)pairs * vecs * 32) {
        const bf16 *in[16];
        int iy = y * p->in_stride + c->dy[t], any = 0;
        if (iy < 0 || iy >= p->in_height)
            continue;
        for (int i = 0; i < rows; i++) {
            int ix = (x + i) * p->in_stride + c->dx[t];
            int inside = ix >= 0 && ix < p->in_width;
            any |= inside;
            in[i] =
                inside ? p->in + ((size_t)iy * p->in_width + ix) * c->inputs : (const bf16 *)zeros;
        }
        if (!any)
            continue;
        for (int k = 0; k < pairs; k++) {
            __m512i w[2];
            for (int v = 0; v < vecs; v++)
                w[v] = _mm512_loadu_si512(weights + (k * vecs + v) * 32);
            for (int i = 0; i < rows; i++) {
                __m512i a = pair(in[i] + 2 * k);
                for (int v = 0; v < vecs; v++)
                    sum[i][v] = dot2(sum[i][v], a, w[v]);
            }
        }
    }
    const int out_width = p->width * p->out_stride;
    for (int i = 0; i < rows; i++) {
        size_t at =
            (size_t)(y * p->out_stride + p->out_y) * out_width + (x + i) * p->out_stride + p->out_x;
        at = at * p->out_channels + block * LANES * vecs;
        for (int v = 0; v < vecs; v++) {
            vec value = sum[i][v];
            if (p->residual)
                value = _mm512_add_ps(value, _mm512_loadu_ps(p->residual + at + v * LANES));
            if (p->relu)
                value = _mm512_max_ps(value, _mm512_setzero_ps());
            if (p->out32)
                _mm512_storeu_ps(p->out32 + at + v * LANES, value);
            if (p->out16)
                store_bf16(p->out16 + at + v * LANES, value);
        }
    }
}

INLINE int rows_a_piece(const Place *p) { return p->width >= 64 ? 2 : 64 / p->width; }

/* One piece: some rows of one block of outputs. */
static void conv_piece(const Conv *c, const Place *p, int piece) {
    const int rows = rows_a_piece(p), groups = p->height / rows;
    const int block = piece / groups, first = piece % groups * rows;
    for (int y = first; y < first + rows; y++)
        if (c->vecs == 1)
            for (int x = 0; x < p->width; x += 2 * ROWS)
                conv_tile(c, p, 2 * ROWS, 1, block, y, x);
        else
            for (int x = 0; x < p->width; x += ROWS)
                conv_tile(c, p, ROWS, 2, block, y, x);
}

static int conv_count(const Conv *c, const Place *p) {
    return p->height / rows_a_piece(p) * (c->outputs / (LANES * c->vecs));
}

/* Convolutions that do not depend on each other, in one step. */
static void convs(Member *me, int count, const Conv *const *c, const Place *p) {
    int starts[5] = {0};
    for (int i = 0; i < count; i++)
        starts[i + 1] = starts[i] + conv_count(c[i], &p[i]);
    FOR_PIECES(piece, starts[count]) {
        int i = 0;
        while (piece >= starts[i + 1])
            i++;
        conv_piece(c[i], &p[i], piece - starts[i]);
    }
    team_wait(me);
}

/* ---- the network --------------------------------------------------------------------------- */

typedef struct {
    Conv projections[3]; /* key, query, value */
    float eta;
} Pam;

typedef struct {
    Conv convs[4];
    float gamma;
} Fcm;

typedef struct {
    Conv conv;
    const float *scale, *shift; /* of the pooled half */
    Pam pam;
} Down;

typedef struct {
    Conv phases[4];
    Pam pam;
    Fcm fcm[2];
} Up;

enum { STEM = 16, POSITIONS = 4096 };

/* What a thread, or a team of them, needs to take one image through. */
typedef struct {
    float image[(130 * 130 + 66 * 66 + 34 * 34 + 18 * 18) * 3];
    float branch[(SIDE * SIDE + 64 * 64 + 32 * 32 + 16 * 16) * STEM];
    float a32[SIDE * SIDE * STEM], b32[POSITIONS * 32];
    bf16 a16[SIDE * SIDE * STEM], b16[POSITIONS * 32], c16[POSITIONS * 32];
    bf16 query[POSITIONS * 32], key[POSITIONS * 32], value[POSITIONS * 32];
    float query32[1024 * 64], key32[1024 * 64];
    bf16 key_pack[POSITIONS * 32], value_pack[POSITIONS * 32];
    float key_pack32[1024 * 64];
    float key_most[128];
    float gram[32][16 * 16 * 64]; /* partial sums, by block of positions */
    bf16 mix[128 * 128];
    float logits[SIDE * SIDE * LANES];
} Scratch;

typedef struct Engine {
    int threads;
    void *memory; /* of all weights */
    char *free_memory;
    const float *stem_weights[4], *stem_bias[4];
    float stem_gamma[4];
    Down down[3];
    Fcm encoder1[4], encoder2[8], bridge;
    float bridge_gamma;
    Pam bridge_pam;
    Up up[2];
    Conv head[4];
    void *scratch_memory[MOST_THREADS + 1];
    Scratch
        *scratch[MOST_THREADS + 1]; /* one for each thread, and the last for all of them together */
    pthread_mutex_t one_at_a_time;
    pthread_t workers[MOST_THREADS];
    int started;
    Team *teams; /* one more than workers, so that one is always empty */
    _Atomic int current;
    _Atomic uint32_t job;
    _Atomic int closing;
    const uint8_t *in;
    float *out;
} Engine;

INLINE vec relu(vec x) { return _mm512_max_ps(x, _mm512_setzero_ps()); }

/* ---- channel attention --------------------------------------------------------------------- */

enum { GRAM_POSITIONS = 512 };

/* Rows r..r+7 and 32 columns (16 where there are no more) of A^T A over one block of positions. */
INLINE void gram_tile(const float *a, int count, int channels, const int vecs, int row, int column,
                      float *to) {
    vec sum[8][2];
    for (int i = 0; i < 8; i++)
        for (int v = 0; v < vecs; v++)
            sum[i][v] = _mm512_setzero_ps();
    for (int position = 0; position < count; position++, a += channels) {
        vec b[2];
        for (int v = 0; v < vecs; v++)
            b[v] = _mm512_loadu_ps(a + column + v * LANES);
        for (int i = 0; i < 8; i++) {
            vec x = _mm512_set1_ps(a[row + i]);
            for (int v = 0; v < vecs; v++)
                sum[i][v] = _mm512_fmadd_ps(x, b[v], sum[i][v]);
        }
    }
    for (int i = 0; i < 8; i++)
        for (int v = 0; v < vecs; v++)
            _mm512_storeu_ps(to + (row + i) * channels + column + v * LANES, sum[i][v]);
}

/* CAM, eq. 2 with DANet's energies: x + gamma * softmax(max - A A^T) A, from x32/x16 to y32/y16;
 * y32 may be x32, y16 not x16. */
static void channel_attention(Member *me, Scratch *s, float gamma, int positions, int channels,
                              const float *x32, const bf16 *x16, float *y32, bf16 *y16) {
    const int block = positions < GRAM_POSITIONS ? positions : GRAM_POSITIONS;
    const int blocks = positions / block;
    const int vecs = channels == 16 ? 1 : 2;
    FOR_PIECES(piece, blocks * (channels / 8)) {
        int at = piece / (channels / 8), row = piece % (channels / 8) * 8;
        for (int column = 0; column < channels && column <= row + 7; column += LANES * vecs) {
            const float *a = x32 + (size_t)at * block * channels;
            if (vecs == 1)
                gram_tile(a, block, channels, 1, row, column, s->gram[at]);
            else
                gram_tile(a, block, channels, 2, row, column, s->gram[at]);
        }
    }
    team_wait(me);
    /* Row i of the softmax becomes output i of a 1x1 convolution. */
    Conv mix = {.taps = 1,
                .inputs = channels,
                .outputs = channels,
                .vecs = vecs,
                .weights = s->mix,
                .bias = zeros};
    FOR_PIECES(piece, channels / 8) {
        for (int row = piece * 8; row < piece * 8 + 8; row++) {
            float energy[128] __attribute__((aligned(64)));
            for (int j = 0; j < channels; j++) {
                int at = row > j ? row * channels + j : j * channels + row;
                float sum = 0;
                for (int b = 0; b < blocks; b++)
                    sum += s->gram[b][at];
                energy[j] = sum;
            }
            vec least = _mm512_set1_ps(INFINITY), total = _mm512_setzero_ps();
            for (int j = 0; j < channels; j += LANES)
                least = _mm512_min_ps(least, _mm512_load_ps(energy + j));
            least = _mm512_set1_ps(_mm512_reduce_min_ps(least));
            for (int j = 0; j < channels; j += LANES) {
                vec e = exp_exact(_mm512_sub_ps(least, _mm512_load_ps(energy + j)));
                total = _mm512_add_ps(total, e);
                _mm512_store_ps(energy + j, e);
            }
            float scale = gamma / _mm512_reduce_add_ps(total);
            int out_block = row / (LANES * vecs), lane = row % (LANES * vecs);
            bf16 *to = s->mix + (size_t)out_block * channels / 2 * vecs * 32 + lane * 2;
            for (int j = 0; j < channels; j += 2) {
                to[(j / 2) * vecs * 32] = to_bf16(energy[j] * scale);
                to[(j / 2) * vecs * 32 + 1] = to_bf16(energy[j + 1] * scale);
            }
        }
    }
    team_wait(me);
    const int width = positions == SIDE * SIDE ? SIDE
                      : positions == 4096      ? 64
                      : positions == 1024      ? 32
                                               : 16;
    const Conv *list[] = {&mix};
    Place place = {.in = x16,
                   .in_height = width,
                   .in_width = width,
                   .in_stride = 1,
                   .height = width,
                   .width = width,
                   .out_stride = 1,
                   .residual = x32,
                   .out32 = y32,
                   .out16 = y16,
                   .out_channels = channels};
    convs(me, 1, list, &place);
}

/* ---- position attention -------------------------------------------------------------------- */

enum { QUERIES = 16, KEYS = 128 }; /* of a tile: scores, weights, keys and values fit L1 */

/* Scores of 8 queries against 32 keys, less what is given for each query. */
INLINE void scores16(const bf16 *query, const bf16 *keys, const float *less, const int channels,
                     vec sum[ROWS][2]) {
    for (int i = 0; i < ROWS; i++)
        sum[i][0] = sum[i][1] = _mm512_set1_ps(-less[i]);
    for (int k = 0; k < channels / 2; k++) {
        __m512i b0 = _mm512_loadu_si512(keys + k * 64), b1 = _mm512_loadu_si512(keys + k * 64 + 32);
        for (int i = 0; i < ROWS; i++) {
            __m512i a = pair(query + i * channels + 2 * k);
            sum[i][0] = dot2(sum[i][0], a, b0);
            sum[i][1] = dot2(sum[i][1], a, b1);
        }
    }
}

INLINE void scores32(const float *query, const float *keys, const float *less, const int channels,
                     vec sum[ROWS][2]) {
    for (int i = 0; i < ROWS; i++)
        sum[i][0] = sum[i][1] = _mm512_set1_ps(-less[i]);
    for (int k = 0; k < channels; k++) {
        vec b0 = _mm512_loadu_ps(keys + k * 32), b1 = _mm512_loadu_ps(keys + k * 32 + 16);
        for (int i = 0; i < ROWS; i++) {
            vec a = _mm512_set1_ps(query[i * channels + k]);
            sum[i][0] = _mm512_fmadd_ps(a, b0, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(a, b1, sum[i][1]);
        }
    }
}

/* out[rows][16 * vecs] += weights[rows][KEYS] * values, from column `at` of `channels`. */
INLINE void weigh(const bf16 *weights, const bf16 *values, float *out, const int channels,
                  const int rows, const int vecs) {
    vec sum[16][2];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++)
            sum[i][v] = _mm512_loadu_ps(out + i * channels + v * LANES);
    for (int k = 0; k < KEYS / 2; k++) {
        __m512i b[2];
        for (int v = 0; v < vecs; v++)
            b[v] = _mm512_loadu_si512(values + (size_t)k * channels * 2 + v * 32);
        for (int i = 0; i < rows; i++) {
            __m512i a = pair(weights + i * KEYS + 2 * k);
            for (int v = 0; v < vecs; v++)
                sum[i][v] = dot2(sum[i][v], a, b[v]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++)
            _mm512_storeu_ps(out + i * channels + v * LANES, sum[i][v]);
}

/* Sixteen queries over all keys. Queries come times log2(e), so that weights are powers of two of
 * scores. */
INLINE void attend(const Scratch *s, const int channels, const int exact, int positions, int first,
                   float eta, const float *x32, float *y32, bf16 *y16) {
    float out[QUERIES * 128] __attribute__((aligned(64)));
    bf16 weights[QUERIES * KEYS] __attribute__((aligned(64)));
    float scores[QUERIES * KEYS] __attribute__((aligned(64)));
    float most[QUERIES], less[QUERIES] = {0};
    vec total[QUERIES];
    int bounded = 1;
    for (int i = 0; i < QUERIES; i++) {
        /* No score of this query is above this and none below 0: both sides are behind a ReLU. */
        vec sum = _mm512_setzero_ps();
        for (int c = 0; c < channels; c += LANES) {
            vec q;
            if (exact)
                q = _mm512_loadu_ps(s->query32 + (size_t)(first + i) * channels + c);
            else
                q = load_bf16(s->query + (size_t)(first + i) * channels + c);
            sum = _mm512_fmadd_ps(q, _mm512_loadu_ps(s->key_most + c), sum);
        }
        most[i] = _mm512_reduce_add_ps(sum);
        bounded &= most[i] < 100.0f;
        total[i] = _mm512_setzero_ps();
    }
    /* Where no weight can underflow, the bound does as well as the highest score, which is then not
     * looked for. */
    for (int i = 0; i < QUERIES; i++)
        if (bounded)
            less[i] = most[i];
        else
            most[i] = -1e30f;
    memset(out, 0, sizeof(float) * QUERIES * channels);
    const vec lowest = _mm512_set1_ps(-126.0f);
    for (int key = 0; key < positions; key += KEYS) {
        for (int at = 0; at < KEYS; at += 32) {
            const bf16 *keys = s->key_pack + (size_t)(key + at) * channels;
            const float *keys32 = s->key_pack32 + (size_t)(key + at) * channels;
            for (int row = 0; row < QUERIES; row += ROWS) {
                vec sum[ROWS][2];
                if (exact)
                    scores32(s->query32 + (size_t)(first + row) * channels, keys32, less + row,
                             channels, sum);
                else
                    scores16(s->query + (size_t)(first + row) * channels, keys, less + row,
                             channels, sum);
                if (bounded) {
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        vec p0 = exp2_rough(sum[i][0]), p1 = exp2_rough(sum[i][1]);
                        total[row + i] = _mm512_add_ps(total[row + i], _mm512_add_ps(p0, p1));
                        _mm512_store_si512(weights + (row + i) * KEYS + at,
                                           (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        _mm512_store_ps(scores + (row + i) * KEYS + at, sum[i][0]);
                        _mm512_store_ps(scores + (row + i) * KEYS + at + LANES, sum[i][1]);
                    }
                }
            }
        }
        if (!bounded)
            for (int i = 0; i < QUERIES; i++) {
                const float *row = scores + i * KEYS;
                vec highest = _mm512_load_ps(row);
                for (int at = LANES; at < KEYS; at += LANES)
                    highest = _mm512_max_ps(highest, _mm512_load_ps(row + at));
                float peak = _mm512_reduce_max_ps(highest);
                if (peak > most[i]) {
                    vec fade = exp2_rough(_mm512_max_ps(_mm512_set1_ps(most[i] - peak), lowest));
                    total[i] = _mm512_mul_ps(total[i], fade);
                    for (int c = 0; c < channels; c += LANES)
                        _mm512_store_ps(
                            out + i * channels + c,
                            _mm512_mul_ps(_mm512_load_ps(out + i * channels + c), fade));
                    most[i] = peak;
                }
                vec bound = _mm512_set1_ps(most[i]);
                for (int at = 0; at < KEYS; at += 32) {
                    vec t0 = _mm512_sub_ps(_mm512_load_ps(row + at), bound);
                    vec t1 = _mm512_sub_ps(_mm512_load_ps(row + at + LANES), bound);
                    vec p0 = exp2_rough(_mm512_max_ps(t0, lowest)),
                        p1 = exp2_rough(_mm512_max_ps(t1, lowest));
                    total[i] = _mm512_add_ps(total[i], _mm512_add_ps(p0, p1));
                    _mm512_store_si512(weights + i * KEYS + at,
                                       (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
                }
            }
        const bf16 *values = s->value_pack + (size_t)key * channels;
        if (channels == 16)
            weigh(weights, values, out, 16, 16, 1);
        else
            for (int row = 0; row < QUERIES; row += ROWS)
                for (int c = 0; c < channels; c += 32)
                    weigh(weights + row * KEYS, values + c * 2, out + row * channels + c, channels,
                          ROWS, 2);
    }
    for (int i = 0; i < QUERIES; i++) {
        vec scale = _mm512_set1_ps(eta / _mm512_reduce_add_ps(total[i]));
        for (int c = 0; c < channels; c += LANES) {
            size_t at = (size_t)(first + i) * channels + c;
            vec y = _mm512_fmadd_ps(_mm512_load_ps(out + i * channels + c), scale,
                                    _mm512_loadu_ps(x32 + at));
            _mm512_storeu_ps(y32 + at, y);
            if (y16)
                store_bf16(y16 + at, y);
        }
    }
}

/* Keys [position][channel] -> [position / 32][channel pair][32][2]; values -> [position /
 * 2][channel][2]. */
static void pack_keys_and_values(Member *me, Scratch *s, int positions, int channels, int exact) {
    FOR_PIECES(piece, positions / 32) {
        const size_t base = (size_t)piece * 32 * channels;
        const int step =
            exact ? channels : channels / 2; /* from one position to the next, in 32 bits */
        const int *from = exact ? (const int *)(s->key32 + base) : (const int *)(s->key + base);
        int *to = exact ? (int *)(s->key_pack32 + base) : (int *)(s->key_pack + base);
        const __m512i lanes = _mm512_mullo_epi32(_mm512_set1_epi32(step), lane_numbers());
        for (int c = 0; c < step; c++)
            for (int half = 0; half < 2; half++)
                _mm512_storeu_si512(
                    to + c * 32 + half * LANES,
                    _mm512_i32gather_epi32(lanes, from + half * LANES * step + c, 4));
        for (int p = 0; p < 32; p += 2)
            for (int c = 0; c < channels; c += LANES) {
                const bf16 *value = s->value + base + (size_t)p * channels + c;
                __m512i even = widen(value), odd = widen(value + channels);
                _mm512_storeu_si512(s->value_pack + base + (size_t)p * channels + c * 2,
                                    _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
    }
    team_wait(me);
    FOR_PIECES(piece, channels / LANES) {
        vec most = _mm512_setzero_ps();
        for (int p = 0; p < positions; p++) {
            size_t at = (size_t)p * channels + piece * LANES;
            vec k;
            if (exact)
                k = _mm512_loadu_ps(s->key32 + at);
            else
                k = load_bf16(s->key + at);
            most = _mm512_max_ps(most, k);
        }
        _mm512_storeu_ps(s->key_most + piece * LANES, most);
    }
    team_wait(me);
}

/* PAM, eq. 4: x + eta * softmax(query key^T) value; y32 may be x32. */
static void position_attention(Member *me, Scratch *s, const Pam *pam, int width, int channels,
                               const float *x32, const bf16 *x16, float *y32, bf16 *y16) {
    const int positions = width * width, exact = channels >= 64;
    Place place = {.in = x16,
                   .in_height = width,
                   .in_width = width,
                   .in_stride = 1,
                   .height = width,
                   .width = width,
                   .out_stride = 1,
                   .relu = 1,
                   .out_channels = channels};
    Place places[3] = {place, place, place};
    if (exact)
        places[0].out32 = s->key32, places[1].out32 = s->query32;
    else
        places[0].out16 = s->key, places[1].out16 = s->query;
    places[2].out16 = s->value;
    const Conv *list[] = {&pam->projections[0], &pam->projections[1], &pam->projections[2]};
    convs(me, 3, list, places);
    pack_keys_and_values(me, s, positions, channels, exact);
    FOR_PIECES(piece, positions / QUERIES) {
        int first = piece * QUERIES;
        switch (channels) {
        case 16:
            attend(s, 16, 0, positions, first, pam->eta, x32, y32, y16);
            break;
        case 32:
            attend(s, 32, 0, positions, first, pam->eta, x32, y32, y16);
            break;
        case 64:
            attend(s, 64, 1, positions, first, pam->eta, x32, y32, y16);
            break;
        default:
            attend(s, 128, 1, positions, first, pam->eta, x32, y32, y16);
        }
    }
    team_wait(me);
}

/* ---- stages -------------------------------------------------------------------------------- */

static void one_conv(Member *me, const Conv *c, int width, const bf16 *in, const float *residual,
                     float *out32, bf16 *out16) {
    Place place = {.in = in,
                   .in_height = width,
                   .in_width = width,
                   .in_stride = 1,
                   .height = width,
                   .width = width,
                   .out_stride = 1,
                   .residual = residual,
                   .relu = 1,
                   .out32 = out32,
                   .out16 = out16,
                   .out_channels = c->outputs};
    convs(me, 1, &c, &place);
}

/* Factorised layer, eqs. 5 and 6: a32/a16 -> a32/c16. */
static void factorised(Member *me, Scratch *s, const Fcm *f, int width) {
    one_conv(me, &f->convs[0], width, s->a16, NULL, NULL, s->b16);
    one_conv(me, &f->convs[1], width, s->b16, NULL, NULL, s->c16);
    one_conv(me, &f->convs[2], width, s->c16, NULL, NULL, s->b16);
    one_conv(me, &f->convs[3], width, s->b16, s->a32, s->a32, s->c16);
}

/* FCM, figure 4, on a32/a16 in place. */
static void fcm(Member *me, Scratch *s, const Fcm *f, int width, int channels) {
    factorised(me, s, f, width);
    channel_attention(me, s, f->gamma, width * width, channels, s->a32, s->c16, s->a32, s->a16);
}

/* a32/a16 [2w x 2w x inputs] -> [w x w x outputs], in place. */
static void down(Member *me, Scratch *s, const Down *d, int width, int inputs, int outputs) {
    const Conv *list[] = {&d->conv};
    Place place = {.in = s->a16,
                   .in_height = 2 * width,
                   .in_width = 2 * width,
                   .in_stride = 2,
                   .height = width,
                   .width = width,
                   .out_stride = 1,
                   .relu = 1,
                   .out32 = s->b32,
                   .out16 = s->b16,
                   .out_channels = outputs};
    convs(me, 1, list, &place);
    FOR_PIECES(y, width) {
        for (int x = 0; x < width; x++)
            for (int c = 0; c < inputs; c += LANES) {
                const float *from = s->a32 + ((size_t)(2 * y) * 2 * width + 2 * x) * inputs + c;
                vec top = _mm512_max_ps(_mm512_loadu_ps(from), _mm512_loadu_ps(from + inputs));
                from += (size_t)2 * width * inputs;
                vec most = _mm512_max_ps(
                    top, _mm512_max_ps(_mm512_loadu_ps(from), _mm512_loadu_ps(from + inputs)));
                vec value = relu(_mm512_fmadd_ps(most, _mm512_loadu_ps(d->scale + c),
                                                 _mm512_loadu_ps(d->shift + c)));
                size_t at = ((size_t)y * width + x) * outputs + (outputs - inputs) + c;
                _mm512_storeu_ps(s->b32 + at, value);
                store_bf16(s->b16 + at, value);
            }
    }
    team_wait(me);
    position_attention(me, s, &d->pam, width, outputs, s->b32, s->b16, s->a32, s->a16);
}

/* The four phases of a deconvolution 3x3, stride 2: [w x w] -> [2w x 2w]. */
static void deconv(Member *me, const Conv *phases, int width, const bf16 *in, int do_relu,
                   float *out32, bf16 *out16) {
    const Conv *list[4];
    Place places[4];
    for (int i = 0; i < 4; i++) {
        list[i] = &phases[i];
        places[i] = (Place){.in = in,
                            .in_height = width,
                            .in_width = width,
                            .in_stride = 1,
                            .height = width,
                            .width = width,
                            .out_stride = 2,
                            .out_y = i / 2,
                            .out_x = i % 2,
                            .relu = do_relu,
                            .out32 = out32,
                            .out16 = out16,
                            .out_channels = phases[i].outputs};
    }
    convs(me, 4, list, places);
}

static void up(Member *me, Scratch *s, const Up *u, int width, int channels) {
    deconv(me, u->phases, width / 2, s->a16, 1, s->b32, s->b16);
    position_attention(me, s, &u->pam, width, channels, s->b32, s->b16, s->a32, s->a16);
    for (int i = 0; i < 2; i++)
        fcm(me, s, &u->fcm[i], width, channels);
}

static const float rgb_mean[3] = {0.708f, 0.582f, 0.536f}, rgb_std[3] = {0.157f, 0.166f, 0.182f};

/* uint8 [128][128][3] -> a32/a16 [128][128][16]. */
static void stem(Member *me, Scratch *s, const Engine *e, const uint8_t *pixels) {
    /* Each scale with a border of zeros, one after the other. */
    float *scale[4], *branch[4];
    int width[4];
    float *next = s->image, *next_branch = s->branch;
    for (int i = 0; i < 4; i++) {
        width[i] = SIDE >> i;
        scale[i] = next;
        next += (width[i] + 2) * (width[i] + 2) * 3;
        branch[i] = next_branch;
        next_branch += width[i] * width[i] * STEM;
    }
    FOR_PIECES(band, 16) {
        for (int y = band * 8; y < band * 8 + 8; y++)
            for (int x = 0; x < SIDE; x++)
                for (int c = 0; c < 3; c++)
                    scale[0][((y + 1) * (SIDE + 2) + x + 1) * 3 + c] =
                        (pixels[(y * SIDE + x) * 3 + c] / 255.0f - rgb_mean[c]) / rgb_std[c];
        for (int i = 1; i < 4; i++) {
            const int rows = 8 >> i, from = width[i - 1] + 2, to = width[i] + 2;
            for (int y = band * rows; y < (band + 1) * rows; y++)
                for (int x = 0; x < width[i]; x++)
                    for (int c = 0; c < 3; c++) {
                        const float *p = scale[i - 1] + ((2 * y + 1) * from + 2 * x + 1) * 3 + c;
                        scale[i][((y + 1) * to + x + 1) * 3 + c] =
                            (p[0] + p[3] + p[from * 3] + p[from * 3 + 3]) * 0.25f;
                    }
        }
    }
    team_wait(me);
    /* Rows of all scales, four at a time. */
    FOR_PIECES(piece, 32 + 16 + 8 + 4) {
        int i = piece < 32 ? 0 : piece < 48 ? 1 : piece < 56 ? 2 : 3;
        static const int starts[4] = {0, 32, 48, 56};
        const float *weights = e->stem_weights[i];
        for (int y = (piece - starts[i]) * 4; y < (piece - starts[i]) * 4 + 4; y++)
            for (int x = 0; x < width[i]; x += 8) {
                vec sum[8];
                for (int j = 0; j < 8; j++)
                    sum[j] = _mm512_loadu_ps(e->stem_bias[i]);
                for (int ky = 0; ky < 3; ky++) {
                    const float *row = scale[i] + ((y + ky) * (width[i] + 2) + x) * 3;
                    for (int k = 0; k < 9; k++) {
                        vec w = _mm512_loadu_ps(weights + (ky * 9 + k) * LANES);
                        for (int j = 0; j < 8; j++)
                            sum[j] = _mm512_fmadd_ps(_mm512_set1_ps(row[j * 3 + k]), w, sum[j]);
                    }
                }
                for (int j = 0; j < 8; j++) {
                    size_t at = ((size_t)y * width[i] + x + j) * STEM;
                    _mm512_storeu_ps(branch[i] + at, relu(sum[j]));
                }
            }
    }
    team_wait(me);
    for (int i = 0; i < 4; i++) {
        FOR_PIECES(y, width[i]) {
            for (int x = 0; x < width[i] * STEM; x += LANES) {
                size_t at = (size_t)y * width[i] * STEM + x;
                store_bf16(s->a16 + at, _mm512_loadu_ps(branch[i] + at));
            }
        }
        team_wait(me);
        channel_attention(me, s, e->stem_gamma[i], width[i] * width[i], STEM, branch[i], s->a16,
                          branch[i], NULL);
    }
    /* Up to full size, bilinear with half-pixel centres, and the mean of the four. */
    FOR_PIECES(y, SIDE) {
        float rows[3][64 * STEM];
        for (int i = 1; i < 4; i++) {
            float at = (y + 0.5f) / (1 << i) - 0.5f;
            if (at < 0)
                at = 0;
            int top = (int)at, bottom = top + 1 < width[i] ? top + 1 : top;
            vec low = _mm512_set1_ps(at - top), high = _mm512_set1_ps(1 - (at - top));
            const float *a = branch[i] + (size_t)top * width[i] * STEM,
                        *b = branch[i] + (size_t)bottom * width[i] * STEM;
            for (int x = 0; x < width[i] * STEM; x += LANES)
                _mm512_storeu_ps(rows[i - 1] + x,
                                 _mm512_fmadd_ps(low, _mm512_loadu_ps(b + x),
                                                 _mm512_mul_ps(high, _mm512_loadu_ps(a + x))));
        }
        for (int x = 0; x < SIDE; x++) {
            vec sum = _mm512_loadu_ps(branch[0] + ((size_t)y * SIDE + x) * STEM);
            for (int i = 1; i < 4; i++) {
                float at = (x + 0.5f) / (1 << i) - 0.5f;
                if (at < 0)
                    at = 0;
                int left = (int)at, right = left + 1 < width[i] ? left + 1 : left;
                vec l = _mm512_loadu_ps(rows[i - 1] + left * STEM),
                    r = _mm512_loadu_ps(rows[i - 1] + right * STEM);
                sum = _mm512_add_ps(
                    sum, _mm512_fmadd_ps(_mm512_set1_ps(at - left), _mm512_sub_ps(r, l), l));
            }
            sum = _mm512_mul_ps(sum, _mm512_set1_ps(0.25f));
            size_t at = ((size_t)y * SIDE + x) * STEM;
            _mm512_storeu_ps(s->a32 + at, sum);
            store_bf16(s->a16 + at, sum);
        }
    }
    team_wait(me);
}

static void forward(Member *me, Scratch *s, const Engine *e, const uint8_t *pixels,
                    float *probability) {
    stem(me, s, e, pixels);
    down(me, s, &e->down[0], 64, 16, 32);
    down(me, s, &e->down[1], 32, 32, 64);
    for (int i = 0; i < 4; i++)
        fcm(me, s, &e->encoder1[i], 32, 64);
    down(me, s, &e->down[2], 16, 64, 128);
    for (int i = 0; i < 8; i++)
        fcm(me, s, &e->encoder2[i], 16, 128);
    factorised(me, s, &e->bridge, 16);
    /* CAM and PAM side by side on the same map, then their sum. */
    channel_attention(me, s, e->bridge_gamma, 256, 128, s->a32, s->c16, s->b32, NULL);
    position_attention(me, s, &e->bridge_pam, 16, 128, s->a32, s->c16, s->a32, NULL);
    FOR_PIECES(piece, 256) {
        for (int c = 0; c < 128; c += LANES) {
            size_t at = (size_t)piece * 128 + c;
            store_bf16(s->a16 + at,
                       _mm512_add_ps(_mm512_loadu_ps(s->a32 + at), _mm512_loadu_ps(s->b32 + at)));
        }
    }
    team_wait(me);
    up(me, s, &e->up[0], 32, 64);
    up(me, s, &e->up[1], 64, 16);
    deconv(me, e->head, 64, s->a16, 0, s->logits, NULL);
    FOR_PIECES(y, SIDE) {
        for (int x = 0; x < SIDE; x += LANES) {
            __m512i lanes = _mm512_slli_epi32(lane_numbers(), 4);
            vec z = _mm512_i32gather_ps(lanes, s->logits + ((size_t)y * SIDE + x) * LANES, 4);
            /* 1 / (1 + e^-z), from the exponential that cannot overflow. */
            vec e = exp_exact(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(z))),
                one = _mm512_set1_ps(1.0f);
            vec small = _mm512_div_ps(e, _mm512_add_ps(one, e));
            __mmask16 positive = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GE_OQ);
            _mm512_storeu_ps(probability + y * SIDE + x,
                             _mm512_mask_sub_ps(small, positive, one, small));
        }
    }
    team_wait(me);
}

/* ---- jobs ---------------------------------------------------------------------------------- */

static void one_image(Engine *e, Member *me, int scratch, int image) {
    forward(me, e->scratch[scratch], e, e->in + (size_t)image * SIDE * SIDE * 3,
            e->out + (size_t)image * SIDE * SIDE);
}

static void work(Engine *e, Team *team, int thread) {
    Member member = {.team = team}, *me = &member;
    if (!team->images) {
        one_image(e, me, e->threads, team->first);
        return;
    }
    FOR_PIECES(image, team->images) {
        Member alone = {0};
        one_image(e, &alone, thread, team->first + image);
    }
    team_wait(me);
}

typedef struct {
    Engine *engine;
    int thread;
} Start;

static void *worker(void *argument) {
    Start start = *(Start *)argument;
    free(argument);
    Engine *e = start.engine;
    uint32_t seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&e->job) == seen; spin++)
            _mm_pause();
        for (uint32_t job; (job = atomic_load(&e->job)) == seen;)
            futex(&e->job, FUTEX_WAIT_PRIVATE, job);
        seen = atomic_load(&e->job);
        if (atomic_load(&e->closing))
            return NULL;
        Team *team = &e->teams[atomic_load(&e->current)];
        for (uint32_t state = atomic_load(&team->state); state & OPEN;)
            if (atomic_compare_exchange_weak(&team->state, &state, state + 1)) {
                work(e, team, start.thread);
                atomic_fetch_sub(&team->state, 1);
                break;
            }
    }
}

static void post(Engine *e) {
    atomic_fetch_add(&e->job, 1);
    futex(&e->job, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

/* Images from `first`: so many, one a thread, or one (`images` is 0) with all threads. */
static void together(Engine *e, int first, int images) {
    int empty = 0;
    while (atomic_load(&e->teams[empty].state))
        empty++;
    Team *team = &e->teams[empty];
    for (int step = 0; step < MOST_STEPS; step++)
        team->next[step] = 0, team->done[step] = 0;
    team->first = first, team->images = images;
    atomic_store(&team->state, OPEN);
    atomic_store(&e->current, empty);
    post(e);
    work(e, team, 0);
    atomic_fetch_sub(&team->state, OPEN);
}

/* ---- what is called from outside ------------------------------------------------------------ */

static const float *take(const float **at, size_t count) {
    const float *from = *at;
    *at += count;
    return from;
}

/* Zeroed memory on a cache line of its own. */
static void *some_memory(Engine *e, size_t bytes) {
    void *memory = e->free_memory;
    e->free_memory += (bytes + 63) / 64 * 64;
    return memory;
}

/* [tap][input][output] and then the bias. Outputs that are no multiple of 16 are filled up with
 * zeros. */
static void take_conv(Engine *e, Conv *c, const float **at, int taps, int inputs, int outputs) {
    const int padded = (outputs + LANES - 1) / LANES * LANES;
    c->taps = taps, c->inputs = inputs, c->outputs = padded;
    c->vecs = padded % 32 ? 1 : 2;
    const float *weights = take(at, (size_t)taps * inputs * outputs), *bias = take(at, outputs);
    c->weights = some_memory(e, sizeof(bf16) * taps * inputs * padded);
    c->bias = some_memory(e, sizeof(float) * padded);
    memcpy(c->bias, bias, sizeof(float) * outputs);
    const int group = LANES * c->vecs;
    for (int t = 0; t < taps; t++)
        for (int i = 0; i < inputs; i++)
            for (int o = 0; o < outputs; o++)
                c->weights[(((size_t)(o / group) * taps + t) * (inputs / 2) + i / 2) * group * 2 +
                           (o % group) * 2 + i % 2] =
                    to_bf16(weights[((size_t)t * inputs + i) * outputs + o]);
}

static void take_pam(Engine *e, Pam *p, const float **at, int channels) {
    /* Queries times log2(e): a ReLU lets a factor through. */
    float *query = (float *)*at + channels * (channels + 1);
    for (int i = 0; i < channels * (channels + 1); i++)
        query[i] *= 1.44269504f;
    for (int i = 0; i < 3; i++)
        take_conv(e, &p->projections[i], at, 1, channels, channels);
    p->eta = *take(at, 1);
}

static void take_factorised(Engine *e, Fcm *f, const float **at, int channels, int dilation) {
    for (int i = 0; i < 4; i++) {
        Conv *c = &f->convs[i];
        take_conv(e, c, at, 3, channels, channels);
        for (int t = 0; t < 3; t++)
            (i % 2 ? c->dx : c->dy)[t] = (t - 1) * (i < 2 ? 1 : dilation);
    }
}

static void take_fcm(Engine *e, Fcm *f, const float **at, int channels, int dilation) {
    take_factorised(e, f, at, channels, dilation);
    f->gamma = *take(at, 1);
}

static void take_down(Engine *e, Down *d, const float **at, int inputs, int outputs) {
    take_conv(e, &d->conv, at, 9, inputs, outputs - inputs);
    for (int t = 0; t < 9; t++)
        d->conv.dy[t] = t / 3 - 1, d->conv.dx[t] = t % 3 - 1;
    d->scale = take(at, inputs);
    d->shift = take(at, inputs);
    take_pam(e, &d->pam, at, outputs);
}

/* Phase (a, b) gives outputs (2y + a, 2x + b). Padding 1: an even line sees the kernel's middle at
 * the same place, an odd one its last at the same place and its first at the next. */
static void take_deconv(Engine *e, Conv *phases, const float **at, int inputs, int outputs) {
    const float *weights = take(at, (size_t)9 * inputs * outputs), *bias = take(at, outputs);
    static const int count[2] = {1, 2}, tap[2][2] = {{1, 1}, {2, 0}},
                     offset[2][2] = {{0, 0}, {0, 1}};
    const size_t size = (size_t)inputs * outputs;
    float some[4 * 128 * 64 + 64];
    for (int phase = 0; phase < 4; phase++) {
        const int a = phase / 2, b = phase % 2, taps = count[a] * count[b];
        int dy[4], dx[4], n = 0;
        for (int i = 0; i < count[a]; i++)
            for (int j = 0; j < count[b]; j++, n++) {
                memcpy(some + n * size, weights + (tap[a][i] * 3 + tap[b][j]) * size,
                       sizeof(float) * size);
                dy[n] = offset[a][i], dx[n] = offset[b][j];
            }
        memcpy(some + taps * size, bias, sizeof(float) * outputs);
        const float *from = some;
        take_conv(e, &phases[phase], &from, taps, inputs, outputs);
        memcpy(phases[phase].dy, dy, sizeof dy);
        memcpy(phases[phase].dx, dx, sizeof dx);
    }
}

static void take_up(Engine *e, Up *u, const float **at, int inputs, int outputs) {
    take_deconv(e, u->phases, at, inputs, outputs);
    take_pam(e, &u->pam, at, outputs);
    for (int i = 0; i < 2; i++)
        take_fcm(e, &u->fcm[i], at, outputs, 1);
}

enum { WEIGHTS = 2338524 };

EXPORT void slsnet_close(Engine *e) {
    atomic_store(&e->closing, 1);
    post(e);
    for (int i = 1; i <= e->started; i++)
        pthread_join(e->workers[i], NULL);
    for (int i = 0; i <= e->threads; i++)
        free(e->scratch_memory[i]);
    free(e->memory);
    free(e->teams);
    free(e);
}

/* Returns NULL where memory or threads are short, or `count` is not this network's. Weights are
 * copied; their order is that of server/backends/native/weights.py. */
EXPORT Engine *slsnet_open(const float *weights, int64_t count, int threads) {
    Engine *e = count == WEIGHTS ? calloc(1, sizeof *e) : NULL;
    if (!e)
        return NULL;
    e->threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    pthread_mutex_init(&e->one_at_a_time, NULL);
    /* Half of it as bfloat16, what remains as it is, and room for filling up. */
    e->memory = calloc(1, sizeof(float) * WEIGHTS * 2);
    e->teams = calloc(e->threads, sizeof *e->teams);
    int complete = e->memory && e->teams;
    for (int i = 0; i <= e->threads; i++) {
        /* Not touched here: threads that never run cost nothing. Borders stay zero. */
        char *memory = e->scratch_memory[i] = calloc(1, sizeof(Scratch) + 64);
        complete &= memory != NULL;
        if (!memory)
            continue;
        e->scratch[i] = (Scratch *)(memory + 64 - (uintptr_t)memory % 64);
    }
    if (!complete) {
        slsnet_close(e);
        return NULL;
    }
    e->free_memory = (char *)e->memory + 64 - (uintptr_t)e->memory % 64;
    float *copy = some_memory(e, sizeof(float) * WEIGHTS);
    memcpy(copy, weights, sizeof(float) * WEIGHTS);
    const float *at = copy;
    for (int i = 0; i < 4; i++) {
        e->stem_weights[i] = take(&at, 27 * STEM);
        e->stem_bias[i] = take(&at, STEM);
        e->stem_gamma[i] = *take(&at, 1);
    }
    take_down(e, &e->down[0], &at, 16, 32);
    take_down(e, &e->down[1], &at, 32, 64);
    for (int i = 0; i < 4; i++)
        take_fcm(e, &e->encoder1[i], &at, 64, 1);
    take_down(e, &e->down[2], &at, 64, 128);
    for (int i = 0; i < 8; i++)
        take_fcm(e, &e->encoder2[i], &at, 128, 2 << (i % 4));
    take_factorised(e, &e->bridge, &at, 128, 1);
    e->bridge_gamma = *take(&at, 1);
    take_pam(e, &e->bridge_pam, &at, 128);
    take_up(e, &e->up[0], &at, 128, 64);
    take_up(e, &e->up[1], &at, 64, 16);
    take_deconv(e, e->head, &at, 16, 1);
    for (int i = 1; i < e->threads; i++) {
        Start *start = malloc(sizeof *start);
        if (start)
            *start = (Start){e, i};
        if (!start || pthread_create(&e->workers[i], NULL, worker, start)) {
            free(start);
            slsnet_close(e);
            return NULL;
        }
        e->started++;
    }
    return e;
}

/* uint8 [n][128][128][3] -> float32 [n][128][128]. */
EXPORT void slsnet_infer(Engine *e, const uint8_t *in, int n, float *out) {
    pthread_mutex_lock(&e->one_at_a_time);
    e->in = in, e->out = out;
    /* As many as come out even an image a thread, then all threads on each of the rest. */
    const int even = n / e->threads * e->threads;
    if (even)
        together(e, 0, even);
    for (int image = even; image < n; image++)
        together(e, image, 0);
    pthread_mutex_unlock(&e->one_at_a_time);
}
