/* Sums over the rest of a trial. */
#include "functions.h"

/* out[t] += discount * out[t + 1] from back to front, where no trial ends at t; out, done [rows, steps]. */
void discounted_sums(int rows, int steps, const uint8_t *done, double discount, real *out) {
    for (int row = 0; row < rows; row++, done += steps, out += steps)
        for (int t = steps - 2; t >= 0; t--)
            if (!done[t]) out[t] += (real)discount * out[t + 1];
}
