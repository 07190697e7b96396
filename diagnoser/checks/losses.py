"""The loss functions behind the root of a backward, with what they compare."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diagnoser.checks.calls import LossCall
from diagnoser.statistics.nodes import inputs_of, operation_of, signed, source_of
from diagnoser.types import Where

NEAR = 64  # nodes of the graph that are searched from the root
KINDS = {
    "NllLoss": "nll",
    "NllLoss2D": "nll",
    "BinaryCrossEntropyWithLogits": "bce_logits",
    "BinaryCrossEntropy": "bce",
    "MseLoss": "mse",
    "L1Loss": "l1",
    "SmoothL1Loss": "smooth_l1",
    "HuberLoss": "huber",
    "KlDiv": "kl_div",
}


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """A loss function in the graph.

    ``scores`` is what it was given (log-probabilities of ``nll``); ``ignored`` the class that does
    not count. The two flags say on which sides gradients flow on.
    """

    kind: str
    node: Any
    scores: Tensor | None
    target: Tensor | None
    ignored: int | None
    scores_have_gradient: bool
    target_has_gradient: bool
    place: Where | None


def find_losses(root: Tensor, calls: Sequence[LossCall]) -> list[Loss]:
    """Returns the losses near the root of a backward, nearest first.

    Args:
        root: Where the backward starts.
        calls: The loss functions that were seen called, for their places.
    """
    found: list[Loss] = []
    queue, seen = deque([source_of(root)]), {source_of(root)}
    for _ in range(NEAR):
        if not queue:
            break
        node = queue.popleft()
        if node is None:
            continue
        kind = KINDS.get(operation_of(node))
        if kind is not None:
            found.append(_loss(kind, node, calls))
            continue
        for following in inputs_of(node):
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return found


def _loss(kind: str, node: Any, calls: Sequence[LossCall]) -> Loss:
    raw = getattr(node, "_raw_saved_self", None)
    readable = getattr(raw, "unpack_hook", None) is None
    scores = getattr(node, "_saved_self", None) if readable else None
    target = getattr(node, "_saved_target", None) if readable else None
    ignored = getattr(node, "_saved_ignore_index", None)
    ignored = None if ignored is None else signed(ignored)
    flows = [following is not None for following, _ in node.next_functions[:2]]
    place = next(
        (c.place for c in calls if target is not None and c.target.numel() == target.numel()), None
    )
    if place is None and calls:
        place = calls[0].place
    return Loss(kind, node, scores, target, ignored, flows[0], flows[-1] and len(flows) > 1, place)
