/* The products of a decode step on a CPU: y = x W^T for a few rows of x, bound by the speed at which W is read.
 *
 * x, y and all sums are fp32; W is bf16, or int8 or int4 as quant.py packs them. Vectors are the compiler's own, which
 * it lowers to what the machine has. OpenMP's functions are left to the libgomp that torch has loaded already: a second
 * runtime would fight over the cores with the first. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

enum { GROUP = 32, GROUPS = LANES / 4, ROWS = 4, BATCH = LANES / 4, BLOCK = 16 };
enum { BF16, INT8, INT4 };

typedef float eight __attribute__((vector_size(32), aligned(4)));

/* IEEE half in the low 16 bits to single: exact, but for infinities and NaN, which scales are not. */
INLINE floats from_half(words half) {
    floats magnitude = as_floats((half & 0x7fff) << 13) * 0x1p112f;
    return as_floats((words)magnitude | (half & 0x8000) << 16);
}

/* The first GROUPS floats at `from`, of which eight can be read, each four times. */
INLINE floats four_times(const float *from) {
    eight v = *(const eight *)from, low = __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1);
#if LANES == 8
    return low;
#else
    eight high = __builtin_shufflevector(v, v, 2, 2, 2, 2, 3, 3, 3, 3);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
}

/* Non-negative integers as floats: exact where they have no more than 24 significant bits. */
INLINE floats values_of(words w) { return __builtin_convertvector((integers)w, floats); }

/* What a tile needs to know of W and of x, which `prepare` has laid out for the kind. */
typedef struct {
    const char *w;     /* the tile's first row */
    long row_bytes;    /* from one row to the next */
    const float *x;    /* [batch, num_cols] */
    const float *sums; /* of x: of each group for INT4, of all for INT8, [batch, num_sums] */
    long num_cols;     /* of x: filled up with zeros */
    long num_groups;
    long num_sums;
} operands;

/* `size` bytes of a row from `at`; what lies beyond its `end` is zero, and is not touched. */
#define LOAD(type, at, end, room) *(const type *)((at) + sizeof(type) <= (end) ? (at) : fill_up(at, end, room))

INLINE const char *fill_up(const char *at, const char *end, char *room) {
    memset(room, 0, sizeof(words));
    memcpy(room, at, end - at);
    return room;
}

INLINE void tile_bf16(const operands *o, int rows, int batch, floats (*acc)[BATCH]) {
    long half = o->num_cols / 2;
    char room[sizeof(words)];
    for (long i = 0; i < half; i += LANES) {
        UNROLL for (int r = 0; r < rows; r++) {
            const char *row = o->w + r * o->row_bytes;
            words pairs = LOAD(words, row + 4 * i, row + o->row_bytes, room);
            floats even = as_floats(pairs << 16), odd = as_floats(pairs & 0xffff0000u);
            UNROLL for (int b = 0; b < batch; b++) {
                const float *x = o->x + b * o->num_cols + i;
                acc[r][b] += even * *(const floats *)x;
                acc[r][b] += odd * *(const floats *)(x + half);
            }
        }
    }
}

/* Byte k of each of a vector of words, k = 0 .. 3, lies where it is in its word: x is divided by 256^k instead. Codes are made
 * non-negative, which 128 times the sum of x undoes. */
INLINE void tile_int8(const operands *o, int rows, int batch, floats (*acc)[BATCH]) {
    char room[sizeof(words)];
    for (long i = 0; i < o->num_cols; i += 4 * LANES) {
        UNROLL for (int r = 0; r < rows; r++) {
            const char *row = o->w + r * o->row_bytes;
            words codes = LOAD(words, row + i, row + o->row_bytes, room) ^ 0x80808080u;
            UNROLL
            for (int k = 0; k < 4; k++) {
                floats w = values_of(k < 3 ? codes & 0xffu << 8 * k : codes >> 24);
                UNROLL for (int b = 0; b < batch; b++)
                    acc[r][b] += w * *(const floats *)(o->x + b * o->num_cols + i + k * LANES);
            }
        }
    }
}

