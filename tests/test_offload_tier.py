"""Offloaded buffers come back bit for bit, or an error says why; nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from packlight.costs.lane import measure_lane
from packlight.costs.peak import allocator_peak
from packlight.errors import OffloadError
from packlight.memory import DiskTier, HostTier, SlotSpec, Tier, scratch
from packlight.memory import disk as disk_module
from packlight.memory.tier import PIECE_BYTES

CPU = torch.device("cpu")
MANY_PIECES_BYTES = 3 * PIECE_BYTES + 777


def disk_tier(directory: Path, slots: list[SlotSpec], **options: Any) -> DiskTier:
    return DiskTier(directory, slots, allow_memory=True, **options)


def make_tier(kind: str, directory: Path, slots: list[SlotSpec]) -> Tier:
    return HostTier(slots) if kind == "host" else disk_tier(directory, slots)


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "packlight-offload"]


def open_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass  # the listing's own descriptor
    found = [path for path in found if path.startswith("/")]
    return [path for path in found if not path.startswith(("/proc", "/dev"))]


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test did: no thread, no descriptor, no file."""
    before = sorted(open_files())
    yield
    gc.collect()
    assert threads() == []
    assert sorted(open_files()) == before
    assert list(tmp_path.iterdir()) == []


def bits(tensor: torch.Tensor) -> bytes:
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return storage.numpy().tobytes()


def random_bytes(num_bytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "float32": lambda: torch.randn(33, 7),
    "bfloat16": lambda: torch.randn(1001).bfloat16(),
    "float16": lambda: torch.randn(3, 5, 7).half(),
    "nan and -0": lambda: torch.tensor([float("nan"), -0.0, float("inf")]),
    "int64": lambda: torch.arange(-500, 500),
    "bool": lambda: torch.randn(1025) > 0,
    "complex64": lambda: torch.randn(9, dtype=torch.complex64),
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0, 4),
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(5, 1).expand(5, 9),
    "part of a storage": lambda: torch.randn(100)[10:90:2],
    "one page": lambda: random_bytes(4096),
    "one piece": lambda: random_bytes(PIECE_BYTES),
    "many pieces": lambda: random_bytes(MANY_PIECES_BYTES),
}


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_every_kind_of_tensor_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    tensors = [make() for make in TENSORS.values()]
    slots = [SlotSpec.of(tensor, name) for name, tensor in zip(TENSORS, tensors, strict=True)]
    with make_tier(kind, tmp_path, slots) as tier:
        for slot, tensor in enumerate(tensors):
            tier.offload(slot, tensor)
        back = [tier.fetch(slot) for slot in range(len(slots))]
        for slot, (tensor, again) in enumerate(zip(tensors, back, strict=True)):
            tier.wait_fetched(slot)
            assert bits(again) == bits(tensor), slots[slot].name
            assert (again.shape, again.stride(), again.dtype) == (
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
            )
            assert again.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
            assert again.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or (
                slots[slot].num_bytes == 0
            )


@pytest.mark.parametrize("kind", ["disk", "host"])
@pytest.mark.parametrize("seed", range(4))
def test_any_legal_order_of_calls_gives_the_last_value_offloaded(
    kind: str, seed: int, tmp_path: Path
) -> None:
    """A fake step's program against a dictionary; what is written is overwritten at once."""
    choose = random.Random(seed)
    sizes = [1, 4096, 70_000, 0, PIECE_BYTES + 1]
    slots = [SlotSpec((n,), (1,), torch.uint8, CPU, n) for n in sizes]
    oracle: dict[int, bytes] = {}
    fetched: dict[int, list[torch.Tensor]] = {}
    open_writes: dict[int, torch.Tensor] = {}

    def settle_fetches(slot: int) -> None:
        tier.wait_fetched(slot)
        for tensor in fetched.pop(slot):
            assert bits(tensor) == oracle[slot]

    with make_tier(kind, tmp_path, slots) as tier:
        for call in range(150):
            slot = choose.randrange(len(slots))
            if slot not in oracle or choose.random() < 0.3:
                if slot in open_writes:
                    tier.wait_written(slot)
                    open_writes.pop(slot).fill_(99)
                if slot in fetched:
                    settle_fetches(slot)
                value = random_bytes(sizes[slot], seed=1000 * seed + call)
                oracle[slot] = bits(value)
                tier.offload(slot, value)
                open_writes[slot] = value
            elif choose.random() < 0.6:
                fetched.setdefault(slot, []).append(tier.fetch(slot))
            elif slot in fetched:
                settle_fetches(slot)
            elif slot in open_writes:
                tier.wait_written(slot)
                open_writes.pop(slot).fill_(99)
        tier.wait_all()
        for slot in list(fetched):
            settle_fetches(slot)


