/* A pass of PPO over many minibatches in one call: for each of them gather, forward, loss, backward, clip, Adam.
 *
 * The parts are the functions of the other files; only what stands between them is written here. gradients/compiled.py says what
 * it is good for.
 */
#include <math.h>

#include "functions.h"
#include "vector.h"

enum { W_IH, W_HH, B_IH, B_HH, W_OUT, B_OUT, PARAMETERS, LOG_STD = 2 * PARAMETERS };
enum { OBJECTIVE, CRITIC, ENTROPY, CLIPPED, KL, MEAN_RATIO, LARGEST_RATIO, NORM, METRICS };

/* GRU, ReLU, linear layer; x [chunks, steps, inputs]; initial [chunks, steps, hidden] or NULL for zeros. */
typedef struct {
    int inputs, hidden, outputs;
    const real *x, *initial;
    parameter *of;
    real *in, *first, *packed, *packed_back, *saved, *features, *sums, *out, *d_out, *d_features; /* a minibatch's memory */
} network;

/* hidden: 0 without a critic. is_shared: the critic has no GRU, and reads the actor's features; is_detached: as they are. */
typedef struct {
    int chunks, steps, rows, threads, is_gaussian, is_shared, is_detached;
    const int64_t *order;
    const uint8_t *init; /* [chunks, steps] */
    const void *action;  /* [chunks, steps] int64, or [chunks, steps, outputs] */
    const real *old_log_prob, *advantage, *target;
    parameter of[2 * PARAMETERS + 1]; /* the actor's, the critic's, log_std */
    network actor, critic;
    double low, high, value_coeff, entropy_coeff, max_norm;
    double *metrics; /* [minibatches, METRICS] */
    real *memory;    /* as much as ppo_pass_memory says */
} pass;

/* Entries of a minibatch, a number a step. */
enum { LOG_PROB, OLD, ADVANTAGE, TARGET, ACTIVE, RATIO, ESS, H, TOTAL, D_H, ARRAYS };
typedef struct { void *action; uint8_t *init; real *of[ARRAYS]; } entries;

/* Bytes of the structures and the number of metrics: a test compares the caller's. */
int ppo_pass_layout(int which) {
    int sizes[] = {sizeof(network), sizeof(pass), METRICS};
    return sizes[which];
}

/* ------------------------------------------------------------------------------------------------ memory */
typedef struct { real *memory; long used; } arena;

/* The next `size` numbers of the arena's memory; where it has none, they are counted alone. */
static real *take(arena *from, long size) {
    long at = from->used;
    from->used += (long)whole_lines(size);
    return from->memory ? from->memory + at : NULL;
}

static void lay_out_network(network *net, long n, int has_gru, arena *from) {
    long inputs = net->inputs, hidden = net->hidden, outputs = net->outputs;
    if (has_gru) {
        net->in = take(from, n * inputs);
        net->first = take(from, net->initial ? n * hidden : 0);
        net->packed = take(from, forward_size(net->inputs, net->hidden));
        net->packed_back = take(from, backward_size(net->hidden));
        net->saved = take(from, n * saved_size(net->inputs, net->hidden));
        net->features = take(from, n * hidden);
        net->sums = take(from, sums_size(net->inputs, net->hidden));
    }
    net->out = take(from, n * outputs);
    net->d_out = take(from, n * outputs);
    net->d_features = take(from, n * hidden);
}

/* Where everything lies in `memory`; returns how much of it there must be. */
static long lay_out(pass *of, real *memory, entries *e) {
    arena from = {memory, 0};
    long n = (long)of->rows * of->steps;
    of->actor.of = of->of;
    of->critic.of = of->of + PARAMETERS;
    e->action = take(&from, of->is_gaussian ? n * of->actor.outputs : n * (long)(sizeof(int64_t) / sizeof(real)));
    e->init = (uint8_t *)take(&from, n);
    for (int i = 0; i < ARRAYS; i++) e->of[i] = take(&from, n);
    lay_out_network(&of->actor, n, 1, &from);
    if (of->critic.hidden) lay_out_network(&of->critic, n, !of->is_shared, &from);
    return from.used;
}

long ppo_pass_memory(pass *of) {
    entries unused;
    return lay_out(of, NULL, &unused);
}

/* The chunks that `order` names, of `size` bytes each. */
static void gather(const void *from, const int64_t *order, int rows, size_t size, void *to) {
    for (int row = 0; row < rows; row++) memcpy((char *)to + row * size, (const char *)from + order[row] * size, size);
}

/* ------------------------------------------------------------------------------------------------ networks */
static int gru(network *net, const int64_t *order, const uint8_t *init, int rows, int steps, int threads) {
    parameter *p = net->of;
    int inputs = net->inputs, hidden = net->hidden;
    gather(net->x, order, rows, (size_t)steps * inputs * sizeof(real), net->in);
    if (net->initial) gather(net->initial, order, rows, (size_t)steps * hidden * sizeof(real), net->first);
    pack_forward(inputs, hidden, p[W_IH].value, p[W_HH].value, p[B_IH].value, p[B_HH].value, net->packed);
    return gru_forward(rows, steps, inputs, hidden, net->in, (long)steps * inputs, inputs, net->initial ? net->first : NULL,
                       (long)steps * hidden, hidden, init, net->packed, net->features, net->saved, threads);
}

static int head(network *net, int n, int threads) {
    parameter *p = net->of;
    return linear_forward(n, net->hidden, net->outputs, net->features, p[W_OUT].value, p[B_OUT].value, net->out, threads);
}

