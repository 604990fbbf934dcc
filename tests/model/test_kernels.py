"""Attention kernels in interpret mode against the XLA path; what they compile to for an absent TPU."""

import dataclasses
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.model.attention import attention
from phi3_jax.model.kernels import cached, cudnn, splash
from phi3_jax.model.kernels.blockwise import blockwise_attention
from phi3_jax.model.kernels.xla import xla_attention
from phi3_jax.model.masks import CausalMask

SCALE = 0.31
HEADS = {"mha": (3, 1), "gqa": (2, 3), "mqa": (1, 4)}


def _product(*values: list, always: list[tuple]) -> list:
    """All combinations; those not in `always` only among the slow tests."""
    combinations = list(itertools.product(*values))
    assert set(always) <= set(combinations)
    marks = {case: () if case in always else pytest.mark.slow for case in combinations}
    return [pytest.param(*case, marks=mark) for case, mark in marks.items()]


def _arrays(batch: int, length: int, size: int, heads: tuple[int, int], width: int) -> list[np.ndarray]:
    """Queries, keys and values; made by NumPy, as each JAX function outside `jit` is a program to compile."""
    random = np.random.default_rng(0)
    kv_heads, groups = heads
    shapes = (batch, length, kv_heads, groups, width), *[(batch, kv_heads, size, width)] * 2
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def _tokens(padding: str, batch: int, size: int) -> np.ndarray:
    """[B, S], True for tokens; each row has another number of them."""
    lengths = size - np.arange(batch)[:, None] * (size // 3) - 5
    places = np.arange(size)
    if padding == "left":
        return places >= size - lengths
    if padding == "right":
        return places < lengths
    return np.ones((batch, size), bool)


def _fresh(padding: str, batch: int, length: int, window: int | None) -> CausalMask:
    slots = np.arange(length, dtype=np.int32)[None]
    return CausalMask(
        query_slots=np.repeat(slots, batch, axis=0),
        key_slots=slots,
        key_mask=_tokens(padding, batch, length),
        window=window,
        prefill=True,
    )


def _cache(
    padding: str, batch: int, size: int, used: int, length: int, window: int | None, ragged: int = 0
) -> CausalMask:
    """`length` queries at the end of a cache of `size` slots of which `used` are taken.

    Each next row has taken `ragged` fewer, its queries included.
    """
    slots = np.arange(size, dtype=np.int32)[None]
    lengths = used - ragged * np.arange(batch, dtype=np.int32)[:, None]
    query_slots = lengths - length + np.arange(length, dtype=np.int32)
    tokens = np.pad(_tokens(padding, batch, used), ((0, 0), (0, size - used)))
    tokens |= slots >= query_slots[:, :1]  # the queries' own keys
    return CausalMask(query_slots, slots, tokens & (slots < lengths), window)


def _loss(attend: Callable[..., jax.Array], weight: np.ndarray) -> Callable[..., jax.Array]:
    """Gradients of the weighted sum over queries, keys and values, and the attended values."""

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*arrays)
        return jnp.sum(out * weight), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def _xla(mask: CausalMask, *arrays: jax.Array | QuantizedVectors) -> jax.Array:
    return attention(*arrays, mask.dense(), scale=SCALE)[0]


