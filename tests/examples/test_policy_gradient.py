"""examples/policy_gradient.py with a vocabulary so small that a run takes a second."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch
from helpers import ROOT

SCRIPT = ROOT / "examples" / "policy_gradient.py"
SMALL = "--steps 2 --group 4 --vocab-size 301".split()


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("policy_gradient", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["policy_gradient"] = module
    spec.loader.exec_module(module)
    return module


def test_loss_and_gradients_are_those_of_the_formula(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "CHUNK_BYTES", 1 << 16)  # some twenty chunks
    torch.manual_seed(0)
    policy = example.Policy(301)
    _, batch = example.train(policy, example.parse_arguments(SMALL))
    found = example.compare(policy, batch)
    assert found.loss_difference < 1e-5 and found.gradient_difference < 1e-5
    assert found.largest_gradient > 1e-3 and 0 < found.clipped < 1

    # In float64 from the definition, over the completions' tokens alone.
    logprob, entropy = example.streamed_stats(policy, batch.tokens, batch.targets)
    loss = example.policy_loss(logprob, entropy, batch)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    policy.double()
    p = policy.head(policy(batch.tokens[:, :-1])[0])[:, 3:].softmax(-1)
    chosen = p.gather(-1, batch.tokens[:, 4:, None])[..., 0]
    ratio = chosen / batch.logprob[:, 3:].double().exp()
    gain = batch.advantage[:, None].double()
    surrogate = torch.where(gain > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * gain
    expected = -(surrogate - 0.01 * (p * p.log()).sum(-1)).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    wanted = torch.autograd.grad(expected, list(policy.parameters()))
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=1e-5)


def test_rewards_and_advantages(example: ModuleType) -> None:
    tokens = torch.ones(4, 20, dtype=torch.int64)
    tokens[1:, 4:12] = 2
    tokens[0, :4] = 2  # a prompt earns nothing
    reward = example.rewards(tokens)
    assert reward.tolist() == [0.0, 0.5, 0.5, 0.5]
    advantage = example.advantages(reward, 2)  # the second group's rewards are all the same
    assert advantage.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0, 0], abs=1e-5)


def test_a_batch_scores_its_completions_alone(example: ModuleType) -> None:
    torch.manual_seed(0)
    batch = example.collect(example.Policy(301), 301, 4)
    assert batch.tokens.shape == (64, 20)
    assert (batch.tokens[:, :4].view(16, 4, 4) == batch.tokens[::4, None, :4]).all()
    assert (batch.targets[:, :3] == -100).all() and (batch.logprob[:, :3] == 0).all()
    assert (batch.targets[:, 3:] == batch.tokens[:, 4:]).all() and (batch.logprob[:, 3:] < 0).all()
    for statistic in (batch.reward, batch.advantage, batch.logprob):
        assert statistic.isfinite().all()
    assert batch.advantage.view(-1, 4).mean(1).abs().max() < 1e-5


def test_the_reward_rises(example: ModuleType) -> None:
    torch.manual_seed(0)
    means, _ = example.train(
        example.Policy(64), example.parse_arguments("--steps 15 --vocab-size 64".split())
    )
    assert len(means) == 15 and all(map(math.isfinite, means))
    assert means[0] < 0.6 and means[-1] > 0.8


def test_the_same_seed_prints_the_same(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for seed in ("3", "3", "4"):
        example.main([*SMALL, "--steps", "1", "--seed", seed])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert "mean reward: " in printed[0] and f"{64 * 19 * 301 * 4:,} bytes" in printed[0]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("--steps 0", "--steps: expected an integer from 1 to 2147483647, got '0'"),
        ("--steps x", "--steps: expected an integer from 1 to 2147483647, got 'x'"),
        ("--group -1", "--group: expected an integer from 2 to 2147483647, got '-1'"),
        ("--group 1", "--group: expected an integer from 2"),  # one reward has no deviation
        ("--vocab-size 0", "--vocab-size: expected an integer from 2"),
        ("--seed -1", "--seed: expected an integer from 0"),
        ("--seed 99999999999999999999", "--seed: expected an integer from 0"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    example: ModuleType, bad: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        example.main([*SMALL, *bad.split()])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("policy_gradient: ") and err.count("\n") == 1
    assert says in err
