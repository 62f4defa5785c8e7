/* What a decode step on a CPU does between its matrix products, in fp32: norms, attention of one token a row, SwiGLU;
 * and the two halves of a block, products included, each in one call: a small model spends as long between calls as in
 * them. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

enum { FP32, BF16 };         /* as `store` takes them */
enum { POSITIONS = 64 };     /* between two looks at the maximum */
enum { PARALLEL = 1 << 15 }; /* floats that pay for threads */

INLINE float element(int kind, const char *from, long i) {
    return kind == FP32 ? ((const float *)from)[i] : from_bf16(((const uint16_t *)from)[i]);
}

INLINE float dot(const float *a, const float *b, long count) {
    floats sums = {0};
    long i = 0;
    for (; i + LANES <= count; i += LANES) sums += *(const floats *)(a + i) * *(const floats *)(b + i);
    float sum = sum_of(sums);
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* y [rows, cols] = x / sqrt(mean(x^2) + eps) * weight; x, y fp32. */
void rms_norm(const float *x, const char *weight, int kind, float eps, float *y, long rows, long cols) {
    for (long r = 0; r < rows; r++, x += cols, y += cols) {
        float scale = 1 / sqrtf(dot(x, x, cols) / cols + eps);
        if (kind == FP32)
            for (long i = 0; i < cols; i++) y[i] = x[i] * scale * element(FP32, weight, i);
        else
            for (long i = 0; i < cols; i++) y[i] = x[i] * scale * element(BF16, weight, i);
    }
}

/* y [rows, hidden] = silu(gate) * up, of x [rows, 2 hidden]: gate, then up. */
void swiglu(const float *x, float *y, long rows, long hidden) {
#pragma omp parallel for schedule(static) if (rows * hidden >= PARALLEL)
    for (long r = 0; r < rows; r++) {
        const float *gate = x + 2 * r * hidden, *up = gate + hidden;
        float *out = y + r * hidden;
        for (long i = 0; i < hidden; i += LANES) {
            long count = hidden - i < LANES ? hidden - i : LANES;
            floats g = {0}, u = {0};
            memcpy(&g, gate + i, count * sizeof *gate), memcpy(&u, up + i, count * sizeof *up);
            floats product = g * u / (1.0f + exp_of(-g));
            memcpy(out + i, &product, count * sizeof *out);
        }
    }
}

/* One row of the batch in one layer; heads are [query heads, KV heads for keys, KV heads for values] of head_dim. */
typedef struct {
    const float *heads;
    const float *rotation; /* cosine and sine for each pair of a head */
    char *keys, *values;   /* the row's slot of the cache, its first position */
    long position;
    float *y; /* [query heads, head_dim] */
} row_of;

typedef struct {
    int kind; /* of the cache */
    long num_heads, num_kv_heads, head_dim;
    long position_bytes; /* from one position of the cache to the next */
} attention;

static void rotate(const float *x, const float *rotation, float *y, long head_dim) {
    for (long i = 0; i < head_dim; i += 2) {
        float cosine = rotation[i], sine = rotation[i + 1], re = x[i], im = x[i + 1];
        y[i] = re * cosine - im * sine, y[i + 1] = re * sine + im * cosine;
    }
}

/* Pairs apart, as bf16 is read fastest: all first elements, then all second ones. */
static void split_pairs(const float *x, float *y, long count) {
    for (long i = 0; i < count / 2; i++) y[i] = x[2 * i], y[count / 2 + i] = x[2 * i + 1];
}

static void join_pairs(const float *x, float *y, long count) {
    for (long i = 0; i < count / 2; i++) y[2 * i] = x[i], y[2 * i + 1] = x[count / 2 + i];
}

/* A key or a value as floats, its pairs apart. */
INLINE void load(int kind, const char *from, float *to, long count) {
    long half = count / 2, i = 0;
    if (kind == FP32) {
        split_pairs((const float *)from, to, count);
        return;
    }
    for (; i + LANES <= half; i += LANES) {
        words pairs = *(const words *)(from + 4 * i);
        *(floats *)(to + i) = as_floats(pairs << 16);
        *(floats *)(to + half + i) = as_floats(pairs & 0xffff0000u);
    }
    for (; i < half; i++) to[i] = element(BF16, from, 2 * i), to[half + i] = element(BF16, from, 2 * i + 1);
}

INLINE void add_scaled(float *y, float scale, const float *x, long count) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) *(floats *)(y + i) += scale * *(const floats *)(x + i);
    for (; i < count; i++) y[i] += scale * x[i];
}

