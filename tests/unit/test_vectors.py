"""Vectors on their way in: length 1, datatypes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.storage_api import Distance
from shoal.vectors import Datatype, VectorField, VectorFields, prepare_query, prepare_rows

COSINE = VectorField(4, Distance.COSINE)
DOT = VectorField(4, Distance.DOT)


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


def test_cosine_rows_get_length_one_whatever_their_magnitude() -> None:
    block = rows([1, 2, 3, 4], [0, 0, 0, 0], [3e38] * 4, [1e-44, 0, 0, 0], [-1e-30, 0, 0, 0])
    assert prepare_rows(block, COSINE) is None
    lengths = np.linalg.norm(block.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, [1, 0, 1, 1, 1], atol=1e-6)
    assert block[4, 0] < 0


def test_a_vector_that_was_read_and_is_written_again_stays_the_same() -> None:
    block = np.random.default_rng(5).standard_normal((100, 4)).astype(np.float32)
    prepare_rows(block, COSINE)
    again = block.copy()
    prepare_rows(again, COSINE)
    np.testing.assert_array_equal(block, again)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_named(bad: float) -> None:
    block = rows([1, 2, 3, 4], [1, bad, 3, 4], [bad, 2, 3, 4])
    for to in (COSINE, DOT):
        assert prepare_rows(block.copy(), to) == 1
    assert prepare_rows(np.empty((0, 4), np.float32), COSINE) is None


def test_datatypes_round_and_say_what_does_not_fit() -> None:
    half = VectorField(4, Distance.DOT, Datatype.FLOAT16)
    block = rows([0.1, 1, 2049, -65504])
    assert prepare_rows(block, half) is None
    assert block[0].tolist() == [float(np.float16(0.1)), 1.0, 2048.0, -65504.0]
    assert prepare_rows(rows([1, 2, 3, 4], [1e5, 0, 0, 0]), half) == 1
    octets = rows([-3, 1.9, 255.9, 300])
    assert prepare_rows(octets, VectorField(4, Distance.DOT, Datatype.UINT8)) is None
    assert octets[0].tolist() == [0, 1, 255, 255]


def test_queries() -> None:
    query = np.array([1.0, 2, 3, 4])
    found = prepare_query(query, COSINE)
    assert found is not None
    assert found.dtype == np.float32
    stored = rows([1, 2, 3, 4])
    prepare_rows(stored, COSINE)
    np.testing.assert_allclose(found, stored[0], rtol=1e-6)
    unchanged = prepare_query(query, DOT)
    assert unchanged is not None
    assert unchanged.tolist() == [1, 2, 3, 4]
    for fits in ([3e38] * 4, [1e-300] * 4, [0.0] * 4):
        vector = prepare_query(np.array(fits), COSINE)
        assert vector is not None
        assert np.isfinite(vector).all()
    for too_large in ([1e39, 0, 0, 0], [1e300] * 4, [np.inf, 0, 0, 0], [np.nan, 0, 0, 0]):
        assert prepare_query(np.array(too_large), COSINE) is None
        assert prepare_query(np.array(too_large), DOT) is None


def test_names() -> None:
    fields = VectorFields({"a": DOT}, frozenset({"s"}))
    assert "a" in fields
    assert "s" in fields
    assert "" not in fields
