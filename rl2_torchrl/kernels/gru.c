/* The GRU over whole sequences, forward and backward, on the CPU (Cho et al. 2014; gates as in torch.nn.GRU):
 *
 *     r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
 *     n = tanh(W_in x + b_in + r (W_hn h + b_hn))       h' = n + z (h - n)
 *
 * Rows of a batch are independent, so a thread takes a block of them through all T steps without waiting for another: the
 * hidden state stays in its cache, gates are made in registers as the products end, and no array of T x 3H
 * pre-activations is ever written. Arrays are batch-major, [B, T, ...], as in a TensorDict.
 *
 * What backward needs is stored in saved [B, T, S] = (r, z, W_hn h + b_hn, n, h, x, 1, 0, ..., 0); backward replaces the
 * first four by the gradients of (r's, z's, W_hn h + b_hn's, n's) pre-activations. The gradients of weights and biases
 * then are the sums over all B T steps of the outer products of those gradients and (h, x, 1).
 */
#include "functions.h"

#define COLUMNS 2 /* vectors that a block of backward's product is wide */
#define TOGETHER (ROWS / 2) /* rows whose gates wait for each other's exponentials; a divisor of a block's */
#define ARRAYS 6 /* [H] that a step reads or writes of a row: r, z, W_hn h + b_hn, n and h in saved, and y or its gradient */

/* S: 5 H + I + 1, and what outer_sums looks at beyond, up to whole cache lines, which vectors then do not straddle. */
long saved_size(int inputs, int hidden) {
    long by_n = 3L * hidden + sums_height(hidden), by_h = 4L * hidden + sums_width(hidden + inputs + 1);
    long by_x = 5L * hidden + sums_width(inputs + 1), most = by_h > by_x ? by_h : by_x;
    return (long)whole_lines(most > by_n ? most : by_n);
}
static inline int padded(int hidden) { return (hidden + COLUMNS * LANES - 1) / (COLUMNS * LANES) * (COLUMNS * LANES); }

/* ------------------------------------------------------------------------------------------------ weights
 * Packed for unit-stride loads. forward: for each block of LANES units the bias (r, z, hn, in), the rows of W_hh, the
 * rows of W_ih, each row as (r, z, n) vectors. backward: for each block of COLUMNS vectors all 3H rows of W_hh. */
long forward_size(int inputs, int hidden) { return (long)padded(hidden) * (4 + 3 * ((long)hidden + inputs)); }
long backward_size(int hidden) { return (long)padded(hidden) * 3 * hidden; }

void pack_forward(int inputs, int hidden, const real *w_ih, const real *w_hh, const real *b_ih, const real *b_hh,
                  real *out) {
    memset(out, 0, forward_size(inputs, hidden) * sizeof(real));
    for (int first = 0; first < padded(hidden); first += LANES) {
        int n = lesser(LANES, hidden - first);
        for (int i = 0; i < n && b_ih; i++) {
            int u = first + i;
            out[i] = b_ih[u] + b_hh[u];
            out[LANES + i] = b_ih[hidden + u] + b_hh[hidden + u];
            out[2 * LANES + i] = b_hh[2 * hidden + u];
            out[3 * LANES + i] = b_ih[2 * hidden + u];
        }
        out += 4 * LANES;
        for (int part = 0; part < 2; part++) {
            int depth = part ? inputs : hidden;
            const real *w = part ? w_ih : w_hh;
            for (int gate = 0; gate < 3; gate++)
                for (int i = 0; i < n; i++) {
                    const real *row = w + (long)(gate * hidden + first + i) * depth;
                    for (int k = 0; k < depth; k++) out[(3 * k + gate) * LANES + i] = row[k];
                }
            out += 3L * depth * LANES;
        }
    }
}

/* The columns of w [depth, size] in blocks of COLUMNS vectors. */
static void pack_columns(int depth, int size, const real *w, real *out) {
    int width = COLUMNS * LANES;
    memset(out, 0, (long)padded(size) * depth * sizeof(real));
    for (int first = 0; first < size; first += width, out += (long)depth * width)
        for (int k = 0; k < depth; k++)
            memcpy(out + (long)k * width, w + (long)k * size + first, lesser(width, size - first) * sizeof(real));
}
void pack_backward(int hidden, const real *w_hh, real *out) { pack_columns(3 * hidden, hidden, w_hh, out); }

