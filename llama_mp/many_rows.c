/* The products of many rows of x, such as a prompt's, on a CPU: y = x W^T, bound by arithmetic.
 *
 * A vector holds a number of each of LANES tokens, so that a weight is multiplied with a vector: x is turned to lie so,
 * and WIDEST vectors make a panel of it. BLOCK rows of W at a time are unpacked into the cache, and meanwhile those that
 * follow are fetched from memory. What is multiplied is fp32 or, where the machine does that, pairs of bf16, of a column
 * and the next, whose products are added up in fp32.
 *
 * Each sum takes the columns in their order, whatever else is computed with it, and on however many threads: none of
 * these changes a bit. OpenMP's functions are left to torch's libgomp, as in kernels.c. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

enum { BF16, INT8, INT4, FP32 };
enum { GROUP = 32, UNPACKED = 16 * GROUP }; /* of INT4; columns unpacked at once */
enum { SUMS = LANES == 16 ? 24 : 12 };      /* vectors of them that stay in registers */
enum { WIDEST = 4, BLOCK = 24 };            /* multiples of SUMS / width for each width of a panel */
/* Steps along the columns, 4 bytes each, for which a panel and a block stay in the second cache; and from one row of a
 * block to the next, so that they begin in different sets of the first. */
enum { PART = 1024, STRIDE = PART + 16 };

typedef struct {
    int kind, in_pairs, is_gated;
    const char *w;                                      /* [rows, num_cols], as quant.py packs INT8 and INT4 */
    const float *x;                                     /* [num_tokens, num_cols] */
    float *y;                                           /* [num_tokens, num_out] */
    words *turned;                                      /* x: part by part, panel by panel, [steps, vectors] */
    long num_tokens, num_out, num_cols, row_bytes;      /* of W; gated, it has 2 num_out rows */
    long num_vectors, num_panels, num_steps, num_parts; /* what tokens and columns are divided into */
} product;

/* Rows of W that are needed next, where they lie in memory, the second half of them further on; or NULL. */
typedef struct {
    const char *at;
    long row_bytes, step_bits, further_bytes;
} rows_ahead;

int multiplies_pairs(void) { return MULTIPLIES_PAIRS; }

/* Of x turned: what `linear_of_many` is to be given room for. */
long turned_bytes(int in_pairs, long tokens, long cols) {
    return (tokens + LANES - 1) / LANES * ((cols + in_pairs) >> in_pairs) * (long)sizeof(words);
}

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long take(long *num_taken) { return __atomic_fetch_add(num_taken, 1, __ATOMIC_RELAXED); }

/* ---- a block of W with a panel of x ---------------------------------------------------------------------------- */

INLINE floats add_product(int in_pairs, floats sum, words x, words w) {
#ifdef __AVX512BF16__
    if (in_pairs) return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#endif
    return sum + as_floats(x) * as_floats(w);
}

/* `width` vectors of tokens with SUMS / width rows of W, from row `first` of a block on. */
INLINE void add_tile(int in_pairs, int width, int first, const words *x, const uint32_t *w, long num_steps,
                     floats *sums, long stride, rows_ahead next) {
    floats held[SUMS];
    words tokens[WIDEST];
    UNROLL for (int i = 0; i < SUMS; i++) held[i] = sums[i / width * stride + i % width];
    for (long step = 0; step < num_steps; step++, x += width) {
        if (next.at && step % 16 == 0) /* a line of bf16 */
            UNROLL for (int r = first; r < first + SUMS / width; r++)
                __builtin_prefetch(next.at + r * next.row_bytes + (r < BLOCK / 2 ? 0 : next.further_bytes) +
                                       step * next.step_bits / 8, 0, 2);
        UNROLL for (int v = 0; v < width; v++) tokens[v] = x[v];
        UNROLL for (int r = 0; r < SUMS / width; r++) {
            words weight = (words){0} + w[r * STRIDE + step];
            UNROLL for (int v = 0; v < width; v++)
                held[r * width + v] = add_product(in_pairs, held[r * width + v], tokens[v], weight);
        }
    }
    UNROLL for (int i = 0; i < SUMS; i++) sums[i / width * stride + i % width] = held[i];
}

