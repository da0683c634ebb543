"""What the arguments mean that several losses share, and the decorator that puts it into their docstrings.

A docstring in the source explains what is the loss's own; ``help()`` shows every argument, with type and
default from the signature. Letters: B samples, C channels, K classes of the loss (C, or C - 1 without the
background), ``*S`` the space, p the prediction, g the target.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

_SHARED = """
Args:
    logits: (B, C, *S), one spatial dimension or more, float32, float16, bfloat16 or float64, any strides.
        Raw, or probabilities where no activation is asked for. Integers are copied to float32 (with
        ``softmax`` a NotImplementedError). (B, C) without a space is read as MONAI does.
    target: with ``to_onehot_y`` labels 0 to C - 1, (B, 1, *S) or (B, *S), else values (B, C, *S): one-hot,
        several labels at once, or soft. Of any real dtype, on the device of the logits.
    mask: voxel weights (B, 1, *S) or (1, 1, *S), at least 0, of any real dtype. Every sum is linear in
        them; what a voxel of weight 0 holds changes neither loss nor gradient. None: each voxel counts
        once.
    include_background: False leaves class 0 out of the loss, after the activation: a softmax still runs
        over all channels. Ignored, with a warning, for one channel.
    to_onehot_y: True: the target holds labels and is read as one-hot; fractions are truncated. A label
        outside [0, C) is a LabelRangeError, on a GPU in a later call: there the loss is NaN and its gradient
        zero. False: it has the shape of the logits. Ignored, with a warning, for one channel.
    sigmoid: take the sigmoid of the logits. At most one of the three activations, else ValueError.
    softmax: take the softmax of the logits over dimension 1. Ignored, with a warning, for one channel.
    other_act: an activation of your own: a function of the whole tensor (B, C, *S), else TypeError. It runs
        in PyTorch, which keeps its result for backward.
    squared_pred: True: prediction p and target g squared in the denominator. Wins over ``soft_label``.
    jaccard: True: the Jaccard index (soft IoU) in place of Dice, (2 I + nr) / (2 (P + G - I) + dr), with
        the sums I of p g, P of p and G of g.
    reduction: "mean" or "sum" of the terms, one for each sample and class, or for each class with
        ``batch``; "none": the terms themselves. MONAI's LossReduction is taken too. Else ValueError.
    smooth_nr: nr, added to the numerator of each term.
    smooth_dr: dr, added to the denominator of each term. A class that is neither predicted nor there has
        the loss 1 - nr / dr: 0 with the defaults, NaN if both are 0.
    batch: True: sums run over the batch as well, and there is one term for each class. False: one for each
        sample and class.
    weight: factor of each class: one number, or one for each class (without the background if that is left
        out) as a sequence or tensor. At least 0, finite and of that length, else ValueError. The mean is
        not divided by them. Without effect on a single class.
    soft_label: True: overlap min(p, g) in place of p g. Its loss is smallest at p = g for soft targets too;
        targets of 0 and 1 give the same loss.
    ignore_index: a label that is left out: the voxels that hold it. Of values (B, C, *S), voxels by 1 - g
        of that channel, or, for a number that is no channel, those where every channel is 0. TypeError for
        what is no whole number. None: every voxel counts.
    use_softmax: True: p from a softmax over the classes; False: from a sigmoid of each.
    gamma: exponent of the focal factor (1 - p_t), 0 or more. With 0 it is the cross entropy.
    alpha: balance of the focal term. One number a: factor a where g = 1 and 1 - a where g = 0; with
        ``use_softmax`` 1 - a for the first class and a for the others (without the background it is
        ignored, with a warning). A sequence or tensor: a factor for each class (without the background if
        that is left out, else ValueError), with sigmoids only where g = 1. None: no factor.
    mean_over_classes: of reduction "mean" with ``ignore_index``: True divides by the voxels that count and
        by the classes, as without ``ignore_index``, so that ignored is the same as cropped; False by the
        voxels alone, K times as much, as MONAI's FocalLoss.
    softmax_over_all: with ``use_softmax`` and without background: True takes the softmax over all classes
        and leaves out the background's term; False takes it over the other classes alone, as MONAI's
        FocalLoss: for two classes it is 1 and the loss 0, which a warning says.
