/* A linear in fp32 between activations in fewer bits; reference.py is the definition.
 *
 * Both sides are laid out so that the innermost loop reads them in order: a span of the outputs' weights at a time,
 * then the activations for a strip of tokens after the other, widened on the way. Sums of a strip are rounded while
 * they lie in the first cache. Each output is summed in the same order, however the tokens are divided.
 */

#if defined(__x86_64__)

#include "../tile.h"

#define DEPTH 192 /* inputs taken together: a panel of that many lies in the first cache */
#define STRIP 48  /* tokens taken together: with 1536 inputs, half of the second cache */
const int64_t mixed_linear_strip = STRIP, mixed_linear_tile_columns = TILE_COLUMNS;

/* A panel [in, TILE_COLUMNS] from `count` rows of weight [out, in], whose rows and columns lie `row` and `column`
 * apart; zeros for rows that are missing. */
static void pack_panel(int64_t count, int64_t in, int64_t row, int64_t column, const float *weight, float *panel) {
    for (int64_t k = 0; k < in; k += 8) /* so that each line of the cache is read once */
        for (int64_t j = 0; j < TILE_COLUMNS; j++)
            for (int64_t one = k; one < least(k + 8, in); one++)
                panel[one * TILE_COLUMNS + j] = j < count ? weight[j * row + one * column] : 0.0f;
}

/* to: [depth, TILE_ROWS], from `count` rows of x that lie `stride` apart; zeros for those that are missing. */
FUSED static inline void pack_rows(int64_t count, int64_t depth, const void *x, int64_t at, int64_t stride, int dtype,
                                   float *to) {
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < TILE_ROWS; i++)
            to[k * TILE_ROWS + i] = i < count ? widened(x, at + i * stride + k, dtype) : 0.0f;
}

/* strip: [in / DEPTH, STRIP / TILE_ROWS, DEPTH, TILE_ROWS], from `count` rows of x from `first` on. */
FUSED static inline void pack_strip(int64_t first, int64_t count, int64_t in, const void *x, int dtype, float *strip) {
    for (int64_t token = 0; token < count; token += TILE_ROWS)
        for (int64_t start = 0; start < in; start += DEPTH) {
            int64_t depth = least(DEPTH, in - start), at = (first + token) * in + start;
            float *to = strip + start * STRIP + token * depth;
            if (count - token >= TILE_ROWS)
                pack_rows(TILE_ROWS, depth, x, at, in, dtype, to);
            else
                pack_rows(count - token, depth, x, at, in, dtype, to);
        }
}

FUSED static inline void store(int64_t count, int64_t width, const float *sums, void *y, int64_t at, int64_t stride,
                               int dtype) {
    for (int64_t token = 0; token < count; token++)
        for (int64_t j = 0; j < width; j++)
            narrow(sums[token * TILE_COLUMNS + j], y, at + token * stride + j, dtype);
}

/* Outputs from `begin` to `end` of y [count, out], from a strip and their packed weights. */
FUSED static void one_strip(int64_t first, int64_t count, int64_t in, int64_t out, int64_t begin, int64_t end,
                            int dtype, const float *strip, const float *packed, const float *bias, void *y) {
    float sums[STRIP * TILE_COLUMNS];
    for (int64_t column = begin; column < end; column += TILE_COLUMNS) {
        int64_t width = least(TILE_COLUMNS, end - column);
        memset(sums, 0, sizeof sums);
        for (int64_t token = 0; token < count && bias != NULL; token++)
            memcpy(sums + token * TILE_COLUMNS, bias + column, width * sizeof(float));
        for (int64_t start = 0; start < in; start += DEPTH) {
            int64_t depth = least(DEPTH, in - start);
            const float *group = strip + start * STRIP, *panel = packed + (column - begin) * in + start * TILE_COLUMNS;
            for (int64_t token = 0; token < count; token += TILE_ROWS)
                add_tile(depth, group + token * depth, panel, sums + token * TILE_COLUMNS, TILE_COLUMNS);
        }
        FOR_DTYPE(dtype, store(count, width, sums, y, first * out + column, out, DTYPE));
    }
}

/* x: [tokens, in], y: [tokens, out], both of `dtype`. weight: [out, in], rows and columns `row` and `column` apart.
 * bias: [out] or NULL. span: outputs taken together, a multiple of TILE_COLUMNS. packed: [span, in] and strips:
 * [threads, STRIP, in], for scratch. */
FUSED void mixed_linear(int threads, int64_t tokens, int64_t in, int64_t out, int64_t row, int64_t column, int64_t span,
                        int dtype, const void *x, const float *weight, const float *bias, void *y, float *packed,
                        float *strips) {
#pragma omp parallel num_threads(threads)
    for (int64_t begin = 0; begin < out; begin += span) {
        float *strip = strips + omp_get_thread_num() * STRIP * in;
        int64_t end = least(begin + span, out);
#pragma omp for schedule(dynamic)
        for (int64_t first = begin; first < end; first += TILE_COLUMNS)
            pack_panel(least(TILE_COLUMNS, end - first), in, row, column, weight + first * row,
                       packed + (first - begin) * in);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < tokens; first += STRIP) {
            int64_t count = least(STRIP, tokens - first);
            FOR_DTYPE(dtype, pack_strip(first, count, in, x, DTYPE, strip));
            one_strip(first, count, in, out, begin, end, dtype, strip, packed, bias, y);
        }
    }
}

#endif
