/* Matrix products of a few rows, bound by the speed of memory: y = x W^T with W in bf16, sums in fp32.
 *
 * The compiler vectorizes the plain loops; on x86-64 it does so once per instruction set, and the loader picks
 * (AVX-512, AVX2, or neither). OpenMP's functions are left to the libgomp that torch has loaded already: a second
 * runtime would fight over the cores with the first. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#define EACH_INSTRUCTION_SET __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_INSTRUCTION_SET
#endif

enum { ROWS = 4 }; /* rows of W at once: enough sums in flight to hide the latency of a multiply-add */

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t round_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                /* to nearest, ties to even */
}

/* Dot products of ROWS rows of pairs of bf16 with x, which is split into its even and its odd elements. */
EACH_INSTRUCTION_SET
static void dot_rows(const uint32_t *w, long num_pairs, const float *even, const float *odd, float *sums) {
    const uint32_t *w0 = w, *w1 = w + num_pairs, *w2 = w + 2 * num_pairs, *w3 = w + 3 * num_pairs;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (long i = 0; i < num_pairs; i++) {
        s0 += as_float(w0[i] << 16) * even[i] + as_float(w0[i] & 0xffff0000u) * odd[i];
        s1 += as_float(w1[i] << 16) * even[i] + as_float(w1[i] & 0xffff0000u) * odd[i];
        s2 += as_float(w2[i] << 16) * even[i] + as_float(w2[i] & 0xffff0000u) * odd[i];
        s3 += as_float(w3[i] << 16) * even[i] + as_float(w3[i] & 0xffff0000u) * odd[i];
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

EACH_INSTRUCTION_SET
static float dot_row(const uint32_t *w, long num_pairs, const float *even, const float *odd) {
    float sum = 0;
    for (long i = 0; i < num_pairs; i++)
        sum += as_float(w[i] << 16) * even[i] + as_float(w[i] & 0xffff0000u) * odd[i];
    return sum;
}

/* y [batch, rows] = x [batch, cols] times the transpose of w [rows, cols], all bf16 and contiguous, cols even.
 * Returns 0, or 1 when there is no memory for a copy of x in fp32. */
int linear_bf16(const uint16_t *w, const uint16_t *x, uint16_t *y, long batch, long rows, long cols) {
    long num_pairs = cols / 2, num_blocks = (rows + ROWS - 1) / ROWS;
    float *split = malloc(batch * cols * sizeof *split);
    if (!split) return 1;
    for (long i = 0; i < batch * num_pairs; i++) {
        float *of_row = split + i / num_pairs * cols;
        of_row[i % num_pairs] = as_float((uint32_t)x[2 * i] << 16);
        of_row[num_pairs + i % num_pairs] = as_float((uint32_t)x[2 * i + 1] << 16);
    }
#pragma omp parallel for schedule(static)
    for (long block = 0; block < num_blocks; block++) {
        long first = block * ROWS, count = rows - first < ROWS ? rows - first : ROWS;
        const uint32_t *w_block = (const uint32_t *)(w + first * cols);
        for (long b = 0; b < batch; b++) { /* the rows of W stay in the cache for all of the batch */
            const float *even = split + b * cols, *odd = even + num_pairs;
            float sums[ROWS];
            if (count == ROWS)
                dot_rows(w_block, num_pairs, even, odd, sums);
            else
                for (long r = 0; r < count; r++) sums[r] = dot_row(w_block + r * num_pairs, num_pairs, even, odd);
            for (long r = 0; r < count; r++) y[b * rows + first + r] = round_to_bf16(sums[r]);
        }
    }
    free(split);
    return 0;
}
