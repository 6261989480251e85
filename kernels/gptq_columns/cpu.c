/* The column loop of GPTQ inside one block of columns; reference.py is the definition.
 *
 * Rows don't depend on each other: a strip of them is taken through all columns while it lies in the first cache, so
 * that the rank-one updates cost no memory traffic.
 */

#include <stdint.h>
#include <string.h>

#include "../native.h"

#define STRIP 32 /* rows taken together: four AVX2 registers */
const int64_t gptq_columns_strip = STRIP;

static inline float as_float16(float value) {
    uint32_t bits;
    float rounded, size = value < 0 ? -value : value;
    memcpy(&bits, &value, 4);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & 0xffffe000u;
    memcpy(&rounded, &bits, 4);
    float small = (size + 0.5f) - 0.5f; /* whole multiples of 2^-24, the smallest fp16 */
    float huge = size >= 65520.0f ? (value < 0 ? -1.0f : 1.0f) / 0.0f : rounded;
    return size < 0x1p-14f ? (value < 0 ? -small : small) : huge;
}

/* One column of a strip: levels and errors (already over the factor's diagonal) of `column`. */
static inline void round_column(const float *column, const float *scale, const float *zero_point, float inverse,
                                float lowest, float highest, int value_dtype, float *codes, float *errors) {
    for (int r = 0; r < STRIP; r++) {
        float level = round_between(column[r] / scale[r], lowest - zero_point[r], highest - zero_point[r]);
        float value = level * scale[r];
        codes[r] = level + zero_point[r];
        if (value_dtype == BFLOAT16)
            value = as_bfloat16(value);
        else if (value_dtype == FLOAT16)
            value = as_float16(value);
        errors[r] = (column[r] - value) * inverse;
    }
}

/* One strip of the rows, from `first` on. */
VECTORIZED static void one_strip(int64_t first, int64_t block, int64_t rows, const float *weight, const float *factor,
                                 const float *scale, const float *zero_point, int8_t *codes, float *errors,
                                 float lowest, float highest, int value_dtype, float *strip) {
    int64_t count = least(STRIP, rows - first);
    memset(strip, 0, block * STRIP * sizeof(float));
    for (int64_t j = 0; j < block; j++)
        memcpy(strip + j * STRIP, weight + j * rows + first, count * sizeof(float));
    for (int64_t j = 0; j < block; j++) {
        const float *row = factor + j * block;
        float steps[STRIP], zeros[STRIP] = {0}, levels[STRIP], error[STRIP];
        for (int r = 0; r < STRIP; r++)
            steps[r] = 1.0f;
        memcpy(steps, scale + j * rows + first, count * sizeof(float));
        memcpy(zeros, zero_point + j * rows + first, count * sizeof(float));
        const float *column = strip + j * STRIP;
        float inverse = 1.0f / row[j];
        FOR_DTYPE(value_dtype, round_column(column, steps, zeros, inverse, lowest, highest, DTYPE, levels, error));
        for (int64_t r = 0; r < count; r++)
            codes[j * rows + first + r] = (int8_t)levels[r];
        memcpy(errors + j * rows + first, error, count * sizeof(float));
        for (int64_t k = j + 1; k < block; k++) {
            float *later = strip + k * STRIP;
            float share = row[k];
            for (int r = 0; r < STRIP; r++)
                later[r] -= share * error[r];
        }
    }
}

/* weight, scale, zero_point, codes, errors: [block, rows]. factor: [block, block]. strips: [threads, block, STRIP], for
 * scratch. */
void gptq_columns(int threads, int64_t block, int64_t rows, const float *weight, const float *factor,
                  const float *scale, const float *zero_point, int8_t *codes, float *errors, float lowest,
                  float highest, int value_dtype, float *strips) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t first = 0; first < rows; first += STRIP)
        one_strip(first, block, rows, weight, factor, scale, zero_point, codes, errors, lowest, highest, value_dtype,
                  strips + omp_get_thread_num() * block * STRIP);
}