def _assert_close(actual: np.ndarray, expected: np.ndarray, rtol: float = 1e-5) -> None:
    """Equal to `rtol`, of the largest number."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def _assert_seen_equal(
    actual: np.ndarray, expected: np.ndarray, mask: CausalMask, rtol: float = 1e-5
) -> None:
    """Equal where a query sees anything; finite everywhere."""
    assert np.isfinite(actual).all()
    seen = np.asarray(mask.dense())[:, 0].any(axis=2)
    _assert_close(np.asarray(actual)[seen], np.asarray(expected)[seen], rtol)


def _tokens_only(mask: CausalMask) -> np.ndarray:
    """Leaves padding out of the loss, as training does."""
    return mask.key_mask[:, :, None, None, None]


class TestSplash:
    @pytest.mark.parametrize(
        ("padding", "window"),
        _product(["none", "left", "right"], [None, 40, 500], always=[("right", 40)]),
    )
    def test_padding_and_windows(self, padding: str, window: int | None) -> None:
        """Blocks are of 384: windows lie within one or span two."""
        self._compare(2, 700, HEADS["gqa"], 64, window, padding)

    @pytest.mark.parametrize(("heads", "width"), _product(list(HEADS), [64, 96, 128], always=[("mha", 96)]))
    def test_heads_and_widths(self, heads: str, width: int) -> None:
        self._compare(2, 200, HEADS[heads], width, None, "left")

    @staticmethod
    def _compare(
        batch: int, length: int, heads: tuple[int, int], width: int, window: int | None, padding: str
    ) -> None:
        mask = _fresh(padding, batch, length, window)
        arrays = _arrays(batch, length, length, heads, width)
        kernel = splash.make_kernel(heads[1], length, window, interpret=True)

        def run(*arrays: jax.Array) -> jax.Array:
            return splash.attend(kernel, *arrays, mask.key_mask, SCALE)

        weight = _arrays(batch, length, 1, heads, width)[0] * _tokens_only(mask)

        @jax.jit
        def both(*arrays: jax.Array) -> tuple:
            return _loss(run, weight)(*arrays), _loss(partial(_xla, mask), weight)(*arrays)

        (gradients, out), (expected_gradients, expected) = both(*arrays)
        _assert_seen_equal(out, expected, mask)
        jax.tree.map(_assert_close, gradients, expected_gradients)

    def test_queries_that_see_nothing_stay_finite(self) -> None:
        arrays = _arrays(2, 256, 256, HEADS["gqa"], 64)
        key_mask = np.array([[False], [True]]) & (np.arange(256) >= 200)
        kernel = splash.make_kernel(3, 256, None, interpret=True)
        run = _loss(lambda *arrays: splash.attend(kernel, *arrays, key_mask, SCALE), arrays[0])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(run)(*arrays)))

    @pytest.mark.parametrize("window", [None, 40, 300])
    @pytest.mark.parametrize(("block", "length"), [((128, 128), 512), ((256, 128), 512), ((128, 256), 768)])
    def test_blocks_are_told_as_they_are(
        self, window: int | None, block: tuple[int, int], length: int
    ) -> None:
        mask = splash._CausalBlocks(length, window)
        dense = np.asarray(_fresh("none", 1, length, window).dense())[0, 0]
        for query in range(0, length, block[0]):
            for key in range(0, length, block[1]):
                place = slice(query, query + block[0]), slice(key, key + block[1])
                np.testing.assert_array_equal(mask[place], [dense[place].any(), dense[place].all()])

    @pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 700])
    def test_pieces_of_the_queries(self, window: int | None) -> None:
        """Each device of a context axis holds half of the queries, in two blocks, and all keys."""
        pieces, length, heads = 2, 1536, (1, 2)
        mask = _fresh("left", 2, length, window)
        query, key, value = _arrays(2, length, length, heads, 64)
        weight = query * _tokens_only(mask)
        kernel = splash.make_kernel(heads[1], length, window, shards=pieces, interpret=True)
        specs = splash.kernel_specs(kernel, AbstractMesh((pieces,), ("context",)), "context")

        def piece(x: np.ndarray, spec: PartitionSpec, index: int) -> np.ndarray:
            return np.split(x, pieces, axis=list(spec).index("context"))[index]

        @jax.jit
        def run(leaves: list, weight: jax.Array, *arrays: jax.Array) -> tuple:
            kernel = jax.tree.unflatten(jax.tree.structure(specs), leaves)
            return _loss(lambda *arrays: splash.attend(kernel, *arrays, mask.key_mask, SCALE), weight)(
                *arrays
            )

        outs, gradients = [], []
        for index in range(pieces):
            cut = [
                piece(x, spec, index) for x, spec in zip(*map(jax.tree.leaves, (kernel, specs)), strict=True)
            ]
            place = np.s_[:, index * length // pieces : (index + 1) * length // pieces]
            gradient, out = run(cut, weight[place], query[place], key, value)
            outs.append(out)
            gradients.append(gradient)
        of_query, of_key, of_value = zip(*gradients, strict=True)
        expected_gradients, expected = jax.jit(_loss(partial(_xla, mask), weight))(query, key, value)
        _assert_seen_equal(np.concatenate(outs, axis=1), expected, mask)
        _assert_close(np.concatenate(of_query, axis=1), expected_gradients[0])
        _assert_close(sum(of_key), expected_gradients[1])
        _assert_close(sum(of_value), expected_gradients[2])

    def test_pieces_must_be_whole_tiles(self) -> None:
        with pytest.raises(ValueError, match=r"1000 tokens .* context=4 .* pad them to 1024"):
            splash.make_kernel(1, 1000, None, shards=4)

    def test_a_long_kernel_is_made_of_little(self) -> None:
        kernel = splash.make_kernel(4, 131072, None)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(kernel)) < 4e6


def _cached(*arrays: jax.Array | QuantizedVectors, mask: CausalMask) -> tuple[jax.Array, jax.Array]:
    return cached.cached_attention(*arrays, mask, scale=SCALE, interpret=True)


def _compare_cached(arrays: list, mask: CausalMask, rtol: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel gives, after comparison with the XLA path."""

    @jax.jit
    def both(arrays: list, mask: CausalMask) -> tuple:
        return _cached(*arrays, mask=mask), _xla(mask, *arrays)

    (out, lse), expected = jax.tree.map(np.asarray, both(arrays, mask))
    _assert_seen_equal(out, expected, mask, rtol)
    return out, lse


