"""Compares the kernels of every variant with NumPy, and the products of programs with the kernels."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from phi3_jax.native.product import EXACT_ROWS, product
from phi3_jax.native.targets import variant

VARIANTS = ("portable", "avx2", "avx512", "avx512bf16", "neon", "neonbf16")
FORMS = ("bfloat16", "int8", "int4")
GROUPS = {
    "bfloat16": [None],
    "int8": [None, 1, 6, 8, 32, 64, 96],
    "int4": [None, 8, 24, 32, 64, 96, 128, 256],
}
"""The inputs of a group; None: all of them."""

PAIRS = ("avx512bf16", "neonbf16")
"""The variants with an instruction for pairs of bfloat16."""


class Case(NamedTuple):
    """The operands of a product, and the weight that they stand for."""

    x: np.ndarray
    weight: np.ndarray
    scale: np.ndarray | None
    zero: np.ndarray | None
    dense: np.ndarray

    @property
    def groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[1]

    @property
    def operands(self) -> list[np.ndarray]:
        return [each for each in self[:4] if each is not None]

    def rounded(self) -> "Case":
        """Returns the case with weights rounded to bfloat16, in the order of the kernels' operations."""
        numbers = self.weight
        if numbers.dtype == np.uint8:
            numbers = np.stack([numbers & 15, numbers >> 4], -1).reshape(len(numbers), -1).astype(np.int8) - 8
        assert self.scale is not None
        by_group = numbers.astype(np.float32).reshape(*self.scale.shape, -1)
        if self.zero is not None:
            by_group = by_group - self.zero[..., None]
        weight = (by_group * self.scale[..., None]).astype(ml_dtypes.bfloat16)
        return self._replace(dense=weight.astype(np.float64).reshape(numbers.shape))

    def assert_close(self, found: np.ndarray, rtol: float = 1e-5) -> None:
        """Compares with the exact product, relative to the sum of the absolute terms."""
        x = self.x.astype(np.float64)
        expected, magnitude = x @ self.dense.T, np.abs(x) @ np.abs(self.dense).T
        assert found.shape == expected.shape
        assert np.all(np.abs(found - expected) <= rtol * magnitude + 1e-30)


