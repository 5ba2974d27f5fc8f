"""Compressors in words, for command lines and settings: "topk:0.001+q2"."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from packlight.comm.compose import Delayed, ErrorFeedback, MomentumCorrection, dgc
from packlight.comm.compressor import Compressor
from packlight.comm.dense import Dense
from packlight.comm.low_rank import GradZip, PowerSGD
from packlight.comm.packing import VALUE_FORMATS
from packlight.comm.quantize import QSGD, Quantize, Sign, Ternary
from packlight.comm.sketch import CountSketch
from packlight.comm.sparse import RandomK, Threshold, TopK
from packlight.errors import OptionError

# name: (makes it of its argument and its other settings, what the argument is; "" for none)
Maker = Callable[..., Compressor]
_KINDS: dict[str, tuple[Maker, str]] = {
    "fp32": (lambda: Dense("fp32"), ""),
    "bf16": (lambda: Dense("bf16"), ""),
    "fp16": (lambda: Dense("fp16"), ""),
    "topk": (lambda a, **s: TopK(float(a), **s), "density"),
    "dgc": (lambda a, **s: dgc(float(a), **s), "density"),
    "randk": (lambda a, **s: RandomK(float(a), **s), "density"),
    "threshold": (lambda a, **s: Threshold(float(a), **s), "threshold"),
    "sketch": (lambda a: CountSketch(float(a), cells=float(a)), "density"),
    "powersgd": (lambda a: PowerSGD(int(a)), "rank"),
    "gradzip": (lambda a: GradZip(int(a)), "rank"),
    "q8": (lambda **s: Quantize(8, **s), ""),
    "q4": (lambda **s: Quantize(4, **s), ""),
    "q2": (lambda **s: Quantize(2, **s), ""),
    "q1": (lambda **s: Quantize(1, **s), ""),
    "qsgd": (lambda a, **s: QSGD(int(a), **s), "bits"),
    "ternary": (lambda **s: Ternary(**s), ""),
    "sign": (lambda: Sign(), ""),
}


def compressor_of(wanted: str | Compressor) -> Compressor:
    """Return a compressor that is given in words: a kind, then what goes with it.

    | kind | | with it | |
    | --- | --- | --- | --- |
    | `fp32`, `bf16`, `fp16` | all elements | `+fp32` .. `+q1` | form of a sparse kind's values |
    | `topk:DENSITY` | the largest | `+warmup:STEPS` | density falls (`topk`, `dgc`) |
    | `dgc:DENSITY` | Deep Gradient Compression | `+stochastic` | at random (`q8`, `q4`, `q2`) |
    | `randk:DENSITY` | random ones | `+ans` | codes entropy-coded |
    | `threshold:T` | those that reach T | `+rescaled` | unbiased (`randk`) |
    | `sketch:DENSITY` | count-sketch | `+momentum:M` | momentum correction |
    | `powersgd:RANK`, `gradzip:RANK` | low rank | `+every:STEPS` | once in so many steps |
    | `q8`, `q4`, `q2`, `q1` | bits, in blocks | `+noef` | no error feedback |
    | `qsgd:BITS`, `ternary`, `sign` | at random; majority | | |

    A biased contraction gets error feedback, unless `+noef` says otherwise; what is made of the
    words is what it prints.

    Args:
        wanted: the words; or a compressor, which is returned as it is.

    Raises:
        OptionError: an unknown word, or words that do not go together.

    >>> compressor_of("topk:0.001+q2")
    ErrorFeedback(inner=TopK(density=0.001, values='q2', warmup_steps=0, first_density=0.25))
    """
    if isinstance(wanted, Compressor):
        return wanted
    if not isinstance(wanted, str):
        raise OptionError(f"{wanted!r} is no compressor, nor one in words")
    head, *others = [word.partition(":") for word in wanted.split("+")]
    maker, argument = _kind(wanted, head[0])
    if bool(head[1]) != bool(argument):
        what = f"needs a {argument}: {head[0]}:..." if argument else "takes no number"
        raise OptionError(f"{wanted!r}: {head[0]} {what}")
    settings: dict[str, object] = {}
    around: dict[str, float] = {}
    for name, _, value in others:
        if name in VALUE_FORMATS and head[0] in ("topk", "dgc", "randk", "threshold"):
            settings["values"] = name
        elif name in ("stochastic", "rescaled"):
            settings[name] = True
        elif name == "ans":
            settings["entropy"] = True
        elif name == "warmup":
            settings["warmup_steps"] = int(_number(wanted, name, value))
        elif name in ("momentum", "every"):
            around[name] = _number(wanted, name, value)
        elif name == "noef":
            around[name] = 1.0
        else:
            raise OptionError(f"{wanted!r}: {name!r} is no word that goes with {head[0]}")
    try:
        kind = maker(head[2], **settings) if argument else maker(**settings)
    except TypeError as error:
        raise OptionError(f"{wanted!r}: {', '.join(settings)} do not go with {head[0]}") from error
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{wanted!r}: {head[2]!r} is no {argument}") from error
    return _composed(kind, around)


def _composed(kind: Compressor, around: dict[str, float]) -> Compressor:
    is_whole = isinstance(kind, (Dense, ErrorFeedback, MomentumCorrection))
    if kind.is_contraction and not is_whole and "noef" not in around:
        kind = ErrorFeedback(kind)
    if "momentum" in around:
        kind = MomentumCorrection(kind, around["momentum"])
    if "every" in around:
        kind = Delayed(kind, int(around["every"]))
    return kind


def _kind(wanted: str, name: str) -> tuple[Maker, str]:
    if name not in _KINDS:
        near = get_close_matches(name, _KINDS, 1)
        raise OptionError(
            f"{wanted!r}: unknown compressor {name!r}; known: {', '.join(_KINDS)}"
            + (f"\nhint: did you mean {near[0]!r}?" if near else "")
        )
    return _KINDS[name]


def _number(wanted: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise OptionError(f"{wanted!r}: {name} needs a number, {name}:...") from error
