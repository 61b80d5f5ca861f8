/* Sums over the rest of a trial. */
#include "functions.h"

/* out[row, t] += discount * out[row, t + 1] from back to front, where no trial ends at t; both [rows, steps], with strides. */
void discounted_sums(int rows, int steps, const uint8_t *done, long done_row, long done_step, double discount, real *out,
                     long row, long step) {
    for (int t = steps - 2; t >= 0; t--) {
        const uint8_t *ends = done + t * done_step;
        real *sums = out + t * step;
        for (int r = 0; r < rows; r++)
            if (!ends[r * done_row]) sums[r * row] += (real)discount * sums[r * row + step];
    }
}
