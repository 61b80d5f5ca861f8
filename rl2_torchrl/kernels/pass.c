/* A pass of PPO over many small minibatches in one call: for each of them gather, forward, loss, backward, clip, Adam.
 *
 * A minibatch of 32 steps (the original's) is 0.1 ms of arithmetic. Called from Python, its sixty operations take six times
 * that. The parts are the functions of the other files, on one thread; only what stands between them is written here.
 */
#include <math.h>

#include "functions.h"
#include "vector.h"

enum { W_IH, W_HH, B_IH, B_HH, W_OUT, B_OUT, PARAMETERS };
enum { OBJECTIVE, CRITIC, ENTROPY, CLIPPED, KL, MEAN_RATIO, LARGEST_RATIO, NORM, METRICS };

/* A parameter, its gradient, and Adam's two averages. */
typedef struct { real *value, *gradient, *mean, *square; long size; } parameter;

/* GRU, ReLU, linear layer; x [chunks, steps, inputs]; initial [chunks, steps, hidden] or NULL for zeros. */
typedef struct {
    int inputs, hidden, outputs;
    const real *x, *initial;
    parameter of[PARAMETERS];
    real *in, *first, *packed, *packed_back, *saved, *features, *out, *d_out, *d_features; /* a minibatch's memory */
} network;

typedef struct {
    int chunks, steps, rows, is_gaussian;
    const int64_t *order;
    const uint8_t *init; /* [chunks, steps] */
    const void *action;  /* [chunks, steps] int64, or [chunks, steps, outputs] */
    const real *old_log_prob, *advantage, *target;
    network actor, critic;
    parameter log_std;
    double low, high, value_coeff, entropy_coeff, max_norm, lr, beta1, beta2, epsilon;
    long adam_step;
    double *metrics; /* [minibatches, METRICS] */
} pass;

/* Bytes of the structures and the number of metrics: what the caller's must be. */
int ppo_pass_layout(int which) {
    int sizes[] = {sizeof(parameter), sizeof(network), sizeof(pass), METRICS};
    return sizes[which];
}

/* The chunks that `order` names, of `size` bytes each. */
static void gather(const void *from, const int64_t *order, int rows, size_t size, void *to) {
    for (int row = 0; row < rows; row++) memcpy((char *)to + row * size, (const char *)from + order[row] * size, size);
}

enum { MEMORIES = 9 };
#define MEMORY_OF(net) {&net->in, &net->first, &net->packed, &net->packed_back, &net->saved, \
                        &net->features, &net->d_features, &net->out, &net->d_out}

/* Whether there was memory for all of it; what there was is to be released in any case. */
static int allocate(network *net, int rows, int steps) {
    size_t n = (size_t)rows * steps, inputs = net->inputs, hidden = net->hidden, outputs = net->outputs;
    size_t sizes[MEMORIES] = {n * inputs, n * hidden, forward_size(inputs, hidden), backward_size(hidden),
                              n * saved_size(inputs, hidden), n * hidden, n * hidden, n * outputs, n * outputs};
    real **all[MEMORIES] = MEMORY_OF(net);
    int found = 1;
    for (int i = 0; i < MEMORIES; i++) found &= (*all[i] = memory(sizes[i] * sizeof(real))) != NULL;
    return found;
}

static void release(network *net) {
    real **all[MEMORIES] = MEMORY_OF(net);
    for (int i = 0; i < MEMORIES; i++) free(*all[i]);
}

static int forward(network *net, const int64_t *order, const uint8_t *init, int rows, int steps) {
    parameter *p = net->of;
    int inputs = net->inputs, hidden = net->hidden;
    gather(net->x, order, rows, (size_t)steps * inputs * sizeof(real), net->in);
    if (net->initial) gather(net->initial, order, rows, (size_t)steps * hidden * sizeof(real), net->first);
    pack_forward(inputs, hidden, p[W_IH].value, p[W_HH].value, p[B_IH].value, p[B_HH].value, net->packed);
    int status = gru_forward(rows, steps, inputs, hidden, net->in, (long)steps * inputs, inputs, net->initial ? net->first : NULL,
                             (long)steps * hidden, hidden, init, net->packed, net->features, net->saved, 1);
    if (status) return status;
    return linear_forward(rows * steps, hidden, net->outputs, net->features, p[W_OUT].value, p[B_OUT].value, net->out, 1);
}