class TestCached:
    @pytest.mark.parametrize(
        ("length", "padding", "window"),
        _product(
            [1, 5, 300],
            ["none", "left", "right"],
            [None, 40, 700],
            always=[(1, "left", 700), (5, "right", 40), (300, "left", None)],
        ),
    )
    def test_padding_and_windows(self, length: int, padding: str, window: int | None) -> None:
        """A step of decoding, drafts, a chunk; windows that lie within a block of 512 or span two."""
        arrays = _arrays(3, length, 1536, HEADS["gqa"], 64)
        _compare_cached(arrays, _cache(padding, 3, 1536, 1200, length, window, ragged=150))

    @pytest.mark.parametrize(
        ("heads", "width", "size"),
        _product(
            list(HEADS),
            [64, 96, 128],
            [200, 2100],
            always=[("mha", 96, 200), ("gqa", 128, 2100), ("mqa", 64, 2100)],
        ),
    )
    def test_heads_widths_and_sizes(self, heads: str, width: int, size: int) -> None:
        """2,100 keys end within a block."""
        arrays = _arrays(2, 3, size, HEADS[heads], width)
        _compare_cached(arrays, _cache("left", 2, size, size, 3, None))

    def test_heads_in_several_steps(self) -> None:
        heads = (8, 1)
        assert cached.choose_blocks(2, *heads, 96, 640, 4).heads == 4
        _compare_cached(_arrays(1, 2, 640, heads, 96), _cache("left", 1, 640, 600, 2, None))

    @pytest.mark.parametrize("used", [300, pytest.param(640, marks=pytest.mark.slow), 1500])
    def test_ring(self, used: int) -> None:
        """Not yet full, just full, gone round twice."""
        size, length = 640, 4
        last = np.array([[used - 1], [used - 150]])
        key_slots = last - (last - np.arange(size)) % size
        mask = CausalMask(
            query_slots=last - length + 1 + np.arange(length),
            key_slots=key_slots,
            key_mask=(key_slots >= 0) & (key_slots != used - 20),
            window=600,
        )
        _compare_cached(_arrays(2, length, size, HEADS["gqa"], 96), mask)

    @pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 200])
    def test_pieces_of_a_cache_are_combined(self, window: int | None) -> None:
        """Two devices hold half of the slots each; one of them sees nothing of a short row."""
        size, length = 1024, 3
        arrays = _arrays(3, length, size, HEADS["gqa"], 64)
        mask = _cache("left", 3, size, 1000, length, window, ragged=300)
        whole, whole_lse = _compare_cached(arrays, mask)
        query, key, value = arrays
        pieces = []
        run = jax.jit(_cached)
        for half in (np.s_[:512], np.s_[512:]):
            part = dataclasses.replace(
                mask, key_slots=mask.key_slots[:, half], key_mask=mask.key_mask[:, half]
            )
            pieces.append(run(query, key[:, :, half], value[:, :, half], mask=part))
        out, lse = (np.stack(x) for x in zip(*pieces, strict=True))
        assert (lse == cached.UNSEEN).any()
        together = jnp.einsum("p...,p...H->...H", jax.nn.softmax(lse, axis=0), out)
        np.testing.assert_allclose(together, whole, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.nn.logsumexp(lse, axis=0), whole_lse, rtol=1e-5)

    def test_log_sum_exp(self) -> None:
        query, key, value = _arrays(2, 3, 640, HEADS["gqa"], 64)
        mask = _cache("left", 2, 640, 600, 3, 100)
        _, lse = _compare_cached([query, key, value], mask)
        scores = np.einsum("BTKGH,BKSH->BTKGS", query, key) * SCALE
        visible = np.asarray(mask.dense())[:, 0, :, None, None]
        _assert_close(lse, np.log(np.exp(scores).sum(axis=-1, where=visible)))

    def test_queries_that_see_nothing(self) -> None:
        arrays = _arrays(2, 2, 640, HEADS["gqa"], 64)
        mask = _cache("none", 2, 640, 600, 2, None)
        mask = dataclasses.replace(mask, key_mask=mask.key_mask & [[True], [False]])
        out, lse = _compare_cached(arrays, mask)
        assert (out[1] == 0).all()
        assert (lse[1] == cached.UNSEEN).all()
        assert (lse[0] > cached.UNSEEN).all()

    @pytest.mark.parametrize(("length", "width"), _product([1, 40], [96, 128], always=[(1, 96), (40, 128)]))
    def test_int8_cache(self, length: int, width: int) -> None:
        query, key, value = _arrays(2, length, 640, (6, 2), width)
        key, value = (jax.jit(QuantizedVectors.quantize)(x) for x in (key, value))
        _compare_cached([query, key, value], _cache("left", 2, 640, 600, length, 300))

    def test_bfloat16_queries_over_a_float32_cache(self) -> None:
        query, key, value = _arrays(2, 1, 640, HEADS["gqa"], 96)
        _compare_cached([query.astype(jnp.bfloat16), key, value], _cache("left", 2, 640, 600, 1, None), 1e-2)

    def test_dead_blocks_are_not_read(self) -> None:
        """What no query sees may be anything."""
        heads = (8, 1)
        assert cached.choose_blocks(2, *heads, 64, 2048, 4).keys == 512
        query, key, value = _arrays(1, 2, 2048, heads, 64)
        mask = _cache("none", 1, 2048, 1500, 2, 300)
        dead = (np.arange(2048) < 1024) | (np.arange(2048) >= 1536)
        run = jax.jit(_cached)
        out, _ = run(query, key, value, mask=mask)
        poisoned, _ = run(query, *(np.where(dead[:, None], jnp.nan, x) for x in (key, value)), mask=mask)
        np.testing.assert_array_equal(poisoned, out)

    def test_visible_blocks(self) -> None:
        key_slots = np.where(_cache("left", 2, 1024, 700, 1, None).key_mask, np.arange(1024), cached.FAR)
        query_slots = np.array([[[10, 11], [698, 699]]] * 2)
        order, counts = cached.visible_blocks(query_slots, key_slots, None, 128)
        assert order[0].tolist() == [[0] * 8, [0, 1, 2, 3, 4, 5, 5, 5]]
        assert order[1, 1].tolist() == [1, 2, 3, 4, 5, 5, 5, 5]
        assert counts.tolist() == [[1, 6], [0, 5]]
        order, counts = cached.visible_blocks(query_slots, key_slots, 200, 128)
        assert order[:, 1].tolist() == [[3, 4, 5, 5, 5, 5, 5, 5]] * 2
        assert counts[:, 1].tolist() == [3, 3]