typedef void add_panel(const words *x, const uint32_t *w, long num_steps, floats *sums, long stride, rows_ahead next);

#define DEFINE_PANEL(name, in_pairs, width)                                                                         \
    static void name(const words *x, const uint32_t *w, long num_steps, floats *sums, long stride, rows_ahead next) { \
        for (int r = 0; r < BLOCK; r += SUMS / width)                                                               \
            add_tile(in_pairs, width, r, x, w + r * STRIDE, num_steps, sums + r * stride, stride, next);            \
    }
DEFINE_PANEL(panel_of_1, 0, 1)
DEFINE_PANEL(panel_of_2, 0, 2)
DEFINE_PANEL(panel_of_3, 0, 3)
DEFINE_PANEL(panel_of_4, 0, WIDEST)
DEFINE_PANEL(pairs_of_1, MULTIPLIES_PAIRS, 1)
DEFINE_PANEL(pairs_of_2, MULTIPLIES_PAIRS, 2)
DEFINE_PANEL(pairs_of_3, MULTIPLIES_PAIRS, 3)
DEFINE_PANEL(pairs_of_4, MULTIPLIES_PAIRS, WIDEST)
static add_panel *const PANELS[2][WIDEST] = {
    {panel_of_1, panel_of_2, panel_of_3, panel_of_4},
    {pairs_of_1, pairs_of_2, pairs_of_3, pairs_of_4},
};

/* ---- x turned -------------------------------------------------------------------------------------------------- */

/* LANES steps of a token from column `first` on; zeros beyond the last column. */
INLINE words steps_of(const product *p, const float *x, long first) {
    enum { MOST = 2 * LANES };
    long num_cols = LANES << p->in_pairs;
    float filled[MOST] = {0};
    if (first + num_cols > p->num_cols) {
        if (first < p->num_cols) memcpy(filled, x + first, (p->num_cols - first) * sizeof *x);
        x = filled, first = 0;
    }
#ifdef __AVX512BF16__
    if (p->in_pairs)
        return (words)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + first + LANES), _mm512_loadu_ps(x + first));
#endif
    return (words)*(const floats *)(x + first);
}

/* A panel of a part, whose tokens and columns may end in it. */
static void turn(const product *p, long part, long panel) {
    long first = part * PART, num_steps = least(PART, p->num_steps - first);
    long vector = panel * WIDEST, num_lanes = least(WIDEST, p->num_vectors - vector) * LANES;
    long num_tokens = least(num_lanes, p->num_tokens - vector * LANES);
    const float *x = p->x + vector * LANES * p->num_cols;
    uint32_t *to = (uint32_t *)(p->turned + first * p->num_vectors + vector * num_steps);
    for (long step = 0; step < num_steps; step += LANES, to += LANES * num_lanes) {
        long count = least(LANES, num_steps - step);
        for (long token = 0; token < num_lanes; token++) {
            words steps = {0};
            if (token < num_tokens) steps = steps_of(p, x + token * p->num_cols, (first + step) << p->in_pairs);
            for (long i = 0; i < count; i++) to[i * num_lanes + token] = steps[i];
        }
    }
}

/* ---- W unpacked ------------------------------------------------------------------------------------------------ */

INLINE float half_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    return half & 0x8000 ? -value : value;
}

/* `count` groups, up to UNPACKED columns, as floats. */
static void unpack_groups(const uint8_t *codes, const uint16_t *ranges, long count, float *values) {
    float low[UNPACKED / 2], high[UNPACKED / 2];
    for (long i = 0; i < count * GROUP / 2; i++) low[i] = codes[i] & 15, high[i] = codes[i] >> 4;
    for (long g = 0; g < count; g++, values += GROUP) {
        float scale = half_to_float(ranges[2 * g]), offset = half_to_float(ranges[2 * g + 1]);
        UNROLL for (int i = 0; i < GROUP / 2; i += LANES) {
            *(floats *)(values + i) = *(floats *)(low + g * GROUP / 2 + i) * scale + offset;
            *(floats *)(values + GROUP / 2 + i) = *(floats *)(high + g * GROUP / 2 + i) * scale + offset;
        }
    }
}