/* Nibble k of each of a vector of words, GROUPS groups of four, k = 0 .. 7, likewise. */
INLINE floats sum_of_groups(words codes, const float *x) {
    floats sum = {0};
    UNROLL
    for (int k = 0; k < 8; k++)
        sum += values_of(k < 7 ? codes & 15u << 4 * k : codes >> 28) * *(const floats *)(x + k * LANES);
    return sum;
}

INLINE void tile_int4(const operands *o, int rows, int batch, floats (*acc)[BATCH], floats (*offsets)[BATCH]) {
    char room[sizeof(words)];
    for (long first = 0; first < o->num_groups; first += LANES) {
        long last = first + LANES < o->num_groups ? first + LANES : o->num_groups;
        UNROLL for (int r = 0; r < rows; r++) {
            const char *row = o->w + r * o->row_bytes, *end = row + o->row_bytes;
            words pairs = LOAD(words, row + o->num_groups * GROUP / 2 + 4 * first, end, room);
            float scales[LANES + 8];
            *(floats *)scales = from_half(pairs & 0xffff);
            floats offset = from_half(pairs >> 16);
            UNROLL for (int b = 0; b < batch; b++) offsets[r][b] += offset * *(const floats *)(o->sums + b * o->num_sums + first);
            for (long g = first; g < last; g += GROUPS) {
                words codes = LOAD(words, row + g * (GROUP / 2), end, room);
                floats scale = four_times(scales + g - first);
                UNROLL for (int b = 0; b < batch; b++)
                    acc[r][b] += sum_of_groups(codes, o->x + b * o->num_cols + g * GROUP) * scale;
            }
        }
    }
}

/* y[b * num_rows + r] of the tile. The order of a sum does not depend on the size of the tile. */
INLINE void tile(int kind, const operands *o, int rows, int batch, float *y, long num_rows) {
    floats acc[ROWS][BATCH] = {0};
    floats offsets[ROWS][BATCH] = {0};
    if (kind == BF16) tile_bf16(o, rows, batch, acc);
    if (kind == INT8) tile_int8(o, rows, batch, acc);
    if (kind == INT4) tile_int4(o, rows, batch, acc, offsets);
    UNROLL for (int r = 0; r < rows; r++) {
        float scale = 1;
        if (kind == INT8) memcpy(&scale, o->w + (r + 1) * o->row_bytes - sizeof scale, sizeof scale);
        UNROLL for (int b = 0; b < batch; b++) {
            float sum = sum_of(acc[r][b]);
            if (kind == INT8) sum -= 128 * sum_of(*(const floats *)(o->sums + b * o->num_sums));
            y[b * num_rows + r] = sum * scale + sum_of(offsets[r][b]);
        }
    }
}

INLINE void rows_of(int kind, const operands *o, long rows, int batch, float *y, long num_rows) {
    operands at = *o;
    for (; rows >= ROWS; rows -= ROWS, at.w += ROWS * o->row_bytes, y += ROWS) tile(kind, &at, ROWS, batch, y, num_rows);
    for (; rows > 0; rows--, at.w += o->row_bytes, y++) tile(kind, &at, 1, batch, y, num_rows);
}

/* Some rows of W with up to BATCH rows of x. */
#define DEFINE_ROWS(kind, name)                                                                                 \
    static void name(const operands *o, long rows, int batch, float *y, long num_rows) {                        \
        if (batch == 1) rows_of(kind, o, rows, 1, y, num_rows);                                                 \
        if (batch == 2) rows_of(kind, o, rows, 2, y, num_rows);                                                 \
        if (batch == 3) rows_of(kind, o, rows, 3 < BATCH ? 3 : BATCH, y, num_rows);                             \
        if (batch == 4) rows_of(kind, o, rows, BATCH, y, num_rows);                                             \
    }
DEFINE_ROWS(BF16, rows_bf16)
DEFINE_ROWS(INT8, rows_int8)
DEFINE_ROWS(INT4, rows_int4)