def test_transfers_happen_in_the_order_of_the_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    pwritev, preadv = os.pwritev, os.preadv

    def write(file: int, views: Any, offset: int) -> int:
        seen.append(("write", offset // 4096))
        return pwritev(file, views, offset)

    def read(file: int, views: Any, offset: int) -> int:
        seen.append(("read", offset // 4096))
        return preadv(file, views, offset)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "preadv", read)
    a, b, c = (random_bytes(100, seed) for seed in range(3))
    with disk_tier(tmp_path, [SlotSpec.of(a)] * 3) as tier:
        tier.offload(2, a)
        tier.offload(0, b)
        tier.fetch(2)
        tier.offload(1, c)
        tier.fetch(0)
        tier.wait_all()
    assert seen == [("write", 2), ("write", 0), ("read", 2), ("write", 1), ("read", 0)]


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_fetch_allocates_the_storage_at_once_and_nothing_else_ever(
    kind: str, tmp_path: Path
) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with make_tier(kind, tmp_path, [SlotSpec.of(value)]) as tier:
        _, peak_bytes, _ = allocator_peak(lambda: (tier.offload(0, value), tier.wait_all()), CPU)
        assert peak_bytes == 0
        again, peak_bytes, end_bytes = allocator_peak(lambda: tier.fetch(0), CPU)
        assert peak_bytes == end_bytes == MANY_PIECES_BYTES
        _, peak_bytes, _ = allocator_peak(lambda: tier.wait_fetched(0), CPU)
        assert peak_bytes == 0
        assert bits(again) == bits(value)


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_after_waiting_the_tier_holds_no_tensor(kind: str, tmp_path: Path) -> None:
    spec = SlotSpec.of(random_bytes(MANY_PIECES_BYTES))
    with make_tier(kind, tmp_path, [spec]) as tier:

        def leave_and_return() -> None:
            value = torch.empty(MANY_PIECES_BYTES, dtype=torch.uint8)
            left = StorageWeakRef(value.untyped_storage())
            tier.offload(0, value)
            tier.wait_written(0)
            assert not left.expired()
            del value
            assert left.expired()
            again = tier.fetch(0)
            returned = StorageWeakRef(again.untyped_storage())
            tier.wait_fetched(0)
            del again
            assert returned.expired()

        _, peak_bytes, end_bytes = allocator_peak(leave_and_return, CPU)
        assert (peak_bytes, end_bytes) == (MANY_PIECES_BYTES, 0)


def test_a_tensor_dropped_while_it_is_written_is_written_nevertheless(tmp_path: Path) -> None:
    expected = bits(random_bytes(MANY_PIECES_BYTES))
    spec = SlotSpec.of(random_bytes(MANY_PIECES_BYTES))
    with disk_tier(tmp_path, [spec]) as tier:
        tier.offload(0, random_bytes(MANY_PIECES_BYTES))
        again = tier.fetch(0)
        tier.wait_fetched(0)
        assert bits(again) == expected


# What the tier refuses


def test_the_tier_refuses_calls_that_cannot_give_right_data(tmp_path: Path) -> None:
    value = torch.randn(6, 4)
    with disk_tier(tmp_path, [SlotSpec.of(value, "hidden")]) as tier:
        with pytest.raises(OffloadError, match="'hidden'.*holds nothing"):
            tier.fetch(0)
        with pytest.raises(OffloadError, match="was not offloaded"):
            tier.wait_written(0)
        for wrong in (value.t(), value.double(), value[1:], torch.randn(4, 6)):
            with pytest.raises(OffloadError, match="'hidden'.*not what was declared"):
                tier.offload(0, wrong)
        tier.offload(0, value)
        with pytest.raises(OffloadError, match="was not fetched"):
            tier.wait_fetched(0)
        with pytest.raises(OffloadError, match="earlier transfers"):
            tier.offload(0, value)
        tier.wait_written(0)
        tier.offload(0, value)
        tier.reset()
        with pytest.raises(OffloadError, match="holds nothing"):
            tier.fetch(0)
    with pytest.raises(OffloadError, match="closed"):
        tier.offload(0, value)


def test_a_lazy_conjugate_is_refused_since_its_bytes_are_not_its_value(tmp_path: Path) -> None:
    value = torch.randn(4, dtype=torch.complex64)
    with disk_tier(tmp_path, [SlotSpec.of(value)]) as tier:
        with pytest.raises(OffloadError, match="conjugation"):
            tier.offload(0, value.conj())


def test_verify_finds_a_buffer_that_is_overwritten_while_it_is_written(tmp_path: Path) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value, "hidden")], verify=True) as tier:
        tier.offload(0, value)
        tier.wait_written(0)
        tier.fetch(0)
        tier.wait_fetched(0)
        is_overwritten = threading.Event()
        with held_writes(until=is_overwritten.is_set):
            tier.offload(0, value)
            value[-1] ^= 1
            is_overwritten.set()
            tier.wait_written(0)
        tier.fetch(0)
        with pytest.raises(OffloadError, match="'hidden'.*differ"):
            tier.wait_fetched(0)