/* Rows of a block: half of ROWS where whole ones would leave threads, or half of the registers, without work. */
static inline int block_of(int batch, int threads) { return batch > threads * ROWS / 2 ? ROWS : ROWS / 2; }

/* ------------------------------------------------------------------------------------------------ prefetching
 * The arrays of a step, each row's far from the next one's, lie where no processor guesses them, and beyond the caches where a batch
 * is large. They are asked for while a product is made, one with each of its terms. Returns how many they are. */
static int arrays_of(int rows, int steps, int inputs, int hidden, const real *saved, const real *y, long y_row, const real **arrays) {
    for (int m = 0; m < rows; m++, saved += steps * saved_size(inputs, hidden), y += y_row) {
        for (int i = 0; i < ARRAYS - 1; i++) *arrays++ = saved + i * hidden;
        *arrays++ = y;
    }
    return ARRAYS * rows;
}
/* The order in which a step's arrays are written, row by row: one after the other they would have a stride, by which processors fetch
 * ahead into the rows that another thread is writing, and take their cache lines away from it. */
static const int STRIDELESS[8] = {0, 5, 2, 7, 4, 1, 6, 3};
INLINE void ask_for(const real *array, const int vectors) {
    UNROLL for (int c = 0; c < vectors; c++) __builtin_prefetch(array + c * LANES, 1, 2);
}

/* ------------------------------------------------------------------------------------------------ forward */
typedef struct { vec r[ROWS], z[ROWS], hn[ROWS], n[ROWS]; } gates;

static int is_zero(const real *h, int size) {
    int zeros = 1;
    for (int i = 0; i < size; i++) zeros &= h[i] == 0;
    return zeros;
}
static int is_finite(const real *w, long size) {
    int finite = 1;
    for (long i = 0; i < size; i++) finite &= w[i] * 0 == 0;
    return finite;
}

/* The gates of LANES units in `rows` rows: a constant, so that registers hold their sums. h: NULL for zeros. */
INLINE void gate_block(const int rows, int inputs, int hidden, int pitch, const real *h, const real *const *x, const real *w,
                       gates *out, const real *const *arrays, int count, int first) {
    const vec *v = (const vec *)w;
    vec r[ROWS], z[ROWS], n[ROWS];
    UNROLL for (int m = 0; m < rows; m++) { r[m] = v[0]; z[m] = v[1]; n[m] = v[2]; }
    vec b_in = v[3];
    v += 4;
    for (int k = 0; h && k < hidden; k++) {
        if (k < count) ask_for(arrays[k] + first, 1);
        UNROLL for (int m = 0; m < rows; m++) {
            real a = h[m * pitch + k];
            r[m] += a * v[3 * k]; z[m] += a * v[3 * k + 1]; n[m] += a * v[3 * k + 2];
        }
    }
    v += 3 * hidden;
    UNROLL for (int m = 0; m < rows; m++) { out->hn[m] = n[m]; n[m] = b_in; }
    for (int k = 0; k < inputs; k++, v += 3)
        UNROLL for (int m = 0; m < rows; m++) {
            real a = x[m][k];
            r[m] += a * v[0]; z[m] += a * v[1]; n[m] += a * v[2];
        }
    UNROLL for (int m = 0; m < rows; m += TOGETHER) {
        sigmoids(TOGETHER, r + m);
        sigmoids(TOGETHER, z + m);
        UNROLL for (int i = m; i < m + TOGETHER; i++) n[i] += r[i] * out->hn[i];
        tanhs(TOGETHER, n + m);
    }
    UNROLL for (int m = 0; m < rows; m++) { out->r[m] = r[m]; out->z[m] = z[m]; out->n[m] = n[m]; }
}

/* ROWS rows, of which the first `rows` exist, through all steps. x and initial have strides of their own; initial[b, t] is
 * read at t = 0 and where init[b, t] is set. saved may be NULL. */