class TestLive:
    """Blocks are of 256 queries and 512 keys."""

    @pytest.mark.parametrize(
        ("length", "padding", "window"),
        _product(
            [40, 300],
            ["none", "left", "right"],
            [None, 40, 700],
            always=[(40, "right", None), (300, "left", 40)],
        ),
    )
    def test_padding_and_windows(self, length: int, padding: str, window: int | None) -> None:
        """The last block of 1,300 keys lies over the one before it."""
        arrays = _arrays(3, length, 1300, HEADS["gqa"], 64)
        self._compare(arrays, _cache(padding, 3, 1300, 1200, length, window, ragged=150))

    def test_a_cache_smaller_than_a_block(self) -> None:
        self._compare(_arrays(2, 33, 70, HEADS["mqa"], 96), _cache("left", 2, 70, 70, 33, None))

    def test_ring(self) -> None:
        size, length, used = 1640, 40, 3000
        key_slots = used - 1 - (used - 1 - np.arange(size)[None]) % size
        query_slots = used - length + np.arange(length)[None]
        mask = CausalMask(query_slots, key_slots, key_slots != used - 20, window=600)
        self._compare(_arrays(1, length, size, HEADS["mha"], 64), mask)

    def test_bfloat16_queries_over_a_float32_cache(self) -> None:
        query, key, value = _arrays(2, 40, 640, HEADS["gqa"], 96)
        self._compare([query.astype(jnp.bfloat16), key, value], _cache("left", 2, 640, 600, 40, None), 1e-2)

    def test_what_no_query_sees_is_not_read(self) -> None:
        query, key, value = _arrays(1, 300, 2048, HEADS["gqa"], 64)
        mask = _cache("none", 1, 2048, 1500, 300, 100)
        dead = (np.arange(2048) < 1024) | (np.arange(2048) >= 1536)
        run = jax.jit(partial(blockwise_attention, scale=SCALE))
        out = run(query, key, value, mask).out
        poisoned = run(query, *(np.where(dead[:, None], jnp.nan, x) for x in (key, value)), mask).out
        np.testing.assert_array_equal(poisoned, out)

    def test_queries_that_see_nothing(self) -> None:
        arrays = _arrays(2, 40, 640, HEADS["gqa"], 64)
        mask = _cache("none", 2, 640, 600, 40, None)
        some = dataclasses.replace(mask, key_mask=mask.key_mask & [[True], [False]])
        self._compare(arrays, some)
        none = dataclasses.replace(mask, key_mask=mask.key_mask & False)
        attended = jax.jit(partial(blockwise_attention, scale=SCALE))(*arrays, none)
        assert (attended.out == 0).all()
        assert (attended.lse == np.finfo(np.float32).min).all()

    def test_gradients_are_those_of_the_plain_way(self) -> None:
        arrays = _arrays(2, 40, 640, HEADS["gqa"], 64)
        mask = _cache("left", 2, 640, 600, 40, None)
        weight = np.random.default_rng(1).standard_normal(arrays[0].shape, np.float32)

        def attend(*arrays: jax.Array) -> jax.Array:
            return attention(*arrays, mask, scale=SCALE)[0]

        scores = "40x640"  # of all queries and keys at a time
        dense, blocks = (jax.jit(f).lower(*arrays).as_text() for f in (partial(_xla, mask), attend))
        assert scores in dense
        assert scores not in blocks
        ours = jax.jit(_loss(attend, weight))(*arrays)
        theirs = jax.jit(_loss(partial(_xla, mask), weight))(*arrays)
        jax.tree.map(_assert_close, ours, theirs)

    @staticmethod
    def _compare(arrays: list, mask: CausalMask, rtol: float = 1e-5) -> None:
        run = jax.jit(partial(blockwise_attention, scale=SCALE))
        expected = jax.jit(partial(xla_attention, scale=SCALE, output_lse=True))(*arrays, mask.dense())
        attended = run(*arrays, mask)
        _assert_seen_equal(attended.out.astype(jnp.float32), expected.out.astype(jnp.float32), mask, rtol)
        seen = np.asarray(mask.dense())[:, 0].any(axis=2)
        lse, expected_lse = (np.asarray(x.lse).swapaxes(1, 2)[seen] for x in (attended, expected))
        np.testing.assert_allclose(lse, expected_lse, rtol=rtol, atol=rtol)


