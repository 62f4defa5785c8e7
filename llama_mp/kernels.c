/* The products of a decode step on a CPU: y = x W^T for a few rows of x, bound by the speed at which W is read.
 *
 * x, y and all sums are fp32; W is bf16, or int8 or int4 as quant.py packs them. Vectors are the compiler's own, which
 * it lowers to what the machine has. OpenMP's functions are left to the libgomp that torch has loaded already: a second
 * runtime would fight over the cores with the first. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

enum { GROUP = 32, GROUPS = LANES / 4, CHAINS = 4, BATCH = LANES / 4, BLOCK = 16, AHEAD = 4096 };
enum { BF16, INT8, INT4, INT4_PAIRS }; /* the last with x rounded to bf16, where MULTIPLIES_PAIRS */

/* IEEE half in the high 16 bits to single, times `factor`: exact, but for infinities and NaN, which ranges are not. */
INLINE floats from_half(words half, float factor) {
    floats magnitude = as_floats((half & 0x7fff0000) >> 3) * (factor * 0x1p112f);
    return as_floats((words)magnitude | (half & 0x80000000));
}

/* GROUPS of the floats of `v`, from the first of the given quarter, each four times. */
INLINE floats four_times(floats v, int quarter) {
#if LANES == 8
#define SPREAD(i) SHUFFLED(v, i, i, i, i, i + 1, i + 1, i + 1, i + 1)
#else
#define SPREAD(i) \
    SHUFFLED(v, i, i, i, i, i + 1, i + 1, i + 1, i + 1, i + 2, i + 2, i + 2, i + 2, i + 3, i + 3, i + 3, i + 3)
#endif
    switch (quarter) {
    case 0: return SPREAD(0);
    case 1: return SPREAD(GROUPS);
    case 2: return SPREAD(2 * GROUPS);
    default: return SPREAD(3 * GROUPS);
    }
}

/* Non-negative integers as floats: exact where they have no more than 24 significant bits. */
INLINE floats values_of(words w) { return __builtin_convertvector((integers)w, floats); }

/* A row of W and what it is multiplied with: x, which `prepare` has laid out for the kind. */
typedef struct {
    const char *w;     /* the row */
    const char *end;   /* of the matrix */
    long row_bytes;    /* from one row to the next */
    const float *x;    /* [batch, x_length] */
    const float *sums; /* of x: of each group for INT4, of all for INT8, [batch, num_sums] */
    long row_cols;     /* of the matrix */
    long num_cols;     /* filled up with zeros to whole units */
    long x_length;
    long num_groups;
    long num_sums;
} operands;

/* A vector from `at`; what lies beyond `end` is zero, and is not touched. That is the end of a row only where what
 * follows may not be finite: what x is zero for may be anything else. */
#define LOAD(at, end, room) *(const words *)((at) + sizeof(words) <= (end) ? (at) : fill_up(at, end, room))

INLINE const char *fill_up(const char *at, const char *end, char *room) {
    memset(room, 0, sizeof(words));
    if (at < end) memcpy(room, at, end - at);
    return room;
}

/* Each of CHAINS sums waits for itself alone; their number and order are the same for any batch. */
INLINE void products_bf16(const operands *o, int batch, floats (*sums)[CHAINS]) {
    const char *end = o->w + 2 * o->row_cols;
    char room[sizeof(words)];
    for (long i = 0; i < o->num_cols; i += 4 * LANES) {
        UNROLL for (int part = 0; part < 2; part++) {
            const char *at = o->w + 2 * i + part * sizeof(words);
            words pairs = LOAD(at, end, room);
            __builtin_prefetch(at + AHEAD);
            floats even = as_floats(pairs << 16), odd = as_floats(pairs & 0xffff0000u);
            UNROLL for (int b = 0; b < batch; b++) {
                const float *x = o->x + b * o->x_length + i + part * 2 * LANES;
                sums[b][2 * part] += even * *(const floats *)x;
                sums[b][2 * part + 1] += odd * *(const floats *)(x + LANES);
            }
        }
    }
}

