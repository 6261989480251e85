/* What the compiled CPU kernels share. */

#ifndef MODELZIP_NATIVE_H
#define MODELZIP_NATIVE_H

#include <stdint.h> /* for one thing, it says whether this is glibc */

/* Compiled for several instruction sets; the best one that the machine has is picked when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

/* The whole number nearest to value (ties to even) between two whole numbers of less than 2^22. */
static inline float round_between(float value, float lowest, float highest) {
    const float whole = 12582912.0f; /* 1.5 * 2^23: sums near it have no fraction */
    value = value < lowest ? lowest : value;
    value = value > highest ? highest : value;
    return (value + whole) - whole;
}

#endif