/* Floats that a thread needs: queries and outputs of a group, a key or value, a rotated head, scores of a group. */
static long room_for(const attention *a) {
    long group = a->num_heads / a->num_kv_heads;
    return 2 * group * a->head_dim + 2 * a->head_dim + group * POSITIONS + 2 * group;
}

/* Told beforehand, since it lies in pieces that the processor would not guess. */
INLINE void prefetch(const char *from, long num_bytes) {
    for (long i = 0; i < num_bytes; i += 64) __builtin_prefetch(from + i);
}

/* The query heads that share KV head `kv`: softmax(q k / sqrt(head_dim)) v, some positions at a time (Milakov and
 * Gimelshein 2018: a running maximum, and what was summed before scaled to it). */
static void attend_group(const attention *a, const row_of *row, long kv, float *room) {
    long D = a->head_dim, group = a->num_heads / a->num_kv_heads;
    float *q = room, *out = q + group * D, *loaded = out + group * D, *turned = loaded + D;
    float *scores = turned + D, *most = scores + group * POSITIONS, *total = most + group;
    long head_bytes = D * (a->kind == FP32 ? 4 : 2), at = kv * head_bytes;
    const char *keys = row->keys + at, *values = row->values + at;
    for (long p = 0; p <= row->position && p < POSITIONS; p++) prefetch(keys + p * a->position_bytes, head_bytes);
    rotate(row->heads + (a->num_heads + kv) * D, row->rotation, turned, D);
    store(a->kind, turned, row->keys + row->position * a->position_bytes + at, D);
    store(a->kind, row->heads + (a->num_heads + a->num_kv_heads + kv) * D,
          row->values + row->position * a->position_bytes + at, D);
    for (long g = 0; g < group; g++) {
        rotate(row->heads + (kv * group + g) * D, row->rotation, turned, D);
        for (long i = 0; i < D; i++) turned[i] /= sqrtf(D);
        split_pairs(turned, q + g * D, D);
        most[g] = -INFINITY, total[g] = 0;
    }
    memset(out, 0, group * D * sizeof *out);
    for (long first = 0; first <= row->position; first += POSITIONS) {
        long count = row->position + 1 - first < POSITIONS ? row->position + 1 - first : POSITIONS;
        for (long p = 0; p < count; p++) {
            prefetch(values + (first + p) * a->position_bytes, head_bytes);
            load(a->kind, keys + (first + p) * a->position_bytes, loaded, D);
            for (long g = 0; g < group; g++) scores[g * POSITIONS + p] = dot(q + g * D, loaded, D);
        }
        for (long g = 0; g < group; g++) {
            float *s = scores + g * POSITIONS, high = most[g], sum = 0;
            for (long p = 0; p < count; p++) high = s[p] > high || s[p] != s[p] ? s[p] : high; /* NaN goes on */
            for (long p = count; p < POSITIONS; p++) s[p] = -INFINITY;
            float shrink = first ? expf(most[g] - high) : 0;
            for (long p = 0; p < POSITIONS; p += LANES) *(floats *)(s + p) = exp_of(*(floats *)(s + p) - high);
            for (long p = 0; p < count; p++) sum += s[p];
            for (long i = 0; i < D; i++) out[g * D + i] *= shrink;
            total[g] = total[g] * shrink + sum, most[g] = high;
        }
        for (long p = 0; p < count; p++) {
            prefetch(keys + (first + p + POSITIONS) * a->position_bytes, head_bytes);
            load(a->kind, values + (first + p) * a->position_bytes, loaded, D);
            for (long g = 0; g < group; g++) add_scaled(out + g * D, scores[g * POSITIONS + p], loaded, D);
        }
    }
    for (long g = 0; g < group; g++) {
        for (long i = 0; i < D; i++) out[g * D + i] /= total[g];
        join_pairs(out + g * D, row->y + (kv * group + g) * D, D);
    }
}

