/* What the compiled CPU kernels share. */

#ifndef MODELZIP_NATIVE_H
#define MODELZIP_NATIVE_H

#include <omp.h>    /* threads of the library that torch has loaded: others would contend with torch's, which spin */
#include <stdint.h> /* for one thing, it says whether this is glibc */
#include <string.h>

/* Compiled for several instruction sets; the best one that the machine has is picked when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

/* What isn't put into its caller isn't compiled for the caller's instruction set. */
#ifdef __GNUC__
#define PART static inline __attribute__((always_inline))
#else
#define PART static inline
#endif

PART int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

/* Numbers for the types of tensors; native.c tells them to Python. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* Run `statement` with DTYPE a constant in each branch, so that its loops hold no choice. */
#define FOR_DTYPE(dtype, statement)                                                                                    \
    do {                                                                                                               \
        if ((dtype) == FLOAT32) {                                                                                      \
            enum { DTYPE = FLOAT32 };                                                                                  \
            statement;                                                                                                 \
        } else if ((dtype) == BFLOAT16) {                                                                              \
            enum { DTYPE = BFLOAT16 };                                                                                 \
            statement;                                                                                                 \
        } else {                                                                                                       \
            enum { DTYPE = FLOAT16 };                                                                                  \
            statement;                                                                                                 \
        }                                                                                                              \
    } while (0)

/* The whole number nearest to value (ties to even) between two whole numbers of less than 2^22. */
PART float round_between(float value, float lowest, float highest) {
    const float whole = 12582912.0f; /* 1.5 * 2^23: sums near it have no fraction */
    value = value < lowest ? lowest : value;
    value = value > highest ? highest : value;
    return (value + whole) - whole;
}

/* The bf16 nearest to value, ties to even. Adding to the bits of a NaN could carry it into another number. */
PART float as_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = value != value ? 0x7fc00000u : (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    memcpy(&value, &bits, 4);
    return value;
}

#endif