def test_verify_finds_a_byte_that_the_disk_has_lost(tmp_path: Path) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value, "hidden")], verify=True) as tier:
        tier.offload(0, value)
        tier.wait_written(0)
        os.pwrite(file_of(tier), bytes([int(value[5000]) ^ 1]), 5000)
        tier.fetch(0)
        with pytest.raises(OffloadError, match="'hidden'.*differ"):
            tier.wait_all()


# Directories


def test_directories_that_cannot_be_used_are_named_with_the_reason(tmp_path: Path) -> None:
    slots = [SlotSpec((4,), (1,), torch.float32, CPU, 16)]
    with pytest.raises(OffloadError, match=f"does not exist\nhint: {tmp_path} exists"):
        disk_tier(tmp_path / "no" / "such", slots)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OffloadError, match="not a directory"):
        disk_tier(file, slots)
    file.unlink()


def test_a_directory_that_may_not_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Monkeypatched since root, who may run this, may write anywhere.
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OffloadError, match="Permission denied"):
        disk_tier(tmp_path, [])


def test_a_directory_in_memory_is_refused_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "file_system", lambda _: "tmpfs")
    with pytest.raises(OffloadError, match="in memory .tmpfs."):
        DiskTier(tmp_path, [])
    DiskTier(tmp_path, [], allow_memory=True).close()


def test_the_kind_of_file_system_is_the_one_that_the_system_tells(tmp_path: Path) -> None:
    told = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    found = scratch.file_system(tmp_path)
    assert found in ("", told) or told.startswith(found[:3])  # stat says "ext2/ext3" for ext4


def test_where_files_need_names_the_name_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def without_anonymous_files(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", without_anonymous_files)
    value = random_bytes(5000)
    with disk_tier(tmp_path, [SlotSpec.of(value)]) as tier:
        assert list(tmp_path.iterdir()) == []
        tier.offload(0, value)
        again = tier.fetch(0)
        tier.wait_all()
        assert bits(again) == bits(value)


def test_a_directory_removed_meanwhile_does_not_matter(tmp_path: Path) -> None:
    directory = tmp_path / "scratch"
    directory.mkdir()
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(directory, [SlotSpec.of(value)]) as tier:
        directory.rmdir()
        tier.offload(0, value)
        again = tier.fetch(0)
        tier.wait_all()
        assert bits(again) == bits(value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        directory.rmdir()
        pytest.skip("may not mount")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)
    directory.rmdir()


def test_a_disk_that_is_too_small_is_found_before_anything_runs(small_disk: Path) -> None:
    half_bytes = 600 * 1024
    slots = [SlotSpec((half_bytes,), (1,), torch.uint8, CPU, half_bytes)] * 2
    disk_tier(small_disk, slots[:1]).close()
    with pytest.raises(OffloadError, match=r"(?s)1\.2 MiB.*free there: 1\.0 MiB") as raised:
        disk_tier(small_disk, slots)
    assert raised.value.needed_bytes == 2 * half_bytes
    assert raised.value.free_bytes == 2**20
    assert "free 176.0 KiB there" in str(raised.value)
    disk_tier(small_disk, slots[:1]).close()  # the failed one has given its space back


def test_space_that_cannot_be_reserved_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OffloadError, match="cannot reserve 4.0 KiB") as raised:
        disk_tier(tmp_path, [SlotSpec((4,), (1,), torch.float32, CPU, 16)])
    assert raised.value.needed_bytes == 4096