/* gradient [outputs, columns] = sum over n of q[n, output] v[n, column]; q and v lie in rows of `pitch`. */
static void outer_sums(int n, long pitch, const real *q, int outputs, const real *v, int columns, real *gradient) {
    for (int o = 0; o < outputs; o += ROWS) {
        int left = lesser(ROWS, outputs - o);
        for (int c = 0; c < columns; c += LANES) {
            vec sum[ROWS] = {{0}};
            for (int i = 0; i < n; i++) {
                vec at = load(v + i * pitch + c, columns - c);
                UNROLL for (int m = 0; m < ROWS; m++) sum[m] += q[i * pitch + o + m] * at; /* beyond outputs: unused */
            }
            for (int m = 0; m < left; m++) store(gradient + (long)(o + m) * columns + c, sum[m], columns - c);
        }
    }
}

/* gradient [outputs] = sum over n of q[n, output]. */
static void column_sums(int n, long pitch, const real *q, int outputs, real *gradient) {
    for (int o = 0; o < outputs; o += LANES) {
        vec sum = {0};
        for (int i = 0; i < n; i++) sum += load(q + i * pitch + o, outputs - o);
        store(gradient + o, sum, outputs - o);
    }
}

/* Gradients of all parameters, from d_out. See gru.c for what `saved` holds. */
static int backward(network *net, const uint8_t *init, int rows, int steps) {
    parameter *p = net->of;
    int inputs = net->inputs, h = net->hidden, n = rows * steps;
    int status = linear_backward(n, h, net->outputs, net->features, p[W_OUT].value, net->d_out, net->d_features,
                                 p[W_OUT].gradient, p[B_OUT].gradient, 1);
    if (status) return status;
    if (steps > 1) pack_backward(h, p[W_HH].value, net->packed_back);
    status = gru_backward(rows, steps, inputs, h, net->d_features, (long)steps * h, h, init, net->packed_back, net->saved, NULL, 1);
    if (status) return status;
    long pitch = saved_size(inputs, h);
    const real *q = net->saved, *dn = q + 3 * h, *before = q + 4 * h, *x = q + 5 * h;
    outer_sums(n, pitch, q, 3 * h, before, h, p[W_HH].gradient);
    column_sums(n, pitch, q, 3 * h, p[B_HH].gradient);
    outer_sums(n, pitch, q, 2 * h, x, inputs, p[W_IH].gradient);
    outer_sums(n, pitch, dn, h, x, inputs, p[W_IH].gradient + 2L * h * inputs);
    column_sums(n, pitch, q, 2 * h, p[B_IH].gradient);
    column_sums(n, pitch, dn, h, p[B_IH].gradient + 2 * h);
    return 0;
}

static double squares(const parameter *p) {
    double sum = 0;
    for (long i = 0; i < p->size; i++) sum += (double)p->gradient[i] * p->gradient[i];
    return sum;
}

/* Adam (Kingma & Ba 2015, algorithm 1), in the order of operations of torch.optim.Adam. */
static void adam(const pass *of, parameter *p, double scale, long step) {
    real first = (real)(1 - of->beta1), second = (real)(1 - of->beta2), decay = (real)of->beta2;
    real rate = (real)(of->lr / (1 - pow(of->beta1, step))), root = (real)sqrt(1 - pow(of->beta2, step));
    real epsilon = (real)of->epsilon, factor = (real)scale;
    real *restrict value = p->value, *restrict gradient = p->gradient, *restrict mean = p->mean, *restrict square = p->square;
    for (long i = 0; i < p->size; i++) {
        real g = gradient[i] *= factor;
        real m = mean[i] += first * (g - mean[i]);
        real s = square[i] = decay * square[i] + second * g * g;
        value[i] -= rate * m / (ROOT(s) / root + epsilon);
    }
}

/* Every parameter there is; returns their number. */
static int collect(pass *of, parameter *all) {
    int count = 0;
    network *nets[] = {&of->actor, &of->critic};
    for (int i = 0; i < 2; i++)
        for (int k = 0; nets[i]->hidden && k < PARAMETERS; k++) all[count++] = nets[i]->of[k];
    if (of->is_gaussian) all[count++] = of->log_std;
    return count;
}

/* Returns the number of the first minibatch whose gradient is not finite, which changes nothing any more; -1 if there is none,
 * -2 - the number of the minibatch in which an action is none of the choices, NO_MEMORY
 * where memory ran out, be it after some steps. */
