/* The kernels that other files and Python call, which reads their types here; each is described where it is defined. Those that
 * return an int return NO_MEMORY where there is none. */
#pragma once

#include "vector.h"

/* Of a torch.optim.Adam's group; the weights' decay is AdamW's (decay) or Adam's (l2). */
typedef struct { double lr, beta1, beta2, epsilon, decay, l2; } adam_options;
/* A parameter, its gradient, Adam's two averages and number of steps; of size 0 if there is none, or no gradient. */
typedef struct {
    real *value, *gradient, *mean, *square;
    float *step;
    const adam_options *options;
    long size;
} parameter;
/* What calls a kernel again, again_... in recording.c, and its arguments. */
typedef union { long n; double x; void *p; } slot;
typedef struct { int (*again)(const slot *); slot of[19]; } call;

int adam_layout(int which);
int clip_and_step(const parameter *of, int count, double max_norm, double *norm);
long saved_size(int inputs, int hidden);
long forward_size(int inputs, int hidden);
long backward_size(int hidden);
void pack_forward(int inputs, int hidden, const real *w_ih, const real *w_hh, const real *b_ih, const real *b_hh, real *out);
void pack_backward(int hidden, const real *w_hh, real *out);
int gru_forward(int batch, int steps, int inputs, int hidden, const real *x, long x_row, long x_step, const real *initial,
                long initial_row, long initial_step, const uint8_t *init, const real *packed, real *y, real *saved, int threads);
int gru_backward(int batch, int steps, int inputs, int hidden, const real *dy, long dy_row, long dy_step, const uint8_t *init,
                 const real *packed, real *saved, real *d_initial, int threads);
int gru_input_gradient(int n, int inputs, int hidden, const real *saved, const real *w_ih, real *dx, int threads);
long sums_size(int inputs, int hidden);
void gru_weight_gradients(int n, int inputs, int hidden, const real *saved, real *d_w_ih, real *d_w_hh, real *d_b_ih,
                          real *d_b_hh, real *sums, int threads);
int linear_forward(int rows, int inputs, int outputs, int relu, const real *x, const real *w, const real *b, real *y,
                   int threads);
int linear_backward(int rows, int inputs, int outputs, int relu, const real *x, const real *w, const real *dy, real *dx, real *dw,
                    real *db, int threads);
long sums_height(int outputs);
long sums_width(int columns);
void outer_sums(int n, long pitch, const real *q, int outputs, const real *v, int columns, real *sums, int threads);
int categorical_forward(int rows, int choices, const real *logits, const int64_t *action, real *log_prob, real *entropy,
                        real *log_total, int threads);
void categorical_backward(int rows, int choices, const real *logits, const int64_t *action, const real *entropy,
                          const real *log_total, const real *d_log_prob, const real *d_entropy, real *d_logits, int threads);
void largest(int rows, int choices, const real *logits, const real *noise, int64_t *choice);
void gaussian_forward(int rows, int dims, const real *action, const real *loc, const real *log_std, real *log_prob,
                      real *entropy);
void gaussian_backward(int rows, int dims, const real *action, const real *loc, const real *log_std, const real *d_log_prob,
                       const real *d_entropy, real *d_loc, real *d_log_std);
void gaussian_scale(int rows, int dims, const real *log_std, real *scale);
void clipped_objective(int rows, int steps, const real *log_prob, const real *old_log_prob, const real *advantage, double low,
                       double high, double scale, real *slope, real *ratio, real *ess, double *totals);
void squared_error(int size, const real *value, const real *target, double factor, real *slope, double *total);
void entropy_sum(int size, const real *entropy, double factor, real *slope, double *total);
void tanh_forward(long size, const real *x, real *y, int threads);
void relu_forward(long size, const real *x, real *y, int threads);
void tanh_backward(long size, const real *y, real *slope, int threads);
void relu_backward(long size, const real *y, real *slope, int threads);
void add(long size, const real *what, real *to, int threads);
void copy_columns(long rows, int columns, const real *from, int from_row, real *to, int to_row, int threads);
void discounted_sums(int rows, int steps, const uint8_t *done, long done_row, long done_step, double discount, real *out,
                     long row, long step);
int gather_rows(const int64_t *const *order, int rows, long bytes, const char *from, char *to);
int make_calls(const call *calls, int count);
int make_passes(const call *calls, int count, const int64_t **at, const int64_t *order, int minibatches, int rows,
                const double *numbers, int width, double *out);