class TestCudnn:
    """There is no GPU here: what can be checked is that it lowers, and what it is given."""

    @pytest.fixture
    def _cudnn_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
        cudnn._installed.cache_clear()
        yield
        cudnn._installed.cache_clear()

    @pytest.mark.usefixtures("_cudnn_is_installed")
    def test_what_is_supported(self) -> None:
        assert cudnn.supported(jnp.bfloat16, 96)
        assert cudnn.supported(jnp.float16, 128)
        assert not cudnn.supported(jnp.float32, 96)
        assert not cudnn.supported(jnp.bfloat16, 160)
        assert not cudnn.supported(jnp.bfloat16, 100)

    def test_without_cudnn_nothing_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None)
        cudnn._installed.cache_clear()
        assert not cudnn.supported(jnp.bfloat16, 96)
        cudnn._installed.cache_clear()

    @pytest.mark.usefixtures("_cudnn_is_installed")
    @pytest.mark.parametrize("case", ["fresh", "window", "cache"])
    def test_lowers_for_cuda(self, case: str) -> None:
        window = 40 if case == "window" else None
        length = 1 if case == "cache" else 101
        mask = _cache("left", 2, 640, 600, 1, None) if case == "cache" else _fresh("left", 2, 101, window)
        arrays = [
            x.astype(jnp.bfloat16) for x in _arrays(2, length, mask.key_mask.shape[1], HEADS["gqa"], 96)
        ]
        run = jax.jit(partial(cudnn.cudnn_attention, scale=SCALE))
        text = run.trace(*arrays, mask).lower(lowering_platforms=("cuda",)).as_text()
        kind = "ScaleBiasSoftmax" if case != "fresh" else "Softmax"
        assert f"__cudnn$fmha{kind}(" in text

    @pytest.mark.parametrize("holes", [False, True])
    @pytest.mark.parametrize("window", [None, 40, 500])
    def test_what_cudnn_is_asked_for_is_this_attention(
        self, monkeypatch: pytest.MonkeyPatch, window: int | None, holes: bool
    ) -> None:
        """With JAX's XLA attention in cuDNN's place."""
        monkeypatch.setattr(
            jax.nn, "dot_product_attention", _without_implementation(jax.nn.dot_product_attention)
        )

        @jax.jit
        def both(arrays: list, mask: CausalMask) -> tuple[jax.Array, jax.Array]:
            return cudnn.cudnn_attention(*arrays, mask, scale=SCALE), _xla(mask, *arrays)

        for padding in ("none", "left", "right"):
            mask = _fresh(padding, 3, 101, window)
            if holes:
                mask = dataclasses.replace(mask, key_mask=mask.key_mask & (np.arange(101) % 7 != 3))
            arrays = _arrays(3, 101, 101, HEADS["gqa"], 64)
            out, expected = jax.tree.map(np.asarray, both(arrays, mask))
            _assert_close(out[mask.key_mask], expected[mask.key_mask])
            assert np.isfinite(out).all()


