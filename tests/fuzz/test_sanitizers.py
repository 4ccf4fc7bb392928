"""The compiled data code under AddressSanitizer and UndefinedBehaviorSanitizer: seeds and mutations of them."""

from pathlib import Path

import pytest
from fuzz import TARGETS, compile_all, link, missing, run, write_seeds

INPUTS = 5000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = missing()
    if reason:
        pytest.skip(reason)
    built = tmp_path_factory.mktemp("sanitized")
    compile_all(built)
    return built


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_breaks_a_promise(target: str, folder: Path, tmp_path: Path) -> None:
    program, failing = link(target, folder), tmp_path / "failing"
    done = run(program, write_seeds(target, tmp_path / "seeds"), failing, inputs=INPUTS, seconds=20)
    kept = failing.read_bytes() if failing.exists() else b""
    assert done.returncode == 0, f"{done.stderr}\ninput: {kept!r}"
    assert int(done.stdout.split()[0]) > INPUTS / 10, "too few inputs in 20 seconds to say anything"


def test_an_input_that_breaks_a_promise_is_kept(folder: Path, tmp_path: Path) -> None:
    source, failing = tmp_path / "wrong.cpp", tmp_path / "failing"
    source.write_text(
        '#include "target.h"\n'
        'extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {\n'
        "    return size == 3 && data[size] == 1;  // a byte beyond the input\n"
        "}\n"
    )
    program = link("wrong", folder, source)
    done = run(program, [], failing, inputs=100_000, seconds=20)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert len(failing.read_bytes()) == 3
    again = run(program, [failing], tmp_path / "again")
    assert "heap-buffer-overflow" in again.stderr