# Failures while buffers move


def file_of(tier: DiskTier) -> int:
    return tier._store._file  # type: ignore[attr-defined]


class held_writes:  # noqa: N801
    """Holds every write until `until()` holds, so that something can happen meanwhile."""

    def __init__(self, until: Callable[[], bool]) -> None:
        self.until, self.num_writes = until, 0

    def __enter__(self) -> held_writes:
        self.patch, real = pytest.MonkeyPatch(), os.pwritev

        def write(file: int, views: Any, offset: int) -> int:
            deadline = time.monotonic() + 20  # a test that fails must end, too
            while not self.until() and time.monotonic() < deadline:
                time.sleep(0.001)
            self.num_writes += 1
            return real(file, views, offset)

        self.patch.setattr(os, "pwritev", write)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def fail_call(patch: pytest.MonkeyPatch, name: str, code: int, after: int = 1) -> None:
    """Make calls of os.pwritev or os.preadv fail after the first few."""
    real, calls = getattr(os, name), []

    def call(*arguments: Any) -> int:
        calls.append(name)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return int(real(*arguments))

    patch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ENODEV])
def test_a_write_that_fails_is_raised_by_the_next_call_and_reset_heals(
    code: int, tmp_path: Path
) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    spec = SlotSpec.of(value, "hidden")
    with disk_tier(tmp_path, [spec, spec]) as tier:
        with pytest.MonkeyPatch.context() as patch:
            fail_call(patch, "pwritev", code)
            tier.offload(0, value)
            with pytest.raises(OffloadError, match=f"writing 'hidden'.*{os.strerror(code)}"):
                tier.wait_written(0)
        calls: list[Callable[[], object]] = [
            lambda: tier.wait_written(0),
            lambda: tier.fetch(0),
            lambda: tier.offload(1, value),
            tier.wait_all,
        ]
        for call in calls:
            with pytest.raises(OffloadError, match="writing 'hidden'"):
                call()
        tier.reset()
        tier.offload(1, value)
        again = tier.fetch(1)
        tier.wait_fetched(1)
        assert bits(again) == bits(value)


def test_a_write_error_that_the_disk_reports_late_is_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        """Reports what a device said when the page cache was written to it."""

        def sync_file_range(self, *_: Any) -> int:
            import ctypes

            ctypes.set_errno(errno.EIO)
            return -1

        def madvise(self, *_: Any) -> int:
            return -1

    value = random_bytes(10)
    with disk_tier(tmp_path, [SlotSpec.of(value, "hidden")]) as tier:
        monkeypatch.setattr(disk_module, "_libc", Libc())
        tier.offload(0, value)
        with pytest.raises(OffloadError, match="writing 'hidden'.*Input/output error"):
            tier.wait_written(0)


def test_a_read_that_fails_is_raised_and_frees_what_it_was_for(tmp_path: Path) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value, "hidden")]) as tier:
        tier.offload(0, value)
        tier.wait_written(0)
        with pytest.MonkeyPatch.context() as patch:
            fail_call(patch, "preadv", errno.EIO)
            again = tier.fetch(0)
            with pytest.raises(OffloadError, match="reading 'hidden'.*Input/output error"):
                tier.wait_fetched(0)
        tier.reset()
        gone = StorageWeakRef(again.untyped_storage())
        del again
        assert gone.expired()


def test_a_file_cut_short_behind_the_tier_is_never_wrong_data(tmp_path: Path) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value, "hidden")]) as tier:
        tier.offload(0, value)
        tier.wait_written(0)
        os.ftruncate(file_of(tier), PIECE_BYTES + 10)
        tier.fetch(0)
        with pytest.raises(OffloadError, match=f"'hidden'.*ends after {PIECE_BYTES + 10} of"):
            tier.wait_fetched(0)


