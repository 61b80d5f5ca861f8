"""What advantage, terms, networks and update keep beside buffers goes on in a resumed run, or the log names it."""

import shutil
from collections import Counter, defaultdict
from functools import cached_property

import numpy as np
import pytest
import torch
from runs import Run
from torch import nn

from rl2_torchrl import Callback, TrialAdvantage
from rl2_torchrl.kept import Kept
from rl2_torchrl.settings import parts_of


class Penalty(nn.Module):
    """Its weight adapts, as that of PPO's penalty on the divergence does."""

    in_keys = ["logits"]

    def __init__(self):
        super().__init__()
        self.beta = 1.0

    def forward(self, logits):
        self.beta *= 1.5
        return {"loss_penalty": self.beta * 1e-3 * logits.square().mean()}


class Moves(Callback):
    """A callback that moves what is no parameter and no buffer."""

    def __init__(self, update):
        self.update, self.head = update, update.loss.actor_network.module[0]
        self.head.temperature = 2.0

    def after_update(self, row, progress):
        self.head.temperature *= 0.8
        self.update.epochs += 1


class Scaled(TrialAdvantage):
    """Its discount grows."""

    def forward(self, batch):
        self.gamma = 1 - 0.9 * (1 - self.gamma)
        return super().forward(batch)


def test_nothing_is_kept_twice(tmp_path):
    run = Run(2)
    run.train(checkpoints=tmp_path, check=False)
    kept = Kept(parts_of(run.update))
    run.update.optimizer.param_groups[0]["lr"] = 1.0
    run.update.loss.clip_epsilon.fill_(0.9)
    next(run.update.loss.parameters()).data.zero_()
    assert kept.state_dict() == {}


def test_what_an_update_is_made_of_keeps_what_moves(tmp_path):
    def run_of(updates, **options):
        run = Run(updates)
        run.update.advantage = Scaled(critic=run.policy, gamma=0.5)
        run.update.loss.terms.append(penalty := Penalty())
        moves = Moves(run.update)
        run.train(checkpoints=tmp_path, check=False, callbacks=[moves], **options)
        return penalty.beta, moves.head.temperature, run.update.epochs, run.update.advantage.gamma, run.everything()

    run_of(2)
    resumed = run_of(4, resume=True)
    shutil.rmtree(tmp_path)
    torch.testing.assert_close(resumed, run_of(4), rtol=0, atol=0)


class Holder(nn.Module):
    """A term whose weight follows from what it holds, ``move`` says how."""

    in_keys = ["logits"]

    def __init__(self, move, **held):
        super().__init__()
        self.move = move
        vars(self).update(held)

    def forward(self, logits):
        return {"loss_held": 1e-2 * float(self.move(self, logits)) * logits.square().mean()}


class Anneal(Callback):
    """It holds what the term holds, and saves it by itself."""

    def __init__(self, shared):
        self.shared = shared

    def after_update(self, row, progress):
        self.shared["v"] *= 3.0

    def state_dict(self):
        return dict(self.shared)

    def load_state_dict(self, state):
        self.shared.update(state)


class Count(nn.Module):
    number = 0


def counted(key):
    def move(term, logits):
        term.held[key] += 1
        return term.held[key]

    return move


def optimized(term, logits):
    loss = (term.theta - logits.detach().mean()).square()
    term.optimizer.zero_grad()
    loss.backward()
    term.optimizer.step()
    return term.theta.detach()


def shared_weight(run):
    shared = {"v": 1.0}
    return Holder(lambda term, _: term.shared["v"], shared=shared), [Anneal(shared)]


def generator(run):
    return Holder(lambda term, _: term.rng.random(), rng=np.random.Generator(np.random.Philox(0))), []


def counter(run):
    return Holder(counted("n"), held=Counter()), []


def defaults(run):
    return Holder(counted("n"), held=defaultdict(float)), []


def array(run):
    return Holder(counted(0), held=np.zeros(2)), []


def own_optimizer(run):
    theta = torch.zeros((), requires_grad=True)
    return Holder(optimized, theta=theta, optimizer=torch.optim.Adam([theta], lr=0.1)), []


def module_within(run):
    def move(term, _):
        term.within.number += 1
        return term.within.number

    term = Holder(move)
    term.within = Count()
    return term, []


def view_of_a_buffer(run):
    term = Holder(lambda term, _: term.mean.add_(1.0))
    term.register_buffer("stats", torch.zeros(2))
    term.mean = term.stats[0]
    return term, []


def alias_of_a_weight(run):
    weight = run.update.loss.actor_network.module[0].module[0].gru.weight_hh_l0.detach()
    return Holder(lambda term, _: term.weight.sum(), weight=weight), []


def what_a_forward_notes(run):
    def move(term, logits):
        term.shape, term.device, term.dtype, term.number = logits.shape, logits.device, logits.dtype, term.number + 1
        return term.number

    return Holder(move, number=0, shape=None, device=None, dtype=None), []


def constants(run):
    """Sparse ones too, which nobody can save."""
    return Holder(lambda term, _: term.some[0], some=torch.ones(2), graph=torch.eye(2).to_sparse()), []


