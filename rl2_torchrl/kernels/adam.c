/* Adam's step on all parameters in one call, and the norm of their gradients. gradients/adam.py says what for. */
#include <math.h>

#include "functions.h"

/* Bytes of the structures: a test compares the caller's. */
int adam_layout(int which) {
    int sizes[] = {sizeof(adam_options), sizeof(parameter)};
    return sizes[which];
}

/* The Euclidean norm of the gradients of all `count` parameters. */
static double gradient_norm(const parameter *of, int count) {
    double sums[16] = {0}, sum = 0; /* one sum would wait for itself */
    for (const parameter *p = of; p < of + count; p++) {
        const real *gradient = p->gradient;
        long i = 0;
        for (; i + 16 <= p->size; i += 16)
            for (int k = 0; k < 16; k++) sums[k] += (double)gradient[i + k] * gradient[i + k];
        for (; i < p->size; i++) sums[0] += (double)gradient[i] * gradient[i];
    }
    for (int k = 0; k < 16; k++) sum += sums[k];
    return sqrt(sum);
}

/* Adam (Kingma & Ba 2015, algorithm 1) and AdamW (Loshchilov & Hutter 2019, algorithm 2), in the order of operations of PyTorch's;
 * gradients are scaled first. */
static void adam_step(const parameter *of, int count, double scale) {
    for (const parameter *p = of; p < of + count; p++) {
        if (!p->size) continue;
        const adam_options *options = p->options;
        double step = ++*p->step;
        real first = (real)(1 - options->beta1), second = (real)(1 - options->beta2), decay = (real)options->beta2;
        real rate = (real)(options->lr / (1 - pow(options->beta1, step))), epsilon = (real)options->epsilon;
        real root = (real)sqrt(1 - pow(options->beta2, step)), factor = (real)scale;
        real kept = (real)(1 - options->lr * options->decay), l2 = (real)options->l2;
        real *restrict value = p->value, *restrict gradient = p->gradient, *restrict mean = p->mean, *restrict square = p->square;
        for (long i = 0; i < p->size; i++) {
            real g = (gradient[i] *= factor) + l2 * value[i];
            real m = mean[i] += first * (g - mean[i]);
            real s = square[i] = decay * square[i] + second * g * g;
            value[i] = kept * value[i] - rate * m / (ROOT(s) / root + epsilon);
        }
    }
}

/* Clips the gradients' norm at max_norm, if that is above 0, as torch.nn.utils.clip_grad_norm_ does, and takes a step. Returns 1, and
 * takes none, where the norm is not finite. */
int clip_and_step(const parameter *of, int count, double max_norm, double *norm) {
    *norm = gradient_norm(of, count);
    if (!isfinite(*norm)) return 1;
    adam_step(of, count, max_norm > 0 && *norm > max_norm ? max_norm / (*norm + 1e-6) : 1);
    return 0;
}
