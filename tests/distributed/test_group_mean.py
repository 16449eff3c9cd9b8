"""`group`: the mean over the tokens of all ranks; two ranks run group_mean_cases.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from chunked_ce import cross_entropy, linear_cross_entropy

pytestmark = [
    pytest.mark.framework,
    pytest.mark.skipif(not dist.is_available(), reason="a torch without torch.distributed"),
]
TARGET = torch.tensor([0, 1, -100])


def test_one_rank(group: dist.ProcessGroup) -> None:
    x = torch.randn(3, 5)
    assert torch.equal(cross_entropy(x, TARGET, group=group), cross_entropy(x, TARGET))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(reduction="none"), "reduction is 'none': leave it None"),
        (dict(reduction="sum"), "reduction='mean' divides by, but reduction is 'sum'"),
        (dict(num_items=4), "num_items and group both say"),
        (dict(token_weight=torch.ones(3, requires_grad=True)), "token_weight.detach()"),
    ],
)
def test_bad_input(group: dist.ProcessGroup, options: dict, text: str) -> None:
    for call in (
        lambda: cross_entropy(torch.randn(3, 5), TARGET, group=group, **options),
        lambda: linear_cross_entropy(
            torch.randn(3, 4), torch.randn(5, 4), TARGET, group=group, **options
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert text in str(caught.value)


def test_group_of_another_type() -> None:
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup or None"):
        cross_entropy(torch.randn(3, 5), TARGET, group="dp")
    with pytest.raises(ValueError, match="group does not contain this process"):
        cross_entropy(torch.randn(3, 5), TARGET, group=dist.GroupMember.NON_GROUP_MEMBER)


def test_function_transforms_are_refused(group: dist.ProcessGroup) -> None:
    loss = torch.func.grad(lambda x: cross_entropy(x, TARGET, group=group))
    with pytest.raises(NotImplementedError, match="a loss with group cannot be transformed"):
        loss(torch.randn(3, 5))
