"""Files of compressed models: every bit comes back, every byte counts, bad files are named."""

from __future__ import annotations

import math
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import packlight.compress as compress
from packlight.compress.container import VERSION
from packlight.compress.contexts import Values
from packlight.compress.entries import Entry, parts_of
from packlight.compress.errors import (
    AlteredFileError,
    CompressionError,
    ModelMismatchError,
    NewerFileError,
    TruncatedFileError,
)
from packlight.compress.huffman_coding import decode_sparse, encode_sparse, relative_index
from packlight.errors import OptionError

CODINGS = ("range", "huffman")


def sparse_weight(
    rows: int, columns: int, density: float, num_values: int, seed: int = 0
) -> torch.Tensor:
    """Return weights of few values, most of them zero; rows and columns differ in density."""
    generator = torch.Generator().manual_seed(seed)
    row_factor = torch.rand(rows, 1, generator=generator) * 2
    column_factor = torch.rand(1, columns, generator=generator) * 2
    likely = (density * row_factor * column_factor).clamp(max=1)
    is_weight = torch.rand(rows, columns, generator=generator) < likely
    values = torch.randn(num_values, generator=generator)
    return values[torch.randint(num_values, (rows, columns), generator=generator)] * is_weight


def a_model() -> nn.Module:
    """Return a model with sparse, dense, tied, integer and empty tensors, in three dtypes."""
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "conv": nn.Conv2d(3, 8, 3),
        "norm": nn.BatchNorm2d(8),
        "wide": nn.Linear(40, 30),
        "brief": nn.Linear(20, 20, bias=False, dtype=torch.bfloat16),
        "table": nn.Embedding(30, 40),
        "pruned_away": nn.Linear(5, 4),
    })
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("mask", torch.rand(7, 9) > 0.5)
    model.register_buffer("tiny", torch.tensor([0.0, 0.5, 0.5, -2.0] * 9).to(torch.float8_e4m3fn))
    model.register_buffer("bounds", torch.tensor([-math.inf, 0.0, math.inf, math.nan]))
    with torch.no_grad():
        model["conv"].weight.copy_(sparse_weight(8, 27, 0.3, 5).reshape(8, 3, 3, 3))
        model["wide"].weight.copy_(sparse_weight(30, 40, 0.1, 16))
        model["brief"].weight.copy_(sparse_weight(20, 20, 0.5, 200))
        model["pruned_away"].weight.zero_()
    model["table"].weight = model["wide"].weight
    return model


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )  # fmt: skip