/* Byte k of each of a vector of words, k = 0 .. 3, lies where it is in its word: x is divided by 256^k instead. Codes
 * are made non-negative, which 128 times the sum of x undoes. */
INLINE void products_int8(const operands *o, int batch, floats (*sums)[CHAINS]) {
    char room[sizeof(words)];
    for (long i = 0; i < o->num_cols; i += 4 * LANES) {
        words codes = LOAD(o->w + i, o->end, room) ^ 0x80808080u;
        __builtin_prefetch(o->w + i + AHEAD);
        UNROLL for (int k = 0; k < 4; k++) {
            floats w = values_of(k < 3 ? codes & 0xffu << 8 * k : codes >> 24);
            UNROLL for (int b = 0; b < batch; b++)
                sums[b][k] += w * *(const floats *)(o->x + b * o->x_length + i + k * LANES);
        }
    }
}

/* Nibble k of each of a vector of words, GROUPS groups of four, k = 0 .. 7, as 1 + nibble / 16: the highest bits of a
 * mantissa, which costs less than converting an integer. */
INLINE floats nibbles(words codes, int k) {
    words highest = k < 5 ? codes << (19 - 4 * k) : codes >> (4 * k - 19);
    return as_floats((highest & 0x00780000u) | 0x3f800000u);
}

/* A sixteenth of the codes' products with 8 vectors of x, behind which lies what undoes the ones. */
INLINE floats sum_of_groups(words codes, const float *x) {
    floats low = *(const floats *)(x + 8 * LANES), high = {0};
    UNROLL for (int k = 0; k < 8; k += 2) {
        low += nibbles(codes, k) * *(const floats *)(x + k * LANES);
        high += nibbles(codes, k + 1) * *(const floats *)(x + (k + 1) * LANES);
    }
    return low + high;
}

/* The codes' products with x, which is [4] vectors of pairs of bf16: nibbles k and k + 4 of each word, k = 0 .. 3. */
#ifdef __AVX512BF16__
INLINE floats sum_in_pairs(words codes, const float *x) {
    /* 0 to 15 in bf16, twice: the table is looked up by 5 bits, of which the highest is of the next nibble. */
    static const uint16_t table[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
    };
    __m512i values = _mm512_loadu_si512(table);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    UNROLL for (int k = 0; k < 4; k++) {
        __m512i pairs = _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)codes, 4 * k), values);
        sums[k % 2] = _mm512_dpbf16_ps(sums[k % 2], (__m512bh)pairs, (__m512bh)_mm512_loadu_si512(x + k * LANES));
    }
    return (floats)sums[0] + (floats)sums[1];
}
#else
INLINE floats sum_in_pairs(words codes, const float *x) { return as_floats(codes) * x[0]; } /* never called */
#endif

/* LANES groups from column i on; `is_whole`: the row holds all of them. */
INLINE void add_groups(int kind, const operands *o, long i, int is_whole, int batch, floats (*sums)[CHAINS]) {
    const char *ranges = o->w + o->num_groups * GROUP / 2 + i / GROUP * 4;
    char room[sizeof(words)];
    words pairs = is_whole ? *(const words *)ranges : LOAD(ranges, o->end, room);
    const char *ahead = o->w + i / GROUP * (GROUP / 2 + 4) + 2 * AHEAD; /* in the order of memory: fastest */
    UNROLL for (int line = 0; line < LANES * (GROUP / 2 + 4); line += 64) __builtin_prefetch(ahead + line);
    floats scales = from_half(pairs << 16, kind == INT4 ? 16 : 1), offsets = from_half(pairs, 1);
    UNROLL for (int b = 0; b < batch; b++)
        sums[b][0] += offsets * *(const floats *)(o->sums + b * o->num_sums + i / GROUP);
    UNROLL for (int quarter = 0; quarter < 4; quarter++) {
        long column = i + quarter * GROUPS * GROUP;
        if (!is_whole && column >= o->num_cols) break;
        const char *at = o->w + column / 2;
        words codes = is_whole ? *(const words *)at : LOAD(at, o->end, room);
        floats scale = four_times(scales, quarter);
        UNROLL for (int b = 0; b < batch; b++) {
            const float *x = o->x + b * o->x_length;
            floats sum = kind == INT4 ? sum_of_groups(codes, x + column / 8 * 9) : sum_in_pairs(codes, x + column / 2);
            sums[b][1 + quarter % 2] += sum * scale;
        }
    }
}