static void forward_rows(int rows, int steps, int inputs, int hidden, const real *x, long x_row, long x_step,
                         const real *initial, long initial_row, long initial_step, const uint8_t *init,
                         const real *packed, int may_skip, real *y, real *saved, real *scratch) {
    int pitch = padded(hidden);
    real *h = scratch, *next = scratch + ROWS * pitch;
    memset(scratch, 0, 2L * ROWS * pitch * sizeof(real));
    for (int t = 0; t < steps; t++) {
        const real *inputs_of[ROWS], *arrays[ARRAYS * ROWS];
        int begun = 0;
        for (int m = 0; m < ROWS; m++) {
            inputs_of[m] = x + lesser(m, rows - 1) * x_row + t * x_step;
            if (m < rows && (t == 0 || (init && init[(long)m * steps + t]))) {
                if (initial) memcpy(h + m * pitch, initial + m * initial_row + t * initial_step, hidden * sizeof(real));
                else memset(h + m * pitch, 0, hidden * sizeof(real));
                begun++;
            }
        }
        const real *read = may_skip && begun == rows && is_zero(h, ROWS * pitch) ? NULL : h;
        int count = saved ? arrays_of(rows, steps, inputs, hidden, saved + t * saved_size(inputs, hidden), y + (long)t * hidden,
                                      (long)steps * hidden, arrays) : 0;
        for (int i = 0; saved && i < 8; i++) {
            int m = STRIDELESS[i];
            if (m >= rows) continue;
            real *s = saved + ((long)m * steps + t) * saved_size(inputs, hidden) + 5 * hidden;
            memset(s, 0, (saved_size(inputs, hidden) - 5L * hidden) * sizeof(real));
            memcpy(s, inputs_of[m], inputs * sizeof(real));
            s[inputs] = 1;
        }
        const real *w = packed;
        for (int first = 0; first < hidden; first += LANES, w += LANES * (4 + 3L * (hidden + inputs))) {
            gates g;
            int n = hidden - first;
            if (rows > ROWS / 2) gate_block(ROWS, inputs, hidden, pitch, read, inputs_of, w, &g, arrays, count, first);
            else gate_block(ROWS / 2, inputs, hidden, pitch, read, inputs_of, w, &g, arrays, count, first);
            for (int i = 0; i < 8; i++) {
                int m = STRIDELESS[i];
                if (m >= rows) continue;
                vec before = *(vec *)(h + m * pitch + first);
                vec after = g.n[m] + g.z[m] * (before - g.n[m]);
                *(vec *)(next + m * pitch + first) = after;
                store(y + ((long)m * steps + t) * hidden + first, after, n);
                if (saved) {
                    real *s = saved + ((long)m * steps + t) * saved_size(inputs, hidden) + first;
                    store(s, g.r[m], n);
                    store(s + hidden, g.z[m], n);
                    store(s + 2 * hidden, g.hn[m], n);
                    store(s + 3 * hidden, g.n[m], n);
                    store(s + 4 * hidden, before, n);
                }
            }
        }
        real *swap = h; h = next; next = swap;
    }
}

int gru_forward(int batch, int steps, int inputs, int hidden, const real *x, long x_row, long x_step,
                const real *initial, long initial_row, long initial_step, const uint8_t *init, const real *packed,
                real *y, real *saved, int threads) {
    size_t size = whole_lines(2L * ROWS * padded(hidden));
    real *scratch = memory(threads * size * sizeof(real));
    if (!scratch) return NO_MEMORY;
    int block = block_of(batch, threads);
    /* Where trials begin the memory is zero, and so is its product, unless a weight is NaN or infinite, which must be seen. */
    int may_skip = (!initial || is_zero(initial, hidden)) && is_finite(packed, forward_size(inputs, hidden));
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int b = 0; b < batch; b += block)
        forward_rows(lesser(block, batch - b), steps, inputs, hidden, x + b * x_row, x_row, x_step,
                     initial ? initial + b * initial_row : NULL, initial_row, initial_step,
                     init ? init + (long)b * steps : NULL, packed, may_skip, y + (long)b * steps * hidden,
                     saved ? saved + (long)b * steps * saved_size(inputs, hidden) : NULL, scratch + omp_get_thread_num() * size);
    free(scratch);
    return 0;
}