"""

# Names of types in the signatures, in full.
ALIASES = {
    "checks.Weight": "float | Sequence[float] | Tensor | None",
    "Alpha": "float | Sequence[float] | Tensor | None",
    "OtherAct": "Callable[[Tensor], Tensor] | None",
    "VolumeWeight": "Callable[[Tensor], Tensor]",
}
SECTIONS = ("Args", "Returns", "Raises", "Warns")
WIDTH = 108

_T = TypeVar("_T", bound=Callable[..., Any])


class Written(NamedTuple):
    """A docstring in its parts.

    Attributes:
        head: what stands before the first section.
        texts: of each argument, one line each.
        sections: the other sections, by name, without their first line.
    """

    head: str
    texts: dict[str, str]
    sections: dict[str, str]

    def after(self, source: Written) -> Written:
        """With the sections of ``source`` that are missing here, and with what is raised there."""
        raised = [part.sections["Raises"] for part in (source, self) if "Raises" in part.sections]
        sections = source.sections | self.sections
        return self._replace(sections=sections | ({"Raises": "\n".join(raised)} if raised else {}))


def written(doc: str) -> Written:
    """The parts of a docstring of Google's style."""
    head: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = head
    for line in inspect.cleandoc(doc).splitlines():
        name = line.removesuffix(":")
        if name != line and name in SECTIONS:
            lines = sections.setdefault(name, [])
        else:
            lines.append(line)
    texts: dict[str, str] = {}
    name = ""
    for line in sections.pop("Args", []):
        if re.match(r"    \S", line):
            name, _, text = line.strip().lstrip("*").partition(": ")
            texts[name] = text
        elif line.strip():
            texts[name] += f" {line.strip()}"
    return Written(
        "\n".join(head).rstrip(),
        texts,
        {name: "\n".join(lines).rstrip() for name, lines in sections.items()},
    )


SHARED = written(_SHARED).texts
# The name that the modules have for it, as MONAI.
SHARED["input"] = SHARED["logits"]
# What the source says of each function that has been documented.
_sources: dict[Callable[..., Any], Written] = {}


def documented(like: Callable[..., Any] | None = None) -> Callable[[_T], _T]:
    """Decorator: completes the docstring of a function, or of a class and its ``forward``.

    The text of an argument is that of the docstring itself, else that of the function ``like``, else the
    shared one. A function and ``forward`` return what ``like`` does, and raise that too.

    Raises:
        KeyError: an argument has no text.
        TypeError: a text has no argument.
    """
    nothing = Written("", {}, {})
    source = nothing if like is None else _sources.get(like, nothing)

    def complete(thing: _T) -> _T:
        if not thing.__doc__:  # python -OO
            return thing
        own = written(thing.__doc__)
        if inspect.isclass(thing):
            thing.__doc__ = _text(thing.__init__, own, source.texts)
            forward = vars(thing)["forward"]
            forward.__doc__ = _text(forward, written(forward.__doc__).after(source), source.texts | own.texts)
        else:
            own = own.after(source)
            thing.__doc__ = _text(thing, own, source.texts)
            _sources[thing] = own._replace(texts=source.texts | own.texts)
        return thing

    return complete


def _text(function: Callable[..., Any], own: Written, texts: dict[str, str]) -> str:
    """The docstring for the arguments of ``function``."""
    known = SHARED | texts | own.texts
    arguments = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    extra = own.texts.keys() - {one.name for one in arguments}
    if extra:
        raise TypeError(f"{function.__qualname__}: explains {sorted(extra)}, expected its arguments alone")
    entries = "\n".join(_entry(one, known[one.name]) for one in arguments)
    sections = {"Args": entries} | own.sections
    parts = [own.head] + [f"{name}:\n{sections[name]}" for name in SECTIONS if sections.get(name)]
    return "\n\n".join(parts)


def _entry(argument: inspect.Parameter, text: str) -> str:
    stars = str(argument).partition(argument.name)[0]
    default = "" if argument.default is argument.empty else f" Default: {argument.default!r}."
    return _filled(f"{stars}{argument.name} ({_type(str(argument.annotation))}): {text}{default}")


@functools.cache
def _type(annotation: str) -> str:
    kind = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace(", ", " | "), annotation)
    for alias, meaning in ALIASES.items():
        kind = re.sub(rf"(?<![\w.]){re.escape(alias)}\b", meaning, kind)
    return " | ".join(dict.fromkeys(kind.split(" | ")))


def _filled(text: str) -> str:
    """Lines of WIDTH; textwrap would take twice the time, at every import."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= WIDTH - 8:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "    " + "\n        ".join(lines)
