/* Kernels' calls as they were made once, made again in one. recording.py says what for. */
#include "functions.h"

/* The chunks, of `bytes` each, that *order names. */
int gather_rows(const int64_t *const *order, int rows, long bytes, const char *from, char *to) {
    for (int row = 0; row < rows; row++) memcpy(to + row * bytes, from + (*order)[row] * bytes, bytes);
    return 0;
}

/* ------------------------------------------------------------------------------------------------ what can be made again
 * Arguments by their numbers: whole, real, or where something lies. */
#define N(i) ((int)a[i].n)
#define L(i) a[i].n
#define X(i) a[i].x
#define P(i) a[i].p
#define KERNELS(VOID, INT)                                                                                                      \
    INT(gather_rows, P(0), N(1), L(2), P(3), P(4))                                                                              \
    VOID(pack_forward, N(0), N(1), P(2), P(3), P(4), P(5), P(6))                                                                \
    VOID(pack_backward, N(0), P(1), P(2))                                                                                       \
    INT(gru_forward, N(0), N(1), N(2), N(3), P(4), L(5), L(6), P(7), L(8), L(9), P(10), P(11), P(12), P(13), N(14))             \
    INT(gru_backward, N(0), N(1), N(2), N(3), P(4), L(5), L(6), P(7), P(8), P(9), P(10), N(11))                                 \
    VOID(gru_weight_gradients, N(0), N(1), N(2), P(3), P(4), P(5), P(6), P(7), P(8), N(9))                                      \
    INT(gru_input_gradient, N(0), N(1), N(2), P(3), P(4), P(5), N(6))                                                           \
    INT(linear_forward, N(0), N(1), N(2), N(3), P(4), P(5), P(6), P(7), N(8))                                                   \
    INT(linear_backward, N(0), N(1), N(2), N(3), P(4), P(5), P(6), P(7), P(8), P(9), N(10))                                     \
    VOID(tanh_forward, L(0), P(1), P(2), N(3))                                                                                  \
    VOID(relu_forward, L(0), P(1), P(2), N(3))                                                                                  \
    VOID(tanh_backward, L(0), P(1), P(2), N(3))                                                                                 \
    VOID(relu_backward, L(0), P(1), P(2), N(3))                                                                                 \
    VOID(copy_columns, L(0), N(1), P(2), N(3), P(4), N(5), N(6))                                                                 \
    VOID(add, L(0), P(1), P(2), N(3))                                                                                           \
    INT(categorical_forward, N(0), N(1), P(2), P(3), P(4), P(5), P(6), N(7))                                                    \
    VOID(categorical_backward, N(0), N(1), P(2), P(3), P(4), P(5), P(6), P(7), P(8), N(9))                                      \
    VOID(largest, N(0), N(1), P(2), P(3), P(4))                                                                                 \
    VOID(gaussian_forward, N(0), N(1), P(2), P(3), P(4), P(5), P(6))                                                            \
    VOID(gaussian_backward, N(0), N(1), P(2), P(3), P(4), P(5), P(6), P(7), P(8))                                               \
    VOID(gaussian_scale, N(0), N(1), P(2), P(3))                                                                                \
    VOID(clipped_objective, N(0), N(1), P(2), P(3), P(4), X(5), X(6), X(7), P(8), P(9), P(10), P(11))                           \
    VOID(squared_error, N(0), P(1), P(2), X(3), P(4), P(5))                                                                     \
    VOID(entropy_sum, N(0), P(1), X(2), P(3), P(4))                                                                             \
    INT(clip_and_step, P(0), N(1), X(2), P(3))

#define MAKE_VOID(name, ...) int again_##name(const slot *a) { name(__VA_ARGS__); return 0; }
#define MAKE_INT(name, ...) int again_##name(const slot *a) { return name(__VA_ARGS__); }
KERNELS(MAKE_VOID, MAKE_INT)

/* Makes the calls one by one until a kernel reports something; returns how many reported nothing. */
int make_calls(const call *calls, int count) {
    for (int i = 0; i < count; i++)
        if (calls[i].again(calls[i].of)) return i;
    return count;
}

/* Makes all calls for one minibatch of `rows` chunks after the other; `*at`, which gather_rows reads, walks along `order`. After each
 * of them the `width` numbers that it has left are copied to `out`. Returns for how many minibatches all calls were made. */
int make_passes(const call *calls, int count, const int64_t **at, const int64_t *order, int minibatches, int rows,
                const double *numbers, int width, double *out) {
    for (int m = 0; m < minibatches; m++) {
        *at = order + (long)m * rows;
        if (make_calls(calls, count) < count) return m;
        memcpy(out + (long)m * width, numbers, width * sizeof(double));
    }
    return minibatches;
}