def _without_implementation(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args, implementation, **kwargs: function(*args, **kwargs)


def _decode(
    query: jax.Array,
    new: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    at: jax.Array,
    key_mask: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """New keys and values into the cache, in place, then attention over it."""
    cache = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=2), cache, new)
    batch, length = query.shape[:2]
    key_slots = jnp.arange(key_mask.shape[1])[None]
    query_slots = jnp.broadcast_to(at + jnp.arange(length), (batch, length))
    mask = CausalMask(query_slots, key_slots, key_mask, window=None)
    out, _ = cached.cached_attention(query, *cache, mask, scale=SCALE)
    return out, cache


def _decode_shapes(
    batch: int,
    length: int,
    heads: tuple[int, int],
    width: int,
    size: int,
    sharding: NamedSharding | None = None,
) -> tuple:
    shape = partial(jax.ShapeDtypeStruct, sharding=sharding)
    kv_heads, groups = heads
    query = shape((batch, length, kv_heads, groups, width), jnp.bfloat16)
    new = shape((batch, kv_heads, length, width), jnp.bfloat16)
    whole = shape((batch, kv_heads, size, width), jnp.bfloat16)
    return query, (new, new), (whole, whole), shape((), jnp.int32), shape((batch, size), bool)


def _splash_gradients(query: jax.Array, key: jax.Array, value: jax.Array, key_mask: jax.Array) -> tuple:
    kernel = splash.make_kernel(query.shape[3], query.shape[1], None)

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(splash.attend(kernel, *arrays, key_mask, SCALE).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


class TestLowering:
    """From any machine: kernels are chosen by the platform that a program is lowered for."""

    def test_splash(self) -> None:
        arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in _arrays(1, 300, 300, (2, 2), 96)]
        run = jax.jit(_splash_gradients).trace(*arrays, jax.ShapeDtypeStruct((1, 300), bool))
        text = run.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 3

    @pytest.mark.parametrize("length", [1, 40])
    def test_cached(self, length: int) -> None:
        run = jax.jit(_decode).trace(*_decode_shapes(2, length, (2, 2), 96, 256))
        assert "tpu_custom_call" in run.lower(lowering_platforms=("tpu",)).as_text()


