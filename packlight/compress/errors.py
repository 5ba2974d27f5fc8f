"""What a user of `packlight.compress` can do something about."""

from __future__ import annotations

from typing import Any

from packlight.errors import FormatError, PacklightError


class CompressedFileError(FormatError):
    """A file of `packlight.compress` that cannot be read; nothing was loaded.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Any, problem: str, hint: str) -> None:
        self.path = path
        super().__init__(f"{path} {problem}; nothing was loaded\nhint: {hint}")


class TruncatedFileError(CompressedFileError):
    """A compressed model's file that ends early.

    Attributes:
        num_bytes, needed_bytes: how long it is, and how long it would be at least.
    """

    def __init__(self, path: Any, num_bytes: int, needed_bytes: int) -> None:
        self.num_bytes, self.needed_bytes = num_bytes, needed_bytes
        problem = f"ends after {num_bytes} of at least {needed_bytes} bytes"
        super().__init__(path, problem, "copy it again from where it came from")


class AlteredFileError(CompressedFileError):
    """A file whose bytes are not those that `packlight.compress.save` wrote."""

    def __init__(self, path: Any, problem: str) -> None:
        super().__init__(path, problem, "copy it again from where it came from, or save it anew")


class NewerFileError(CompressedFileError):
    """A file in a format of a later release.

    Attributes:
        version, known_version: of the file, and the latest that this release reads.
    """

    def __init__(self, path: Any, version: int, known_version: int) -> None:
        self.version, self.known_version = version, known_version
        problem = f"is in version {version} of the format, this release reads up to {known_version}"
        super().__init__(path, problem, "pip install --upgrade packlight")


class ModelMismatchError(PacklightError, ValueError):
    """A compressed file and a model with other tensors; nothing was loaded.

    Attributes:
        missing: names that the model has and the file has not.
        unexpected: names that the file has and the model has not.
        different: (name, what the file has, what the model has) where shapes or dtypes differ.
    """

    def __init__(
        self,
        path: Any,
        missing: list[str],
        unexpected: list[str],
        different: list[tuple[str, str, str]],
    ) -> None:
        self.missing, self.unexpected, self.different = missing, unexpected, different
        lines = [f"{path} is not of this model; nothing was loaded"]
        for names, what in ((missing, "in the model alone"), (unexpected, "in the file alone")):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"  {what}: {', '.join(names[:3])}{more}")
        lines += [f"  {name}: {a} in the file, {b} in the model" for name, a, b in different[:3]]
        if len(different) > 3:
            lines.append(f"  and {len(different) - 3} more that differ")
        lines.append("hint: make the model as it was when it was saved, or load without into=")
        super().__init__("\n".join(lines))


class CompressionError(PacklightError, ValueError):
    """A tensor or model that cannot be compressed as was asked for.

    Attributes:
        name: of the tensor or layer.
        problem: what is in the way.
    """

    def __init__(self, name: str, problem: str, hint: str = "") -> None:
        self.name, self.problem = name, problem
        super().__init__(f"{name!r} {problem}" + (f"\nhint: {hint}" if hint else ""))


class TargetError(PacklightError, ValueError):
    """A size that cannot be reached.

    Attributes:
        target_bytes, best_bytes: what was asked for, and the smallest that can be had.
    """

    def __init__(self, what: str, target_bytes: int, best_bytes: int, with_: str) -> None:
        self.target_bytes, self.best_bytes = target_bytes, best_bytes
        super().__init__(
            f"{what} do not fit in {target_bytes} bytes: with {with_} they take {best_bytes}\n"
            f"hint: ask for {best_bytes} bytes, or prune further first"
        )


class CalibrationError(PacklightError, ValueError):
    """No data where a method looks at what a model does with data."""

    def __init__(self, method: str) -> None:
        super().__init__(
            f"{method} got no batches: there is no calibration data\n"
            "hint: pass some; an iterator that was used up yields nothing more"
        )
