"""Boosted trees as plain arrays: what scikit-learn has grown, read without it.

To import a learning library takes longer than all else that is done when a run is judged, and what
its objects hold differs from version to version; numbers do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagnoser.errors import ClassifierError
from diagnoser.table import Array

# A node asks whether a number is at most ``threshold``, or is none and ``missing_left``, and sends
# the row ``left`` or ``right``; a leaf sends it to itself. ``gain`` is what its split was worth.
NODE: Final = np.dtype(
    [
        ("column", "<i4"),
        ("threshold", "<f8"),
        ("missing_left", "?"),
        ("left", "<i4"),
        ("right", "<i4"),
        ("value", "<f8"),
        ("gain", "<f8"),
    ]
)


MOST_NODES: Final = 2**15  # they may stand in one long line


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """The sum of trees, and of ``base``.

    ``nodes`` (nodes,) are of type `NODE`, those of all trees one behind the other; ``roots``
    (trees,) are the first of each.
    """

    nodes: NDArray[Any]
    roots: NDArray[np.int64]
    base: float

    def score(self, rows: NDArray[np.floating[Any]]) -> Array:
        """Returns what they say of rows (rows, columns), (rows,): log-odds."""
        values = np.asarray(rows, dtype=np.float64)
        column, threshold = self.nodes["column"], self.nodes["threshold"]
        missing_left, left, right = (self.nodes[k] for k in ("missing_left", "left", "right"))
        at = np.broadcast_to(self.roots[:, None], (len(self.roots), len(values)))
        each = np.arange(len(values))
        while True:
            asked = values[each, column[at]]
            goes_left = np.where(np.isnan(asked), missing_left[at], asked <= threshold[at])
            behind = np.where(goes_left, left[at], right[at])
            if np.array_equal(behind, at):
                return np.asarray(self.base + self.nodes["value"][at].sum(axis=0))
            at = behind

    def gains(self) -> dict[int, float]:
        """Returns, by column, the share of the gain of all splits that are on it."""
        splits = self.nodes[self.nodes["left"] != self.nodes["right"]]
        whole = float(splits["gain"].sum())
        return {
            int(column): float(splits["gain"][splits["column"] == column].sum()) / whole
            for column in np.unique(splits["column"])
        }

    def check(self, columns: int) -> None:
        """Raises what is wrong with trees that somebody else has made.

        Args:
            columns: How many there are to ask for.

        Raises:
            ValueError: A node that is of another type, leads backwards or nowhere, or asks for a
                column that is not there; numbers that are not finite.
        """
        nodes, own = self.nodes, np.arange(len(self.nodes))
        if nodes.dtype != NODE or nodes.ndim != 1:
            raise ValueError("the nodes of its trees are of another type")
        if len(nodes) > MOST_NODES:
            raise ValueError("its trees are too large")
        if self.roots.dtype.kind != "i" or self.roots.ndim != 1:
            raise ValueError("the roots of its trees are of another type")
        if len(self.roots) and not (self.roots.min() >= 0 and self.roots.max() < len(nodes)):
            raise ValueError("a tree begins nowhere")
        leaf = (nodes["left"] == own) & (nodes["right"] == own)
        onwards = np.minimum(nodes["left"], nodes["right"]) > own
        inside = np.maximum(nodes["left"], nodes["right"]) < len(nodes)
        if not (leaf | (onwards & inside)).all():
            raise ValueError("a node of a tree leads backwards or nowhere")
        if not ((nodes["column"] >= 0) & (nodes["column"] < columns)).all():
            raise ValueError("a node of a tree asks for a column that is not there")
        if not (np.isfinite(nodes["value"]).all() and np.isfinite(self.base)):
            raise ValueError("a tree says what is no number")


def trees_of(estimator: Any, rows: NDArray[np.floating[Any]]) -> Trees:
    """Reads the trees of a fitted `HistGradientBoostingClassifier` of two classes.

    Args:
        estimator: The classifier, without categories.
        rows: Some that both are to say the same of, (rows, columns).

    Raises:
        ClassifierError: They do not: this version of scikit-learn keeps its trees otherwise.
    """
    found, roots, begin = [], [], 0
    # scikit-learn keeps its trees where no public name leads to.
    for (tree,) in estimator._predictors:
        own = np.arange(begin, begin + len(tree.nodes))
        leaf = tree.nodes["is_leaf"].astype(bool)
        nodes = np.zeros(len(own), dtype=NODE)
        nodes["column"] = np.where(leaf, 0, tree.nodes["feature_idx"])
        nodes["threshold"] = np.where(leaf, 0.0, tree.nodes["num_threshold"])
        nodes["missing_left"] = tree.nodes["missing_go_to_left"]
        nodes["left"] = np.where(leaf, own, tree.nodes["left"].astype(np.int64) + begin)
        nodes["right"] = np.where(leaf, own, tree.nodes["right"].astype(np.int64) + begin)
        nodes["value"] = tree.nodes["value"]
        nodes["gain"] = np.where(leaf, 0.0, tree.nodes["gain"])
        found.append(nodes)
        roots.append(begin)
        begin += len(own)
    nodes = np.concatenate(found) if found else np.zeros(0, dtype=NODE)
    trees = Trees(
        nodes, np.array(roots, dtype=np.int64), float(estimator._baseline_prediction.item())
    )
    if not np.allclose(trees.score(rows), estimator.decision_function(rows), rtol=0, atol=1e-9):
        raise ClassifierError("this version of scikit-learn keeps its trees in another way")
    return trees
