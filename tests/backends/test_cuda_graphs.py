"""CUDA graphs of a training step, and torch.compile that makes them, on each backend of a GPU.

``bash bench/gpu.sh`` runs it.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from cases import laid_out
from cuda_cases import (
    DEVICE,
    HERE,
    HOT,
    MODULES,
    assert_same,
    bits,
    gpu_backend,  # noqa: F401  (a fixture)
    inputs_of,
    problem,
)

from dicekernels import DiceCELoss, functional

pytestmark = HERE
F64 = torch.float64


def captured(step: Callable[[], object], keep: bool = False) -> tuple[torch.cuda.CUDAGraph, object]:
    """The graph of a step and what it writes to; the capture fails if the host waits in the step.

    ``keep``: for ``nodes_of`` alone, the graph is not made to run.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph(keep_graph=keep)
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


# CUgraphNodeType of cuda.h, the first ones.
NODES = ("kernel", "memcpy", "memset", "host", "graph", "empty")


def nodes_of(graph: torch.cuda.CUDAGraph) -> Counter[str]:
    """How many nodes of each kind a captured graph has, from the driver itself."""
    driver, handle, count = (
        ctypes.CDLL("libcuda.so.1"),
        ctypes.c_void_p(graph.raw_cuda_graph()),
        ctypes.c_size_t(),
    )
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes, kind = (ctypes.c_void_p * count.value)(), ctypes.c_int()
    assert driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    found: Counter[str] = Counter()
    for node in nodes:
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        found[NODES[kind.value] if kind.value < len(NODES) else str(kind.value)] += 1
    return found


@pytest.mark.parametrize("kind", ["labels", "values and mask"])
def test_a_graph_has_two_kernels_forward_and_one_backward(kind):
    loss, logits, target = inputs_of(kind)
    grad_loss = torch.ones((), device=DEVICE)
    graph, _ = captured(lambda: loss(logits, target), keep=True)
    assert nodes_of(graph) == {"kernel": 2}
    graph, _ = captured(lambda: torch.autograd.grad(loss(logits, target), logits, grad_loss), keep=True)
    assert nodes_of(graph) == {"kernel": 3}


def fill(logits, labels, seed):
    """New data into the old memory."""
    fresh = problem(tuple(logits.shape), logits.dtype, seed)
    with torch.no_grad():
        logits.copy_(fresh[0])
    labels.copy_(fresh[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("name", MODULES)
def test_a_captured_step_replays_on_new_data(name, layout):
    logits, labels = problem()
    logits = laid_out(logits.detach(), layout).requires_grad_()
    module = MODULES[name]()
    graph, results = captured(lambda: bits(module, logits, labels))
    for seed in range(10, 13):
        fill(logits, labels, seed)
        for result in results:
            result.detach().fill_(float("nan"))
        # What the host has freed since the capture holds other values by now.
        noise = [torch.full((n,), float("nan")) for n in range(1, 200)]
        graph.replay()
        assert_same(results, bits(module, logits, labels), f"seed {seed}, {len(noise)}")


def test_a_factor_on_the_device_is_read_by_each_replay():
    logits, labels = problem()
    factor = torch.tensor(0.5, dtype=F64, device=DEVICE)
    graph, results = captured(
        lambda: bits(lambda z, y: functional.dice_ce_loss(z, y, lambda_ce=factor, **HOT), logits, labels)
    )
    for value in (0.0, 3.0):
        factor.fill_(value)
        graph.replay()
        expected = bits(
            lambda z, y, v=value: functional.dice_ce_loss(z, y, lambda_ce=v, **HOT), logits, labels
        )
        assert_same(results, expected, str(value))


def test_graphs_replayed_at_a_time_on_two_streams():
    steps = []
    for seed in range(2):
        logits, labels = problem(seed=seed)
        graph, results = captured(lambda z=logits, y=labels: bits(DiceCELoss(**HOT), z, y))
        steps.append((graph, results, bits(DiceCELoss(**HOT), logits, labels), torch.cuda.Stream()))
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, _, _, stream in steps:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, results, expected, _ in steps:
        assert_same(results, expected)


def test_a_graph_beside_launches_on_the_stream_of_its_capture():
    # A captured launch must not share what the launches of its stream share.
    logits, labels = problem()
    other, more = problem((3, 4, 33, 34, 35), seed=7)
    expected = bits(DiceCELoss(**HOT), logits, labels), bits(DiceCELoss(**HOT), other, more)
    at, aside, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=at):
        results = bits(DiceCELoss(**HOT), logits, labels)
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        with torch.cuda.stream(aside):
            graph.replay()
        with torch.cuda.stream(at):
            found.append(bits(DiceCELoss(**HOT), other, more))
    torch.cuda.synchronize()
    assert_same(results, expected[0])
    for got in found:
        assert_same(got, expected[1])


@pytest.mark.parametrize("name", ["dice_ce", "generalized", "tversky", "dice_ce lambdas"])
def test_compile_with_reduce_overhead(name):
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    module = MODULES[name]().to(DEVICE)
    scale = torch.ones((), device=DEVICE, requires_grad=True)
    fast = torch.compile(lambda z, y: module(z * scale, y), mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        logits, labels = problem(seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        value = fast(logits, labels)
        got = (value.detach().clone(), torch.autograd.grad(value, logits)[0].clone())
        assert_same(got, bits(lambda z, y: module(z * scale, y), logits, labels), f"step {seed}")
    assert counters["inductor"]["cudagraph_skips"] == 0, dict(counters["inductor"])
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODULES)
def test_compile_with_inductor(name):
    torch.compiler.reset()
    module = MODULES[name]()
    logits, labels = problem()
    got = bits(torch.compile(module, fullgraph=True), logits, labels)
    assert_same(got, bits(module, logits, labels))
