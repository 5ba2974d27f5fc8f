"""The known schedules: each function writes one down for any number of ranks and microbatches."""

from __future__ import annotations

from collections.abc import Iterable

from packlight.cluster.instructions import Instruction, PipelineSchedule, Work
from packlight.errors import OptionError

_F, _B, _I, _W, _R, _U = (
    Work.FORWARD, Work.BACKWARD, Work.INPUT, Work.WEIGHT, Work.RECOMPUTE, Work.UPDATE,
)


def gpipe(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Return all forwards, then all backwards (Huang et al. 2019): everything is in flight."""
    _check_sizes(num_ranks, num_microbatches)
    return _on_own_ranks("gpipe", num_microbatches, [
        [Instruction(work, rank, m) for work in (_F, _B) for m in range(num_microbatches)]
        for rank in range(num_ranks)
    ])


def one_f_one_b(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Return one forward, one backward in turn (PipeDream-flush, Narayanan et al. 2021).

    The same time as GPipe with at most `num_ranks - rank` microbatches in flight.
    """
    _check_sizes(num_ranks, num_microbatches)
    return _on_own_ranks("1f1b", num_microbatches, [
        _alternating(rank, num_ranks - rank, range(num_microbatches))
        for rank in range(num_ranks)
    ])


def varuna(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Return 1F1B in which recomputation does not wait for the gradient (Athlur et al. 2022).

    A rank that waits for a gradient has brought back what it needs by the time that it comes, so
    recomputation is not part of the bubble. The last stage, whose backward follows its forward at
    once, has nothing to bring back if it keeps what it has.
    """
    schedule = one_f_one_b(num_ranks, num_microbatches)
    return _on_own_ranks("varuna", num_microbatches, [
        [each for i in instructions for each in _recomputed_first(i, num_ranks - 1)]
        for instructions in schedule.ranks
    ])


def interleaved(num_ranks: int, num_microbatches: int, chunks: int) -> PipelineSchedule:
    """Return 1F1B over `chunks` stages on each rank, in turn (Narayanan et al. 2021, 2.2).

    Stage `c * num_ranks + rank` is on `rank`. The bubble shrinks by the number of chunks.

    Raises:
        OptionError: the number of microbatches is no multiple of that of ranks.
    """
    _check_sizes(num_ranks, num_microbatches)
    if num_microbatches % num_ranks:
        up = num_microbatches + num_ranks - num_microbatches % num_ranks
        raise OptionError(
            f"{num_microbatches} microbatches cannot be interleaved on {num_ranks} ranks\n"
            f"hint: a multiple of {num_ranks}, such as {up}; or one chunk on each rank"
        )
    group = num_ranks * chunks
    total = num_microbatches * chunks

    def at(k: int, *, backward: bool) -> tuple[int, int]:
        """Return (chunk, microbatch) of the k-th forward or backward of a rank."""
        chunk = k % group // num_ranks
        microbatch = k // group * num_ranks + k % num_ranks
        return (chunks - 1 - chunk if backward else chunk), microbatch

    ranks = []
    for rank in range(num_ranks):
        warm_up = min(total, 2 * (num_ranks - rank - 1) + (chunks - 1) * num_ranks)
        order = [(_F, k) for k in range(warm_up)]
        for k in range(total - warm_up):
            order += [(_F, k + warm_up), (_B, k)]
        order += [(_B, k) for k in range(total - warm_up, total)]
        instructions = []
        for work, k in order:
            chunk, microbatch = at(k, backward=work is _B)
            instructions.append(Instruction(work, chunk * num_ranks + rank, microbatch))
        ranks.append(tuple(instructions))
    return PipelineSchedule(
        f"interleaved-{chunks}", tuple(s % num_ranks for s in range(group)), num_microbatches,
        tuple(ranks),
    )


def zero_bubble_h1(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Return 1F1B with the backward in halves (ZB-H1, Qi et al. 2024, arXiv 2401.10241).

    Gradients of weights fill what would be bubble: on rank r they lag r microbatches behind, so no
    rank has more than `num_ranks` microbatches in flight, as the first has under 1F1B. With equal
    times of the three parts the bubble is a third of 1F1B's.
    """
    return _zero_bubble("zb-h1", num_ranks, num_microbatches, 1)


def zero_bubble_h2(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Return the same with twice the lag, and `2 * num_ranks - 1` in flight (ZB-H2, ibid.).

    With equal times of the three parts and many microbatches no rank waits between its first
    instruction and its last one.
    """
    return _zero_bubble("zb-h2", num_ranks, num_microbatches, 2)


def _zero_bubble(
    name: str, num_ranks: int, num_microbatches: int, lag: int
) -> PipelineSchedule:
    """Return 1F1B in halves, on rank r the second ones `lag * r` microbatches behind."""
    _check_sizes(num_ranks, num_microbatches)
    ranks = []
    for rank in range(num_ranks):
        ahead = min(lag * (num_ranks - rank) - lag + 1, num_microbatches)
        behind = lag * rank
        instructions = [Instruction(_F, rank, m) for m in range(ahead)]
        for m in range(num_microbatches):
            instructions.append(Instruction(_I, rank, m))
            if m >= behind:
                instructions.append(Instruction(_W, rank, m - behind))
            if m + ahead < num_microbatches:
                instructions.append(Instruction(_F, rank, m + ahead))
        left = range(max(0, num_microbatches - behind), num_microbatches)
        instructions += [Instruction(_W, rank, m) for m in left]
        ranks.append(instructions)
    return _on_own_ranks(name, num_microbatches, ranks)


def bidirectional(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Return two pipelines through the same ranks, one from each end (as DualPipe).

    Each rank has a stage of either way, and so twice the parameters; one way's microbatches fill
    the other's bubble, and gradients of weights what is left. A rank takes what is ready: gradients
    of inputs first, then forwards, while no more than `num_ranks + 1` microbatches are in flight.
    (DualPipe, DeepSeek-AI 2024, arXiv 2412.19437, besides runs a forward and a backward of
    different ways at once, to hide their messages.)

    Args:
        num_ranks: of which each is on both ways.
        num_microbatches: on each way.
    """
    _check_sizes(num_ranks, num_microbatches)
    place = (*range(num_ranks), *reversed(range(num_ranks)))
    own = [(rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks)]
    # How many microbatches of each stage have run each part, and when the latest ended.
    done = {work: [0] * len(place) for work in (_F, _I, _W)}
    seen = {work: [0] * len(place) for work in (_F, _I)}
    ranks: list[list[Instruction]] = [[] for _ in range(num_ranks)]

    def ready(work: Work, stage: int) -> bool:
        position, microbatch = stage % num_ranks, done[work][stage]
        if microbatch == num_microbatches:
            return False
        if work is _F:
            in_flight = microbatch - done[_I][stage]
            held = sum(done[_F][s] - done[_W][s] for s in own[place[stage]])
            room = in_flight < num_ranks - position and held <= num_ranks
            return room and (position == 0 or seen[_F][stage - 1] > microbatch)
        if work is _I:
            made = done[_F][stage] > microbatch
            return made and (position == num_ranks - 1 or seen[_I][stage + 1] > microbatch)
        return done[_I][stage] > microbatch

    while any(count < num_microbatches for count in done[_W]):
        for rank in range(num_ranks):
            choices = [
                (order, done[work][stage], Instruction(work, stage, done[work][stage]))
                for order, work in enumerate((_I, _F, _W))
                for stage in own[rank] if ready(work, stage)
            ]
            if choices:
                _, _, instruction = min(choices, key=lambda choice: choice[:2])
                ranks[rank].append(instruction)
                done[instruction.work][instruction.stage] += 1
        seen = {work: list(done[work]) for work in seen}
    return PipelineSchedule(
        "bidirectional", place, num_microbatches, tuple(tuple(each) for each in ranks), 2
    )


def pipedream(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Return 1F1B that never flushes: an update after each backward (Narayanan et al. 2019).

    A rank keeps a version of its parameters for each microbatch in flight (`weight_versions`).
    """
    return pipedream_2bw(num_ranks, num_microbatches, 1, name="pipedream")


def pipedream_2bw(
    num_ranks: int, num_microbatches: int, per_update: int, *, name: str = "pipedream-2bw"
) -> PipelineSchedule:
    """Return 1F1B that never flushes, with an update every `per_update` microbatches.

    With at least as many as there are ranks, two versions of the parameters are enough (Narayanan
    et al. 2021, arXiv 2006.09503).
    """
    _check_sizes(num_ranks, num_microbatches)
    if per_update < 1 or num_microbatches % per_update:
        raise OptionError(
            f"{num_microbatches} microbatches do not end with an update every {per_update}\n"
            f"hint: {num_microbatches - num_microbatches % max(per_update, 1) or per_update} do"
        )
    ranks = []
    for rank in range(num_ranks):
        instructions = []
        for i in _alternating(rank, num_ranks - rank, range(num_microbatches)):
            instructions.append(i)
            if i.work is _B and (i.microbatch + 1) % per_update == 0:
                instructions.append(Instruction(_U, rank, i.microbatch))
        ranks.append(instructions)
    return _on_own_ranks(name, num_microbatches, ranks)


def schedule_of(name: str, num_ranks: int, num_microbatches: int, chunks: int) -> PipelineSchedule:
    """Return the schedule of a name.

    Raises:
        OptionError: there is none, or it does not take these sizes.
    """
    if name == "1f1b" and chunks > 1:
        return interleaved(num_ranks, num_microbatches, chunks)
    known = {
        "gpipe": gpipe, "1f1b": one_f_one_b, "varuna": varuna, "zb-h1": zero_bubble_h1,
        "zb-h2": zero_bubble_h2,
    }
    if name not in known:
        raise OptionError(f"no schedule is called {name!r}\nhint: one of {', '.join(known)}")
    if chunks > 1:
        raise OptionError(f"{name} takes one chunk on each rank\nhint: 1f1b takes {chunks}")
    return known[name](num_ranks, num_microbatches)


def _alternating(stage: int, in_flight: int, microbatches: range) -> list[Instruction]:
    """Return forwards and backwards in turn, with at most `in_flight` between the two."""
    ahead = min(in_flight, len(microbatches))
    instructions = [Instruction(_F, stage, m) for m in microbatches[:ahead]]
    for position, microbatch in enumerate(microbatches):
        instructions.append(Instruction(_B, stage, microbatch))
        if position + ahead < len(microbatches):
            instructions.append(Instruction(_F, stage, microbatches[position + ahead]))
    return instructions


def _recomputed_first(instruction: Instruction, last_stage: int) -> Iterable[Instruction]:
    if instruction.work is _B and instruction.stage < last_stage:
        yield Instruction(_R, instruction.stage, instruction.microbatch)
    yield instruction


def _on_own_ranks(
    name: str, num_microbatches: int, ranks: list[list[Instruction]]
) -> PipelineSchedule:
    """Return a schedule with one stage on each rank."""
    return PipelineSchedule(
        name, tuple(range(len(ranks))), num_microbatches, tuple(tuple(each) for each in ranks)
    )


def _check_sizes(num_ranks: int, num_microbatches: int) -> None:
    if num_ranks < 1 or num_microbatches < 1:
        raise OptionError(
            f"{num_ranks} ranks and {num_microbatches} microbatches make no pipeline\n"
            "hint: both numbers are positive"
        )
