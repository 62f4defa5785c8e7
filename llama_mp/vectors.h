/* Vectors of floats as the compiler lowers them to what the machine has, and what the kernels do with them. */

#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
enum { MULTIPLIES_PAIRS = 1 }; /* of bf16, with sums in fp32 */
#else
enum { MULTIPLIES_PAIRS = 0 };
#endif
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define UNROLL _Pragma("GCC unroll 32")
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2)));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(2)));
typedef uint16_t stored_half __attribute__((may_alias)); /* in memory that is read by the word */

INLINE float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t to_bf16(float value) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

INLINE void store(int is_bf16, const float *x, void *to, long count) {
    if (is_bf16)
        for (long i = 0; i < count; i++) ((stored_half *)to)[i] = to_bf16(x[i]);
    else
        memcpy(to, x, count * sizeof *x);
}

INLINE floats as_floats(words bits) { return (floats)bits; }

INLINE words bits_of_bf16(floats v) { /* `to_bf16` */
#ifdef __AVX512BF16__
    return (words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    words bits = (words)v, is_nan = (words)((bits & 0x7fffffff) > 0x7f800000);
    return (is_nan & (bits >> 16 | 0x40)) | (~is_nan & (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

#if __GNUC__ >= 12 || defined(__clang__)
#define SHUFFLED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLED(v, ...) __builtin_shuffle(v, (integers){__VA_ARGS__})
#endif

INLINE float sum_of(floats v) {
#if LANES == 16
    v += SHUFFLED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
    v += SHUFFLED(v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
#else
    v += SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += SHUFFLED(v, 2, 3, 0, 1, 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}

/* e^x, to 3e-7 of its value; x below -87 counts as -87. The power of two is multiplied with, not added to the bits, so
 * that NaN stays NaN, whatever its payload. */
INLINE floats exp_of(floats x) {
    floats least = (floats){0} - 87.0f, most = (floats){0} + 88.0f;
    words is_low = (words)(x < least), is_high = (words)(x > most);
    x = as_floats((is_low & (words)least) | (is_high & (words)most) | (~(is_low | is_high) & (words)x));
    floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 x 2^23: the sum is rounded to a whole number */
    floats whole = shifted - 12582912.0f;
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln 2 in two parts */
    floats sum = r * (1 / 5040.0f) + 1 / 720.0f;
    sum = sum * r + 1 / 120.0f, sum = sum * r + 1 / 24.0f, sum = sum * r + 1 / 6.0f;
    sum = sum * r + 0.5f, sum = sum * r + 1.0f, sum = sum * r + 1.0f;
    return sum * as_floats(((words)shifted << 23) + 0x3f800000u);
}