@pytest.mark.parametrize(
    "make",
    [
        *(shared_weight, generator, counter, defaults, array, own_optimizer, module_within, view_of_a_buffer),
        *(alias_of_a_weight, what_a_forward_notes, constants),
    ],
)
def test_what_others_hold_too_is_put_back_in_its_place(make, tmp_path, caplog):
    def run_of(updates, **options):
        run = Run(updates)
        term, callbacks = make(run)
        run.update.loss.terms.append(term)
        run.train(checkpoints=tmp_path, check=False, callbacks=callbacks, **options)
        return run.everything()

    run_of(2)
    resumed = run_of(4, resume=True)
    shutil.rmtree(tmp_path)
    torch.testing.assert_close(resumed, run_of(4), rtol=0, atol=0)
    assert "checkpoints cannot hold it" not in caplog.text


def test_what_follows_from_a_changed_setting_begins_anew(tmp_path):
    class Decays(TrialAdvantage):
        @cached_property
        def powers(self):
            return self.gamma ** torch.arange(3.0)

        def forward(self, batch):
            self.last = self.powers
            return super().forward(batch)

    def run_of(updates, gamma, **options):
        run = Run(updates)
        run.update.advantage = advantage = Decays(critic=run.policy, gamma=gamma)
        run.train(checkpoints=tmp_path, check=False, **options)
        return advantage.last.tolist()

    assert run_of(1, 0.9) == pytest.approx([1, 0.9, 0.81])
    assert run_of(2, 0.5, resume=True, resume_changes=["advantage.gamma"]) == [1, 0.5, 0.25]


def test_what_has_moved_goes_on_whatever_it_is_given(tmp_path, caplog):
    caplog.set_level("INFO", "rl2_torchrl")

    def run_of(updates, epochs, **options):
        run = Run(updates, epochs=epochs)
        run.train(checkpoints=tmp_path, check=False, callbacks=[Moves(run.update)], **options)
        return run.update.epochs

    assert run_of(2, 2) == 4
    assert run_of(3, 1, resume=True, resume_changes=["update.epochs"]) == 2
    assert run_of(4, 1, resume=True) == 3
    assert "whatever it is given" not in caplog.text
    assert run_of(5, 7, resume=True) == 4
    assert "the run itself had come to, whatever it is given now: update.epochs: 1 then, 7 now" in caplog.text


def test_what_stood_still_since_a_resume_is_kept(tmp_path):
    """A flag that was set before that, with the same objects in a second call."""
    warmed = []

    class Warms(TrialAdvantage):
        _is_warm = False

        def forward(self, batch):
            if not self._is_warm:
                warmed.append(1)
            self._is_warm = True
            return super().forward(batch)

    def run_of():
        run = Run(3)
        run.update.advantage = Warms(critic=run.policy)
        return run

    run, options = run_of(), {"checkpoints": tmp_path, "check": False}
    run.train(stop=lambda row: True, **options)
    run.train(stop=lambda row: True, resume=True, **options)
    run_of().train(resume=True, **options)
    assert len(warmed) == 1


class Last:
    """Another object at each update, of which no file can tell."""


class Remembers(TrialAdvantage):
    """What cannot be saved, and a number beside it."""

    def forward(self, batch):
        self.last, self.calls = Last(), getattr(self, "calls", 0) + 1
        return super().forward(batch)


def test_what_cannot_be_saved_is_named_once(tmp_path, caplog):
    def run_of(updates, **options):
        run = Run(updates)
        run.update.advantage = Remembers(critic=run.policy)
        run.train(checkpoints=tmp_path, check=False, checkpoint_interval=1, **options)
        return run.update.advantage.calls

    run_of(2)
    said = [record.message for record in caplog.records if "checkpoints cannot hold it" in record.message]
    assert [message.split()[0] for message in said] == ["advantage.last"]
    assert run_of(4, resume=True) == 4


def test_a_run_with_another_network_in_a_term_is_another(tmp_path):
    class Decodes(nn.Module):
        in_keys = ["actor_features"]

        def __init__(self, activation):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 2), activation)

        def forward(self, features):
            return {"loss_decodes": self.layers(features).square().mean()}

    def run_of(updates, activation, **options):
        run = Run(updates)
        run.update.loss.terms.append(Decodes(activation))
        run.train(checkpoints=tmp_path, check=False, **options)

    run_of(1, nn.ReLU())
    for other, words in ((nn.Tanh(), '"ReLU" then, "Tanh" now'), (nn.Dropout(0.5), '"ReLU" then, "Dropout" now')):
        with pytest.raises(ValueError, match=rf"Decodes.modules.layers.1.class: {words}"):
            run_of(2, other, resume=True)
    run_of(2, nn.ReLU(), resume=True)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(0), lambda generator: torch.rand((), generator=generator).item()),
        (lambda: np.random.default_rng(0), lambda generator: generator.random()),
    ],
)
def test_a_generator_that_others_hold_goes_on_in_its_place(make, draw):
    first, second = nn.Module(), nn.Module()
    first.generator, second.generator = make(), make()
    kept, others, held = Kept({"part": first}), Kept({"part": second}), second.generator
    draw(first.generator)
    others.load_state_dict(kept.state_dict())
    assert second.generator is held
    assert draw(held) == draw(first.generator)


class Level:
    def __init__(self):
        self.value = 1.0


def test_an_object_that_changes_within_is_named(caplog):
    part = nn.Module()
    part.__class__ = type("Tasks", (nn.Module,), {"__module__": __name__})
    part.level, part.still = Level(), Level()
    kept = Kept({"tasks": part})
    assert not kept.state_dict()
    assert not caplog.text
    part.level.value = 2.0
    assert not kept.state_dict()
    assert "tasks.level changes in the training" in caplog.text
    assert "tasks.still" not in caplog.text