/* ----------------------------------------------------------------------------------------------- backward */

/* From the gradient of h' at one step to those of the pre-activations, of one row: into saved, into q [3H], and dh z. */
static inline void gate_gradients(int hidden, const real *dy, real *s, real *q, real *dh) {
    for (int i = 0; i < hidden; i += LANES) {
        int n = hidden - i;
        vec r = load(s + i, n), z = load(s + hidden + i, n), hn = load(s + 2 * hidden + i, n);
        vec c = load(s + 3 * hidden + i, n), h = load(s + 4 * hidden + i, n);
        vec d = *(vec *)(dh + i) + load(dy + i, n);
        vec dz = d * (h - c) * z * (1 - z);
        vec dn = d * (1 - z) * (1 - c * c);
        vec dr = dn * hn * r * (1 - r);
        vec dhn = dn * r;
        store(s + i, dr, n);
        store(s + hidden + i, dz, n);
        store(s + 2 * hidden + i, dhn, n);
        store(s + 3 * hidden + i, dn, n);
        store(q + i, dr, n);
        store(q + hidden + i, dz, n);
        store(q + 2 * hidden + i, dhn, n);
        *(vec *)(dh + i) = d * z;
    }
}

/* dh [rows, pitch] += q [rows, depth] W, of columns packed, for a constant number of rows. */
INLINE void through_weights(const int rows, int depth, int pitch, const real *q, const real *packed, real *dh,
                            const real *const *arrays, int count) {
    for (int first = 0; first < pitch; first += COLUMNS * LANES) {
        vec sum[ROWS][COLUMNS];
        UNROLL for (int m = 0; m < rows; m++)
            UNROLL for (int c = 0; c < COLUMNS; c++) sum[m][c] = *(vec *)(dh + m * pitch + first + c * LANES);
        for (int k = 0; k < depth; k++, packed += COLUMNS * LANES) {
            if (k < count) ask_for(arrays[k] + first, COLUMNS);
            UNROLL for (int m = 0; m < rows; m++) {
                real a = q[m * depth + k];
                UNROLL for (int c = 0; c < COLUMNS; c++) sum[m][c] += a * *(const vec *)(packed + c * LANES);
            }
        }
        UNROLL for (int m = 0; m < rows; m++)
            UNROLL for (int c = 0; c < COLUMNS; c++) *(vec *)(dh + m * pitch + first + c * LANES) = sum[m][c];
    }
}

static void backward_rows(int rows, int steps, int inputs, int hidden, const real *dy, long dy_row, long dy_step,
                          const uint8_t *init, const real *packed, real *saved, real *d_initial, real *scratch) {
    int pitch = padded(hidden);
    real *dh = scratch, *q = scratch + ROWS * pitch;
    memset(scratch, 0, ROWS * (pitch + 3L * hidden) * sizeof(real));
    for (int t = steps - 1; t >= 0; t--) {
        for (int m = 0; m < rows; m++)
            gate_gradients(hidden, dy + m * dy_row + t * dy_step, saved + ((long)m * steps + t) * saved_size(inputs, hidden),
                           q + m * 3L * hidden, dh + m * pitch);
        if (t == 0 && !d_initial) break;
        const real *arrays[ARRAYS * ROWS]; /* of the step before this one, which comes next */
        int count = t ? arrays_of(rows, steps, inputs, hidden, saved + (t - 1) * saved_size(inputs, hidden), dy + (t - 1) * dy_step,
                                  dy_row, arrays) : 0;
        if (rows > ROWS / 2) through_weights(ROWS, 3 * hidden, pitch, q, packed, dh, arrays, count);
        else through_weights(ROWS / 2, 3 * hidden, pitch, q, packed, dh, arrays, count);
        for (int m = 0; m < rows; m++)
            if (t == 0 || (init && init[(long)m * steps + t])) {
                if (d_initial) memcpy(d_initial + ((long)m * steps + t) * hidden, dh + m * pitch, hidden * sizeof(real));
                memset(dh + m * pitch, 0, pitch * sizeof(real));
            }
    }
}