INLINE void products_int4(int kind, const operands *o, int batch, floats (*sums)[CHAINS]) {
    long i = 0;
    for (; i + LANES * GROUP <= o->num_groups * GROUP; i += LANES * GROUP) add_groups(kind, o, i, 1, batch, sums);
    if (i < o->num_cols) add_groups(kind, o, i, 0, batch, sums);
}

/* y[b * num_rows + r] for some rows of W, one after the other, as memory is read fastest, and `batch` rows of x. */
INLINE void products(int kind, operands o, long rows, int batch, float *y, long num_rows) {
    for (long r = 0; r < rows; r++, o.w += o.row_bytes) {
        floats sums[BATCH][CHAINS] = {0};
        if (kind == BF16) products_bf16(&o, batch, sums);
        if (kind == INT8) products_int8(&o, batch, sums);
        if (kind == INT4 || kind == INT4_PAIRS) products_int4(kind, &o, batch, sums);
        float scale = 1;
        if (kind == INT8) memcpy(&scale, o.w + o.row_bytes - sizeof scale, sizeof scale);
        for (int b = 0; b < batch; b++) {
            float sum = sum_of(sums[b][0] + sums[b][1] + (sums[b][2] + sums[b][3]));
            if (kind == INT8) sum -= 128 * sum_of(*(const floats *)(o.sums + b * o.num_sums));
            y[b * num_rows + r] = sum * scale;
        }
    }
}

typedef void products_of(const operands *o, long rows, int batch, float *y, long num_rows);

#define DEFINE_PRODUCTS(kind, name)                                                      \
    static void name(const operands *o, long rows, int batch, float *y, long num_rows) { \
        if (batch == 1) products(kind, *o, rows, 1, y, num_rows);                    \
        if (batch == 2) products(kind, *o, rows, 2, y, num_rows);                    \
        if (batch == 3) products(kind, *o, rows, 3 < BATCH ? 3 : BATCH, y, num_rows); \
        if (batch == 4) products(kind, *o, rows, BATCH, y, num_rows);                \
    }
DEFINE_PRODUCTS(BF16, all_bf16)
DEFINE_PRODUCTS(INT8, all_int8)
DEFINE_PRODUCTS(INT4, all_int4)
DEFINE_PRODUCTS(MULTIPLIES_PAIRS ? INT4_PAIRS : INT4, all_int4_pairs)

/* The first of each 4 elements, of GROUPS groups. */
INLINE floats every_fourth(const float *x) {
    floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = x[lane / 4 * GROUP + lane % 4 * 4];
    return found;
}