/* One row of x, filled up with zeros, in the order in which the kind's tile reads it; and its sums. */
static void prepare(int kind, const float *x, const operands *o, float *prepared, float *sums) {
    long n = o->num_cols;
    if (kind == BF16) {
        for (long i = 0; i < n / 2; i++) prepared[i] = x[2 * i], prepared[n / 2 + i] = x[2 * i + 1];
    } else if (kind == INT8) { /* byte i % 4 of word i / 4 */
        for (long i = 0; i < n; i += 4 * LANES, prepared += 4 * LANES, x += 4 * LANES)
            for (int k = 0; k < 4; k++)
                for (int word = 0; word < LANES; word++) {
                    sums[word] += x[4 * word + k];
                    prepared[k * LANES + word] = x[4 * word + k] * (k < 3 ? 1.0f / (1 << 8 * k) : 1.0f);
                }
    } else { /* the low nibbles of a group's 16 bytes first, then the high ones */
        for (long g = 0; g < n / GROUP; g++, x += GROUP) {
            float *at = prepared + g / GROUPS * GROUPS * GROUP + g % GROUPS * 4;
            for (int k = 0; k < 8; k++)
                for (int word = 0; word < 4; word++)
                    at[k * LANES + word] = x[4 * word + k / 2 + k % 2 * GROUP / 2] * (k < 7 ? 1.0f / (1 << 4 * k) : 1.0f);
            for (int i = 0; i < GROUP; i++) sums[g] += x[i];
        }
    }
}

/* y [batch, rows] = x [batch, cols] times the transpose of w [rows, cols]; all contiguous, cols even for BF16.
 * Returns 0, or 1 when there is no memory for a copy of x. */
int linear(int kind, const char *w, const float *x, float *y, long batch, long rows, long cols, long row_bytes) {
    static const long units[] = {2 * LANES, 4 * LANES, 8 * LANES}; /* of columns, by kind */
    long num_groups = kind == INT4 ? (cols + GROUP - 1) / GROUP : 0;
    operands all = {w, row_bytes, .num_cols = (cols + units[kind] - 1) / units[kind] * units[kind]};
    all.num_groups = num_groups, all.num_sums = (num_groups / LANES + 1) * LANES;
    float *room = calloc(all.num_cols + batch * (all.num_cols + all.num_sums), sizeof *room);
    if (!room) return 1;
    float *prepared = room + all.num_cols, *sums = prepared + batch * all.num_cols;
    all.x = prepared, all.sums = sums;
    for (long b = 0; b < batch; b++) {
        memcpy(room, x + b * cols, cols * sizeof *x);
        prepare(kind, room, &all, prepared + b * all.num_cols, sums + b * all.num_sums);
    }
    long num_blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (long block = 0; block < num_blocks; block++) {
        long first = block * BLOCK, count = rows - first < BLOCK ? rows - first : BLOCK;
        for (long b = 0; b < batch; b += BATCH) { /* the rows of W stay in the cache for all of the batch */
            operands o = all;
            o.w += first * row_bytes, o.x += b * all.num_cols, o.sums += b * all.num_sums;
            int some = batch - b < BATCH ? batch - b : BATCH;
            (kind == BF16 ? rows_bf16 : kind == INT8 ? rows_int8 : rows_int4)(&o, count, some, y + b * rows + first, rows);
        }
    }
    free(room);
    return 0;
}

/* matrix [rows, cols] in fp32 = what w [rows, cols] is packed from: INT8 or INT4. */
void unpack(int kind, const char *w, float *matrix, long rows, long cols, long row_bytes) {
    long num_groups = (cols + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const char *row = w + r * row_bytes, *end = row + row_bytes;
        float *to = matrix + r * cols;
        if (kind == INT8) {
            float scale;
            memcpy(&scale, end - sizeof scale, sizeof scale);
            for (long i = 0; i < cols; i++) to[i] = scale * (int8_t)row[i];
            continue;
        }
        for (long g = 0; g < num_groups; g++) {
            uint16_t range[2];
            memcpy(range, row + num_groups * GROUP / 2 + 4 * g, sizeof range);
            floats scale = from_half((words){range[0], range[1]});
            const uint8_t *codes = (const uint8_t *)row + g * GROUP / 2;
            float values[GROUP];
            for (int i = 0; i < GROUP / 2; i++) {
                values[i] = scale[0] * (codes[i] & 15) + scale[1];
                values[GROUP / 2 + i] = scale[0] * (codes[i] >> 4) + scale[1];
            }
            memcpy(to + g * GROUP, values, (cols - g * GROUP < GROUP ? cols - g * GROUP : GROUP) * sizeof *to);
        }
    }
}