int gru_backward(int batch, int steps, int inputs, int hidden, const real *dy, long dy_row, long dy_step, const uint8_t *init,
                 const real *packed, real *saved, real *d_initial, int threads) {
    size_t size = whole_lines(ROWS * (padded(hidden) + 3L * hidden));
    real *scratch = memory(threads * size * sizeof(real));
    if (!scratch) return NO_MEMORY;
    int block = block_of(batch, threads);
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int b = 0; b < batch; b += block)
        backward_rows(lesser(block, batch - b), steps, inputs, hidden, dy + b * dy_row, dy_row, dy_step,
                      init ? init + (long)b * steps : NULL, packed, saved + (long)b * steps * saved_size(inputs, hidden),
                      d_initial ? d_initial + (long)b * steps * hidden : NULL, scratch + omp_get_thread_num() * size);
    free(scratch);
    return 0;
}

/* The gradients by x, dx [n, I] = (dr, dz, dn) W_ih, from what backward has left in saved, of n steps. */
int gru_input_gradient(int n, int inputs, int hidden, const real *saved, const real *w_ih, real *dx, int threads) {
    int depth = 3 * hidden, pitch = padded(inputs);
    size_t weights = (size_t)pitch * depth, size = whole_lines(ROWS * (pitch + (long)depth));
    real *packed = memory((weights + threads * size) * sizeof(real));
    if (!packed) return NO_MEMORY;
    pack_columns(depth, inputs, w_ih, packed);
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int first = 0; first < n; first += ROWS) {
        real *sums = packed + weights + omp_get_thread_num() * size, *q = sums + ROWS * pitch;
        int rows = lesser(ROWS, n - first);
        memset(sums, 0, size * sizeof(real));
        for (int m = 0; m < rows; m++) {
            const real *s = saved + (first + m) * saved_size(inputs, hidden);
            memcpy(q + (long)m * depth, s, 2L * hidden * sizeof(real));
            memcpy(q + (long)m * depth + 2 * hidden, s + 3 * hidden, hidden * sizeof(real));
        }
        through_weights(ROWS, depth, pitch, q, packed, sums, NULL, 0);
        for (int m = 0; m < rows; m++) memcpy(dx + (long)(first + m) * inputs, sums + m * pitch, inputs * sizeof(real));
    }
    free(packed);
    return 0;
}

/* ----------------------------------------------------------------------------------------------- weights */

/* Memory that each thread of gru_weight_gradients works in. */
long sums_size(int inputs, int hidden) {
    return sums_height(3 * hidden) * sums_width(hidden + inputs + 1) + sums_height(hidden) * sums_width(inputs + 1);
}

/* Gradients of the weights from what backward has left in saved, of n steps: (dr, dz, dhn) by (h, x, 1), and dn by (x, 1). */
void gru_weight_gradients(int n, int inputs, int hidden, const real *saved, real *d_w_ih, real *d_w_hh, real *d_b_ih,
                          real *d_b_hh, real *sums, int threads) {
    long pitch = saved_size(inputs, hidden), width = sums_width(hidden + inputs + 1), width_of_n = sums_width(inputs + 1);
    real *by_n = sums + threads * sums_height(3 * hidden) * width;
    outer_sums(n, pitch, saved, 3 * hidden, saved + 4 * hidden, hidden + inputs + 1, sums, threads);
    outer_sums(n, pitch, saved + 3 * hidden, hidden, saved + 5 * hidden, inputs + 1, by_n, threads);
    for (int u = 0; u < 3 * hidden; u++, sums += width) {
        const real *by_x = u < 2 * hidden ? sums + hidden : by_n + (u - 2 * hidden) * width_of_n;
        memcpy(d_w_hh + (long)u * hidden, sums, hidden * sizeof(real));
        memcpy(d_w_ih + (long)u * inputs, by_x, inputs * sizeof(real));
        d_b_hh[u] = sums[hidden + inputs];
        d_b_ih[u] = by_x[inputs];
    }
}
