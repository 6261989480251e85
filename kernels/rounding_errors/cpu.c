/* The errors that rounding to each of several grids makes in each group of weights; reference.py is the definition. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "../native.h"

#define SPAN 64  /* groups that a thread takes at a time */
#define LANES 16 /* sums kept apart, so that they can be added side by side */

static inline float missed(float weight, float scale, float lowest, float highest, float root) {
    return (weight - round_between(weight / scale, lowest, highest) * scale) * root;
}

/* The groups from begin to end. */
VECTORIZED static void some_groups(int64_t begin, int64_t end, int64_t grids, int64_t groups, int64_t size,
                                   int64_t period, const float *weight, const float *scale, const float *zero_point,
                                   const float *root, float *norms, float lowest, float highest) {
    static const float ones[LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (int64_t group = begin; group < end; group++) {
        const float *values = weight + group * size, *own = root == NULL ? NULL : root + group % period * size;
        for (int64_t at = group; at < grids * groups; at += groups) { /* the weights stay in the first cache */
            float step = scale[at], zero = zero_point == NULL ? 0.0f : zero_point[at];
            float low = lowest - zero, high = highest - zero, sums[LANES] = {0}, total = 0;
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES) {
                const float *roots = own == NULL ? ones : own + i;
                for (int lane = 0; lane < LANES; lane++) {
                    float one = missed(values[i + lane], step, low, high, roots[lane]);
                    sums[lane] += one * one;
                }
            }
            for (; i < size; i++) {
                float one = missed(values[i], step, low, high, own == NULL ? 1.0f : own[i]);
                total += one * one;
            }
            for (int lane = 0; lane < LANES; lane++)
                total += sums[lane];
            norms[at] = sqrtf(total);
        }
    }
}

/* weight: [groups, size]. scale, zero_point (or NULL), norms: [grids, groups]. root (or NULL): [period, size], for
 * groups that take turns at its rows. */
void rounding_errors(int threads, int64_t grids, int64_t groups, int64_t size, int64_t period, const float *weight,
                     const float *scale, const float *zero_point, const float *root, float *norms, float lowest,
                     float highest) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t first = 0; first < groups; first += SPAN)
        some_groups(first, least(first + SPAN, groups), grids, groups, size, period, weight, scale, zero_point, root,
                    norms, lowest, highest);
}
