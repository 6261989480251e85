/* The symmetric rank-k update total += xᵀx under the diagonal; reference.py is the definition.
 *
 * The columns of x are laid out twice, in groups and in panels as the innermost loop reads its two sides. Each entry is
 * summed in the same order, however the work is divided.
 */

#if defined(__x86_64__)

#include "../tile.h"

#define DEPTH 256 /* tokens taken together: a panel of that many lies in the first cache */
#define BLOCK 192 /* rows of total taken together: their groups lie in the second cache. Both tile sides divide it */
const int64_t second_moment_depth = DEPTH, second_moment_tile_columns = TILE_COLUMNS;

/* One token: x [width] into its place in groups [padded / TILE_ROWS, depth, TILE_ROWS] and in panels [padded /
 * TILE_COLUMNS, depth, TILE_COLUMNS], with zeros from `width` on. */
FUSED static inline void pack_token(int64_t width, int64_t depth, const void *x, int64_t at, int dtype, float *group,
                                    float *panel) {
    for (int64_t column = 0; column < width; column += TILE_COLUMNS) {
        float values[TILE_COLUMNS] = {0};
        if (column + TILE_COLUMNS <= width) /* a count that is constant, so that the loop is vectorized */
            for (int64_t j = 0; j < TILE_COLUMNS; j++)
                values[j] = widened(x, at + column + j, dtype);
        else
            for (int64_t j = 0; column + j < width; j++)
                values[j] = widened(x, at + column + j, dtype);
        memcpy(panel + column * depth, values, sizeof values);
        for (int64_t j = 0; j < TILE_COLUMNS; j += TILE_ROWS)
            memcpy(group + (column + j) * depth, values + j, TILE_ROWS * sizeof(float));
    }
}

/* Add a tile of which only `rows` and `columns` lie in total. */
FUSED static void add_edge(int64_t depth, const float *group, const float *panel, float *total, int64_t width,
                           int64_t rows, int64_t columns) {
    float sums[TILE_ROWS * TILE_COLUMNS] = {0};
    add_tile(depth, group, panel, sums, TILE_COLUMNS);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            total[i * width + j] += sums[i * TILE_COLUMNS + j];
}

/* A panel's columns of the rows of a block that lie on or under the diagonal. */
FUSED static void add_piece(int64_t block, int64_t column, int64_t width, int64_t depth, const float *groups,
                            const float *panels, float *total) {
    for (int64_t row = column > block ? column : block; row < least(block + BLOCK, width); row += TILE_ROWS) {
        const float *group = groups + row * depth, *panel = panels + column * depth;
        float *at = total + row * width + column;
        int64_t rows = least(TILE_ROWS, width - row), columns = least(TILE_COLUMNS, width - column);
        if (rows == TILE_ROWS && columns == TILE_COLUMNS)
            add_tile(depth, group, panel, at, width);
        else
            add_edge(depth, group, panel, at, width, rows, columns);
    }
}

/* total: [width, width]. x: [tokens, width] of `dtype`. groups, panels: [DEPTH, padded] for `padded`, the next multiple
 * of TILE_COLUMNS, for scratch. */
FUSED void second_moment(int threads, int64_t width, int64_t tokens, int dtype, const void *x, float *total,
                         float *groups, float *panels) {
#pragma omp parallel num_threads(threads)
    for (int64_t start = 0; start < tokens; start += DEPTH) {
        int64_t depth = least(DEPTH, tokens - start);
#pragma omp for
        for (int64_t token = 0; token < depth; token++)
            FOR_DTYPE(dtype, pack_token(width, depth, x, (start + token) * width, DTYPE, groups + token * TILE_ROWS,
                                        panels + token * TILE_COLUMNS));
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t block = 0; block < width; block += BLOCK)
            for (int64_t pair = 0; pair < width; pair += 2 * TILE_COLUMNS) /* no two threads write to one line */
                for (int64_t column = pair; column < least(pair + 2 * TILE_COLUMNS, least(block + BLOCK, width));
                     column += TILE_COLUMNS)
                    add_piece(block, column, width, depth, groups, panels, total);
    }
}

#endif
