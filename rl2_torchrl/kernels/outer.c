/* Sums of outer products over all steps, as the gradients of a GRU's weights are.
 *
 * Blocks of OUTPUTS by LANES sums are made in registers, of STEPS steps at a time, whose numbers a near cache holds. Sums lie in
 * whole blocks and whole vectors, and so are q and v read: what is beyond outputs and columns is unused, but must be there.
 */
#include "functions.h"

#define OUTPUTS (2 * ROWS)
#define STEPS 64

long sums_height(int outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS * OUTPUTS; }
long sums_width(int columns) { return (columns + LANES - 1) / LANES * LANES; }

/* Adds those over n steps of `pitch` numbers each. */
static void add_outer(int n, long pitch, const real *q, const real *v, real *sums, long width) {
    vec sum[OUTPUTS];
    UNROLL for (int m = 0; m < OUTPUTS; m++) sum[m] = *(vec *)(sums + m * width);
    for (int i = 0; i < n; i++) {
        vec at = *(const vec *)(v + i * pitch);
        UNROLL for (int m = 0; m < OUTPUTS; m++) sum[m] += q[i * pitch + m] * at;
    }
    UNROLL for (int m = 0; m < OUTPUTS; m++) *(vec *)(sums + m * width) = sum[m];
}

/* sums [sums_height(outputs), sums_width(columns)] = sum over n steps of q[step, output] v[step, column]; steps are `pitch` numbers
 * apart. Each thread has outputs of its own: the sums are the same whatever the number of threads. */
void outer_sums(int n, long pitch, const real *q, int outputs, const real *v, int columns, real *sums, int threads) {
    int blocks = (int)(sums_height(outputs) / OUTPUTS);
    long width = sums_width(columns);
    memset(sums, 0, sums_height(outputs) * width * sizeof(real));
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++)
        for (int i = 0; i < n; i += STEPS)
            for (int o = blocks * thread / threads * OUTPUTS; o < blocks * (thread + 1) / threads * OUTPUTS; o += OUTPUTS)
                for (int c = 0; c < columns; c += LANES)
                    add_outer(lesser(STEPS, n - i), pitch, q + i * pitch + o, v + i * pitch + c, sums + o * width + c, width);
}

