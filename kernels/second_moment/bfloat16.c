/* The symmetric update of bf16 rows on CPUs that multiply bf16 in pairs and sum in fp32 (AVX-512 BF16); reference.py is
 * the definition, but for values under 2^-126, which count as zero.
 *
 * Two tokens at a time: a word holds one column's values of both. The columns lie in panels that serve either side of
 * the innermost loop. Each entry is summed in the same order, however the work is divided.
 */

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)

#include <immintrin.h>

#include "../native.h"

#define PAIRED __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define UNROLLED _Pragma("GCC unroll 8") /* else the sums are kept in memory */

/* 24 registers of sums, three for the right side, one for the left, of 32. */
#define TILE_ROWS 8
#define TILE_COLUMNS 48
#define DEPTH 256 /* tokens taken together: a panel of that many lies in the first cache */
#define BLOCK 192 /* rows of total taken together: they lie in the second cache. Both tile sides divide it */
const int64_t second_moment_pairs_depth = DEPTH, second_moment_pairs_columns = TILE_COLUMNS;

/* sums[i, j] += sum over k of left[k, i] . right[k, j] for words of two values; rows of left and right lie TILE_COLUMNS
 * apart, those of sums `stride`. */
PAIRED static inline void add_tile(int64_t depth, const uint32_t *left, const uint32_t *right, float *sums,
                                   int64_t stride) {
    __m512 tile[TILE_ROWS][3];
    UNROLLED for (int i = 0; i < TILE_ROWS; i++)
        tile[i][0] = tile[i][1] = tile[i][2] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++, left += TILE_COLUMNS, right += TILE_COLUMNS) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(right), second = (__m512bh)_mm512_loadu_si512(right + 16),
                 third = (__m512bh)_mm512_loadu_si512(right + 32);
        UNROLLED for (int i = 0; i < TILE_ROWS; i++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32((int)left[i]);
            tile[i][0] = _mm512_dpbf16_ps(tile[i][0], one, first);
            tile[i][1] = _mm512_dpbf16_ps(tile[i][1], one, second);
            tile[i][2] = _mm512_dpbf16_ps(tile[i][2], one, third);
        }
    }
    UNROLLED for (int i = 0; i < TILE_ROWS; i++) {
        float *row = sums + i * stride;
        _mm512_storeu_ps(row, _mm512_add_ps(_mm512_loadu_ps(row), tile[i][0]));
        _mm512_storeu_ps(row + 16, _mm512_add_ps(_mm512_loadu_ps(row + 16), tile[i][1]));
        _mm512_storeu_ps(row + 32, _mm512_add_ps(_mm512_loadu_ps(row + 32), tile[i][2]));
    }
}

/* Two tokens, the second NULL past the last one: into their place in panels [padded / TILE_COLUMNS, depth,
 * TILE_COLUMNS], with zeros from `width` on. */
PAIRED static inline void pack_pair(int64_t width, int64_t depth, const uint16_t *one, const uint16_t *other,
                                    uint32_t *panel) {
    for (int64_t column = 0; column < width; column += TILE_COLUMNS, panel += depth * TILE_COLUMNS) {
        int64_t columns = least(TILE_COLUMNS, width - column);
        for (int64_t j = 0; j < columns; j++)
            panel[j] = one[column + j] | (other ? (uint32_t)other[column + j] << 16 : 0);
        for (int64_t j = columns; j < TILE_COLUMNS; j++)
            panel[j] = 0;
    }
}

/* Add a tile of which only `rows` and `columns` lie in total. */
PAIRED static void add_edge(int64_t depth, const uint32_t *left, const uint32_t *right, float *total, int64_t width,
                            int64_t rows, int64_t columns) {
    float sums[TILE_ROWS * TILE_COLUMNS] = {0};
    add_tile(depth, left, right, sums, TILE_COLUMNS);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            total[i * width + j] += sums[i * TILE_COLUMNS + j];
}

/* A panel's columns of the rows of a block that lie on or under the diagonal. */
PAIRED static void add_piece(int64_t block, int64_t column, int64_t width, int64_t depth, const uint32_t *panels,
                             float *total) {
    for (int64_t row = column > block ? column : block; row < least(block + BLOCK, width); row += TILE_ROWS) {
        const uint32_t *left = panels + row / TILE_COLUMNS * TILE_COLUMNS * depth + row % TILE_COLUMNS;
        const uint32_t *right = panels + column * depth;
        float *at = total + row * width + column;
        int64_t rows = least(TILE_ROWS, width - row), columns = least(TILE_COLUMNS, width - column);
        if (rows == TILE_ROWS && columns == TILE_COLUMNS)
            add_tile(depth, left, right, at, width);
        else
            add_edge(depth, left, right, at, width, rows, columns);
    }
}

/* total: [width, width]. x: bf16 [tokens, width]. panels: words [DEPTH / 2, padded] for `padded`, the next multiple of
 * TILE_COLUMNS, for scratch. */
PAIRED void second_moment_pairs(int threads, int64_t width, int64_t tokens, const uint16_t *x, float *total,
                                uint32_t *panels) {
#pragma omp parallel num_threads(threads)
    for (int64_t start = 0; start < tokens; start += DEPTH) {
        int64_t some = least(DEPTH, tokens - start), depth = (some + 1) / 2;
#pragma omp for
        for (int64_t pair = 0; pair < depth; pair++) {
            const uint16_t *one = x + (start + 2 * pair) * width;
            pack_pair(width, depth, one, 2 * pair + 1 < some ? one + width : NULL, panels + pair * TILE_COLUMNS);
        }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t block = 0; block < width; block += BLOCK)
            for (int64_t column = 0; column < width; column += TILE_COLUMNS)
                if (column < block + BLOCK)
                    add_piece(block, column, width, depth, panels, total);
    }
}

#endif