/* Gradients of the head's parameters from d_out, and, if `d_features` is not NULL, that by the features. */
static int head_gradients(network *net, int n, real *d_features, int threads) {
    parameter *p = net->of;
    return linear_backward(n, net->hidden, net->outputs, net->features, p[W_OUT].value, net->d_out, d_features, p[W_OUT].gradient,
                           p[B_OUT].gradient, threads);
}

/* Gradients of the GRU's parameters from d_features. */
static int gru_gradients(network *net, const uint8_t *init, int rows, int steps, int threads) {
    parameter *p = net->of;
    int inputs = net->inputs, h = net->hidden, n = rows * steps;
    if (steps > 1) pack_backward(h, p[W_HH].value, net->packed_back);
    int status = gru_backward(rows, steps, inputs, h, net->d_features, (long)steps * h, h, init, net->packed_back, net->saved,
                              NULL, threads);
    if (status) return status;
    gru_weight_gradients(n, inputs, h, net->saved, p[W_IH].gradient, p[W_HH].gradient, p[B_IH].gradient, p[B_HH].gradient,
                         net->sums, threads);
    return 0;
}

/* ------------------------------------------------------------------------------------------------ steps */
/* Returns the number of the first minibatch whose gradient is not finite, which changes nothing any more; -1 if there is none,
 * -2 - the number of the minibatch in which an action is none of the choices, NO_MEMORY
 * where memory ran out, be it after some steps. */
int ppo_pass(pass *of) {
    int rows = of->rows, steps = of->steps, outputs = of->actor.outputs, has_critic = of->critic.hidden > 0, threads = of->threads;
    size_t one = steps * sizeof(real), action_size = of->is_gaussian ? outputs * sizeof(real) : sizeof(int64_t);
    network *actor = &of->actor, *critic = &of->critic;
    entries e;
    lay_out(of, of->memory, &e);
    if (of->is_shared) critic->features = actor->features;
    parameter *log_std = &of->of[LOG_STD];
    double *metrics = of->metrics;
    for (int first = 0; first < of->chunks; first += rows, metrics += METRICS) {
        const int64_t *order = of->order + first;
        int count = lesser(rows, of->chunks - first), size = count * steps, strangers = 0, status = 0;
        double entropy = 0, error = 0, totals[5];
        gather(of->init, order, count, steps, e.init);
        gather(of->action, order, count, steps * action_size, e.action);
        gather(of->old_log_prob, order, count, one, e.of[OLD]);
        gather(of->advantage, order, count, one, e.of[ADVANTAGE]);

        status |= gru(actor, order, e.init, count, steps, threads);
        status |= head(actor, size, threads);
        if (of->is_gaussian) {
            gaussian_forward(size, outputs, e.action, actor->out, log_std->value, e.of[LOG_PROB]);
            for (int d = 0; d < outputs; d++) entropy += log_std->value[d] + 1.4189385332046727; /* log(2 pi e) / 2 */
        } else {
            strangers = categorical_forward(size, outputs, actor->out, e.action, e.of[LOG_PROB], e.of[H], e.of[TOTAL], threads);
            for (int i = 0; i < size; i++) entropy += e.of[H][i] / size;
        }
        if (strangers) return -2 - first / rows;
        clipped_objective(count, steps, e.of[LOG_PROB], e.of[OLD], e.of[ADVANTAGE], of->low, of->high, e.of[ACTIVE], e.of[RATIO],
                          e.of[ESS], totals);
        for (int i = 0; i < size; i++) {
            e.of[ACTIVE][i] *= (real)(-1.0 / size);
            e.of[D_H][i] = (real)(-of->entropy_coeff / size);
        }
        if (of->is_gaussian) {
            gaussian_backward(size, outputs, e.action, actor->out, log_std->value, e.of[ACTIVE], actor->d_out,
                              log_std->gradient);
            for (int d = 0; d < outputs; d++) log_std->gradient[d] -= (real)of->entropy_coeff;
        } else
            categorical_backward(size, outputs, actor->out, e.action, e.of[H], e.of[TOTAL], e.of[ACTIVE], e.of[D_H], actor->d_out,
                                 threads);
        status |= head_gradients(actor, size, actor->d_features, threads);

        if (has_critic) {
            gather(of->target, order, count, one, e.of[TARGET]);
            if (!of->is_shared) status |= gru(critic, order, e.init, count, steps, threads);
            status |= head(critic, size, threads);
            for (int i = 0; i < size; i++) {
                real off = critic->out[i] - e.of[TARGET][i];
                error += (double)off * off / size;
                critic->d_out[i] = off * (real)(2 * of->value_coeff / size);
            }
            status |= head_gradients(critic, size, of->is_detached ? NULL : critic->d_features, threads);
            if (!of->is_shared) status |= gru_gradients(critic, e.init, count, steps, threads);
            else if (!of->is_detached)
                for (long i = 0; i < (long)size * actor->hidden; i++) actor->d_features[i] += critic->d_features[i];
        }
        status |= gru_gradients(actor, e.init, count, steps, threads);
        if (status) return status;

        double norm = gradient_norm(of->of, LOG_STD + 1);
        metrics[OBJECTIVE] = -totals[0] / size;
        metrics[CRITIC] = of->value_coeff * error;
        metrics[ENTROPY] = entropy;
        metrics[CLIPPED] = totals[1] / size;
        metrics[KL] = totals[2] / size;
        metrics[MEAN_RATIO] = totals[3] / size;
        metrics[LARGEST_RATIO] = totals[4];
        metrics[NORM] = norm;
        if (!isfinite(norm)) return first / rows;
        double scale = of->max_norm > 0 && norm > of->max_norm ? of->max_norm / (norm + 1e-6) : 1; /* as clip_grad_norm_ */
        adam_step(of->of, LOG_STD + 1, scale);
    }
    return -1;
}
