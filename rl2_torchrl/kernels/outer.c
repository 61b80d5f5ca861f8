/* Sums of outer products over all steps, as the gradients of a GRU's weights are.
 *
 * Blocks of OUTPUTS by up to WIDE vectors of sums are made in registers, of STEPS steps at a time, whose numbers a near cache
 * holds. Sums lie in whole blocks and whole vectors, and so are q and v read: what is beyond outputs and columns is unused, but
 * must be there.
 */
#include "functions.h"

#define OUTPUTS 8
#define WIDE (BYTES == 64 ? 3 : 1) /* other processors have half the registers */
#define STEPS 64

long sums_height(int outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS * OUTPUTS; }
long sums_width(int columns) { return (columns + LANES - 1) / LANES * LANES; }

/* Adds those over n steps of `pitch` numbers each, `wide` vectors of them: a constant, so that registers hold the sums. Of the next
 * STEPS steps those q and v are asked for that are `new` to this column and output: no processor guesses such strides. */
INLINE void add_outer(const int wide, int n, long pitch, const real *q, int new_q, const real *v, int new_v, real *sums, long width) {
    vec sum[OUTPUTS][3], at[3];
    UNROLL for (int m = 0; m < OUTPUTS; m++)
        UNROLL for (int c = 0; c < wide; c++) sum[m][c] = *(vec *)(sums + m * width + c * LANES);
    for (int i = 0; i < n; i++, q += pitch, v += pitch) {
        if (new_q) __builtin_prefetch(q + STEPS * pitch, 0, 2);
        if (new_v) UNROLL for (int c = 0; c < wide; c++) __builtin_prefetch(v + STEPS * pitch + c * LANES, 0, 2);
        UNROLL for (int c = 0; c < wide; c++) at[c] = *(const vec *)(v + c * LANES);
        UNROLL for (int m = 0; m < OUTPUTS; m++)
            UNROLL for (int c = 0; c < wide; c++) sum[m][c] += q[m] * at[c];
    }
    UNROLL for (int m = 0; m < OUTPUTS; m++)
        UNROLL for (int c = 0; c < wide; c++) *(vec *)(sums + m * width + c * LANES) = sum[m][c];
}

/* Those of all outputs over n steps, in [sums_height(outputs), width]. */
static void sums_of(int n, long pitch, const real *q, int outputs, const real *v, real *sums, long width) {
    memset(sums, 0, sums_height(outputs) * width * sizeof(real));
    for (int i = 0; i < n; i += STEPS)
        for (int c = 0; c < width; c += WIDE * LANES)
            for (int o = 0; o < outputs; o += OUTPUTS) {
                const real *from_q = q + i * pitch + o, *from_v = v + i * pitch + c;
                real *to = sums + o * width + c;
                int steps = lesser(STEPS, n - i), wide = lesser(WIDE, (int)(width - c) / LANES);
                if (wide == WIDE) add_outer(WIDE, steps, pitch, from_q, !c, from_v, !o, to, width);
                else if (wide == 2) add_outer(2, steps, pitch, from_q, !c, from_v, !o, to, width);
                else add_outer(1, steps, pitch, from_q, !c, from_v, !o, to, width);
            }
}

/* sums [threads, sums_height(outputs), sums_width(columns)]: in the first of the threads', the sums over n steps of q[step, output]
 * v[step, column]; steps are `pitch` numbers apart. Each thread has steps of its own, which are in its cache if it has made them, and
 * the sums are added in the threads' order: the same numbers in every run. */
void outer_sums(int n, long pitch, const real *q, int outputs, const real *v, int columns, real *sums, int threads) {
    long width = sums_width(columns), size = sums_height(outputs) * width;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        long begin = (long)n * thread / threads, end = (long)n * (thread + 1) / threads;
        sums_of((int)(end - begin), pitch, q + begin * pitch, outputs, v + begin * pitch, sums + thread * size, width);
    }
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < size; i += LANES)
        for (int thread = 1; thread < threads; thread++) *(vec *)(sums + i) += *(vec *)(sums + thread * size + i);
}
