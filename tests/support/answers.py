"""Stores answers of transformers, PyTorch and PEFT in `tests/answers/`, so that most tests need none of them.

A function decorated with `stored` asks the reference. `pytest` does not call it, but reads its answer to the
same arguments from the file of the running test's module. `pytest --reference live` calls it and compares its
answer with the stored one. `pytest --reference remake` calls it and stores its answer. To drop answers that
no test uses any more, remove a module's file and remake all of its tests.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

FOLDER = Path(__file__).parents[1] / "answers"
MODES = ("stored", "live", "remake")

WHOLE = 256
"""Larger arrays of floats are stored as a `Sample`."""

LARGEST, OTHERS = 16, 48
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Sample:
    """Some elements of an array: the `LARGEST` largest ones, and `OTHERS` at random."""

    shape: tuple[int, ...]
    index: np.ndarray
    """Indices into the flat array, [elements]."""
    values: np.ndarray

    @classmethod
    def of(cls, array: np.ndarray) -> "Sample":
        flat = array.ravel()
        largest = np.argsort(-np.abs(flat.astype(np.float64)), kind="stable")[:LARGEST]
        others = np.random.default_rng(flat.size).choice(flat.size, OTHERS, replace=False)
        index = np.unique(np.concatenate([largest, others])).astype(np.int32)
        return cls(array.shape, index, flat[index])

    def at(self, array: Any) -> np.ndarray:
        """Returns the same elements of another array, which broadcasts to this one's shape."""
        return np.broadcast_to(np.asarray(array), self.shape).ravel()[self.index]


class Answers:
    """The files of answers; `mode` decides whether an answer is read, compared or stored."""

    def __init__(self) -> None:
        self.mode: Literal["stored", "live", "remake"] = "stored"
        self.bypass = False
        """Whether the running test always asks the reference, and stores nothing."""
        self._files: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {}
        self._remade: set[str] = set()

    def get(self, function: Callable[..., Any], arguments: Any, whole: bool) -> Any:
        if self.bypass:
            return _plain(function(*arguments[0], **arguments[1]))
        name = _running_module()
        key = f"{function.__qualname__}-{_digest(arguments)}"
        tensors, structures = self._file(name)
        if self.mode == "remake":
            answer = _plain(function(*arguments[0], **arguments[1]))
            arrays: list[np.ndarray] = []
            structures[key] = _pack(answer, whole, arrays)
            tensors[key] = np.concatenate([np.empty(0, np.uint8), *arrays])
            self._remade.add(name)
            return answer
        if key not in structures:
            raise LookupError(
                f"tests/answers/{name}.safetensors has no answer of {function.__qualname__} for these "
                "arguments; pip install -e '.[reference]' and run this test with --reference remake"
            )
        expected = _unpack(structures[key], tensors[key])
        if self.mode == "stored":
            return expected
        answer = _plain(function(*arguments[0], **arguments[1]))
        _assert_same(answer, expected, key)
        return answer

    def write(self) -> None:
        """Writes the files of this run's new answers."""
        for name in sorted(self._remade):
            tensors, structures = self._files[name]
            path = _path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            # One entry, as safetensors writes several in a new order each time.
            metadata = {"structures": json.dumps(structures, sort_keys=True, separators=(",", ":"))}
            save_file(dict(sorted(tensors.items())), path, metadata=metadata)

    def _file(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if name not in self._files:
            tensors: dict[str, np.ndarray] = {}
            structures: dict[str, Any] = {}
            if _path(name).exists():
                with safe_open(_path(name), "np") as file:
                    structures = json.loads(file.metadata()["structures"])
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
            self._files[name] = tensors, structures
        return self._files[name]


ANSWERS = Answers()


def stored(function: Callable[..., Any] | None = None, *, whole: bool = False) -> Any:
    """Decorates a function that asks the reference, so that its answers are stored.

    The arguments are plain values, NumPy arrays, or objects with an `answer_key`. The answer consists of
    dicts, lists, tuples, plain values and arrays; tensors become arrays. Unless `whole`, a large array of
    floats comes from the file as a `Sample`.
    """
    if function is None:
        return functools.partial(stored, whole=whole)

    @functools.wraps(function)
    def ask(*positional: Any, **named: Any) -> Any:
        return ANSWERS.get(function, (positional, named), whole)

    return ask


def _running_module() -> str:
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[0]
    return test.removeprefix("tests/").removesuffix(".py")


def _path(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _pieces(value: Any) -> Any:
    """Yields a value's parts as bytes, which are equal for equal values on every platform and version."""
    if hasattr(value, "answer_key"):
        yield from _pieces(value.answer_key)
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype.str}{value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for pair in sorted(value.items(), key=repr):
            yield from _pieces(pair)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield f"sequence {len(value)}".encode()
        for each in value:
            yield from _pieces(each)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        yield f"{type(value).__name__} {value!r}".encode()
    else:
        raise TypeError(f"a stored answer cannot depend on a {type(value).__name__}; give it an answer_key")


def _plain(value: Any) -> Any:
    """Returns the answer with arrays in place of tensors."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, list):
        return list(map(_plain, value))
    if hasattr(value, "detach"):
        value = value.detach()
        if value.dtype.is_floating_point and value.dtype.itemsize == 2:  # NumPy has no bfloat16
            value = value.float()
        return value.numpy()
    return value


def _pack(value: Any, whole: bool, arrays: list[np.ndarray]) -> Any:
    """Returns the answer's structure for JSON, and appends the bytes of its arrays to `arrays`."""
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if not whole and array.size > WHOLE and array.dtype.kind == "f":
            sample = Sample.of(array)
            return {
                "sample": [array.shape, _pack(sample.index, True, arrays), _pack(sample.values, True, arrays)]
            }
        begin, narrow = sum(each.size for each in arrays), array.dtype
        if array.dtype.kind == "i" and array.size:
            narrow = np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max()))
        arrays.append(np.frombuffer(array.astype(narrow).tobytes(), np.uint8))
        return {"array": [array.shape, array.dtype.name, narrow.name, begin]}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(each, whole, arrays)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(each, whole, arrays) for each in value]}
    return {"value": value}


