/* A policy's terms in PPO's loss, forward and backward, each in one pass: PyTorch spends a dozen calls on arrays of a few
 * numbers a step. LANES steps are taken at once, a lane each, so that no sum goes across a vector. */
#include <math.h>

#include "functions.h"

/* Entry `column` of LANES rows of [rows, columns], of which the first n exist. */
static inline vec gather(const real *from, int columns, int column, int n) {
    vec v = {0};
    for (int lane = 0; lane < LANES && lane < n; lane++) v[lane] = from[(long)lane * columns + column];
    return v;
}
static inline void scatter(real *to, int columns, int column, vec v, int n) {
    for (int lane = 0; lane < LANES && lane < n; lane++) to[(long)lane * columns + column] = v[lane];
}

/* ------------------------------------------------------------------------- categorical
 * log p(a) and H = -sum p log p of softmax(logits), where 0 log 0 is 0; log sum exp(logits) is kept for backward.
 * Returns how many actions are none of the choices. */
int categorical_forward(int rows, int choices, const real *logits, const int64_t *action, real *log_prob, real *entropy,
                         real *log_total, int threads) {
    int strangers = 0;
    #pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : strangers)
    for (int row = 0; row < rows; row += LANES) {
        int n = rows - row;
        const real *of = logits + (long)row * choices;
        vec largest = gather(of, choices, 0, n), total = {0}, weighted = {0};
        for (int c = 1; c < choices; c++) {
            vec l = gather(of, choices, c, n);
            largest = choose(l <= largest, largest, l); /* a NaN is taken on */
        }
        for (int c = 0; c < choices; c++) {
            vec l = gather(of, choices, c, n) - largest, e = exponential(l);
            total += e;
            weighted += e * choose(l < -(real)LARGEST, (vec){0}, l);
        }
        for (int lane = 0; lane < LANES && lane < n; lane++) {
            real log_of = (real)log(total[lane]);
            entropy[row + lane] = log_of - weighted[lane] / total[lane];
            log_total[row + lane] = largest[lane] + log_of;
            int64_t a = action[row + lane];
            int is_choice = 0 <= a && a < choices;
            strangers += !is_choice;
            log_prob[row + lane] = of[(long)lane * choices + (is_choice ? a : 0)] - largest[lane] - log_of;
        }
    }
    return strangers;
}

/* d log p(a) / d logits = 1_a - p and d H / d logits = -p (log p + H). A slope that is NULL is 0. */
void categorical_backward(int rows, int choices, const real *logits, const int64_t *action, const real *entropy,
                          const real *log_total, const real *d_log_prob, const real *d_entropy, real *d_logits,
                          int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int row = 0; row < rows; row += LANES) {
        int n = rows - row;
        vec total = load(log_total + row, n), h = load(entropy + row, n);
        vec by_log_prob = d_log_prob ? load(d_log_prob + row, n) : (vec){0};
        vec by_entropy = d_entropy ? load(d_entropy + row, n) : (vec){0};
        for (int c = 0; c < choices; c++) {
            vec log_p = gather(logits + (long)row * choices, choices, c, n) - total;
            vec finite = choose(log_p < -(real)LARGEST, (vec){0} - LARGEST, log_p);
            vec slope = -exponential(log_p) * (by_log_prob + by_entropy * (finite + h));
            scatter(d_logits + (long)row * choices, choices, c, slope, n);
        }
        for (int lane = 0; lane < LANES && lane < n; lane++)
            d_logits[(long)(row + lane) * choices + action[row + lane]] += by_log_prob[lane];
    }
}

/* The number of the largest of logits + noise in each row, the first of those that are as large; a NaN is the largest. */
void largest(int rows, int choices, const real *logits, const real *noise, int64_t *choice) {
    for (int row = 0; row < rows; row++, logits += choices, noise += choices) {
        real most = logits[0] + noise[0];
        choice[row] = 0;
        for (int c = 1; c < choices && most == most; c++) {
            real sum = logits[c] + noise[c];
            if (!(sum <= most)) most = sum, choice[row] = c;
        }
    }
}

/* ------------------------------------------------------------------------- Gaussian
 * log p(a) and, where `entropy` is not NULL, H of Normal(loc, exp(log_std)) with independent components, log_std [dims] the same in
 * all rows. */