/* `store`, but subnormal numbers may become zeros, which products of pairs take them for. */
INLINE void store_factors(int is_bf16, const float *x, char *to, long count) {
    long i = 0;
#ifdef __AVX512BF16__
    for (; is_bf16 && i + LANES <= count; i += LANES) {
        __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
        memcpy(to + 2 * i, &rounded, sizeof rounded);
    }
#endif
    store(is_bf16, x + i, to + i * (is_bf16 ? 2 : 4), count - i);
}

/* `num_cols` columns of a row, from a multiple of GROUP on, as fp32 or bf16; `row_cols` are all. */
static void unpack_row(int kind, int is_bf16, const char *row, long row_bytes, long row_cols, long first, long num_cols,
                       char *to) {
    const uint16_t *halves = (const uint16_t *)row + first;
    const uint16_t *ranges = (const uint16_t *)(row + (row_cols + GROUP - 1) / GROUP * (GROUP / 2));
    float values[UNPACKED], scale;
    if (kind == FP32) {
        store_factors(is_bf16, (const float *)row + first, to, num_cols);
    } else if (kind == BF16 && is_bf16) {
        memcpy(to, halves, num_cols * sizeof *halves);
    } else if (kind == BF16) {
        for (long i = 0; i < num_cols; i++) ((uint32_t *)to)[i] = (uint32_t)halves[i] << 16;
    } else {
        memcpy(&scale, row + row_bytes - sizeof scale, sizeof scale); /* of INT8 */
        for (long i = first; i < first + num_cols; i += UNPACKED, to += UNPACKED * (is_bf16 ? 2 : 4)) {
            long count = least(UNPACKED, first + num_cols - i);
            if (kind == INT8)
                for (long j = 0; j < count; j++) values[j] = scale * ((const int8_t *)row)[i + j];
            else
                unpack_groups((const uint8_t *)row + i / 2, ranges + i / GROUP * 2, (count + GROUP - 1) / GROUP, values);
            store_factors(is_bf16, values, to, count);
        }
    }
}

/* matrix [rows, cols], in bf16 or fp32, = what w [rows, cols] is packed from. */
void unpack(int kind, const char *w, char *matrix, int is_bf16, long rows, long cols, long row_bytes) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++)
        unpack_row(kind, is_bf16, w + r * row_bytes, row_bytes, cols, 0, cols, matrix + r * cols * (is_bf16 ? 2 : 4));
}

/* ---- all of it ------------------------------------------------------------------------------------------------- */

/* Where row r of a block lies. Gated, its first half is of the gate and the second of the up projection. */
INLINE const char *row_of(const product *p, long block, long r) {
    long half = BLOCK / 2, gated = block * half + (r < half ? r : p->num_out + r - half);
    return p->w + (p->is_gated ? gated : block * BLOCK + r) * p->row_bytes;
}

/* What a block's sums are made of y's columns from `first` on, `count` of them. */
static void finish(const product *p, long first, long count, floats *sums) {
    long half = BLOCK / 2 * p->num_vectors;
    if (p->is_gated) /* silu(gate) * up: as fused.c has it */
        for (long i = 0; i < half; i++) sums[i] = sums[i] * sums[half + i] / (1.0f + exp_of(-sums[i]));
    const float *sum = (const float *)sums;
    for (long token = 0; token < p->num_tokens; token++)
        for (long r = 0; r < count; r++)
            p->y[token * p->num_out + first + r] = sum[r * p->num_vectors * LANES + token];
}

