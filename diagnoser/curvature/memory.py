"""How much memory a graph keeps, how much is left, and whether an error says that there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def out_of_memory(error: Exception) -> bool:
    """Whether memory has run out; on CPU and MPS that is a plain RuntimeError with a text."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)


def kept_bytes(compute: Callable[[], Tensor], parameters: Mapping[str, Tensor]) -> int:
    """Returns how many bytes the graph of a loss keeps alive besides the parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters.values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = compute()
    del loss  # alive until here, so that no address was given out twice
    return sum(kept.values())


def free_memory(device: torch.device) -> int | None:
    """Returns how many bytes may still be allocated on a device, or None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    known = [
        free for free in (_available(), _left_in_group(), _left_in_limit()) if free is not None
    ]
    return max(min(known), 0) if known else None


def _available() -> int | None:
    """What the system says."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _left_in_group() -> int | None:
    """What a container may still use, with the file cache that it would give up."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text("ascii"))  # "max": no limit, no number
        used = int((group / "memory.current").read_text("ascii"))
        lines = (group / "memory.stat").read_text("ascii").splitlines()
        cache = next(int(x.split()[1]) for x in lines if x.startswith("inactive_file "))
    except (OSError, ValueError, StopIteration):
        return None
    return limit - used + cache


def _left_in_limit() -> int | None:
    """What ``ulimit -v`` leaves."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit - pages * resource.getpagesize()
