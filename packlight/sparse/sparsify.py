"""`sparsify`: a model's layers replaced by sparse ones, in place; and the way back."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from packlight.errors import OptionError, SparsityError
from packlight.sparse.cpu import FLOATS
from packlight.sparse.growth import GuidedExploration, RigL
from packlight.sparse.layers import LAYERS, SparseLayer
from packlight.sparse.method import Method, Place, Run
from packlight.sparse.methods import DSR, SET, DeepR, GradualPruning, Static, Thin
from packlight.sparse.sparsity import Sparsity, refuse_ranks
from packlight.sparse.weight import SparseWeight

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (DSR, SET, DeepR, RigL, GuidedExploration, Static, GradualPruning, Thin)
}


def sparsify(
    model: nn.Module,
    density: float = 0.2,
    method: str | Method = "dsr",
    exclude: Iterable[str] = (),
    *,
    seed: int = 0,
) -> Sparsity:
    """Replace a model's layers by sparse ones, in place; return what trains them.

        sparsity = packlight.sparsify(model, density=0.1, method="rigl")
        optimizer = torch.optim.AdamW(model.parameters())
        sparsity.attach(optimizer)

    Then train as before, with `packlight.fit` or a loop of your own: patterns change after steps of
    the optimizer. Weights of `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` and `nn.Embedding` (not of
    classes made from them) become values and an index; values, gradients and optimizer state exist
    at nonzeros only. Biases and everything else stay dense. Values start as they are in the model.

    Args:
        model: on the CPU.
        density: share of the elements of all these weights together that is stored, in (0, 1].
        method: a name ("dsr", "set", "deepr", "rigl", "gse", "static", "pruning", "thin") or a
            `Method` with settings of your own.
        exclude: names of layers, or of modules that contain them, that stay dense.
        seed: of random places.

    Raises:
        SparsityError: nothing to make sparse, a layer too small for its share, a model that is
            sparse already, several ranks.
        OptionError: an unknown method or name, a density out of its range.

    Memory: one dense weight at a time is there beside its values.

    >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> sparsity = sparsify(model, density=0.2, method="set", exclude=["2"])
    >>> model[0].weight.num_nonzeros, sparsity.density
    (1000, 0.2)
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise OptionError(f"density={density!r}; it must be above 0 and at most 1, such as 0.1")
    method = _chosen_method(method)
    refuse_ranks()
    layers, left = _layers_of(model, list(exclude))
    # Layers that share a weight get one sparse weight.
    owners: dict[int, list[str]] = {}
    for name, layer in layers.items():
        owners.setdefault(id(layer.weight), []).append(name)
    places = [
        Place(names[0], layers[names[0]].weight.shape, type(layers[names[0]]) is nn.Embedding)  # type: ignore[arg-type]
        for names in owners.values()
    ]
    run = Run(numbers={"density": float(density)})
    run.generator.manual_seed(seed)
    starts = method.start(places, density, run.generator)
    _refuse_small_layers(places, starts, density)
    weights: dict[str, SparseWeight] = {}
    for names, start in zip(owners.values(), starts, strict=True):
        weight = SparseWeight.of_dense(layers[names[0]].weight, start)  # type: ignore[arg-type]
        weight.name = f"{names[0]}.weight"
        weights[weight.name] = weight
        for name in names:
            layer = layers.pop(name)
            _replace(model, name, LAYERS[type(layer)].of_dense(layer, weight))
    method.set_up(list(weights.values()), run)
    return Sparsity(method, weights, run, left)


def _chosen_method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(
            f"unknown method {method!r}\nhint: {meant}known are {', '.join(METHODS)}, or an "
            "object of a class made from packlight.sparse.Method"
        )
    return METHODS[method]()


def _layers_of(
    model: nn.Module, exclude: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers to be made sparse, and those that stay dense with the reason."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in exclude:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise OptionError(
                f"exclude={name!r} is no module of the model"
                + (f"\nhint: did you mean {near[0]!r}?" if near else "")
            )
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLayer):
            raise SparsityError(
                f"{name!r} is sparse already\nhint: sparsify a dense model once; "
                "packlight.sparse.to_dense(model) makes one"
            )
        if any(name == other or name.startswith(other + ".") for other in exclude):
            continue
        why = _why_dense(module)
        if why is None:
            layers[name] = module
        elif why:
            left[name] = why
    if not layers:
        raise SparsityError(
            "the model has no layer to be made sparse: nn.Linear, nn.Conv1d, nn.Conv2d and "
            "nn.Embedding can be, if they are not excluded"
        )
    return layers, left


def _why_dense(module: nn.Module) -> str | None:
    """Return None for a layer that can be sparse, "" for what is none, else the reason."""
    if isinstance(module, tuple(LAYERS)) and nn.utils.parametrize.is_parametrized(module):
        return "its weight is computed from others (parametrized)"
    if type(module) not in LAYERS:
        is_like_one = isinstance(module, tuple(LAYERS))
        return f"{type(module).__name__} is a class of its own" if is_like_one else ""
    weight: Any = module.weight
    if weight.device.type != "cpu":
        raise SparsityError(
            f"a weight on {weight.device}; sparse products run on the CPU\nhint: move the model "
            "there, or keep it dense"
        )
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "max_norm= and sparse= of nn.Embedding need the dense weight"
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        return "scale_grad_by_freq= of nn.Embedding needs the dense weight"
    return None


def _refuse_small_layers(
    places: Sequence[Place], starts: Sequence[torch.Tensor], density: float
) -> None:
    for place, start in zip(places, starts, strict=True):
        if not len(start):
            raise SparsityError(
                f"{place.name!r} of shape {tuple(place.shape)} is too small: of "
                f"{place.shape.numel()} elements {density:g} leave none\n"
                f"hint: exclude=[{place.name!r}]"
            )


def _replace(model: nn.Module, name: str, layer: SparseLayer) -> None:
    if not name:
        raise SparsityError(
            "the model is itself the layer, which cannot be replaced in place\n"
            "hint: put it into nn.Sequential(model)"
        )
    model.set_submodule(name, layer)


def to_dense(model: nn.Module) -> nn.Module:
    """Replace sparse layers by PyTorch's dense ones with the same weights, in place; return it.

    Layers that share a sparse weight share the dense one. Optimizers have to be made anew.

    >>> model = nn.Sequential(nn.Linear(20, 10))
    >>> _ = sparsify(model, density=0.5)
    >>> int((to_dense(model)[0].weight != 0).sum())
    100
    """
    dense_of: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SparseLayer):
            dense = module.to_dense()
            shared = dense_of.setdefault(id(module.weight), dense.weight)  # type: ignore[arg-type]
            dense.weight = shared
            model.set_submodule(name, dense)
    return model


