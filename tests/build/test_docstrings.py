"""``help()`` of everything public: each argument with its type, default and meaning, and no other."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from pathlib import Path

import pytest
from processes import captured

import dicekernels
from dicekernels import arguments, functional, modules

ROOT = Path(__file__).parents[2]
LOSSES = [getattr(dicekernels, name) for name in modules.__all__]
FUNCTIONS = [
    *(getattr(functional, name) for name in functional.__all__ if name != "RegionSums"),
    *(getattr(dicekernels, name) for name in ("explain", "from_monai", "use_backend")),
    *(getattr(dicekernels, name) for name in ("available_backends", "unavailable_backends")),
]
# What stands in the docstring, and whose arguments it must explain.
DOCUMENTED = [
    *((function, function) for function in FUNCTIONS),
    *((loss, loss.__init__) for loss in LOSSES),
    *((loss.forward, loss.forward) for loss in LOSSES),
]
ENTRY = re.compile(r"^    (\*{0,2}\w+) \((.+?)\): (.+?)(?=^    \S|\Z)", re.MULTILINE | re.DOTALL)


def section(thing: object, name: str) -> str:
    doc = inspect.getdoc(thing) or ""
    found = re.search(rf"^{name}:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    return found[1] if found else ""


def entries(thing: object) -> dict[str, tuple[str, str]]:
    """Argument -> (type, text) under Args."""
    found = ENTRY.findall(section(thing, "Args"))
    return {name: (kind, " ".join(text.split())) for name, kind, text in found}


def test_nothing_public_is_forgotten() -> None:
    callables = {getattr(dicekernels, name) for name in dicekernels.__all__ if name != "__version__"}
    assert callables == {*LOSSES, *FUNCTIONS, dicekernels.LabelRangeError} & callables
    assert {*LOSSES, dicekernels.explain, dicekernels.region_sums} <= callables
    for thing in callables:
        assert len(inspect.getdoc(thing) or "") > 40, thing


@pytest.mark.parametrize(("thing", "function"), DOCUMENTED, ids=lambda x: getattr(x, "__qualname__", ""))
def test_every_argument_is_explained_and_no_other(thing: object, function: object) -> None:
    signature = [x for x in inspect.signature(function).parameters.values() if x.name != "self"]
    explained = entries(thing)
    assert list(explained) == [str(x).partition(":")[0] for x in signature]
    hints = typing.get_type_hints(inspect.unwrap(function))
    for argument in signature:
        kind, text = explained[str(argument).partition(":")[0]]
        assert len(text) > 15, argument
        if argument.default is argument.empty:
            assert "Default:" not in text, argument
        else:
            assert text.endswith(f"Default: {argument.default!r}."), argument
        # No name of a type is left that a reader would have to look up.
        assert not re.search(r"\b(Alpha|Weight|OtherAct|VolumeWeight|Literal|typing)\b", kind), argument
        options = [x for x in typing.get_args(hints[argument.name]) if isinstance(x, str)]
        if typing.get_origin(hints[argument.name]) is typing.Literal:
            assert kind == " | ".join(map(repr, options)), argument


@pytest.mark.parametrize(("thing", "function"), DOCUMENTED, ids=lambda x: getattr(x, "__qualname__", ""))
def test_it_says_what_comes_back_and_what_is_raised(thing: object, function: object) -> None:
    nothing_raised = (dicekernels.available_backends, dicekernels.unavailable_backends)
    assert section(thing, "Raises") or thing in (*nothing_raised, dicekernels.DeepSupervisionLoss)
    assert section(thing, "Returns") or inspect.isclass(thing)
    doc = inspect.getdoc(thing) or ""
    assert [len(re.findall(rf"^{name}:$", doc, re.MULTILINE)) for name in ("Args", "Returns", "Raises")] <= [
        1
    ] * 3
    assert max(map(len, doc.splitlines())) <= 110


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_module_says_where_its_formula_stands(loss: type) -> None:
    doc = inspect.getdoc(loss) or ""
    assert f"monai.losses.{loss.__name__}" in doc
    if loss.__name__ not in ("DeepSupervisionLoss", "MaskedLoss"):
        (name,) = re.findall(r":func:`dicekernels\.functional\.(\w+)`", doc)
        own = inspect.signature(getattr(functional, name)).parameters
        assert {*inspect.signature(loss).parameters} <= {*own}


def test_an_option_means_one_thing_wherever_it_is_shared() -> None:
    texts: dict[str, set[str]] = {}
    for thing, _ in DOCUMENTED:
        for name, (_, text) in entries(thing).items():
            texts.setdefault(name, set()).add(text.partition(" Default:")[0])
    for name in ("to_onehot_y", "squared_pred", "jaccard", "soft_label", "alpha", "mean_over_classes"):
        assert len(texts[name]) <= 2, texts[name]  # Tversky's alpha, the unified loss's labels
    assert len(texts["jaccard"]) == len(texts["soft_label"]) == 1
    unused = {name for name in arguments.SHARED if name not in texts}
    assert not unused


def test_a_text_without_argument_and_an_argument_without_text_are_refused() -> None:
    def extra(logits: int) -> None:
        """One.

        Args:
            logitz: no argument of this name.
        """

    def missing(unheard: int = 3) -> None:
        """One."""

    with pytest.raises(TypeError, match=r"extra: explains \['logitz'\], expected its arguments alone"):
        arguments.documented()(extra)
    with pytest.raises(KeyError, match="unheard"):
        arguments.documented()(missing)


def test_without_docstrings_all_imports() -> None:
    code = "import dicekernels; print(dicekernels.DiceLoss.__doc__, dicekernels.DiceLoss.forward.__doc__)"
    done = captured([sys.executable, "-OO", "-c", code], cwd=ROOT)
    assert done.stdout.split() == ["None", "None"], done.stderr


REDUCTION = {"mean", "sum", "none"}
TYPED = {
    "reduction": REDUCTION,
    "w_type": {"square", "simple", "uniform"},
    "weighting_mode": {"default", "GDL"},
    "weight_mode": {"same", "exp", "two"},
    "activation": {"softmax", "sigmoid"},
    "overlap": {"product", "min", "squared", "voxel_squared"},
    "voxel_term": {"ce", "bce", "focal_sigmoid", "focal_softmax"},
    "mask_mode": {"weight", "product"},
}


def words(hint: object) -> set[str]:
    """The strings of a Literal, also within a union."""
    found: set[str] = set()
    for part in typing.get_args(hint):
        found |= {part} if isinstance(part, str) else words(part)
    return found


def test_options_of_a_few_words_are_typed_as_those() -> None:
    seen = set()
    for _, function in DOCUMENTED:
        hints = typing.get_type_hints(inspect.unwrap(function))
        for name in hints.keys() & TYPED:
            # The cross entropy has no map.
            ce = name == "reduction" and "lambda_ce" in hints
            assert words(hints[name]) == TYPED[name] - ({"none"} if ce else set()), (function, name)
            seen.add(name)
    assert seen == {*TYPED}


@pytest.mark.slow
def test_a_type_checker_refuses_another_word(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "use.py"
    file.write_text(
        "from dicekernels import DiceCELoss, GeneralizedDiceLoss, functional, region_sums\n"
        'DiceCELoss(reduction="sum")\n'
        'DiceCELoss(reduction="none")\n'
        'GeneralizedDiceLoss(w_type="cubic")\n'
        "region_sums(1, 2)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file=", f"--cache-dir={tmp_path}", str(file)]
    done = captured(command, cwd=ROOT)
    errors = sorted(
        {
            int(line.split(":")[1])
            for line in done.stdout.splitlines()
            if "error" in line and file.name in line
        }
    )
    assert errors == [3, 4, 5], done.stdout + done.stderr
