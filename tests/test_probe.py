"""The probe: readouts worked out by hand, posterior means, the control that is shown the same, and the page."""

from pathlib import Path

import pytest
import torch

from recipes import probe
from recipes.agents import held_out
from rl2_torchrl import AdaptiveAgent

PRETRAINED = Path(__file__).parents[1] / "recipes" / "pretrained"
AGENT = PRETRAINED / "bandits_10_5_rewards.safetensors"


def test_what_is_read():
    torch.manual_seed(0)
    target = torch.randn(3, 4000, 2)
    # Known wholly, with as much noise as there is to know (R² 1/2), and not at all.
    noise = torch.randn(3, 4000, 2)
    hidden = torch.stack([target[0], target[1] + noise[1], noise[2]]) @ torch.tensor([[1.0, 2.0], [-3.0, 1.0]]) + 5
    score = probe.r_squared(hidden, target, 1e-6)
    assert score.tolist() == pytest.approx([1.0, 0.5, 0.0], abs=0.03)


def test_a_readout_is_scored_where_it_was_not_fitted():
    torch.manual_seed(0)
    # 60 weights fit 50 numbers of pure noise without error, and say nothing of others.
    score = probe.r_squared(torch.randn(1, 100, 60), torch.randn(1, 100, 1), 1e-6)
    assert score.item() < 0


def test_posterior_means_by_hand():
    pulls = [[[0.0, 0, 0, 0], [1, 0, 1, 1], [1, 0, 0, 1]], [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]]
    posterior = probe.posterior_of(held_out("bandits_3_2", 2))
    # Beta(2, 2), Beta(3, 1); an arm not pulled: Beta(1, 1).
    assert posterior(torch.tensor(pulls))[:, -1].tolist() == [[0.5, 0.5], [0.5, 0.75]]
    seen = torch.zeros(1, 3, 10 + 5 + 2)
    seen[..., 4] = 1  # the state, in which action 2 has paid 3, then 5
    seen[0, 1:, 10 + 2], seen[0, 1:, -2] = 1, torch.tensor([3.0, 5.0])
    means = probe.posterior_of(held_out("mdps_1", 1))(seen)[0, -1]
    assert means[5 * 4 + 2].item() == 3.0  # (1 + 3 + 5) / 3
    assert means.sum().item() == 3.0 + 49


def test_the_control_is_shown_what_the_agent_does_and_earns():
    torch.manual_seed(0)
    # The agent itself as its own control: had it seen anything else, its hidden states would be others.
    played = probe.play(AdaptiveAgent.load(AGENT), AdaptiveAgent.load(AGENT), held_out(AGENT.stem, 50))
    assert played.posterior.shape == (10, 50, 5)
    assert torch.equal(*played.hidden)
    assert not torch.equal(played.hidden[0][1], played.hidden[0][9])


def test_trained_agents_know_more_than_untrained_ones(tmp_path):
    page = tmp_path / "pages" / "probe.md"
    mdps = PRETRAINED / "mdps_10_rewards.safetensors"
    scores = probe.main(agents=(AGENT, mdps), trials=400, page=page)
    assert scores["bandits_10_5_rewards"].shape == (9, 2)
    assert scores["bandits_10_5_rewards"][1, 0] > 0.98  # two pulls, remembered
    assert scores["mdps_10_rewards"][-1, 0] > scores["mdps_10_rewards"][-1, 1] + 0.2
    lines = page.with_suffix(".csv").read_text().splitlines()
    assert lines[:1] == ["agent,step,r2,r2_untrained"]
    assert (
        lines[1]
        == f"bandits_10_5_rewards,2,{scores['bandits_10_5_rewards'][0, 0]:.4f},{scores['bandits_10_5_rewards'][0, 1]:.4f}"
    )
    assert f"{scores['mdps_10_rewards'][-1, 0]:.3f} | {scores['mdps_10_rewards'][-1, 1]:.3f} |" in page.read_text()
    assert page.with_suffix(".png").exists()
    with pytest.raises(ValueError, match="trials=50: a readout"):
        probe.main(trials=50)
    with pytest.raises(ValueError, match="agents is empty: nothing would be probed"):
        probe.main(agents=(), page=page)
    with pytest.raises(ValueError, match="agents has bandits_10_5_rewards twice, and one of two would be lost"):
        probe.main(agents=(AGENT, tmp_path / AGENT.name), page=page)