/* One block of W with all of x, while the `next` is fetched. `rows`: room for it unpacked; `sums` [BLOCK, vectors]. */
static void multiply_block(const product *p, long block, long next_block, uint32_t *rows, floats *sums) {
    const int column_bits[] = {16, 8, 5, 32}; /* of INT4 with its ranges */
    long step_bits = column_bits[p->kind] << p->in_pairs, half = BLOCK / 2;
    long width = p->is_gated ? half : BLOCK, count = least(width, p->num_out - block * width);
    memset(sums, 0, BLOCK * p->num_vectors * sizeof *sums);
    for (long part = 0; part < p->num_parts; part++) {
        long first = part * PART, num_steps = least(PART, p->num_steps - first), col = first << p->in_pairs;
        long num_cols = least(num_steps << p->in_pairs, p->num_cols - col);
        for (long r = 0; r < BLOCK; r++) {
            if ((r < width ? r : r - half) >= count) continue; /* behind the last row: zeros, or what was there before */
            rows[r * STRIDE + num_steps - 1] = 0;              /* a pair may lack its second half */
            unpack_row(p->kind, p->in_pairs, row_of(p, block, r), p->row_bytes, p->num_cols, col, num_cols,
                       (char *)(rows + r * STRIDE));
        }
        int is_last = part + 1 == p->num_parts;
        const char *at = row_of(p, is_last ? next_block : block, 0) + (is_last ? 0 : (first + PART) * step_bits / 8);
        rows_ahead next = {at, p->row_bytes, step_bits, p->is_gated ? (p->num_out - half) * p->row_bytes : 0};
        for (long panel = 0; panel < p->num_panels; panel++, next.at = NULL) {
            long vector = panel * WIDEST, num_vectors = least(WIDEST, p->num_vectors - vector);
            const words *x = p->turned + first * p->num_vectors + vector * num_steps;
            PANELS[p->in_pairs][num_vectors - 1](x, rows, num_steps, sums + vector, p->num_vectors, next);
        }
    }
    finish(p, block * width, count, sums);
}

/* y [tokens, out] = x [tokens, cols] times the transpose of w [out, cols]; x and y contiguous. `in_pairs`: factors are
 * rounded to bf16, if `multiplies_pairs`. `is_gated`: w [2 out, cols] is a gate and an up projection, and y is
 * silu(gate) * up of what they make. `turned`: room for `turned_bytes`. Returns 0, or 1 when no thread has memory. */
int linear_of_many(int kind, int in_pairs, int is_gated, const char *w, const float *x, float *y, void *turned,
                   long tokens, long out, long cols, long row_bytes) {
    product p = {kind, in_pairs, is_gated, w, x, y, turned, tokens, out, cols, row_bytes, 0, 0, 0, 0};
    long width = is_gated ? BLOCK / 2 : BLOCK, num_blocks = (out + width - 1) / width;
    p.num_vectors = (tokens + LANES - 1) / LANES, p.num_panels = (p.num_vectors + WIDEST - 1) / WIDEST;
    p.num_steps = (cols + in_pairs) >> in_pairs, p.num_parts = (p.num_steps + PART - 1) / PART;
    long num_taken = 0; /* blocks: whoever is free takes one, for cores may be slower, or needed elsewhere */
#pragma omp parallel
    {
        uint32_t *room = aligned_alloc(sizeof(words), BLOCK * (STRIDE * 4 + p.num_vectors * sizeof(floats)));
        if (room) memset(room, 0, BLOCK * STRIDE * 4); /* rows of the last block that are not there */
#pragma omp for collapse(2) schedule(static)
        for (long part = 0; part < p.num_parts; part++)
            for (long panel = 0; panel < p.num_panels; panel++) turn(&p, part, panel);
        long block = room ? take(&num_taken) : num_blocks;
        while (block < num_blocks) {
            long next = take(&num_taken);
            multiply_block(&p, block, next, room, (floats *)(room + BLOCK * STRIDE));
            block = next;
        }
        free(room);
    }
    return num_taken < num_blocks;
}
