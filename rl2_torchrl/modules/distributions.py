"""stand-in"""
import math
import torch
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal, OneHotCategorical
from rl2_torchrl.modules.categorical import log_prob_and_entropy
class Family:
    pass
class _Cat(Family):
    def noise(self, steps, logits):
        return torch.empty((steps, *logits.shape)).uniform_().log_().neg_().log_().neg_()
    def act(self, noise, logits):
        return (logits + noise).argmax(-1)
    def mode(self, logits): return logits.argmax(-1)
    def log_prob_and_entropy(self, a, logits): return log_prob_and_entropy(a, logits)
class _OH(_Cat):
    def act(self, noise, logits): return torch.nn.functional.one_hot(super().act(noise, logits), logits.shape[-1])
    def mode(self, logits): return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
    def log_prob_and_entropy(self, a, logits): return log_prob_and_entropy(a.long().argmax(-1), logits)
class _N(Family):
    def noise(self, steps, loc, scale):
        n=torch.empty((steps, *loc.shape))
        for t in n.unbind(): t.normal_()
        return n
    def act(self, noise, loc, scale): return loc + scale * noise
    def mode(self, loc, scale): return loc
    def log_prob_and_entropy(self, action, loc, scale):
        log_scale = scale.log() + 0.5 * math.log(2 * math.pi)
        return (-0.5 * ((action - loc) / scale).square() - log_scale).sum(-1), (log_scale + 0.5).sum(-1)
_F = {Categorical: _Cat(), OneHotCategorical: _OH(), IndependentNormal: _N()}
def family_of(m): return _F.get(m.distribution_class)
