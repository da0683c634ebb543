"""Counters by which the programs of one launch find out which of them ends last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from triton.runtime import driver

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def ticket(device: torch.device) -> Tensor:
    """(1,) int32 at 0 that no launch at the same time uses; each launch has to leave it at 0.

    One for each stream of a GPU, since launches of one stream do not overlap. A graph may be replayed on any
    stream, so a captured launch gets one of its own, cleared by the graph.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return ticket(device)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, driver.active.get_current_stream(device.index))
    found = _tickets.get(key)
    if found is None:
        stream = torch.cuda.current_stream(device)
        # A thread of its own allocates from no memory pool that this one has chosen: the warm-up before the
        # capture of a compiled graph chooses one, and refuses tensors that outlive it there.
        with ThreadPoolExecutor(max_workers=1) as pool:
            found = _tickets.setdefault(key, pool.submit(_make, device, stream).result())
    return found


def _make(device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    with torch.cuda.device(device):
        made = torch.zeros(1, dtype=torch.int32, device=device)
        stream.wait_stream(torch.cuda.current_stream(device))
    return made
