/* Vectors of floats as the compiler lowers them to what the machine has, and what the kernels do with them. */

#pragma once
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2)));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(2)));

INLINE floats as_floats(words bits) { return (floats)bits; }

INLINE float sum_of(floats v) {
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) v[i] += v[i + step];
    return v[0];
}

/* e^x, to 3e-7 of its value; x below -87 counts as -87. */
INLINE floats exp_of(floats x) {
    words is_low = (words)(x < -87.0f), is_high = (words)(x > 88.0f);
    x = as_floats((is_low & (words)(x * 0 - 87.0f)) | (is_high & (words)(x * 0 + 88.0f)) | (~(is_low | is_high) & (words)x));
    floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 x 2^23: the sum is rounded to a whole number */
    floats whole = shifted - 12582912.0f;
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln 2 in two parts */
    floats sum = r * (1 / 5040.0f) + 1 / 720.0f;
    sum = sum * r + 1 / 120.0f, sum = sum * r + 1 / 24.0f, sum = sum * r + 1 / 6.0f;
    sum = sum * r + 0.5f, sum = sum * r + 1.0f, sum = sum * r + 1.0f;
    return as_floats((words)sum + ((words)shifted << 23));
}
