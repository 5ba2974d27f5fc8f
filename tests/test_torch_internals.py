"""What Packlight takes from torch's insides is where it was: a test for each, and one for the rest.

A failure here says what a release of torch has moved; failures elsewhere say what it broke.
"""

from __future__ import annotations

import ast
import copy
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from packlight.torch_internals import (
    aot,
    autograd,
    calling,
    calls,
    collectives,
    dispatch,
    dynamo,
    inductor,
    modules,
    optimizers,
    processes,
    storages,
    translator,
)
from packlight.torch_internals.profiler import AllocationLog, is_profiled

PACKAGE = Path(__file__).resolve().parent.parent / "packlight"
LOGGER = logging.getLogger("packlight.test")
# Private in name alone: torch documents them, or has no other name for them in years.
TOLERATED_MODULES = {"torch.utils._pytree", "torch.utils._python_dispatch", "torch._ops"}
TOLERATED_ATTRIBUTES = {
    *("_ops", "OpOverload", "_schema", "_opname", "_overloadname"),  # tested below
    *("_version", "_buffers", "_to_copy"),
    *("_softmax", "_log_softmax", "_unsafe_view"),  # operators' names
    *("_replace", "_exit"),  # named tuples', a forked process's
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: Callable[..., Any], **options: Any) -> Any:
    return torch.compile(function, backend=backend, dynamic=False, **options)


