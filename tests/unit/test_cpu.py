"""What numpy, faiss and grpc find in the environment."""

from __future__ import annotations

import pytest

from shoal.cpu import core_type, prepare_environment


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fpu sse2 avx avx2 avx512f avx512bw", "SkylakeX"),
        ("fpu sse2 avx avx2", "Haswell"),
        ("fpu sse2 avx", None),
        ("fpu avx512fp16x avx2x", None),
    ],
)
def test_core_type(flags, found):
    cpuinfo = f"processor\t: 0\nmodel name\t: Some avx512f CPU\nflags\t\t: {flags}\n\n"
    assert core_type(cpuinfo * 2) == found


def test_no_flags_no_guess():
    assert core_type("") is None
    assert core_type("Features : fp asimd") is None


def test_what_the_operator_set_stays():
    given = {"OPENBLAS_CORETYPE": "Zen", "OMP_WAIT_POLICY": "ACTIVE", "GRPC_VERBOSITY": "DEBUG"}
    environ = dict(given)
    prepare_environment(environ)
    assert environ == given | {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    environ = {}
    prepare_environment(environ)
    assert environ["OMP_WAIT_POLICY"] == "PASSIVE"