int ppo_pass(pass *of) {
    int rows = of->rows, steps = of->steps, outputs = of->actor.outputs, has_critic = of->critic.hidden > 0, broken = -1;
    size_t n = (size_t)rows * steps, one = steps * sizeof(real);
    size_t action_size = of->is_gaussian ? outputs * sizeof(real) : sizeof(int64_t);
    enum { LOG_PROB, OLD, ADVANTAGE, TARGET, ACTIVE, RATIO, ESS, H, TOTAL, D_H, ARRAYS };
    real *a[ARRAYS];
    void *action = memory(n * action_size);
    uint8_t *init = memory(n);
    int found = action && init;
    for (int i = 0; i < ARRAYS; i++) found &= (a[i] = memory(n * sizeof(real))) != NULL;
    parameter all[2 * PARAMETERS + 1];
    int parameters = collect(of, all);
    found &= allocate(&of->actor, rows, steps);
    if (has_critic) found &= allocate(&of->critic, rows, steps);
    int status = found ? 0 : NO_MEMORY;

    double *metrics = of->metrics;
    for (int first = 0; !status && first < of->chunks; first += rows, metrics += METRICS) {
        const int64_t *order = of->order + first;
        int count = lesser(rows, of->chunks - first), size = count * steps, strangers = 0;
        double entropy = 0, totals[5];
        gather(of->init, order, count, steps, init);
        gather(of->action, order, count, steps * action_size, action);
        gather(of->old_log_prob, order, count, one, a[OLD]);
        gather(of->advantage, order, count, one, a[ADVANTAGE]);

        status |= forward(&of->actor, order, init, count, steps);
        if (of->is_gaussian) {
            gaussian_forward(size, outputs, action, of->actor.out, of->log_std.value, a[LOG_PROB]);
            for (int d = 0; d < outputs; d++) entropy += of->log_std.value[d] + 1.4189385332046727; /* log(2 pi e) / 2 */
        } else {
            strangers = categorical_forward(size, outputs, of->actor.out, action, a[LOG_PROB], a[H], a[TOTAL], 1);
            for (int i = 0; i < size; i++) entropy += a[H][i] / size;
        }
        if (strangers) { broken = -2 - first / rows; break; }
        clipped_objective(count, steps, a[LOG_PROB], a[OLD], a[ADVANTAGE], of->low, of->high, a[ACTIVE], a[RATIO], a[ESS], totals);
        for (int i = 0; i < size; i++) {
            a[ACTIVE][i] *= (real)(-1.0 / size);
            a[D_H][i] = (real)(-of->entropy_coeff / size);
        }
        if (of->is_gaussian) {
            gaussian_backward(size, outputs, action, of->actor.out, of->log_std.value, a[ACTIVE], of->actor.d_out,
                              of->log_std.gradient);
            for (int d = 0; d < outputs; d++) of->log_std.gradient[d] -= (real)of->entropy_coeff;
        } else
            categorical_backward(size, outputs, of->actor.out, action, a[H], a[TOTAL], a[ACTIVE], a[D_H], of->actor.d_out, 1);
        status |= backward(&of->actor, init, count, steps);

        double error = 0;
        if (has_critic) {
            gather(of->target, order, count, one, a[TARGET]);
            status |= forward(&of->critic, order, init, count, steps);
            for (int i = 0; i < size; i++) {
                real e = of->critic.out[i] - a[TARGET][i];
                error += (double)e * e / size;
                of->critic.d_out[i] = e * (real)(2 * of->value_coeff / size);
            }
            status |= backward(&of->critic, init, count, steps);
        }
        if (status) break;

        double sum = 0;
        for (int i = 0; i < parameters; i++) sum += squares(&all[i]);
        double norm = sqrt(sum);
        metrics[OBJECTIVE] = -totals[0] / size;
        metrics[CRITIC] = of->value_coeff * error;
        metrics[ENTROPY] = entropy;
        metrics[CLIPPED] = totals[1] / size;
        metrics[KL] = totals[2] / size;
        metrics[MEAN_RATIO] = totals[3] / size;
        metrics[LARGEST_RATIO] = totals[4];
        metrics[NORM] = norm;
        if (!isfinite(norm)) { broken = first / rows; break; }
        double scale = of->max_norm > 0 && norm > of->max_norm ? of->max_norm / (norm + 1e-6) : 1; /* as clip_grad_norm_ */
        of->adam_step++;
        for (int i = 0; i < parameters; i++) adam(of, &all[i], scale, of->adam_step);
    }
    for (int i = 0; i < ARRAYS; i++) free(a[i]);
    free(action);
    free(init);
    release(&of->actor);
    if (has_critic) release(&of->critic);
    return status ? status : broken;
}