def as_it_is(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    return module.forward


# -- processes


def test_the_store_of_the_default_group_is_at_hand(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        store = processes.default_store()
        assert not store.check(["word"])
        store.set("word", "said")
        assert store.check(["word"]) and store.get("word") == b"said"
    finally:
        torch.distributed.destroy_process_group()


# -- TorchDynamo


def test_functions_and_recurrent_layers_are_traced_through() -> None:
    dynamo.trace_through([logging.Logger.warning])
    cell = nn.LSTM(4, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        LOGGER.warning("in the forward")
        return cell(x)[0].sum()

    x = torch.randn(3, 2, 4)
    assert torch.equal(compiled(loss, as_it_is, fullgraph=True)(x), loss(x))


def test_dynamo_keeps_what_it_compiled_by_the_code_object() -> None:
    calls: list[int] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        calls.append(len(inputs))
        return module.forward

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.ones(3)
    for _ in range(2):
        compiled(double, backend)(x)
    assert len(calls) == 1, "the same code object is compiled once"
    assert torch.equal(compiled(dynamo.with_own_cache(double), backend)(x), x * 2)
    assert len(calls) == 2, "its copy apart from it"


def test_a_backend_is_told_that_a_graph_is_one_of_several_and_why() -> None:
    found: list[Any] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        found.append(translator.graph_break())
        return module.forward

    def whole(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    compiled(whole, backend)(torch.ones(3))
    assert found == [None]
    compiled(broken, backend)(torch.ones(3))
    assert len(found) == 3
    reason, stack = found[1]
    assert "graph_break" in reason
    assert list(stack)[-1].filename == __file__
    assert found[2] is None, "the last piece ends with the function"
    assert translator.graph_break() is None, "nothing is being compiled"


def test_the_returned_tensor_is_told_from_those_that_attributes_get() -> None:
    names: list[tuple[str | None, set[str], list[str]]] = []
    model = nn.Linear(2, 2)

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        (results,) = next(n for n in module.graph.nodes if n.op == "output").args
        names.append((*translator.returned_names(), [r.name for r in results]))
        return module.forward

    def one(x: torch.Tensor) -> torch.Tensor:
        model.seen = x.cos()  # type: ignore[assignment]
        return x.sin()

    def two(x: torch.Tensor) -> Any:
        model.seen = x.tan()  # type: ignore[assignment]
        return x.sin(), {"deep": [x.cos(), "text"]}

    def other(x: torch.Tensor) -> Any:
        return {"loss": x.sin()}

    for function in (one, two, other):
        compiled(function, backend)(torch.ones(2))
    (first, beside, results), (of_pair, deep, all_three), (nothing, _, _) = names
    assert first in results and len(results) == 2 and "sin" in str(first) and beside == set()
    assert "sin" in str(of_pair) and len(all_three) == 3
    assert len(deep) == 1 and "cos" in deep.pop()
    assert nothing is None


def test_a_function_is_traced_anew_as_often_as_is_said() -> None:
    num_traces = 0

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        nonlocal num_traces
        num_traces += 1
        return module.forward

    def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    function = compiled(dynamo.with_own_cache(scaled), backend)
    with dynamo.many_entries(12):
        for factor in [*range(12), 3, 4]:
            assert float(function(torch.ones(()), float(factor))) == factor
    assert num_traces == 12


def test_gradients_inside_a_traced_function_are_eagers() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def penalty(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((weight * x.square()).sum(), x, create_graph=True)
        return gradient.square().sum()

    def backward(x: torch.Tensor) -> torch.Tensor:
        loss = (weight * x).sum()
        loss.backward(retain_graph=True)
        return loss

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        return module.forward

    with dynamo.gradients_inside():
        result = compiled(penalty, backend, fullgraph=True)(torch.ones(2))
        assert torch.equal(result, penalty(torch.ones(2)))
        untraceable = dynamo.dynamo_errors()[1]
        with pytest.raises(untraceable, match=r"Tensor\.backward\(\)"):
            compiled(backward, backend, fullgraph=True)(torch.ones(2))
    with pytest.raises(untraceable, match=r"autograd\.grad"):
        compiled(penalty, backend, fullgraph=True)(torch.ones(3))
    assert weight.grad is None


def test_sizes_become_symbols_and_their_expressions_numbers() -> None:
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        def partition(joint: fx.GraphModule, num_forward_outputs: int) -> Any:
            graphs.append((joint, list(inputs)))
            raise ValueError("seen")

        with aot.numbers_stay_numbers():
            aot.aot_compiler(lambda m, i: m.forward, partition)(module, inputs)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return (x.T.reshape(-1) / x.shape[1] ** 0.5).sum()

    x = torch.ones(3, 5, requires_grad=True)
    marks = dict(x.__dict__)
    with dynamo.marked_dynamic([(x, [1])]), pytest.raises(Exception, match="seen"):
        compiled(scaled, backend, fullgraph=True)(x)
    assert x.__dict__ == marks
    ((joint, inputs),) = graphs
    (symbol,) = (i for i in inputs if isinstance(i, torch.SymInt))
    number = dynamo.with_numbers([(symbol, 7)])
    values = {node.name: node.meta.get("val") for node in joint.graph.nodes}
    flat = next(v for n, v in values.items() if n.startswith(("view", "_unsafe_view", "clone")))
    assert [number(size) for size in flat.shape] in ([21], [7, 3])
    assert number(4) == 4
    divisions = [n for n in joint.graph.nodes if n.target is torch.ops.aten.div.Tensor]
    assert all(isinstance(n.args[1].meta["val"], torch.SymFloat) for n in divisions) and divisions


def test_hooks_of_a_parameter_are_those_that_autograd_calls() -> None:
    seen: list[torch.Tensor] = []

    def made() -> nn.Parameter:
        parameter = nn.Parameter(torch.ones(2))
        parameter.register_hook(lambda g: g * 3)
        parameter.register_hook(lambda g: None)
        parameter.register_hook(lambda g: g + 1)
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        return parameter

    theirs, ours = made(), made()
    (theirs * torch.tensor([2.0, 5.0])).sum().backward()
    assert autograd.has_gradient_hooks(ours) and not autograd.has_gradient_hooks(torch.ones(1))
    ours.grad = autograd.through_hooks(ours, torch.tensor([2.0, 5.0]))
    autograd.after_accumulation(ours)
    assert torch.equal(theirs.grad, ours.grad) and torch.equal(*seen)
def test_dynamo_guards_hooks_and_aliases_where_it_is_told_to() -> None:
    dynamo.keep_eagers_meaning()
    calls: list[Any] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        calls.append(module)
        return module.forward

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    run, x = compiled(lambda x: model(x), backend), torch.ones(2, 3)
    run(x), run(x)
    assert len(calls) == 1
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.equal(run(x), model(x)) and len(calls) == 2
    model[1].weight = model[0].weight
    run(x)
    assert len(calls) == 3


def test_numpys_noise_is_numpys() -> None:
    dynamo.keep_eagers_meaning()
    run = compiled(lambda x: x + torch.from_numpy(np.random.rand(3)), as_it_is)
    np.random.seed(0)
    noisy = run(torch.zeros(3))
    np.random.seed(0)
    assert noisy.tolist() == np.random.rand(3).tolist()


def test_a_backend_adds_a_question_that_every_call_asks() -> None:
    answers, known = [True], []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        known.append(translator.traced_call())
        dynamo.guard_on(lambda: lambda: answers[0])
        return module.forward

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def outer(named: torch.Tensor) -> torch.Tensor:
        return inner(named) + random.randint(1, 3)

    run, x = compiled(outer, backend), torch.ones(3)
    run(x), run(x)
    assert len(known) == 1
    call = known[0]
    assert call is not None and call.arguments["named"] is x and call.arguments["inner"] is inner
    assert {outer.__code__, inner.__code__} <= call.codes
    assert call.random_functions == [random.randint]
    assert translator.traced_call() is None
    answers[0] = False
    with pytest.raises(AssertionError):  # the new trace does not hold either: dynamo says so
        run(x)


def test_hooks_of_all_modules_have_numbers() -> None:
    from torch.nn.modules import module as all_modules

    before = modules.hooks_of_all_modules()
    handles = [
        all_modules.register_module_forward_pre_hook(lambda module, inputs: None),
        all_modules.register_module_forward_hook(lambda module, inputs, output: None),
        all_modules.register_module_full_backward_pre_hook(lambda module, outputs: None),
        all_modules.register_module_full_backward_hook(lambda module, inputs, outputs: None),
    ]
    now = modules.hooks_of_all_modules()
    for handle in handles:
        handle.remove()
    assert len(now) == len(before) + len(handles) == len(set(now))
    assert modules.hooks_of_all_modules() == before


def test_errors_of_a_backend_and_of_a_trace_say_what_is_read_from_them() -> None:
    around_backend, untraceable = dynamo.dynamo_errors()
    mine = ValueError("mine")

    def failing(module: fx.GraphModule, inputs: Any) -> Any:
        raise mine

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def branching(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x

    def raising(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("absent")

    with pytest.raises(around_backend) as failed:
        compiled(plain, failing)(torch.ones(2))
    assert failed.value.inner_exception is mine  # type: ignore[attr-defined]
    with pytest.raises(untraceable, match=r"(?m)^ *Explanation: (.*\n)*? *Hint: ") as broken:
        compiled(branching, as_it_is, fullgraph=True)(torch.ones(2))
    assert list(broken.value.real_stack)[-1].filename == __file__  # type: ignore[attr-defined]
    with pytest.raises(untraceable, match=r"(?m)(got|raised exception) KeyError\(.*\)$"):
        compiled(raising, as_it_is, fullgraph=True)(torch.ones(2))


# -- AOTAutograd


class Normed(nn.Module):
    """Batch norm, whose statistics the forward changes, under a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(x)
        return self.head(y).sum(), y.detach()


class Caught(Exception):
    """Ends a compilation in `partition`."""


def caught_joint(model: nn.Module, *inputs: torch.Tensor) -> tuple[fx.GraphModule, int]:
    caught: list[tuple[fx.GraphModule, int]] = []

    def partition(joint: fx.GraphModule, num_forward_outputs: int) -> Any:
        caught.append((joint, num_forward_outputs))
        raise Caught

    def backend(module: fx.GraphModule, arguments: Any) -> Any:
        return aot.aot_compiler(as_it_is, partition)(module, arguments)

    around_backend, _ = dynamo.dynamo_errors()
    with pytest.raises(around_backend) as raised:
        compiled(model, backend, fullgraph=True)(*inputs)
    assert isinstance(raised.value.inner_exception, Caught)  # type: ignore[attr-defined]
    return caught[0]


def test_a_partition_gets_a_joint_graph_of_primals_then_tangents() -> None:
    model = Normed()
    joint, num_forward_outputs = caught_joint(model, torch.randn(8, 4))
    placeholders = joint.graph.find_nodes(op="placeholder")
    tangents = [n for n in placeholders if aot.is_tangent(n)]
    assert placeholders[-1:] == tangents, "one loss needs a gradient, and comes last"
    num_inputs = sum(1 for _ in (*model.parameters(), *model.buffers())) + 1
    assert len(placeholders) == num_inputs + 1
    results = joint.graph.find_nodes(op="output")[0].args[0]
    assert len(results) == num_forward_outputs + num_inputs
    gradients = [
        (primal.meta["val"].shape, gradient.meta["val"].shape)
        for primal, gradient in zip(placeholders, results[num_forward_outputs:], strict=False)
        if gradient is not None
    ]
    assert [mine for _, mine in gradients] == [p.shape for p in model.parameters()]
    assert all(primal == mine for primal, mine in gradients)


def test_without_a_backward_no_partition_is_asked_for() -> None:
    def partition(joint: fx.GraphModule, num_forward_outputs: int) -> Any:
        raise AssertionError

    def backend(module: fx.GraphModule, arguments: Any) -> Any:
        return aot.aot_compiler(as_it_is, partition)(module, arguments)

    x = torch.ones(3)
    assert torch.equal(compiled(torch.cos, backend)(x), x.cos())


def test_results_say_whose_new_values_they_are_and_which_the_function_returns() -> None:
    joint, num_forward_outputs = caught_joint(Normed(), torch.randn(8, 4))
    placeholders = joint.graph.find_nodes(op="placeholder")
    output = joint.graph.find_nodes(op="output")[0]
    described = list(aot.descriptions(output))[:num_forward_outputs]
    results = output.args[0][:num_forward_outputs]
    mutated = [aot.mutated_input(d) for d in described]
    by_description = {aot.descriptions(p): p for p in placeholders}
    changed = [by_description[d].meta["val"] for d in mutated if d is not None]
    assert [tuple(v.shape) for v in changed] == [(), (4,), (4,)], "counter, mean, variance"
    places = [aot.place_returned(d) for d in described]
    assert [tuple(r.meta["val"].shape) for p in (0, 1) for r in [results[places.index(p)]]] == [
        (), (8, 4),
    ]
    assert all((m is None) != (p is None) for m, p in zip(mutated, places, strict=True))


def test_saved_values_are_described_as_aotautograd_describes_its_own() -> None:
    seen: list[Any] = []

    def compile_one(module: fx.GraphModule, inputs: Any) -> Any:
        seen.append(aot.descriptions(module.graph.find_nodes(op="output")[0]))
        return module.forward

    from functorch.compile import default_partition

    def partition(joint: fx.GraphModule, num_forward_outputs: int) -> Any:
        inputs = [n.meta["val"] for n in joint.graph.find_nodes(op="placeholder")]
        return default_partition(joint, inputs, num_fwd_outputs=num_forward_outputs)

    def backend(module: fx.GraphModule, arguments: Any) -> Any:
        return aot.aot_compiler(compile_one, partition)(module, arguments)

    x = torch.ones(3, requires_grad=True)
    compiled(lambda t: (t.sin() * t).sum(), backend)(x)
    saved = [d for d in seen[0] if "SavedForBackwards" in type(d).__name__]
    assert saved and saved == aot.saved_descriptions(len(saved))


def test_nodes_say_their_modules_their_part_and_which_gradient_is_whose() -> None:
    joint, _ = caught_joint(Normed(), torch.randn(8, 4))
    norm, backward = (n for n in joint.graph.nodes if "batch_norm" in str(n.target))
    for node in (norm, backward):
        ((path, kind),) = aot.modules_around(node)
        assert path == "L['self'].norm" and kind is nn.BatchNorm1d
    assert aot.sequence_number(norm) == aot.sequence_number(backward) is not None
    assert aot.is_traced_in_backward(backward)
    assert not aot.is_traced_in_backward(norm)


# -- FX


def test_boxed_code_takes_a_list_and_empties_it() -> None:
    module = fx.symbolic_trace(lambda a, b: a + b)
    calling.box_arguments(module.graph)
    module.recompile()
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    plain = fx.Graph()
    plain.output(plain.graph_copy(module.graph, {}))
    calling.copy_calling_convention(module.graph, plain)
    for code in (module, copied, fx.GraphModule(module, plain)):
        arguments = [torch.ones(2), torch.ones(2)]
        assert torch.equal(code.forward(arguments), torch.full((2,), 2.0))
        assert arguments == []


def test_a_boxed_compiled_function_is_given_a_list() -> None:
    given: list[Any] = []

    def compile_one(module: fx.GraphModule, inputs: Any) -> Any:
        calling.box_arguments(module.graph)
        module.recompile()

        def run(arguments: list[Any]) -> Any:
            given.append(type(arguments))
            return module.forward(arguments)

        return calling.boxed(run)

    def backend(module: fx.GraphModule, arguments: Any) -> Any:
        return aot.aot_compiler(compile_one, lambda *_: None)(module, arguments)  # type: ignore

    with torch.no_grad():
        compiled(torch.cos, backend)(torch.ones(3))
    assert given == [list]


# -- tracing modes and dispatch


def test_tensors_made_outside_of_a_trace_are_real_and_measured() -> None:
    found: list[Any] = []

    def partition(joint: fx.GraphModule, num_forward_outputs: int) -> Any:
        found.append(torch.ones(2))
        with dispatch.outside_of_tracing():
            found.append(torch.ones(2))
        found.append(joint.graph.find_nodes(op="placeholder")[0].meta["val"])
        raise Caught

    def backend(module: fx.GraphModule, arguments: Any) -> Any:
        return aot.aot_compiler(as_it_is, partition)(module, arguments)

    with pytest.raises(dynamo.dynamo_errors()[0]):
        compiled(lambda t: t.sin().sum(), backend)(torch.ones(2, requires_grad=True))
    _, real, traced = found
    assert not dispatch.is_fake(real) and type(real) is torch.Tensor
    assert real.data_ptr() and real.tolist() == [1.0, 1.0]
    assert dispatch.is_fake(traced) and isinstance(traced.fake_mode, dispatch.FakeTensorMode)


def test_autocast_can_be_left_whichever_device_it_is_on_for() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with dispatch.without_autocast():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_an_operator_with_a_decomposition_for_tracing_is_traced_as_it_is() -> None:
    def operators() -> set[str]:
        names: set[str] = set()

        def partition(joint: fx.GraphModule, num_forward_outputs: int) -> Any:
            names.update(str(n.target) for n in joint.graph.nodes)
            raise Caught

        def backend(module: fx.GraphModule, arguments: Any) -> Any:
            return aot.aot_compiler(as_it_is, partition)(module, arguments)

        torch._dynamo.reset()
        function = compiled(lambda t: F.interpolate(t, scale_factor=2.0).sum(), backend)
        with pytest.raises(dynamo.dynamo_errors()[0]):
            function(torch.ones(1, 1, 2, 2, requires_grad=True))
        return names

    packet = torch.ops.aten.upsample_nearest2d
    overloads = [getattr(packet, name) for name in packet.overloads()]
    decomposed = operators()
    assert not any("upsample" in name for name in decomposed), "else there is nothing to undo"
    with dispatch.undecomposed(overloads):
        assert any("aten.upsample_nearest2d" in name for name in operators())
    assert operators() == decomposed


def test_a_backward_can_ask_whether_its_graph_is_retained() -> None:
    retained: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: retained.append(autograd.is_graph_retained()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert retained == [True, False]


# -- storages


def test_storages_are_told_apart_and_their_viewers_seen() -> None:
    x = torch.ones(4)
    before = storages.num_storage_references(x)
    assert before == storages.num_storage_references(torch.empty(1)), "nobody else looks at it"
    view = x[1:].view(3, 1)
    assert storages.storage_identity(view) == storages.storage_identity(x)
    assert storages.storage_identity(x.clone()) != storages.storage_identity(x)
    assert storages.num_storage_references(x) > before
    del view
    assert storages.num_storage_references(x) == before


def test_a_tensor_can_be_negated_when_it_is_read() -> None:
    x = torch.ones(2)
    lazy = storages.lazily_negated(x)
    assert lazy.is_neg() and storages.storage_identity(lazy) == storages.storage_identity(x)
    assert lazy.tolist() == [-1.0, -1.0]


# -- optimizers and modules


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)


def test_a_step_without_its_wrapper_runs_no_hooks(optimizer: torch.optim.Optimizer) -> None:
    ran: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("pre"))
    optimizer.register_step_post_hook(lambda *_: ran.append("post"))
    assert all(getattr(optimizer, name) for name in optimizers.STEP_HOOKS), "where hooks are kept"
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert ran == ["pre", "post"]
    optimizers.plain_step(type(optimizer))(optimizer)
    assert ran == ["pre", "post"]
    assert parameter.tolist() == [0.0, 0.0], "both steps have stepped"


def test_hooks_after_a_step_are_found_in_order(optimizer: torch.optim.Optimizer) -> None:
    hooks = [lambda *_: None, lambda *_: None]
    for hook in hooks:
        optimizer.register_step_post_hook(hook)
    assert optimizers.step_post_hooks(optimizer) == hooks


def test_hooks_on_all_optimizers_are_seen() -> None:
    assert not optimizers.has_global_step_hooks()
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert optimizers.has_global_step_hooks()
    finally:
        handle.remove()
    assert not optimizers.has_global_step_hooks()


def test_a_schedulers_step_is_told_from_others_and_stays_quiet_when_told(
    optimizer: torch.optim.Optimizer,
) -> None:
    assert not optimizers.is_replaced_step(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer), "else there is nothing to tell"
    assert not optimizers.is_replaced_step(optimizer)
    with pytest.warns(UserWarning, match="before"):
        scheduler.step()
    another = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(another, 1)
    optimizers.mark_stepped(another)
    scheduler.step()  # warnings are errors here
    another.step = lambda: None  # type: ignore[assignment, method-assign, misc]
    assert optimizers.is_replaced_step(another)


def test_what_a_scaler_found_decides_on_its_next_scale() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    for told, scale in ((0.0, 8.0), (1.0, 4.0)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(parameter.sum())
        parameter.grad = torch.ones(2)
        scaler.unscale_(optimizer)
        (found,) = optimizers.overflows(scaler, optimizer).values()
        assert found.item() == 0.0
        found.fill_(told)
        scaler.update()
        assert scaler.get_scale() == scale


def test_functional_collectives_take_what_they_took() -> None:
    names = {
        collectives.ALL_REDUCE: ["input", "reduce_op", "group_name"],
        collectives.ALL_GATHER: ["input", "group_size", "group_name"],
        collectives.REDUCE_SCATTER: ["input", "reduce_op", "group_size", "group_name"],
        collectives.WAIT: ["tensor"],
    }
    for operator, expected in names.items():
        assert [argument.name for argument in operator._schema.arguments] == expected
        assert collectives.is_exchange(operator)
    assert not collectives.is_exchange(torch.ops.aten.add.Tensor)


def test_hooks_on_gradients_are_seen() -> None:
    def hooked(register: str, function: Callable[..., None]) -> bool:
        parameter = nn.Parameter(torch.ones(2))
        assert not autograd.has_gradient_hooks(parameter)
        getattr(parameter, register)(function)
        return autograd.has_gradient_hooks(parameter)

    assert hooked("register_hook", lambda gradient: None)
    assert hooked("register_post_accumulate_grad_hook", lambda parameter: None)


def test_the_model_inside_a_compiled_one_is_found() -> None:
    model = nn.Linear(2, 2)
    assert modules.uncompiled(model) is model
    assert modules.uncompiled(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]


# -- what tells one traced graph from another, and puts it together again


def test_settings_of_tracing_change_with_functorchs_and_with_modes_of_dispatch() -> None:
    from torch._functorch import config
    from torch.utils._python_dispatch import TorchDispatchMode

    before = aot.tracing_settings()
    assert before == aot.tracing_settings()
    with config.patch(functionalize_rng_ops=not config.functionalize_rng_ops):
        assert aot.tracing_settings() != before
    with TorchDispatchMode():
        assert aot.tracing_settings() != before


def test_dynamo_names_functions_where_it_is_told_not_to() -> None:
    from torch._dynamo import symbolic_convert

    names_functions = symbolic_convert.get_funcname  # type: ignore[attr-defined]
    with dynamo.quick_tracing():
        assert symbolic_convert.get_funcname is not names_functions  # type: ignore[attr-defined]
    assert symbolic_convert.get_funcname is names_functions  # type: ignore[attr-defined]


def test_descriptions_are_made_again_from_their_names_and_fields() -> None:
    described = aot.saved_descriptions(2)[1]
    assert is_dataclass(described)
    content = {f.name: getattr(described, f.name) for f in fields(described)}
    assert aot.description_class(type(described).__name__)(**content) == described


def test_a_fake_tensor_is_made_from_one_without_memory() -> None:
    meta = torch.empty(2, 3, device="meta")
    fake = dispatch.fake_of(dispatch.FakeTensorMode(), meta, torch.device("cpu"))
    assert dispatch.is_fake(fake)
    assert (fake.shape, fake.device.type, fake.dtype) == ((2, 3), "cpu", torch.float32)


# -- the profiler


def test_every_allocation_and_free_is_logged_and_no_call() -> None:
    """Calls may begin in one log and end in the next: neither keeps a record of them."""
    log = AllocationLog()
    with torch.autograd.profiler.record_function("a call of the user's"):
        first = torch.empty(100, dtype=torch.uint8)
        second = torch.empty(3, 7, dtype=torch.uint8)
        del first
        assert is_profiled() and log.stop() == [100, 21, -100] and not is_profiled()
        log = AllocationLog()
    del second
    (torch.ones(2, 2) @ torch.ones(2, 2)).sum()
    sizes = log.stop()
    assert sizes[0] == -21 and sum(sizes) == -21 and len(sizes) == 9


def test_a_log_of_allocations_is_told_of_no_call() -> None:
    log = AllocationLog()
    with torch.autograd.profiler.record_function("a call of the user's"):
        torch.ones(3)
    names = {event.name() for event in torch._C._autograd._disable_profiler().events()}
    assert names == {"[memory]"}
    del log


# -- modules


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_convolutions_padding_and_what_it_makes_with_another_weight(mode: str) -> None:
    layer = nn.Conv2d(2, 3, (3, 5), padding="same", padding_mode=mode, dilation=2)
    assert isinstance(layer, modules.CONVOLUTION) and not isinstance(layer, modules.BATCH_NORM)
    assert isinstance(nn.BatchNorm3d(2), modules.BATCH_NORM)
    x, weight, bias = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 5), torch.randn(3)
    padded = F.pad(x, modules.padding_of(layer), mode="constant" if mode == "zeros" else mode)
    expected = F.conv2d(padded, weight, bias, dilation=2)
    assert torch.allclose(modules.convolved(layer, x, weight, bias), expected, atol=1e-5)


# -- inductor


def test_a_graph_becomes_source_that_runs_by_itself() -> None:
    def write(x: torch.Tensor, out: torch.Tensor) -> tuple[()]:
        written = torch.ops.aten.copy_(out, x * 2 + 1)
        torch.ops.aten.copy_(x, written.relu())  # what was written is read there
        return ()

    assert inductor.compiler_problem(torch.device("cpu")) is None
    with dispatch.FakeTensorMode():
        fakes = [torch.empty(8, 8) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = inductor.compiled_source(write, fakes, rounds_as_eager=True)
        call = inductor.loaded(source, "kernel")
    x, out = torch.randn(8, 8), torch.empty(8, 8)
    expected = x * 2 + 1
    arguments = [x, out]
    call(arguments)
    assert arguments == [] and torch.equal(out, expected) and torch.equal(x, expected.relu())


def test_a_compiler_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    problem = inductor.compiler_problem(torch.device("cpu"))
    assert problem is not None


# -- the rest


def test_an_operators_names_and_arguments_are_read_from_its_schema() -> None:
    add = torch.ops.aten.add.out
    assert isinstance(add, torch._ops.OpOverload)
    assert (add._opname, add._overloadname, add.namespace) == ("add", "out", "aten")
    assert add._schema.name == "aten::add" and add._schema.is_mutable
    arguments = [(a.name, a.is_out, str(a.type)) for a in add._schema.arguments]
    assert arguments == [
        ("self", False, "Tensor"), ("other", False, "Tensor"), ("alpha", False, "number"),
        ("out", True, "Tensor"),
    ]
    assert add._schema.arguments[2].default_value == 1
    assert torch.ops.aten.view.default.is_view and not add.is_view
    assert torch.Tag.pointwise in torch.ops.aten.add.Tensor.tags
    assert torch.Tag.nondeterministic_seeded in torch.ops.aten.bernoulli.default.tags


def test_calls_of_what_is_compiled_are_seen_whatever_dynamo_makes_of_them() -> None:
    seen: list[str] = []

    def backend(module: fx.GraphModule, _: Any) -> Any:
        return module.forward

    def other(module: fx.GraphModule, _: Any) -> Any:
        return module.forward

    @contextmanager
    def around(given: Any) -> Iterator[None]:
        assert given.compiler_fn is backend
        num_before = calls.num_recorded()
        seen.append("begins")
        yield
        is_recorded = calls.num_recorded() > num_before
        seen.append(f"{is_recorded}, {calls.is_failing()}")

    @torch.compiler.disable
    def unseen(x: torch.Tensor) -> torch.Tensor:
        if x.numel() > 1:
            raise KeyError
        return x.sin().cos()

    calls.watch_calls(backend, around)
    x = torch.ones(1, requires_grad=True)
    compiled(unseen, other)(x)
    assert seen == []
    compiled(unseen, backend)(x)
    assert seen == ["begins", "True, False"]
    with pytest.raises(KeyError):
        compiled(unseen, backend)(torch.ones(2))
    assert seen[2:] == ["begins", "False, True"]
    assert not calls.is_compiling_off()
    with torch.compiler.set_stance("force_eager"):
        assert calls.is_compiling_off()


def sources() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent.name != "torch_internals"]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def names_of_our_own() -> set[str]:
    """Private names that Packlight's classes and modules define themselves."""
    own: set[str] = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
    return own


def is_of_torch(module: str) -> bool:
    """Whether an imported name is a private one of torch that nobody should rely upon."""
    parts = module.split(".")
    is_tolerated = any(f"{module}.".startswith(f"{known}.") for known in TOLERATED_MODULES)
    return parts[0] == "torch" and any(map(is_private, parts)) and not is_tolerated


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_other_module_uses_private_names_of_torch(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = [name for node in nodes for name in imported(node) if is_of_torch(name)]
    attributes = [
        ast.unparse(node)
        for node in nodes
        if isinstance(node, ast.Attribute) and is_private(node.attr)
        and node.attr not in names_of_our_own() | TOLERATED_ATTRIBUTES
    ]
    assert modules + attributes == [], "these belong into packlight/torch_internals/"