def positive_zeros(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0 if tensor.dtype in (torch.float32, torch.bfloat16) else tensor


# -- files


@pytest.mark.parametrize("coding", CODINGS)
def test_a_file_gives_back_every_bit(tmp_path: Path, coding: str) -> None:
    model = a_model()
    path = tmp_path / "model.plc"
    report = compress.save(path, model, coding=coding, meta={"error_percent": 1.5})
    assert report.file_bytes == path.stat().st_size
    loaded = compress.load(path)
    state = model.state_dict()
    assert list(loaded) == list(state)
    assert all(same(loaded[name], positive_zeros(state[name])) for name in state)
    assert loaded["table.weight"].data_ptr() == loaded["wide.weight"].data_ptr()
    assert compress.inspect(path).meta == {"error_percent": 1.5}


def test_a_file_is_loaded_into_a_plain_and_into_a_meta_model(tmp_path: Path) -> None:
    compress.save(tmp_path / "m.plc", a_model())
    plain = a_model()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    before = plain["conv"].weight
    compress.load(tmp_path / "m.plc", into=plain)
    assert plain["conv"].weight is before, "the optimizer's parameters stay"
    meta = a_model().to("meta")
    compress.load(tmp_path / "m.plc", into=meta)
    for name, tensor in a_model().state_dict().items():
        assert same(plain.state_dict()[name], positive_zeros(tensor))
        assert same(meta.state_dict()[name], positive_zeros(tensor))


def test_memory_formats_do_not_matter(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 8, 3)
    expected = conv.weight.detach().clone()
    compress.save(tmp_path / "m.plc", conv.to(memory_format=torch.channels_last))
    assert same(compress.load(tmp_path / "m.plc")["weight"], expected)


def test_a_negative_zero_comes_back_as_zero(tmp_path: Path) -> None:
    compress.save(tmp_path / "m.plc", {"w": torch.tensor([-0.0, 1.0, 1.0, 0.0])})
    loaded = compress.load(tmp_path / "m.plc")["w"]
    assert loaded.tolist() == [0, 1, 1, 0] and not torch.signbit(loaded).any()


def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packlight.compress.range_coding.MAX_BLOCK_ELEMENTS", 100)
    model = a_model()
    compress.save(tmp_path / "m.plc", model)
    loaded = compress.load(tmp_path / "m.plc")
    state = model.state_dict()
    assert all(same(loaded[name], positive_zeros(state[name])) for name in state)


def test_reading_holds_a_block_and_a_row_beside_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numpy's memory, which is where decoding happens; the tensor itself is torch's."""
    monkeypatch.setattr("packlight.compress.range_coding.MAX_BLOCK_ELEMENTS", 20_000)
    weight = sparse_weight(300, 1000, 0.1, 8)
    report = compress.save(tmp_path / "m.plc", {"w": weight})
    compress.load(tmp_path / "m.plc")  # what is made once is there
    tracemalloc.start()
    try:
        compress.load(tmp_path / "m.plc")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 150_000 < weight.nbytes / 4
    assert report.file_bytes > 15_000


def test_a_stream_yields_the_same_tensors_one_by_one(tmp_path: Path) -> None:
    compress.save(tmp_path / "m.plc", a_model())
    loaded = compress.load(tmp_path / "m.plc")
    streamed = dict(compress.stream(tmp_path / "m.plc"))
    assert list(streamed) == list(loaded)
    assert all(same(streamed[n], t) for n, t in loaded.items() if n != "table.weight")


def test_places_and_values_take_about_their_entropy(tmp_path: Path) -> None:
    """An oracle for the coder: the entropy of independent places and values, known exactly."""
    rows, columns, density, num_values = 150, 300, 0.06, 8
    generator = torch.Generator().manual_seed(1)
    is_weight = torch.rand(rows, columns, generator=generator) < density
    values = torch.arange(1, num_values + 1)[
        torch.randint(num_values, (rows, columns), generator=generator)
    ]
    weight = values * is_weight * 0.5
    report = compress.save(tmp_path / "m.plc", {"w": weight})
    share_of = float(is_weight.float().mean())
    places = -share_of * math.log2(share_of) - (1 - share_of) * math.log2(1 - share_of)
    entropy_bytes = rows * columns * (places + share_of * math.log2(num_values)) / 8
    assert entropy_bytes < report.file_bytes < 1.05 * entropy_bytes + 110


def test_rows_and_columns_that_differ_take_less_than_if_they_were_alike(tmp_path: Path) -> None:
    weight = torch.zeros(120, 200)
    weight[:40, :60] = sparse_weight(40, 60, 0.5, 4)
    shuffled = weight.reshape(-1)[torch.randperm(weight.numel())].reshape(weight.shape)
    sizes = [
        compress.save(tmp_path / "m.plc", {"w": tensor}).file_bytes for tensor in (weight, shuffled)
    ]
    assert sizes[0] < 0.65 * sizes[1]


def test_weights_that_keep_together_in_images_take_less(tmp_path: Path) -> None:
    """Blobs in 14 x 14 images: the pixel beside and the one above tell where weights are."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.avg_pool2d(
        torch.randn(60, 1, 18, 18, generator=generator), 5, stride=1
    )
    weight = torch.where(smooth > 0.3, 0.5, 0.0).reshape(60, 196)
    order = torch.randperm(196, generator=generator)
    sizes = [
        compress.save(tmp_path / "m.plc", {"w": tensor}).file_bytes
        for tensor in (weight, weight[:, order])
    ]
    assert sizes[0] < 0.8 * sizes[1]
    assert torch.equal(compress.load(tmp_path / "m.plc")["w"], weight[:, order])
    (line,) = parts_of({"w": weight}, "range", {})
    assert line.entry.is_transposed and {1, 14} <= set(line.entry.weighing.lags)
    assert Entry.from_json(line.entry.to_json(), "range") == line.entry


