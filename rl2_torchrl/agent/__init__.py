"""An agent to take away: the policy without env and training, as a file, a `torch.export` program or an ONNX model."""

from rl2_torchrl.agent.agent import AdaptiveAgent
from rl2_torchrl.agent.architecture import register_part
from rl2_torchrl.agent.files import load_weights
from rl2_torchrl.agent.signature import Signature

__all__ = ["AdaptiveAgent", "Signature", "load_weights", "register_part"]