class TestCompiledForTPU:
    """Compiled for a TPU that is not there; libtpu can do that."""

    @pytest.fixture
    def mesh(self, monkeypatch: pytest.MonkeyPatch) -> Mesh:
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("libtpu is not installed: `pip install libtpu` compiles for TPUs without having one")
        from jax.experimental import topologies

        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no search for a TPU in the network
        monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may compile as well
        topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
        return Mesh(np.array(topology.devices), ("context",))

    def test_splash_takes_no_memory_of_length_squared(self, mesh: Mesh) -> None:
        length, heads, width = 32768, (2, 2), 96
        sharding = NamedSharding(Mesh(mesh.devices[:1], ("context",)), PartitionSpec())
        shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharding)
        query, key = shape((1, length, *heads, width)), shape((1, heads[0], length, width))
        key_mask = jax.ShapeDtypeStruct((1, length), bool, sharding=sharding)
        program = jax.jit(_splash_gradients).lower(query, key, key, key_mask).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        assert temporary < length**2 / 4  # one bit a score would take half of that
        assert temporary < 12 * query.size * 2

    def test_splash_over_a_context_axis(self, mesh: Mesh) -> None:
        length, heads, width = 4096, (2, 2), 96
        kernel = splash.make_kernel(heads[1], length, None, shards=4)
        whole, cut = PartitionSpec(), PartitionSpec(None, "context")
        run = jax.shard_map(
            lambda *args: splash.attend(*args, SCALE),
            mesh=mesh,
            in_specs=(splash.kernel_specs(kernel, mesh, "context"), cut, whole, whole, whole),
            out_specs=cut,
            check_vma=False,
        )

        def loss(*arrays: jax.Array) -> jax.Array:
            *arrays, key_mask = arrays
            return jnp.sum(run(kernel, *arrays, key_mask).astype(jnp.float32))

        def shape(spec: PartitionSpec, *shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        arrays = shape(cut, 1, length, *heads, width), *[shape(whole, 1, heads[0], length, width)] * 2
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        text = program.lower(*arrays, shape(whole, 1, length, dtype=bool)).compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 3

    @pytest.mark.parametrize(
        ("batch", "length", "heads", "width"),
        [(1, 1, (32, 1), 96), (4, 1, (10, 4), 128), (4, 1, (8, 3), 128), (1, 512, (32, 1), 96)],
    )
    def test_a_cache_is_read_where_it_lies(
        self, mesh: Mesh, batch: int, length: int, heads: tuple[int, int], width: int
    ) -> None:
        size = 4096
        sharding = NamedSharding(Mesh(mesh.devices[:1], ("context",)), PartitionSpec())
        shapes = _decode_shapes(batch, length, heads, width, size, sharding)
        program = jax.jit(_decode, donate_argnums=2).lower(*shapes).compile()
        text = program.as_text()
        assert 'custom_call_target="tpu_custom_call"' in text
        of_the_cache = rf"\[{batch},{heads[0]},({size},{width}|{width},{size})\]"
        moved = [
            line
            for line in text.splitlines()
            if re.search(rf"= \(?\w+{of_the_cache}.* (copy|transpose)\(", line)
        ]
        assert moved == []
        cache_bytes = 2 * 2 * batch * heads[0] * size * width
        activations = 4 * 4 * batch * length * heads[0] * heads[1] * 128
        assert program.memory_analysis().temp_size_in_bytes < cache_bytes / 50 + activations