/* Attention of one token for each of `batch` rows, whose keys and values are stored in the cache first. `heads`
 * [batch, heads + 2 KV heads, head_dim], `rotations` [batch, head_dim], `y` [batch, heads, head_dim] are fp32; row b's
 * slot lies b * slot_bytes behind `keys` and `values`, and its token at positions[b]. Returns 0, or 1 for no memory. */
int attend(const float *heads, const float *rotations, char *keys, char *values, const int64_t *positions, float *y,
           int kind, long batch, long num_heads, long num_kv_heads, long head_dim, long slot_bytes,
           long position_bytes) {
    attention a = {kind, num_heads, num_kv_heads, head_dim, position_bytes};
    long tasks = batch * num_kv_heads, width = (num_heads + 2 * num_kv_heads) * head_dim, work = 0, room = room_for(&a);
    for (long b = 0; b < batch; b++) work += (positions[b] + 1) * num_heads * head_dim;
    float *rooms = malloc(tasks * room * sizeof *rooms);
    if (!rooms) return 1;
#pragma omp parallel for schedule(static) if (work >= PARALLEL)
    for (long task = 0; task < tasks; task++) {
        long b = task / num_kv_heads;
        row_of row = {heads + b * width, rotations + b * head_dim, keys + b * slot_bytes, values + b * slot_bytes,
                      positions[b], y + b * num_heads * head_dim};
        attend_group(&a, &row, task % num_kv_heads, rooms + task * room);
    }
    free(rooms);
    return 0;
}

/* ---- halves of a block -------------------------------------------------------------------------------------------- */

typedef int product(int kind, const char *w, const float *x, float *y, long batch, long rows, long cols,
                    long row_bytes); /* linear in kernels.c */

/* `Half` in fused.py: a norm, a product (wqkv or w13), what is between, and a second product (wo or w2). */
typedef struct {
    product *linear;
    const char *norm, *first, *second;
    long norm_kind, first_kind, second_kind;
    long dim, first_rows, second_cols, first_row_bytes, second_row_bytes;
    double eps;
} half;

/* The norm of x [batch, dim] and its first product [batch, first_rows], behind which there is room for the input of the
 * second; NULL where there is no memory. */
static float *first_product(const half *h, const float *x, long batch) {
    float *made = malloc(batch * (h->first_rows + h->second_cols) * sizeof *made);
    float *normed = malloc(batch * h->dim * sizeof *normed);
    int failed = !made || !normed;
    if (!failed) {
        rms_norm(x, h->norm, h->norm_kind, h->eps, normed, batch, h->dim);
        failed = h->linear(h->first_kind, h->first, normed, made, batch, h->first_rows, h->dim, h->first_row_bytes);
    }
    free(normed);
    if (!failed) return made;
    free(made);
    return NULL;
}

static int second_product(const half *h, const float *x, float *y, long batch) {
    return h->linear(h->second_kind, h->second, x, y, batch, h->dim, h->second_cols, h->second_row_bytes);
}

/* y [batch, dim] = this rank's part of wo(attention(wqkv(norm(x)))); the other arguments as `attend` has them. */
int attention_half(const half *h, const float *x, float *y, const float *rotations, char *keys, char *values,
                   const int64_t *positions, int kind, long batch, long num_heads, long num_kv_heads, long head_dim,
                   long slot_bytes, long position_bytes) {
    float *heads = first_product(h, x, batch);
    if (!heads) return 1;
    float *attended = heads + batch * h->first_rows;
    int failed = attend(heads, rotations, keys, values, positions, attended, kind, batch, num_heads, num_kv_heads,
                        head_dim, slot_bytes, position_bytes) ||
                 second_product(h, attended, y, batch);
    free(heads);
    return failed;
}

/* y [batch, dim] = this rank's part of w2(swiglu(w13(norm(x)))). */
int feed_forward_half(const half *h, const float *x, float *y, long batch) {
    float *gate_up = first_product(h, x, batch);
    if (!gate_up) return 1;
    float *product = gate_up + batch * h->first_rows;
    swiglu(gate_up, product, batch, h->second_cols);
    int failed = second_product(h, product, y, batch);
    free(gate_up);
    return failed;
}
