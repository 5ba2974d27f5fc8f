"""The examples are what they say they are, and run."""

from __future__ import annotations

import importlib
import io
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
FILES = ["char_gpt", "wrn_cifar10", "hf_gpt2", "hf_bert"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Return a function that imports an example afresh, as a script's neighbour would."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    names: list[str] = []

    def load_module(name: str) -> ModuleType:
        if name.startswith("hf_"):
            pytest.importorskip("transformers", reason="needs the extra 'hf'")
        names.append(name)
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield load_module
    for name in names:
        sys.modules.pop(name, None)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def cifar10(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write a small data set in the layout of the home page; return its training part."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = rng.integers(0, 256, (250, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, 250)
    for index in range(5):
        part = slice(50 * index, 50 * index + 50)
        batch = {b"data": images[part].reshape(50, -1), b"labels": labels[part].tolist()}
        (folder / f"data_batch_{index + 1}").write_bytes(pickle.dumps(batch))
    batch = {b"data": images[:20].reshape(20, -1), b"labels": labels[:20].tolist()}
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    return images, labels


# Character-level GPT.


def test_char_gpt_starts_at_a_uniform_guess_and_learns(load) -> None:
    example = load("char_gpt")
    example.BATCH = 4
    torch.manual_seed(0)
    model = example.model()
    data = example.batches()
    uniform = math.log(len(example.CHARACTERS.alphabet))
    first = example.loss(model, next(data))
    assert abs(first.item() - uniform) < 0.3
    optimizer = example.optimizer(model)
    for _ in range(8):
        loss = example.loss(model, next(data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first.item() - 0.5


def test_char_gpt_sees_no_character_that_follows(load) -> None:
    example = load("char_gpt")
    torch.manual_seed(0)
    model = example.model().eval()
    tokens = torch.randint(60, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 60
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_char_gpt_batches_are_the_text_and_the_character_after(load) -> None:
    example = load("char_gpt")
    text = example.TEXT.read_text(encoding="utf-8")
    for split in ("train", "validation"):
        tokens, following = next(example.batches(split))
        assert tokens.shape == (example.BATCH, example.CONTEXT)
        assert torch.equal(tokens[:, 1:], following[:, :-1])
        piece = example.CHARACTERS.decode(tokens[0]) + example.CHARACTERS.decode(following[0, -1:])
        position = text.find(piece)
        assert position >= 0
        assert (position >= 0.89 * len(text)) == (split == "validation")
        assert example.tokens_per_batch((tokens, following)) == tokens.numel()


def test_char_gpt_samples_text_longer_than_its_context(load) -> None:
    example = load("char_gpt")
    model = example.model().train()
    text = example.sample(model, prompt="A", num_characters=example.CONTEXT + 5)
    assert len(text) == example.CONTEXT + 6 and text[0] == "A"
    assert model.training


# WRN-28-2.


def test_wrn_has_the_published_number_of_parameters(load) -> None:
    example = load("wrn_cifar10")
    model = example.model()
    assert num_parameters(model) == 1_467_610
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
    # Depth counts 3x3 convolutions, shortcuts' replacements (3) and the classifier.
    assert len(convolutions) + 3 == 28
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_wrn_reads_the_batches_of_the_home_page(
    load, cifar10, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("wrn_cifar10")
    for directory in (tmp_path, tmp_path / "cifar-10-batches-py"):
        monkeypatch.setenv("PACKLIGHT_CIFAR10", str(directory))
        example.read_cifar10.cache_clear()
        images, labels = example.read_cifar10(True)
        assert np.array_equal(images.numpy(), cifar10[0])
        assert np.array_equal(labels.numpy(), cifar10[1])
        assert len(example.read_cifar10(False)[1]) == 20


def test_wrn_reads_webp_strips(
    load, cifar10, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="needs the extra 'vision'")
    images, labels = cifar10
    archive = tmp_path / "strips" / "cifar10_full.webp.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for index in range(2):
            strip = images[125 * index : 125 * (index + 1)].transpose(0, 2, 3, 1)
            content = io.BytesIO()
            picture = image_module.fromarray(np.ascontiguousarray(strip).reshape(-1, 32, 3))
            picture.save(content, "webp", lossless=True)
            file.writestr(f"train_images_{index:03}.webp", content.getvalue())
        content = io.BytesIO()
        np.save(content, labels.astype(np.uint8))
        file.writestr("train_labels.npy", content.getvalue())
    monkeypatch.setenv("PACKLIGHT_CIFAR10", str(archive.parent))
    example = load("wrn_cifar10")
    read_images, read_labels = example.read_cifar10(True)
    assert np.array_equal(read_images.numpy(), images)
    assert np.array_equal(read_labels.numpy(), labels)


@pytest.mark.parametrize("value", [None, "", "no/such/directory"])
def test_wrn_says_what_is_missing(
    value: str | None, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PACKLIGHT_CIFAR10", raising=False)
    if value is not None:
        monkeypatch.setenv("PACKLIGHT_CIFAR10", value)
    example = load("wrn_cifar10")
    with pytest.raises(FileNotFoundError, match=r"PACKLIGHT_CIFAR10.*cifar10_full\.webp\.zip"):
        next(example.batches())


def test_wrn_batches_keep_images_with_their_labels(
    load, cifar10, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without shifts and mirrors, every normalized image is one of the data set with its label."""
    monkeypatch.setenv("PACKLIGHT_CIFAR10", str(tmp_path))
    example = load("wrn_cifar10")
    example.augmented = lambda images: images
    images, labels = cifar10
    known = example.normalized(torch.from_numpy(images)).flatten(1)
    batch_images, batch_labels = next(example.batches())
    assert batch_images.shape == (100, 3, 32, 32)
    for image, label in zip(batch_images.flatten(1)[:10], batch_labels[:10], strict=True):
        (index,) = (known == image).all(1).nonzero().flatten().tolist()
        assert labels[index] == label
    assert sum(len(y) for _, y in example.batches("validation")) == 20


def test_wrn_augmentation_shifts_by_at_most_four_and_mirrors_half(load) -> None:
    example = load("wrn_cifar10")
    torch.manual_seed(0)
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 10] = 255
    moved = example.augmented(images)
    places = moved[:, 0].nonzero()
    assert len(places) == 400
    assert places[:, 1].min() == 12 and places[:, 1].max() == 20
    is_mirrored = places[:, 2] >= 16
    assert 150 < is_mirrored.sum() < 250
    assert set(places[is_mirrored, 2].tolist()) <= set(range(17, 26))


def test_wrn_learns_from_the_real_data(load) -> None:
    """Needs PACKLIGHT_CIFAR10: an easy tenth of a nat in a few steps."""
    if not os.environ.get("PACKLIGHT_CIFAR10"):
        pytest.skip("PACKLIGHT_CIFAR10 is not set")
    example = load("wrn_cifar10")
    images, labels = example.read_cifar10(True)
    assert images.shape == (50_000, 3, 32, 32)
    assert torch.equal(labels.bincount(), torch.full((10,), 5000))


# Hugging Face.


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_bert"])
def test_hugging_face_examples_give_a_trainable_loss(name: str, load) -> None:
    example = load(name)
    torch.manual_seed(0)
    model = example.model()
    batch = next(example.batches())
    assert model.training
    loss = example.loss(model, batch)
    assert abs(loss.item() - math.log(256)) < 1
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert example.tokens_per_batch(batch) == example.BATCH * example.CONTEXT


def test_bert_is_asked_for_the_masked_bytes_only(load) -> None:
    example = load("hf_bert")
    batch = next(example.batches())
    is_masked = batch["input_ids"] == example.MASK
    assert torch.equal(is_masked, batch["labels"] != example.IGNORED)
    assert 0.1 < is_masked.float().mean() < 0.2


# Through Packlight.


@pytest.mark.parametrize("name", FILES)
def test_the_command_line_accepts_every_example(
    name: str, cifar10, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packlight.example import BatchStream, build, load_example

    if name.startswith("hf_"):
        pytest.importorskip("transformers", reason="needs the extra 'hf'")
    monkeypatch.setenv("PACKLIGHT_CIFAR10", str(tmp_path))
    example = load_example(str(ROOT / "examples" / f"{name}.py"))
    model, optimizer = build(example, "cpu", seed=0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )
    first = next(BatchStream(example, "train", "cpu", seed=0))
    again = next(BatchStream(example, "train", "cpu", seed=0))
    tensors = list(first.values()) if isinstance(first, dict) else list(first)
    others = list(again.values()) if isinstance(again, dict) else list(again)
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def test_the_demo_shows_identical_losses_in_forty_percent(
    load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo itself, on a smaller model: it exits with an error where its claims do not hold."""
    char_gpt = load("char_gpt")
    char_gpt.NUM_LAYERS, char_gpt.WIDTH, char_gpt.CONTEXT, char_gpt.BATCH = 4, 32, 64, 16
    demo = load("demo")
    demo.NUM_COMPARED = 3
    demo.MEASURED_STEPS = (2,)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "5"])
    demo.main()
    output = capsys.readouterr().out
    assert "all 3 losses are identical to the last bit" in output
    assert "It writes" in output


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_bert"])
def test_hugging_face_scripts_train_within_their_budget(
    name: str, load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load(name)
    example.BATCH, example.CONTEXT = 2, 32
    monkeypatch.setattr(sys, "argv", [name, "--budget", "64MiB", "--steps", "3"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    (measured,) = [line for line in lines if line.startswith("measured peak")]
    assert float(measured.split()[2]) <= 64
    assert [line for line in lines if line.startswith("step 3: loss")]


def test_hugging_face_trainer_runs_with_one_line_more(
    load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'hf'")
    example = load("hf_trainer")
    example.BATCH = 2
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", "--budget", "100MiB", "--steps", "2"])
    example.main()
    assert "train_loss" in capsys.readouterr().out
