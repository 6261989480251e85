/* The innermost loop of the matrix products: a tile of sums that stays in AVX2's registers. */

#ifndef MODELZIP_TILE_H
#define MODELZIP_TILE_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "native.h"

#define FUSED __attribute__((target("avx2,fma,f16c")))

#define UNROLLED _Pragma("GCC unroll 4") /* else the sums are kept in memory */

/* Twelve registers of sums, three for the right side, one for the left: all sixteen. */
#define TILE_ROWS 4
#define TILE_COLUMNS 24

/* sums[i, j] += sum over k of left[k, i] * right[k, j]. left: [depth, TILE_ROWS], right: [depth, TILE_COLUMNS]; the
 * rows of sums lie `stride` apart. */
FUSED static inline void add_tile(int64_t depth, const float *left, const float *right, float *sums, int64_t stride) {
    __m256 tile[TILE_ROWS][3];
    UNROLLED for (int i = 0; i < TILE_ROWS; i++)
        tile[i][0] = tile[i][1] = tile[i][2] = _mm256_setzero_ps();
    for (int64_t k = 0; k < depth; k++, left += TILE_ROWS, right += TILE_COLUMNS) {
        __m256 first = _mm256_loadu_ps(right), second = _mm256_loadu_ps(right + 8), third = _mm256_loadu_ps(right + 16);
        UNROLLED for (int i = 0; i < TILE_ROWS; i++) {
            __m256 one = _mm256_broadcast_ss(left + i);
            tile[i][0] = _mm256_fmadd_ps(one, first, tile[i][0]);
            tile[i][1] = _mm256_fmadd_ps(one, second, tile[i][1]);
            tile[i][2] = _mm256_fmadd_ps(one, third, tile[i][2]);
        }
    }
    UNROLLED for (int i = 0; i < TILE_ROWS; i++) {
        float *row = sums + i * stride;
        _mm256_storeu_ps(row, _mm256_add_ps(_mm256_loadu_ps(row), tile[i][0]));
        _mm256_storeu_ps(row + 8, _mm256_add_ps(_mm256_loadu_ps(row + 8), tile[i][1]));
        _mm256_storeu_ps(row + 16, _mm256_add_ps(_mm256_loadu_ps(row + 16), tile[i][2]));
    }
}

/* One of the values of a tensor, in fp32. */
FUSED static inline float widened(const void *values, int64_t at, int dtype) {
    if (dtype == FLOAT32)
        return ((const float *)values)[at];
    uint16_t half = ((const uint16_t *)values)[at];
    if (dtype == FLOAT16)
        return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Store a value in a tensor's type, rounded to nearest, ties to even. */
FUSED static inline void narrow(float value, void *values, int64_t at, int dtype) {
    if (dtype == FLOAT32) {
        ((float *)values)[at] = value;
    } else if (dtype == FLOAT16) {
        ((uint16_t *)values)[at] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
        float rounded = as_bfloat16(value);
        uint32_t bits;
        memcpy(&bits, &rounded, 4);
        ((uint16_t *)values)[at] = (uint16_t)(bits >> 16);
    }
}

#endif
