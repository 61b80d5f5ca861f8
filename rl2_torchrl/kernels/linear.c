/* y = f(x) W^T + b, forward and backward, where f(x) is max(x, 0), if there is a ReLU, or x: layers with few outputs, as heads and
 * encoders have.
 *
 * Matrix libraries are made for wide products: on one of 64 x 10 a call, and the passes over x for the activation and for
 * its gradient, cost several times the arithmetic. Here x is read once each way and f(x) is never written.
 */
#include "functions.h"

/* max(x, 0); NaN stays NaN, as everywhere. */
static inline vec positive_part(vec x) { return choose(x <= (vec){0}, (vec){0}, x); }

/* W [O, I] as [O / LANES, I, LANES], so that a vector holds the weights of LANES outputs. */
static void pack(int inputs, int outputs, const real *w, real *packed) {
    for (int first = 0; first < outputs; first += LANES)
        for (int k = 0; k < inputs; k++)
            for (int lane = 0; lane < LANES; lane++)
                *packed++ = first + lane < outputs ? w[(long)(first + lane) * inputs + k] : 0;
}

static inline vec activated(int relu, vec x) { return relu ? positive_part(x) : x; }

/* f(x) of the first `rows` rows of ROWS, 0 in those that do not exist. */
static void activate(int relu, int rows, int inputs, const real *x, real *active) {
    long size = (long)rows * inputs;
    for (long i = 0; i < size; i += LANES) store(active + i, activated(relu, load(x + i, size - i)), size - i);
    memset(active + size, 0, ((long)ROWS * inputs - size) * sizeof(real));
}

/* LANES outputs of ROWS rows, of which the first `rows` exist. */
static void outputs_of(int rows, int inputs, int n, const real *active, const real *packed, vec bias, real *y, long pitch) {
    vec sum[ROWS];
    UNROLL for (int m = 0; m < ROWS; m++) sum[m] = bias;
    for (int k = 0; k < inputs; k++, packed += LANES) {
        vec w = *(const vec *)packed;
        UNROLL for (int m = 0; m < ROWS; m++) sum[m] += active[(long)m * inputs + k] * w;
    }
    for (int m = 0; m < rows; m++) store(y + m * pitch, sum[m], n);
}

/* The one output of each row: of a vector of outputs all but one would be empty. */
static void one_output(int relu, int rows, int inputs, const real *x, const real *w, const real *b, real *y) {
    for (int row = 0; row < rows; row++, x += inputs) {
        vec sum = {0};
        for (int k = 0; k < inputs; k += LANES) sum += activated(relu, load(x + k, inputs - k)) * load(w + k, inputs - k);
        y[row] = b ? *b : 0;
        for (int lane = 0; lane < LANES; lane++) y[row] += sum[lane];
    }
}

int linear_forward(int rows, int inputs, int outputs, int relu, const real *x, const real *w, const real *b, real *y,
                   int threads) {
    size_t blocks = (outputs + LANES - 1) / LANES, weights = whole_lines(blocks * LANES * inputs);
    size_t size = whole_lines((size_t)ROWS * inputs); /* of a thread's rows */
    real *packed = memory((weights + threads * size) * sizeof(real));
    if (!packed) return NO_MEMORY;
    pack(inputs, outputs, w, packed);
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int row = 0; row < rows; row += ROWS) {
        real *active = packed + weights + omp_get_thread_num() * size;
        int count = lesser(ROWS, rows - row);
        if (outputs == 1) {
            one_output(relu, count, inputs, x + (long)row * inputs, w, b, y + row);
            continue;
        }
        activate(relu, count, inputs, x + (long)row * inputs, active);
        for (int first = 0; first < outputs; first += LANES)
            outputs_of(count, inputs, outputs - first, active, packed + (long)first * inputs,
                       b ? load(b + first, outputs - first) : (vec){0}, y + (long)row * outputs + first, outputs);
    }
    free(packed);
    return 0;
}

/* For n entries of ROWS rows' x, of which the first `rows` exist: adds to those columns of dW and, where it is asked for, a constant,
 * writes those of dx. w and dW have whole vectors of columns. */
INLINE void gradient_columns(const int by_x, int relu, int rows, int inputs, int outputs, int n, int pitch, const real *x, const real *w,
                             const real *dy, real *dx, real *dw) {
    vec before[ROWS], active[ROWS], sum[ROWS];
    UNROLL for (int m = 0; m < ROWS; m++) {
        before[m] = m < rows ? load(x + (long)m * inputs, n) : (vec){0};
        active[m] = activated(relu, before[m]);
        sum[m] = (vec){0};
    }
    for (int o = 0; o < outputs; o++, w += pitch, dw += pitch) {
        vec weight = *(const vec *)w, total = *(const vec *)dw;
        UNROLL for (int m = 0; m < ROWS; m++) {
            real slope = dy[(long)m * outputs + o];
            total += slope * active[m];
            if (by_x) sum[m] += slope * weight;
        }
        *(vec *)dw = total;
    }
    for (int m = 0; by_x && m < rows; m++)
        store(dx + (long)m * inputs, relu ? choose(before[m] <= (vec){0}, (vec){0}, sum[m]) : sum[m], n);
}