def test_values_whose_signs_keep_together_take_less(tmp_path: Path) -> None:
    """The same places; signs as smooth as they are, or drawn at random."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.avg_pool2d(
        torch.randn(60, 1, 18, 18, generator=generator), 5, stride=1
    ).reshape(60, 196)
    weight = torch.where(smooth.abs() > 0.2, smooth.sign(), 0.0)
    drawn = weight.abs() * torch.randn(weight.shape, generator=generator).sign()
    sizes = [
        compress.save(tmp_path / "m.plc", {"w": tensor}).file_bytes for tensor in (drawn, weight)
    ]
    assert torch.equal(compress.load(tmp_path / "m.plc")["w"], weight)
    num_weights = int((weight != 0).sum())
    assert sizes[0] - sizes[1] > 0.5 * num_weights / 8, "half a bit for each weight"


def test_every_byte_of_a_file_is_accounted_for(tmp_path: Path) -> None:
    report = compress.save(tmp_path / "m.plc", a_model())
    counted = sum(tensor.file_bytes for tensor in report.tensors)
    assert counted + report.frame_bytes == report.file_bytes == (tmp_path / "m.plc").stat().st_size
    assert f"{report.file_bytes} bytes" in report.describe()
    state = a_model().state_dict()
    dense_bytes = sum(t.numel() * t.itemsize for name, t in state.items() if "table" not in name)
    assert report.dense_bytes == dense_bytes


@pytest.mark.parametrize("coding", CODINGS)
def test_a_truncated_file_is_named_and_nothing_is_loaded(tmp_path: Path, coding: str) -> None:
    path = tmp_path / "m.plc"
    compress.save(path, a_model(), coding=coding)
    content = path.read_bytes()
    model = a_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for size in [0, 3, 5, *range(6, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(TruncatedFileError, match=f"ends after {size} of at least"):
            compress.load(path, into=model)
    assert all(same(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_altered_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.plc"
    compress.save(path, a_model())
    content = path.read_bytes()
    model = a_model()
    for place in [0, *range(6, len(content), 23)]:
        altered = bytearray(content)
        altered[place] ^= 0x20
        path.write_bytes(altered)
        with pytest.raises((AlteredFileError, TruncatedFileError)):
            compress.load(path, into=model)
    path.write_bytes(content + b"more")
    with pytest.raises(AlteredFileError, match="checksum"):
        compress.load(path)


def test_a_file_with_a_right_checksum_and_other_content_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.plc"
    compress.save(path, a_model())
    content = path.read_bytes()[:-4]
    generator = np.random.default_rng(0)
    model = a_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    num_named = 0
    for place in generator.integers(5, len(content), size=60).tolist():
        altered = bytearray(content)
        altered[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(altered) + zlib.crc32(altered).to_bytes(4, "little"))
        try:
            compress.load(path)  # other values of the same form cannot be told from the right ones
        except (AlteredFileError, TruncatedFileError):
            num_named += 1
            with pytest.raises((AlteredFileError, TruncatedFileError, ModelMismatchError)):
                compress.load(path, into=model)
    assert num_named > 10
    assert all(same(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_newer_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.plc"
    compress.save(path, a_model())
    content = bytearray(path.read_bytes())
    content[4] = VERSION + 1
    path.write_bytes(content)
    with pytest.raises(NewerFileError, match=f"version {VERSION + 1} of the format") as caught:
        compress.load(path)
    assert caught.value.version == VERSION + 1


def test_a_model_that_does_not_match_is_named(tmp_path: Path) -> None:
    compress.save(tmp_path / "m.plc", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2))
    with pytest.raises(ModelMismatchError) as caught:
        compress.load(tmp_path / "m.plc", into=other)
    assert caught.value.missing == ["2.weight", "2.bias"]
    assert ("0.weight", "torch.float32 (4, 3)", "torch.float32 (5, 3)") in caught.value.different


def test_what_is_no_dense_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="'w' is a Tensor, not a dense"):
        compress.save(tmp_path / "m.plc", {"w": torch.eye(3).to_sparse()})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError, match="one of range, huffman"):
        compress.save(tmp_path / "m.plc", {}, coding="zip")


# -- Huffman's code


def test_fillers_stand_where_distances_do_not_suffice() -> None:
    """Figure 2 of the Deep Compression paper: 3 bits, weights at 1, 4 and 15."""
    codes = np.zeros(16, dtype=np.int32)
    codes[[1, 4, 15]] = [1, 2, 3]
    distances, told = relative_index(codes, 3)
    assert distances.tolist() == [2, 3, 8, 3] and told.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("index_bits", [1, 2, 5, 8])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 1.0])
def test_huffman_blocks_decode(index_bits: int, density: float) -> None:
    generator = np.random.default_rng(0)
    codes = (generator.random(3000) < density) * generator.integers(1, 9, 3000)
    codes = codes.astype(np.int32)
    block = encode_sparse(codes, 9, index_bits)
    assert np.array_equal(decode_sparse(block, 3000, 9, index_bits), codes)


def test_the_learning_counts_forget_nothing() -> None:
    values = Values(3)
    values.learn(np.array([0, 0, 2]))
    assert values.likely().tolist() == [5.0, 1.0, 3.0]
    assert [end for _, end in values.blocks(20)] == [8, 16, 20]