def test_partial_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda f, v, o: pwritev(f, [v[0][:999_983]], o))
    monkeypatch.setattr(os, "preadv", lambda f, v, o: preadv(f, [v[0][:999_979]], o))
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value)]) as tier:
        tier.offload(0, value)
        again = tier.fetch(0)
        tier.wait_fetched(0)
        assert bits(again) == bits(value)


def test_reset_does_not_wait_for_what_it_cancels(tmp_path: Path) -> None:
    """Counted in pieces: the one under way ends, the other seven are not written."""
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value)] * 2) as tier:
        worker: Any = tier._transfers
        with held_writes(until=lambda: worker._is_stopping) as writes:
            tier.offload(0, value)
            tier.offload(1, value)
            gone = StorageWeakRef(value.untyped_storage())
            del value
            tier.reset()
            assert writes.num_writes <= 1
        assert gone.expired()


def test_a_wait_is_interrupted_by_ctrl_c_and_the_tier_goes_on_after_reset(tmp_path: Path) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value)]) as tier:
        worker: Any = tier._transfers
        with held_writes(until=lambda: worker._is_stopping):
            this_thread = threading.get_ident()
            timer = threading.Timer(0.05, signal.pthread_kill, (this_thread, signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                tier.offload(0, value)
                timer.start()
                tier.wait_written(0)
            timer.join()
            tier.reset()
        tier.offload(0, value)
        again = tier.fetch(0)
        tier.wait_all()
        assert bits(again) == bits(value)


# Nothing is left behind (the fixture looks)


def test_an_exception_in_the_step_closes_the_tier(tmp_path: Path) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with pytest.raises(ZeroDivisionError):
        with disk_tier(tmp_path, [SlotSpec.of(value)]) as tier:
            tier.offload(0, value)
            raise ZeroDivisionError
    tier.close()
    tier.reset()


def test_a_tier_that_is_dropped_closes_itself_even_while_it_writes(tmp_path: Path) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    tier = disk_tier(tmp_path, [SlotSpec.of(value)])
    tier.offload(0, value)
    assert len(threads()) == 1
    del tier


def test_a_thread_that_does_not_start_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        disk_tier(tmp_path, [])


def test_a_process_that_ends_with_an_open_tier_ends_and_leaves_nothing(tmp_path: Path) -> None:
    program = """
import sys, torch
from packlight.memory import DiskTier, SlotSpec
value = torch.zeros(50 * 2**20, dtype=torch.uint8)
tier = DiskTier(sys.argv[1], [SlotSpec.of(value)], allow_memory=True)
tier.offload(0, value)
raise SystemExit(7)
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert ended.returncode == 7


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_neither_use_nor_break_the_tier(tmp_path: Path) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value)]) as tier:
        tier.offload(0, value)
        tier.wait_written(0)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                tier.fetch(0)
                tier.wait_fetched(0)
            except OffloadError as error:
                code = 0 if "fork" in str(error) else 2
            finally:
                tier.close()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        again = tier.fetch(0)
        tier.wait_fetched(0)
        assert bits(again) == bits(value)


# The rest


def test_a_tier_in_host_memory_has_parts_that_the_pinned_allocator_need_not_round() -> None:
    sizes = [0, 1, 4096, PIECE_BYTES, 65 * 2**20 + 3, 100_000_000]
    slots = [SlotSpec((n,), (1,), torch.uint8, CPU, n) for n in sizes]
    with HostTier(slots) as tier:
        assert sum(sizes) <= tier.host_bytes <= sum(sizes) + len(sizes) * PIECE_BYTES / 2
        store: Any = tier._store
        sizes_of_parts = [part.numel() for parts in store.parts for part in parts]
        assert all(size & (size - 1) == 0 for size in sizes_of_parts)


def test_tiers_refuse_devices_that_they_do_not_serve(tmp_path: Path) -> None:
    on_cpu = SlotSpec((4,), (1,), torch.float32, CPU, 16)
    on_gpu = SlotSpec((4,), (1,), torch.float32, torch.device("cuda:0"), 16, name="hidden")
    with pytest.raises(OffloadError, match="'hidden'.*cuda:0.*\nhint: HostTier"):
        disk_tier(tmp_path, [on_cpu, on_gpu])
    with pytest.raises(OffloadError, match="one device"):
        HostTier([on_cpu, on_gpu])


def test_a_lane_is_measured_once_per_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = measure_lane(tmp_path, 2**20, allow_memory=True)
    assert lane.read is not None and lane.write is not None
    assert lane.read.bytes_per_second > 0 and lane.write.bytes_per_second > 0
    assert 0 < lane.read.latency_seconds < lane.read.seconds(2**30)
    assert lane.write.seconds(0) == lane.read.latency_seconds
    assert 0 <= lane.compute_share <= 1
    monkeypatch.setattr(os, "pwritev", None)
    assert measure_lane(tmp_path / ".", 2**20, allow_memory=True) is lane


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_buffers_come_back_bit_for_bit_beside_computation() -> None:
    values = [torch.randn(1000 + n, 1000, device="cuda") for n in range(4)]
    expected = [value.cpu() for value in values]
    with HostTier([SlotSpec.of(value) for value in values]) as tier:
        for slot in range(4):
            tier.offload(slot, values[slot])
            tier.wait_written(slot)
            values[slot] = torch.full_like(values[slot], 7.0)  # likely the same memory
        back = []
        for slot in range(4):
            back.append(tier.fetch(slot))
            torch.randn(2000, 2000, device="cuda").square().sum()
        for slot in range(4):
            tier.wait_fetched(slot)
            assert torch.equal(back[slot].cpu(), expected[slot])


def test_a_mapped_tensor_is_the_slot_it_sees_writes_and_its_writes_are_fetched(
    tmp_path: Path,
) -> None:
    value = random_bytes(MANY_PIECES_BYTES).view(torch.uint8)
    weight = torch.arange(12.0).reshape(3, 4).t()
    with disk_tier(tmp_path, [SlotSpec.of(value)]) as tier:
        first = tier.mapped(0)
        tier.extend([SlotSpec.of(weight)])
        for slot, tensor in enumerate((value, weight)):
            tier.offload(slot, tensor)
            tier.wait_written(slot)
        mapped, peak_bytes, _ = allocator_peak(lambda: tier.mapped(1), CPU)
        assert peak_bytes == 0
        assert torch.equal(first, value)
        assert torch.equal(mapped, weight) and mapped.stride() == weight.stride()
        mapped.mul_(2)
        first[-1] = 7
        tier.forget_pages()
        assert torch.equal(mapped, 2 * weight)
        fetched = [tier.fetch(slot) for slot in range(2)]
        tier.wait_all()
        assert torch.equal(fetched[1], 2 * weight)
        assert fetched[0][-1] == 7 and torch.equal(fetched[0][:-1], value[:-1])


def test_a_mapped_tensor_outlives_its_tier_and_keeps_only_the_mapping_open(
    tmp_path: Path,
) -> None:
    weight = torch.arange(5000.0)
    tier = disk_tier(tmp_path, [SlotSpec.of(weight)] * 3)
    for slot in range(3):
        tier.offload(slot, weight)
    tier.wait_all()
    mapped = [tier.mapped(slot) for slot in range(3)]
    mine = [name for name in open_files() if name.startswith(str(tmp_path))]
    assert len(mine) == 2, "one descriptor for the tier, one for all mappings"
    tier.close()
    del tier
    gc.collect()
    mapped[1].add_(1)
    assert [torch.equal(m, weight) for m in mapped] == [True, False, True]
    assert torch.equal(mapped[1], weight + 1)


def test_recover_keeps_what_was_written_in_whole_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = random_bytes(MANY_PIECES_BYTES)
    with disk_tier(tmp_path, [SlotSpec.of(value)] * 2) as tier:
        tier.offload(0, value)
        tier.wait_written(0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *_: 1 // 0)
            tier.offload(1, value)
            with pytest.raises(OffloadError):
                tier.wait_written(1)
        tier.recover()
        fetched = tier.fetch(0)
        tier.wait_fetched(0)
        assert torch.equal(fetched, value)
        with pytest.raises(OffloadError, match="holds nothing"):
            tier.fetch(1)
