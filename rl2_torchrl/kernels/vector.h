/* Vectors of the processor's width, and the functions on them that the kernels share. */
#pragma once

#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif

/* Compiled once for float and once, with -DDOUBLE, for double. */
#ifdef DOUBLE
typedef double real;
typedef int64_t bits;
#define EXPONENT_SHIFT 52
#define EXPONENT_BIAS 1023
#define LARGEST 700
#define ROOT sqrt
#define LAST_FACTOR (1 / 6227020800.) /* 1 / 13! */
#define TERMS 13 /* of e^x's series for |x| < 0.35: what follows is below rounding */
#else
typedef float real;
typedef int32_t bits;
#define EXPONENT_SHIFT 23
#define EXPONENT_BIAS 127
#define LARGEST 87
#define ROOT sqrtf
#define LAST_FACTOR (1 / 5040.f)
#define TERMS 7
#endif

#if defined(__AVX512F__)
#define BYTES 64
#define ROWS 8
#elif defined(__AVX__)
#define BYTES 32
#define ROWS 4 /* 12 accumulators, 3 weights and 1 factor fill AVX2's 16 registers */
#else
#define BYTES 16
#define ROWS 8
#endif
#define LANES (BYTES / (int)sizeof(real))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
typedef bits ivec __attribute__((vector_size(BYTES)));

static inline int lesser(int a, int b) { return a < b ? a : b; }

#define NO_MEMORY INT_MIN /* what a kernel returns that could not get the memory that it works in */

/* Entries up to whole cache lines: what two threads write must not share one. */
static inline size_t whole_lines(size_t entries) { return (entries + 15) / 16 * 16; }
/* Memory that begins at a cache line, to be freed; NULL if there is none. aligned_alloc's sizes must be whole lines, too. */
static inline void *memory(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* Loads and stores of the first n of a vector's entries; n beyond LANES means all of them. */
static inline vec load(const real *from, int n) {
    if (n >= LANES) return *(const vec *)from;
    vec v = {0};
    memcpy(&v, from, n * sizeof(real));
    return v;
}
static inline void store(real *to, vec v, int n) {
    if (n >= LANES) *(vec *)to = v;
    else if (n > 0) memcpy(to, &v, n * sizeof(real));
}

static inline vec choose(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }

/* e^x = 2^k e^r with a whole k and |r| < 0.35, where e^r's series is short. Beyond LARGEST it stands still; NaN stays NaN. Of n
 * vectors, a constant: each line waits for the one above it, and several vectors wait together. */
INLINE void exponentials(const int n, vec *x) {
    const real magic = (real)((bits)3 << (EXPONENT_SHIFT - 1)); /* adding it leaves the whole part in the low bits */
    real factor = LAST_FACTOR;
    vec shifted[ROWS], k[ROWS], sum[ROWS];
    UNROLL for (int i = 0; i < n; i++) x[i] = choose(x[i] < -(real)LARGEST, (vec){0} - LARGEST, x[i]);
    UNROLL for (int i = 0; i < n; i++) x[i] = choose(x[i] > (real)LARGEST, (vec){0} + LARGEST, x[i]);
    UNROLL for (int i = 0; i < n; i++) shifted[i] = x[i] * (real)1.4426950408889634 + magic;
    UNROLL for (int i = 0; i < n; i++) k[i] = shifted[i] - magic;
    UNROLL for (int i = 0; i < n; i++) x[i] = x[i] - k[i] * (real)0.693145751953125;
    UNROLL for (int i = 0; i < n; i++) x[i] = x[i] - k[i] * (real)1.4286068203094172e-6;
    UNROLL for (int i = 0; i < n; i++) sum[i] = (vec){0} + factor;
    UNROLL for (int term = TERMS; term > 0; term--) {
        factor *= term;
        UNROLL for (int i = 0; i < n; i++) sum[i] = sum[i] * x[i] + factor;
    }
    UNROLL for (int i = 0; i < n; i++)
        x[i] = sum[i] * (vec)(((ivec)shifted[i] << EXPONENT_SHIFT) + ((bits)EXPONENT_BIAS << EXPONENT_SHIFT));
}
INLINE void sigmoids(const int n, vec *x) {
    UNROLL for (int i = 0; i < n; i++) x[i] = -x[i];
    exponentials(n, x);
    UNROLL for (int i = 0; i < n; i++) x[i] = 1 / (1 + x[i]);
}
INLINE void tanhs(const int n, vec *x) {
    UNROLL for (int i = 0; i < n; i++) x[i] = 2 * x[i];
    sigmoids(n, x);
    UNROLL for (int i = 0; i < n; i++) x[i] = 2 * x[i] - 1;
}
static inline vec exponential(vec x) {
    exponentials(1, &x);
    return x;
}