def _unpack(packed: dict[str, Any], stored_bytes: np.ndarray) -> Any:
    (kind, content), *_ = packed.items()
    if kind == "array":
        shape, dtype, narrow, begin = content
        flat = np.frombuffer(stored_bytes.data, narrow, math.prod(shape), begin)
        return flat.astype(dtype).reshape(shape)
    if kind == "sample":
        shape, index, values = content
        return Sample(tuple(shape), _unpack(index, stored_bytes), _unpack(values, stored_bytes))
    if kind == "dict":
        return {key: _unpack(each, stored_bytes) for key, each in content}
    if kind in ("list", "tuple"):
        parts = [_unpack(each, stored_bytes) for each in content]
        return parts if kind == "list" else tuple(parts)
    return content


def _assert_same(answer: Any, expected: Any, name: str) -> None:
    """Checks that the reference still gives the stored answer."""
    if isinstance(expected, Sample):
        assert answer.shape == expected.shape, name
        _assert_same(expected.at(answer), expected.values, name)
    elif isinstance(expected, np.ndarray):
        answer = np.asarray(answer)
        assert (answer.shape, answer.dtype) == (expected.shape, expected.dtype), name
        if expected.dtype.kind == "f":
            finite = np.abs(expected[np.isfinite(expected)])
            scale = float(finite.max()) if finite.size else 1.0
            np.testing.assert_allclose(answer, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(answer, expected, err_msg=name)
    elif isinstance(expected, dict):
        assert answer.keys() == expected.keys(), name
        for key, each in expected.items():
            _assert_same(answer[key], each, f"{name}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(answer) == len(expected), name
        for mine, each in zip(answer, expected, strict=True):
            _assert_same(mine, each, name)
    elif isinstance(expected, float):
        np.testing.assert_allclose(answer, expected, rtol=TOLERANCE, err_msg=name)
    else:
        assert answer == expected, name