/* One row of x, filled up with zeros, in the order in which the kind's products read it; and its sums. */
static void prepare(int kind, const float *x, const operands *o, float *prepared, float *sums) {
    long n = o->num_cols;
    if (kind == BF16) { /* the even elements of a vector of words, then the odd ones */
        for (long i = 0; i < n; i += 2 * LANES)
            for (int word = 0; word < LANES; word++)
                prepared[i + word] = x[i + 2 * word], prepared[i + LANES + word] = x[i + 2 * word + 1];
    } else if (kind == INT8) { /* byte i % 4 of word i / 4 */
        for (long i = 0; i < n; i += 4 * LANES, prepared += 4 * LANES, x += 4 * LANES)
            for (int k = 0; k < 4; k++)
                for (int word = 0; word < LANES; word++) {
                    sums[word] += x[4 * word + k];
                    prepared[k * LANES + word] = x[4 * word + k] * (k < 3 ? 1.0f / (1 << 8 * k) : 1.0f);
                }
    } else if (kind == INT4) { /* the low nibbles of a group's 16 bytes first, then the high ones */
        for (long i = 0; i < n; i += GROUPS * GROUP, prepared += 9 * LANES, sums += GROUPS) {
            floats less = {0};
            for (int k = 0; k < 8; k++) {
                floats part = every_fourth(x + i + k / 2 + k % 2 * GROUP / 2);
                *(floats *)(prepared + k * LANES) = part;
                less -= part;
            }
            *(floats *)(prepared + 8 * LANES) = less;
            for (int lane = 0; lane < LANES; lane++) sums[lane / 4] -= less[lane];
        }
    } else { /* the same for nibbles k and k + 4 */
        for (long i = 0; i < n; i += GROUPS * GROUP, prepared += 4 * LANES, sums += GROUPS) {
            floats sum = {0};
            for (int k = 0; k < 4; k++) {
                const float *from = x + i + k / 2 + k % 2 * GROUP / 2;
                words low = bits_of_bf16(every_fourth(from)), high = bits_of_bf16(every_fourth(from + 2)) << 16;
                *(words *)(prepared + k * LANES) = low | high;
                sum += as_floats(low << 16) + as_floats(high);
            }
            for (int lane = 0; lane < LANES; lane++) sums[lane / 4] += sum[lane];
        }
    }
}

/* y [batch, rows] = x [batch, cols] times the transpose of w [rows, cols]; x and y contiguous. Returns 0, or 1
 * when there is no memory for a copy of x. */
int linear(int kind, const char *w, const float *x, float *y, long batch, long rows, long cols, long row_bytes) {
    static const long units[] = {4 * LANES, 4 * LANES, 8 * LANES, 8 * LANES}; /* of columns, by kind */
    static products_of *const of_kind[] = {all_bf16, all_int8, all_int4, all_int4_pairs};
    if (kind == INT4_PAIRS && !MULTIPLIES_PAIRS) kind = INT4;
    long num_groups = kind >= INT4 ? (cols + GROUP - 1) / GROUP : 0;
    operands all = {w, w + rows * row_bytes, row_bytes, .row_cols = cols};
    all.num_cols = (cols + units[kind] - 1) / units[kind] * units[kind];
    all.x_length = kind == INT4 ? all.num_cols / 8 * 9 : kind == INT4_PAIRS ? all.num_cols / 2 : all.num_cols;
    all.num_groups = num_groups, all.num_sums = (num_groups / LANES + 1) * LANES;
    size_t num_bytes = (all.num_cols + batch * (all.x_length + all.num_sums)) * sizeof(float);
    float *room = aligned_alloc(sizeof(floats), num_bytes); /* each part of it is of whole vectors */
    if (!room) return 1;
    memset(room, 0, num_bytes);
    float *prepared = room + all.num_cols, *sums = prepared + batch * all.x_length;
    all.x = prepared, all.sums = sums;
    for (long b = 0; b < batch; b++) {
        memcpy(room, x + b * cols, cols * sizeof *x);
        prepare(kind, room, &all, prepared + b * all.x_length, sums + b * all.num_sums);
    }
    long num_blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (long block = 0; block < num_blocks; block++) {
        long first = block * BLOCK, count = rows - first < BLOCK ? rows - first : BLOCK;
        for (long b = 0; b < batch; b += BATCH) { /* the rows of W stay in the cache for all of the batch */
            operands o = all;
            o.w += first * row_bytes, o.x += b * all.x_length, o.sums += b * all.num_sums;
            int some = batch - b < BATCH ? batch - b : BATCH;
            of_kind[kind](&o, count, some, y + b * rows + first, rows);
        }
    }
    free(room);
    return 0;
}
