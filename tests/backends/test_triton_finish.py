"""The op ``finish`` of the Triton backend: its kernel against ``dicekernels.finish`` and numbers by hand.

With TRITON_INTERPRET=1 the kernel runs on the CPU, a GPU runs it compiled.
What is compiled for GPUs that are not here needs neither, and a process that does not interpret.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import swept
from test_finish import COMBINATIONS, ROWS_G, SUMS, combination, random_slots, relevant
from torch import Tensor
from triton_finish_cases import ALL_ROWS, DEVICE, F64, check, compiles, quiet, run, runs

pytest.importorskip("triton")

from bench.gpu.offline import target
from bench.static import sass
from dicekernels.backends.triton import finish as module
from dicekernels.backends.triton.finish import plan_finish
from dicekernels.backends.triton.launch import Launch
from dicekernels.spec import (
    BAD,
    LS,
    NEG,
    OVERLAP_ROWS,
    POS,
    Denominator,
    FinishSpec,
    Formula,
    N,
    Reduction,
    Transform,
    Weights,
    row_index,
)

pytestmark = quiet


@runs
@pytest.mark.parametrize("block", range(7))
def test_every_formula_equals_its_twin(block: int) -> None:
    # Formula x sums x voxel term x reduction in full, the other options drawn: see ``combination``.
    checked = 0
    for index in filter(relevant, range(block, len(COMBINATIONS), 7)):
        slots, rows, spec, voxels, weights = combination(index)
        check(slots, rows, spec, voxels == 0, **weights)
        checked += 1
    assert checked >= 40


# Chunks: one, two, an odd number, more than two tiles of the 64 columns of a wide problem.
# Classes: one, a power of two and beside it, more than half of what a tile holds. Samples: none, one, more.
SHAPES = [(0, 1, 3), (1, 2, 1), (2, 37, 4), (3, 1, 5), (5, 2, 33), (2, 1, 256), (4, 3, 257), (1, 513, 64)]


@runs
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("formula", [Formula.RATIO, Formula.GENERALIZED, Formula.MCC])
def test_shapes(formula: Formula, shape: tuple[int, int, int], batch: bool) -> None:
    samples, chunks, classes = shape
    rows = ALL_ROWS & ~BAD
    slots = random_slots(rows, samples, chunks, classes, "random", seed=samples + classes)
    skipped = int(classes > 1)
    spec = FinishSpec(
        formula, skipped=skipped, batch=batch, denominator=Denominator.ELEMENTS, label_smoothing=0.1
    )
    weights = {"class_weight": torch.rand(classes - skipped), "pos_weight": torch.rand(classes, dtype=F64)}
    check(slots, rows, spec, samples == 0, **weights)


@runs
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("formula", [Formula.RATIO, Formula.GENERALIZED, Formula.MCC])
def test_losses_without_reduction(formula: Formula, batch: bool) -> None:
    rows = ALL_ROWS & ~(BAD | POS | NEG | LS)
    # 300 samples of 2 classes and 5 of 200: several tiles of samples, and of one sample each.
    for samples, classes in ((0, 2), (300, 2), (5, 200)):
        slots = random_slots(rows, samples, 1, classes, "random", seed=classes)
        spec = FinishSpec(formula, skipped=1, batch=batch, reduction=Reduction.NONE)
        check(slots, rows, spec, class_weight=torch.rand(classes - 1))


@runs
@pytest.mark.parametrize("denominator", Denominator)
def test_many_samples(denominator: Denominator) -> None:
    rows = ALL_ROWS & ~BAD
    slots = random_slots(rows, 150, 1, 5, "random", seed=7)
    slots[3::7, ..., row_index(rows, N)] = 0  # samples of which every voxel is ignored
    spec = FinishSpec(Formula.RATIO, denominator=denominator, voxel_skipped=1)
    check(slots, rows, spec, pos_weight=torch.rand(5), neg_weight=torch.rand(5))


@runs
def test_sums_of_other_strides() -> None:
    rows = ROWS_G | POS | N
    slots = random_slots(rows, 4, 3, 5, "random", seed=1)
    spec = FinishSpec(Formula.RATIO, denominator=Denominator.VOXELS)
    plain = run(slots, rows, spec)
    permuted = slots.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    strided = torch.full((8, 3, 5, slots.shape[3]), math.nan, dtype=F64)[::2].copy_(slots)
    for other in (permuted, strided):
        assert not other.is_contiguous()
        assert all(map(torch.equal, run(other, rows, spec), plain))


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", Reduction)
def test_dtypes_of_the_loss(dtype: torch.dtype, reduction: Reduction) -> None:
    slots = random_slots(ROWS_G, 3, 2, 5, "random", seed=2)
    spec = FinishSpec(Formula.RATIO, reduction=reduction)
    exact, slopes = run(slots, ROWS_G, spec)
    loss, coef = run(slots, ROWS_G, spec, dtype=dtype)
    assert loss.dtype == dtype
    assert torch.equal(loss, exact.to(dtype))
    assert torch.equal(coef, slopes)


WEIGHT_DTYPES = [F64, torch.float32, torch.float16, torch.bfloat16]
WEIGHT_DTYPES += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@runs
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_dtypes_of_the_weights(dtype: torch.dtype) -> None:
    rows = ROWS_G | POS | NEG | N
    slots = random_slots(rows, 2, 1, 3, "random", seed=3)
    spec = FinishSpec(Formula.RATIO, denominator=Denominator.WEIGHTS)
    values = torch.tensor([3, 1, 100, 7, 0, 3, 2.3, 5.7]).to(dtype)
    # Slices: neither contiguous nor aligned to 16 bytes.
    weights = {
        "class_weight": values[1:4],
        "pos_weight": values[::2][:3],
        "neg_weight": values[3:6],
        "region_lambda": values[6],
        "voxel_lambda": values[7],
    }
    check(slots, rows, spec, **weights)


@runs
def test_lambdas_on_the_cpu_and_on_the_device() -> None:
    rows = ROWS_G | POS | N
    slots = random_slots(rows, 2, 1, 3, "random", seed=4)
    spec = FinishSpec(Formula.RATIO, denominator=Denominator.VOXELS)
    # 0.1 and 1e-300 are not float32 numbers.
    for region, voxel in ((0.1, 1.0 / 3), (1e-300, 0.0)):
        values = [torch.tensor(number, dtype=F64) for number in (region, voxel)]
        check(slots, rows, spec, region_lambda=values[0], voxel_lambda=values[1])
        one = [value.reshape(1).to(DEVICE) for value in values]
        as_value = run(slots, rows, spec, region_lambda=values[0], voxel_lambda=values[1])
        as_pointer = run(slots, rows, spec, region_lambda=one[0], voxel_lambda=one[1])
        assert all(map(torch.equal, as_value, as_pointer))


def planned(slots: Tensor, rows: int, spec: FinishSpec) -> Launch:
    samples, _, classes, width = slots.shape
    loss = slots.new_full(spec.loss_shape(samples, classes), math.nan)
    coef = slots.new_full((samples, classes, width), math.nan)
    return plan_finish(loss, coef, slots, Weights(), rows, spec, False)


@runs
def test_one_launch_that_resets_its_counter_and_reads_no_old_memory() -> None:
    rows = ROWS_G | POS | N
    slots = random_slots(rows, 3, 40, 6, "random", seed=8).to(DEVICE)
    spec = FinishSpec(Formula.RATIO, denominator=Denominator.VOXELS)
    launch = planned(slots, rows, spec)
    _, totals, counter, loss, coef = launch.args[:5]
    assert launch.grid[0] > 1  # several programs, of which one evaluates
    results = []
    for _ in range(3):
        for buffer in (totals, loss, coef):
            buffer.fill_(math.nan)
        launch.run(slots.device)
        assert counter.item() == 0
        results.append((loss.clone(), coef.clone()))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    assert results[0][1].isfinite().all()


@runs
def test_finish_launches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    plain = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, device: (launches.append(self), plain(self, device)))
    monkeypatch.setattr("dicekernels.backends.triton.launch.remembered", {})
    run(SUMS, ROWS_G, FinishSpec(Formula.RATIO))
    assert [launch.kernel for launch in launches] == [module.finish_kernel]


@runs
def test_wrong_lengths_are_refused() -> None:
    spec = FinishSpec(Formula.RATIO)
    arguments = {"slots": SUMS, "rows": ROWS_G, "spec": spec}
    with pytest.raises(RuntimeError, match="class_weight: got 3 values, expected 2"):
        run(**arguments, class_weight=torch.ones(3))
    with pytest.raises(RuntimeError, match="region_lambda: got 2 values, expected 1"):
        run(**arguments, region_lambda=torch.ones(2))
    with pytest.raises(RuntimeError, match="sums: got 4 rows, expected 3"):
        run(SUMS, OVERLAP_ROWS, spec)


def test_offsets_past_int32_are_refused() -> None:
    slots = torch.empty(2**20, 1, 512, 4, dtype=F64, device="meta")
    with pytest.raises(RuntimeError, match=r"sums: got 2147483648 totals .* split the batch"):
        planned(slots, ROWS_G, FinishSpec(Formula.RATIO))


#
# Compiled for GPUs that are not here.


def compiled(samples: int, chunks: int, classes: int, spec: FinishSpec, dtype: torch.dtype = F64):
    """The kernel with every row on and every weight given, for the active target."""
    width = ALL_ROWS.bit_count()
    slots = torch.empty(samples, chunks, classes, width, dtype=F64, device="meta")
    loss = slots.new_empty(spec.loss_shape(samples, classes), dtype=dtype)
    sizes = (classes - spec.skipped, classes, classes, 1, 1)
    weights = Weights(*(torch.empty(size, device="meta") for size in sizes))
    coef = slots.new_empty((samples, classes, width))
    return plan_finish(loss, coef, slots, weights, ALL_ROWS, spec, False).compile()


KINDS = {
    "ratio": {"formula": Formula.RATIO, "denominator": Denominator.VOXELS},
    "power": {"formula": Formula.RATIO, "transform": Transform.POWER, "denominator": Denominator.WEIGHTS},
    "log": {"formula": Formula.RATIO, "transform": Transform.LOG, "denominator": Denominator.SAMPLES},
    "generalized": {"formula": Formula.GENERALIZED, "denominator": Denominator.ELEMENTS},
    "mcc": {"formula": Formula.MCC, "denominator": Denominator.ONE},
}


@compiles
@pytest.mark.parametrize("capability", swept((80, 90, 100, 120), now=(90,)))
def test_no_spill(capability: int) -> None:
    with target(capability):
        for kind, batch, shape in itertools.product(KINDS, (False, True), ((2, 512, 4), (64, 2048, 512))):
            spec = FinishSpec(**KINDS[kind], batch=batch)
            kernel = sass.read(compiled(*shape, spec).asm["cubin"])
            assert kernel.stack == 0, f"{kind}, batch {batch}, {shape}: {kernel.registers} registers"


@compiles
def test_numbers_stay_float64_and_totals_bypass_the_l1_cache() -> None:
    with target(90):
        asm = compiled(2, 512, 4, FinishSpec(**KINDS["log"]), torch.bfloat16).asm
    # 1e-7 as float64, and not as float32 gives it; the numbers of the spec and both lambdas by value.
    assert "9.9999999999999995E-8" in asm["ttir"]
    assert "1.0000000116860974E-7" not in asm["ttir"]
    assert asm["ptx"].count(".param .f64 ") == 9
    assert "atom.global.gpu.acq_rel.add" in asm["ptx"]
    evaluated = asm["ptx"].split("atom.global.gpu.acq_rel.add")[1]
    assert evaluated.count("ld.global.cg.b64") > 0
    assert "ld.global.b64" not in evaluated  # all doubles read after the ticket are totals
