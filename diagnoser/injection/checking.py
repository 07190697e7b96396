"""Proof that an operator changed what it says it changes, and nothing else.

`snapshot` describes a training as names with fingerprints; two of them differ in the names that a
change altered. (The idea of a structural verifier is DEForm's, of DEFault-bench, 2026.)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from diagnoser.errors import InjectionError
from diagnoser.injection.operator import Change, Place
from diagnoser.injection.training import Training

MODULE_BOOKKEEPING = frozenset(vars(nn.Module()))


def snapshot(training: Training) -> dict[str, str]:
    """Describes all of a training that exists by now.

    Names are ``settings.<field>``, ``data.<split>.<tensor>``, ``parameter.<name>``,
    ``buffer.<name>``, ``requires_grad.<name>``, ``tied.<name>``, ``module.<path>`` (its class),
    ``call.<path>.<attribute>`` (whatever else the module holds), ``criterion`` and
    ``optimizer.<index>.<parameter>``.
    """
    found = {
        f"settings.{entry.name}": repr(getattr(training.settings, entry.name))
        for entry in dataclasses.fields(training.settings)
    }
    if hasattr(training, "data"):
        for split in ("train", "held_out"):
            for name, tensor in getattr(training.data, split).items():
                found[f"data.{split}.{name}"] = _fingerprint(tensor)
    if hasattr(training, "model"):
        found |= _of_model(training.model)
    if hasattr(training, "criterion"):
        found["criterion"] = _describe(training.criterion)
    if hasattr(training, "optimizers"):
        found |= _of_optimizers(training)
    return found


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the names that one of the two has alone, or that differ, in order."""
    return tuple(name for name in sorted({*before, *after}) if before.get(name) != after.get(name))


def apply_checked(
    training: Training, change: Change, place: Place, values: Mapping[str, Any], generator: Any
) -> tuple[str, ...]:
    """Applies a change and returns what it altered.

    Raises:
        InjectionError: It altered something it does not name, or nothing of what it names.
    """
    intended = change.touches(training, place)
    before = snapshot(training)
    change.apply(training, place, values, generator)
    altered = differences(before, snapshot(training))
    stray = [name for name in altered if not any(fnmatchcase(name, p) for p in intended)]
    idle = [p for p in intended if not any(fnmatchcase(name, p) for name in altered)]
    if stray:
        raise InjectionError(f"an operator altered {', '.join(stray[:3])}, which it does not name")
    if idle:
        raise InjectionError(f"an operator left {', '.join(idle[:3])} as it was")
    return altered


def _of_model(model: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    owner: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"parameter.{name}"] = _fingerprint(parameter)
        found[f"requires_grad.{name}"] = str(parameter.requires_grad)
        found[f"tied.{name}"] = owner.setdefault(id(parameter), name)
    for name, buffer in model.named_buffers():
        found[f"buffer.{name}"] = _fingerprint(buffer)
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"module.{path}"] = type(module).__qualname__
        for name, value in vars(module).items():
            if name not in MODULE_BOOKKEEPING and not name.startswith("_"):  # torch's own
                found[f"call.{path}.{name}".replace("..", ".")] = _describe(value)
    return found


def _of_optimizers(training: Training) -> dict[str, str]:
    names = {id(p): name for name, p in training.model.named_parameters()}
    return {
        f"optimizer.{i}.{names.get(id(parameter), f'stale-{g}-{p}')}": repr(
            {key: value for key, value in group.items() if key != "params"}
        )
        for i, optimizer in enumerate(training.optimizers)
        for g, group in enumerate(optimizer.param_groups)
        for p, parameter in enumerate(group["params"])
    }


def _fingerprint(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().numpy().tobytes()
    shape = "x".join(map(str, tensor.shape))
    return f"{tensor.dtype} {shape} {hashlib.sha256(data).hexdigest()[:16]}"


def _describe(value: Any) -> str:
    """Describes what a module holds: callables by name and options, tensors by their numbers."""
    if isinstance(value, Tensor):
        return _fingerprint(value)
    if isinstance(value, functools.partial):
        options = {**{f"[{i}]": v for i, v in enumerate(value.args)}, **value.keywords}
        inner = ", ".join(f"{k}={_describe(v)}" for k, v in sorted(options.items()))
        return f"{_describe(value.func)}({inner})"
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return repr(value)
