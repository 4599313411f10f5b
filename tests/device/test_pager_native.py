"""The pager's C under AddressSanitizer and UndefinedBehaviorSanitizer (native/pager_test.c), and CRC-32C."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from harness.compile import NATIVE, compile_c, run
from motorcade.core._native import lib

SOURCES = [*sorted(NATIVE.glob("pager*.c")), NATIVE / "uffd.c", NATIVE / "crc32c.c"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    test = Path(__file__).parent / "native" / "pager_test.c"
    return compile_c(tmp_path_factory.mktemp("pager") / "pager_test", [test, *SOURCES])


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("mode", ["faults", "deaths", "damage", "eager", "lies", "configs"])
def test_under_sanitizers(program: Path, mode: str, seed: int) -> None:
    run(program, mode, str(seed))


def test_crc32c_is_that_of_the_rfc_by_instruction_and_by_tables() -> None:
    """RFC 3720, appendix B.4, and Castagnoli's check value."""
    for data, crc in (
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ):
        assert lib.mc_crc32c(0, data, len(data)) == lib.mc_crc32c_tables(0, data, len(data)) == crc


def test_crc32c_of_a_part_goes_on_with_the_rest() -> None:
    rng = random.Random(1)
    for size in [*range(70), 2047, 6143, 6144, 6145, 12288, 65536, 70001]:
        data = rng.randbytes(size)
        whole = lib.mc_crc32c_tables(0, data, size)
        cut = rng.randint(0, size)
        assert lib.mc_crc32c(lib.mc_crc32c(0, data[:cut], cut), data[cut:], size - cut) == whole