def make_case(
    form: str,
    dtype: Any,
    rows: int,
    inputs: int,
    outputs: int,
    group: int | None,
    zero: bool = False,
    seed: int = 0,
) -> Case:
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(rows, inputs)).astype(dtype)
    if form == "bfloat16":
        weight = draws.normal(size=(outputs, inputs)).astype(ml_dtypes.bfloat16)
        return Case(x, weight, None, None, weight.astype(np.float64))
    groups = 1 if group is None else inputs // group
    scale = draws.uniform(0.01, 1.0, (outputs, groups)).astype(np.float32)
    wide = np.repeat(scale, inputs // groups, axis=1).astype(np.float64)
    if form == "int8":
        weight = draws.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        return Case(x, weight, scale, None, weight * wide)
    numbers = draws.integers(0, 16, (outputs, inputs)).astype(np.uint8)
    zeros = draws.uniform(-9, 8, (outputs, groups)).astype(np.float32) if zero else None
    shift = 8.0 if zeros is None else 8 + np.repeat(zeros, inputs // groups, axis=1).astype(np.float64)
    return Case(x, numbers[:, ::2] | numbers[:, 1::2] << 4, scale, zeros, (numbers - shift) * wide)


class Kernels:
    """Calls the kernels without XLA, on arrays whose addresses are odd."""

    def __init__(self, library: ctypes.CDLL):
        self._product = library.phi3_jax_product_by
        self._product.restype = ctypes.c_bool

    def __call__(self, variant: str, case: Case, chunk: int = 0) -> np.ndarray:
        rows, inputs = case.x.shape
        outputs = len(case.weight)
        kept = [None if each is None else self._displaced(each.tobytes()) for each in case[:4]]
        y = self._displaced(bytes(4 * rows * outputs))
        form = FORMS.index({"int8": "int8", "uint8": "int4"}.get(str(case.weight.dtype), "bfloat16"))
        sizes = (rows, inputs, outputs, case.groups, chunk)
        done = self._product(
            variant.encode(),
            form,
            case.x.dtype != np.float32,
            *map(ctypes.c_int64, sizes),
            *(None if each is None else ctypes.c_void_p(each.ctypes.data) for each in (*kept, y)),
        )
        if not done:
            pytest.skip(f"this machine does not run {variant} for {case.x.dtype}")
        return np.frombuffer(y.tobytes(), np.float32).reshape(rows, outputs)

    @staticmethod
    def _displaced(contents: bytes) -> np.ndarray:
        return np.frombuffer(b"\0" + contents, np.uint8).copy()[1:]


@pytest.fixture(scope="session")
def kernels(library: ctypes.CDLL) -> Kernels:
    return Kernels(library)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_numpy(kernels: Kernels, variant: str, form: str, dtype: Any) -> None:
    """Shapes around the sizes of vectors, blocks and groups."""
    draws = np.random.default_rng(1)
    for seed in range(60):
        group = GROUPS[form][seed % len(GROUPS[form])]
        if group is None:
            inputs = int(draws.integers(1, 400))
            inputs += inputs % 2 if form == "int4" else 0
        else:
            inputs = group * int(draws.integers(1, max(2, 600 // group)))
        rows = int(draws.integers(17, 50) if seed % 3 == 0 else draws.integers(1, 17))
        outputs = int(draws.integers(1, 40))
        case = make_case(form, dtype, rows, inputs, outputs, group, zero=seed % 2 == 1, seed=seed)
        found = kernels(variant, case, chunk=int(draws.integers(0, 12)))
        fits = group is not None and group % {"bfloat16": 2, "int8": 4, "int4": 8}[form] == 0
        is_rounded = fits and variant in PAIRS and rows > EXACT_ROWS and case.groups > 1
        (case.rounded() if is_rounded else case).assert_close(found)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_depend_neither_on_the_other_rows_nor_on_chunks(
    kernels: Kernels, variant: str, form: str, dtype: Any
) -> None:
    """More than 16 rows take another way than fewer, by which weights in groups are rounded."""
    for rows, group in ((27, None), (16, None if form == "bfloat16" else 32)):
        case = make_case(form, dtype, rows, 352, 23, group, zero=form == "int4")
        whole = kernels(variant, case)
        for chunk in (1, 4, 12):
            np.testing.assert_array_equal(kernels(variant, case, chunk), whole)
        for first, last in ((0, 1), (3, 5), (2, 9), (4, rows - 3)):
            np.testing.assert_array_equal(
                kernels(variant, case._replace(x=case.x[first:last])), whole[first:last]
            )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_infinite_inputs_and_nan_pass_through(kernels: Kernels, variant: str, form: str) -> None:
    case = make_case(form, ml_dtypes.bfloat16, 5, 140, 9, None)
    expected = kernels(variant, case)
    for row, value in ((1, np.nan), (3, np.inf)):
        case.x[row, 139] = value
    found = kernels(variant, case)
    finite = [0, 2, 4]
    np.testing.assert_array_equal(found[finite], expected[finite])
    assert np.isnan(found[1]).all()
    last = case.dense[:, 139]
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found[3], np.inf * last)


def test_empty_sums_are_zero(kernels: Kernels) -> None:
    for form in FORMS:
        assert not kernels("portable", make_case(form, np.float32, 2, 0, 3, None)).any()


# Products of programs


CASES = {
    "bfloat16": make_case("bfloat16", ml_dtypes.bfloat16, 3, 512, 640, None),  # 640 KB: several threads
    "int8": make_case("int8", np.float32, 3, 512, 640, 64),
    "int4": make_case("int4", ml_dtypes.bfloat16, 3, 512, 640, 32),
    "int4 with zeros": make_case("int4", np.float32, 3, 512, 640, 32, zero=True),
}


@pytest.mark.parametrize("name", CASES)
def test_programs_give_the_same_bytes_in_many_threads(library: Any, kernels: Kernels, name: str) -> None:
    case = CASES[name]
    operands = [jnp.asarray(each) for each in case.operands]
    program = jax.jit(product)
    found = np.asarray(program(*operands))
    case.assert_close(found)
    with ThreadPoolExecutor(8) as pool:
        for other in pool.map(lambda _: np.asarray(program(*operands)), range(64)):
            np.testing.assert_array_equal(other, found)


@pytest.mark.parametrize("name", CASES)
def test_programs_take_many_rows(library: Any, name: str) -> None:
    """The rows are cut into parts, and copied by several threads."""
    case = CASES[name]
    draws = np.random.default_rng(3).choice([-1, 1], (397, *case.x.shape)).astype(case.x.dtype)
    case = case._replace(x=(case.x * draws).reshape(-1, case.x.shape[1]))
    program = jax.jit(product)
    found = np.asarray(program(*case.operands))
    rounds = case.scale is not None and case.scale.shape[1] > 1
    case.assert_close(found, 2**-8 if rounds and case.x.dtype == ml_dtypes.bfloat16 else 1e-5)
    for first in (0, 511, 1125):
        last = first + (EXACT_ROWS + 1 if rounds else 5)
        rows = case._replace(x=case.x[first:last])
        np.testing.assert_array_equal(np.asarray(program(*rows.operands)), found[first:last])


def test_rounds_weights_in_groups_for_many_rows(library: Any) -> None:
    """bfloat16 rows are multiplied by weights in bfloat16, as exact as a model's other weights."""
    case = CASES["int4"]
    case = case._replace(x=np.repeat(case.x, 40, axis=0))
    assert len(case.x) > EXACT_ROWS
    found = np.asarray(jax.jit(product)(*case.operands))
    (case.rounded() if variant() in PAIRS else case).assert_close(found)


def test_runs_without_jit(library: Any) -> None:
    case = make_case("int8", np.float32, 2, 40, 5, 8)
    case.assert_close(np.asarray(product(*map(jnp.asarray, case.operands))))


def test_no_operand_is_copied(library: Any) -> None:
    """XLA hands its own buffers to the library, without a transposed weight."""
    case = CASES["int4 with zeros"]
    text = jax.jit(product).lower(*case.operands).compile().as_text()
    assert "phi3_jax_product" in text
    assert not any(word in text for word in ("copy(", "transpose(", "fusion("))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_vmap(library: Any, axes: tuple[int | None, int | None]) -> None:
    draws = np.random.default_rng(2)
    x, weight = (draws.normal(size=(3, *shape)).astype(np.float32) for shape in ((2, 24), (5, 24)))
    x, weight = (jnp.asarray(each, jnp.bfloat16) for each in (x, weight))
    x, weight = (each if axis == 0 else each[0] for each, axis in zip((x, weight), axes, strict=True))
    found = jax.vmap(product, axes)(x, weight)
    expected = jnp.matmul(x, weight.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_vmap_of_rows_reads_the_weight_once(library: Any) -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 5, 1, 24), (7, 24))]
    twice = jax.vmap(jax.vmap(product, (0, None)), (0, None))
    text = jax.jit(twice).lower(*shapes).as_text()
    assert text.count("phi3_jax_product") == 1
    assert "tensor<20x24xbf16>" in text
    assert "while" not in text


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("divided", ["rows", "outputs"])
def test_shard_map(library: Any, divided: str, check: bool) -> None:
    case = make_case("int4", np.float32, 4, 64, 12, 32, zero=True)
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("i",))
    whole, cut = PartitionSpec(None, None), PartitionSpec("i", None)
    inputs = (cut, whole, whole, whole) if divided == "rows" else (whole, cut, cut, cut)
    output = cut if divided == "rows" else PartitionSpec(None, "i")
    program = jax.shard_map(product, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=check)
    case.assert_close(np.asarray(jax.jit(program)(*case.operands)))


BAD: dict[str, Callable[[Case], dict[str, Any]]] = {
    "inputs": lambda case: {"x": case.x[:, 1:]},
    "dtype of rows": lambda case: {"x": case.x.astype(np.int32)},
    "axes": lambda case: {"x": case.x[None]},
    "no scale": lambda case: {"scale": None},
    "outputs of the scale": lambda case: {"scale": case.scale[1:]},  # type: ignore[index]
    "dtype of the scale": lambda case: {"scale": case.scale.astype(np.float16)},  # type: ignore[union-attr]
    "groups": lambda case: {"scale": np.ones((5, 3), np.float32)},
    "groups of the zeros": lambda case: {"zero": np.ones((5, 2), np.float32)},
    "zeros of int8": lambda case: {"weight": np.ones((5, 64), np.int8)},
    "scale of bfloat16": lambda case: {"weight": np.ones((5, 64), ml_dtypes.bfloat16)},
    "dtype of the weight": lambda case: {"weight": np.ones((5, 64), np.float32)},
}


@pytest.mark.parametrize("name", BAD)
def test_rejects_operands_that_do_not_fit(name: str) -> None:
    case = make_case("int4", np.float32, 2, 64, 5, 16, zero=True)
    arguments = case._asdict() | BAD[name](case)
    del arguments["dense"]
    converted = {key: each if each is None else jnp.asarray(each) for key, each in arguments.items()}
    with pytest.raises(ValueError, match=r"product\(.*\): expected"):
        jax.eval_shape(partial(product, **converted))
