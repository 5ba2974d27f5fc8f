"""Which calls lie between others, against paths followed one step at a time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import fx

from packlight.moves.chunk.span import Span


def random_graph(seed: int, num_nodes: int = 24) -> list[fx.Node]:
    """Return calls that each read one or two of the calls a little before them."""
    draw = random.Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(num_nodes):
        nodes.append(graph.call_function(torch.add, tuple(draw.choices(nodes[-5:], k=2))))
    return nodes


def reached(node: fx.Node, within: set[fx.Node]) -> set[fx.Node]:
    """Return all that can be reached from a node through nodes of a set."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        new = {u for u in pending.pop().users if u in within} - found
        found |= new
        pending += new
    return found


@pytest.mark.parametrize("seed", range(20))
def test_between_are_the_calls_that_a_source_reaches_and_that_reach_a_member(seed: int) -> None:
    draw = random.Random(1000 + seed)
    nodes = random_graph(seed)
    within = [n for n in nodes if draw.random() < 0.8]
    members = draw.sample(nodes, 4)
    sources = members[:2]
    after = {n: reached(n, set(within)) for n in within}
    expected = [
        n
        for n in within
        if n not in members
        and any(n in after[s] for s in sources if s in after)
        and any(m in after[n] for m in members)
    ]
    assert Span(within).between(members, sources) == expected


def test_some_cases_have_calls_between_and_some_have_none() -> None:
    found = []
    for seed in range(20):
        nodes = random_graph(seed)
        ends = random.Random(seed).sample(nodes, 2)
        found.append(bool(Span(nodes).between(ends, ends)))
    assert any(found) and not all(found)


def test_ordered_keeps_to_the_span() -> None:
    nodes = random_graph(0)
    assert Span(nodes[3:9]).ordered({nodes[5], nodes[1], nodes[4]}) == [nodes[4], nodes[5]]
