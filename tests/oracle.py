"""RL² with PPO and GRUs (Duan et al. 2016), written out formula by formula in plain torch: an oracle for the package.

It shares no code with the package or TorchRL, and takes weights as dictionaries under PyTorch's names for them. Shapes:
``N`` sequences (or ``B`` rows) of ``T`` steps; data is a dictionary of tensors ``[N, T, ...]``.
"""

import math

import torch


def gru_step(x, h, w_ih, w_hh, b_ih, b_hh):
    """``h_t`` ``[N, H]`` of Cho et al. 2014 in PyTorch's convention: the reset gate acts on ``W_hn h + b_hn``."""
    ir, iz, in_ = (x @ w_ih.T + b_ih).chunk(3, -1)
    hr, hz, hn = (h @ w_hh.T + b_hh).chunk(3, -1)
    r = 1 / (1 + torch.exp(-(ir + hr)))
    z = 1 / (1 + torch.exp(-(iz + hz)))
    n = torch.tanh(in_ + r * hn)
    return (1 - z) * n + z * h


def gru(weights, x, is_init, hidden):
    """Outputs ``[N, T, H]`` from the memory ``hidden`` ``[N, L, H]``; zeros where ``is_init`` ``[N, T]`` is set."""
    layers = range(hidden.shape[1])
    names = ("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l")
    memory, outputs = [hidden[:, layer] for layer in layers], []
    for t in range(x.shape[1]):
        y = x[:, t]
        for layer in layers:
            kept = memory[layer] * (~is_init[:, t, None])
            y = memory[layer] = gru_step(y, kept, *(weights[f"{name}{layer}"] for name in names))
        outputs.append(y)
    return torch.stack(outputs, 1)


def head(weights, features):
    """``W relu(h) + b``."""
    return features.clamp_min(0) @ weights["weight"].T + weights["bias"]


def log_prob(actor, features, action):
    """Log-probability ``[N, T]``: Gaussian for an actor that has a ``log_std``, else categorical."""
    outputs = head(actor, features)
    if "log_std" in actor:
        z = (action - outputs) / actor["log_std"].exp()
        return (-0.5 * z**2 - actor["log_std"] - 0.5 * math.log(2 * math.pi)).sum(-1)
    chosen = outputs.gather(-1, action[..., None])[..., 0]
    return chosen - outputs.exp().sum(-1).log()


def actor_and_value(actor, critic, data, wiring="separate"):
    """Log-probabilities and values, ``[N, T]`` each, of sequences that start from their first stored memory."""
    x, is_init = data["trans"], data["is_init"]
    features = gru(actor, x, is_init, data["actor_hidden"][:, 0])
    memory = {
        "separate": lambda: gru(critic, x, is_init, data["critic_hidden"][:, 0]),
        "shared": lambda: features,
        "detached": lambda: features.detach(),
    }[wiring]()
    return log_prob(actor, features, data["action"]), head(critic, memory)[..., 0]


def losses(actor, critic, data, *, clip=0.3, wiring="separate"):
    """Policy loss ``-mean(min(r A, clip(r) A))``, value loss ``mean((v - R)²)``, ``total`` and the ratios ``r``."""
    new, value = actor_and_value(actor, critic, data, wiring)
    ratio, advantage = torch.exp(new - data["log_prob"]), data["advantage"]
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    policy = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    value = ((value - data["value_target"]) ** 2).mean()
    return {"policy": policy, "value": value, "total": policy + 0.5 * value, "ratio": ratio}


def advantages(reward, value, after, done, terminated, *, gamma, lmbda):
    """GAE and discounted returns-to-go of trials, ``[B, T]`` each, step by step backwards.

    ``after`` ``[B, T]`` is the value of what follows a step; read only where the trial is cut, by the row's end or by
    ``done`` without ``terminated``.
    """
    gae, returns = torch.zeros_like(reward), torch.zeros_like(reward)
    rows, steps = reward.shape
    for b in range(rows):
        for t in reversed(range(steps)):
            last = bool(done[b, t]) or t == steps - 1
            next_gae = 0.0 if last else gae[b, t + 1]
            if terminated[b, t]:
                next_value = next_return = 0.0
            elif last:
                next_value = next_return = after[b, t]
            else:
                next_value, next_return = value[b, t + 1], returns[b, t + 1]
            gae[b, t] = reward[b, t] + gamma * next_value - value[b, t] + gamma * lmbda * next_gae
            returns[b, t] = reward[b, t] + gamma * next_return
    return gae, returns


def normalized(advantage):
    """Mean 0, standard deviation 1 over the batch."""
    variance = ((advantage - advantage.mean()) ** 2).sum() / (advantage.numel() - 1)
    return (advantage - advantage.mean()) / variance.sqrt()


def chunks(data, bptt):
    """Rows ``[B, T, ...]`` cut into sequences of ``bptt`` steps ``[B * T / bptt, bptt, ...]``, row after row."""

    def cut(x):
        rows, steps = x.shape[:2]
        return torch.stack([x[b, t : t + bptt] for b in range(rows) for t in range(0, steps, bptt)])

    return {name: cut(x) for name, x in data.items()}


class Adam:
    """Kingma & Ba 2015, algorithm 1."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients):
        self.steps += 1
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g**2)
            m_hat, v_hat = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
            p -= self.lr * m_hat / (v_hat.sqrt() + 1e-8)


def update(actor, critic, data, *, bptt, epochs, minibatches, lr, clip=0.3, wiring="separate"):
    """Trains the weights in place on ordered minibatches; the losses' means over all of them."""
    parameters = [*actor.values(), *critic.values()]
    adam, history = Adam(parameters, lr), []
    sequences = chunks(data, bptt)
    for _ in range(epochs):
        for rows in torch.arange(len(sequences["trans"])).chunk(minibatches):
            minibatch = {name: x[rows] for name, x in sequences.items()}
            terms = losses(actor, critic, minibatch, clip=clip, wiring=wiring)
            adam.step(torch.autograd.grad(terms["total"], parameters))
            history.append(terms)
    return {name: sum(h[name].item() for h in history) / len(history) for name in ("policy", "value", "total")}