/* ROWS rows, of which the first `rows` exist: adds to dW [O, pitch] and db [O], and writes dx [rows, I] (may be NULL). */
static void gradients_of(int relu, int rows, int inputs, int outputs, int pitch, const real *x, const real *w, const real *dy,
                         real *dx, real *dw, real *db, real *slopes) {
    memcpy(slopes, dy, (size_t)rows * outputs * sizeof(real)); /* rows that do not exist have slope 0 */
    memset(slopes + (long)rows * outputs, 0, (size_t)(ROWS - rows) * outputs * sizeof(real));
    for (int i = 0; i < inputs; i += LANES) {
        if (dx) gradient_columns(1, relu, rows, inputs, outputs, inputs - i, pitch, x + i, w + i, slopes, dx + i, dw + i);
        else gradient_columns(0, relu, rows, inputs, outputs, inputs - i, pitch, x + i, w + i, slopes, NULL, dw + i);
    }
    for (int m = 0; m < rows; m++)
        for (int o = 0; o < outputs; o++) db[o] += slopes[(long)m * outputs + o];
}

/* dx [rows, I] may be NULL; dw [O, I] and db [O] are written. Each thread sums over rows of its own, and the sums are added in
 * the threads' order: the same numbers in every run. */
int linear_backward(int rows, int inputs, int outputs, int relu, const real *x, const real *w, const real *dy, real *dx, real *dw,
                    real *db, int threads) {
    int pitch = (inputs + LANES - 1) / LANES * LANES;
    size_t weights = (size_t)outputs * pitch, slopes = whole_lines(weights + outputs); /* where a thread's slopes begin */
    size_t size = slopes + whole_lines((size_t)ROWS * outputs);
    real *padded = memory((weights + threads * size) * sizeof(real)), *sums;
    if (!padded) return NO_MEMORY;
    sums = padded + weights;
    for (int o = 0; o < outputs; o++) {
        memcpy(padded + (long)o * pitch, w + (long)o * inputs, inputs * sizeof(real));
        memset(padded + (long)o * pitch + inputs, 0, (pitch - inputs) * sizeof(real));
    }
    int blocks = (rows + ROWS - 1) / ROWS;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        real *sum = sums + thread * size;
        memset(sum, 0, (weights + outputs) * sizeof(real));
        int end = (int)((long)blocks * (thread + 1) / threads) * ROWS;
        for (int row = (int)((long)blocks * thread / threads) * ROWS; row < end; row += ROWS)
            gradients_of(relu, lesser(ROWS, rows - row), inputs, outputs, pitch, x + (long)row * inputs, padded,
                         dy + (long)row * outputs, dx ? dx + (long)row * inputs : NULL, sum, sum + weights, sum + slopes);
    }
    for (int thread = 1; thread < threads; thread++)
        for (size_t i = 0; i < weights + outputs; i++) sums[i] += sums[thread * size + i];
    for (int o = 0; o < outputs; o++) memcpy(dw + (long)o * inputs, sums + (long)o * pitch, inputs * sizeof(real));
    memcpy(db, sums + weights, outputs * sizeof(real));
    free(padded);
    return 0;
}

void tanh_forward(long size, const real *x, real *y, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < size; i += LANES) {
        vec of = load(x + i, lesser(LANES, size - i));
        tanhs(1, &of);
        store(y + i, of, lesser(LANES, size - i));
    }
}

void relu_forward(long size, const real *x, real *y, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < size; i += LANES) store(y + i, positive_part(load(x + i, lesser(LANES, size - i))), lesser(LANES, size - i));
}

/* From the gradient by what an activation gives, y, that by what it reads, in its place. */
void tanh_backward(long size, const real *y, real *slope, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < size; i++) slope[i] *= 1 - y[i] * y[i];
}

void relu_backward(long size, const real *y, real *slope, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < size; i++) slope[i] = y[i] <= 0 ? 0 : slope[i];
}

/* to += what */
void add(long size, const real *what, real *to, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < size; i++) to[i] += what[i];
}

/* Copies `columns` numbers of each of `rows` rows, which lie `from_row` and `to_row` numbers apart. */
void copy_columns(long rows, int columns, const real *from, int from_row, real *to, int to_row, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) memcpy(to + i * to_row, from + i * from_row, columns * sizeof(real));
}