void gaussian_forward(int rows, int dims, const real *action, const real *loc, const real *log_std, real *log_prob,
                      real *entropy) {
    real constant = 0, h = 0;
    for (int d = 0; d < dims; d++) {
        constant -= log_std[d] + (real)0.91893853320467274178; /* log(2 pi) / 2 */
        h += log_std[d] + (real)1.41893853320467274178;        /* log(2 pi e) / 2 */
    }
    for (int row = 0; row < rows; row++) log_prob[row] = constant;
    for (int row = 0; entropy && row < rows; row++) entropy[row] = h;
    for (int d = 0; d < dims; d++) {
        real precision = (real)exp(-log_std[d]);
        for (int row = 0; row < rows; row++) {
            real z = (action[(long)row * dims + d] - loc[(long)row * dims + d]) * precision;
            log_prob[row] -= z * z / 2;
        }
    }
}

/* d log p / d loc = z / std, d log p / d log_std = z^2 - 1 and d H / d log_std = 1, the latter two summed over rows. A slope that is
 * NULL is 0. */
void gaussian_backward(int rows, int dims, const real *action, const real *loc, const real *log_std, const real *d_log_prob,
                       const real *d_entropy, real *d_loc, real *d_log_std) {
    double by_entropy = 0;
    for (int row = 0; d_entropy && row < rows; row++) by_entropy += d_entropy[row];
    for (int d = 0; d < dims; d++) {
        real precision = (real)exp(-log_std[d]);
        double sum = by_entropy;
        for (int row = 0; row < rows; row++) {
            long i = (long)row * dims + d;
            real z = (action[i] - loc[i]) * precision, slope = d_log_prob ? d_log_prob[row] : 0;
            d_loc[i] = slope * z * precision;
            sum += slope * (z * z - 1);
        }
        d_log_std[d] = (real)sum;
    }
}

/* scale [rows, dims] = exp(log_std) */
void gaussian_scale(int rows, int dims, const real *log_std, real *scale) {
    for (int d = 0; d < dims; d++) {
        real of = (real)exp(log_std[d]);
        for (int row = 0; row < rows; row++) scale[(long)row * dims + d] = of;
    }
}

/* ------------------------------------------------------------------------- clipped objective
 * min(r A, clip(r) A) with r = p / p_old, by log p and log p_old. `slope` is r A where that is the smaller, else 0, the
 * objective's gradient by log p, times `scale`. `totals` are the sums of the objective, of whether r was clipped, of log p_old - log p, of r;
 * and the largest r. `ess` [steps] is the effective share of samples, (sum r)^2 / sum r^2 / rows, of every step.
 * One thread: the sums come out the same in every run. */
void clipped_objective(int rows, int steps, const real *log_prob, const real *old_log_prob, const real *advantage, double low,
                       double high, double scale, real *slope, real *ratio, real *ess, double *totals) {
    int size = rows * steps;
    vec least = (vec){0} + (real)low, most = (vec){0} + (real)high, zero = {0};
    for (int i = 0; i < 5; i++) totals[i] = i < 4 ? 0 : -INFINITY;
    for (int first = 0; first < size; first += LANES) {
        int n = size - first;
        vec log_r = load(log_prob + first, n) - load(old_log_prob + first, n), a = load(advantage + first, n);
        vec clipped = choose(log_r < least, least, choose(log_r > most, most, log_r));
        vec r = choose(log_r > (real)LARGEST, zero + (real)INFINITY, exponential(log_r));
        vec gain = r * a, bound = exponential(clipped) * a;
        store(slope + first, choose(gain > bound, zero, gain) * (real)scale, n);
        store(ratio + first, r, n);
        for (int lane = 0; lane < LANES && lane < n; lane++) {
            totals[0] += gain[lane] > bound[lane] ? bound[lane] : gain[lane];
            totals[1] += clipped[lane] != log_r[lane];
            totals[2] -= log_r[lane];
            totals[3] += r[lane];
            totals[4] = r[lane] <= totals[4] ? totals[4] : r[lane];
        }
    }
    for (int t = 0; t < steps; t++) {
        real sum = 0, squares = 0;
        for (int row = 0; row < rows; row++) {
            real r = ratio[(long)row * steps + t];
            sum += r;
            squares += r * r;
        }
        ess[t] = sum * sum / squares / rows;
    }
}

/* ------------------------------------------------------------------------- squared error, entropy bonus
 * The sum of (value - target)^2 and, as `slope`, factor (value - target). */
void squared_error(int size, const real *value, const real *target, double factor, real *slope, double *total) {
    double sum = 0;
    for (int i = 0; i < size; i++) {
        real off = value[i] - target[i];
        sum += (double)off * off;
        slope[i] = (real)factor * off;
    }
    *total = sum;
}

/* The sum of all entropies; each has the slope `factor`. */
void entropy_sum(int size, const real *entropy, double factor, real *slope, double *total) {
    double sum = 0;
    for (int i = 0; i < size; i++) {
        sum += entropy[i];
        slope[i] = (real)factor;
    }
    *total = sum;
}
