"""A realistic run and its results on disk, and the report of them, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import report_sample
from page_parser import Page

from megatron_plm.report.command import main


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 200 steps."""
    return report_sample.write_run(tmp_path_factory.mktemp("pretraining") / "run", report_sample.realistic_records())


@pytest.fixture(scope="session")
def result_directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Results of three tasks."""
    return report_sample.write_results(tmp_path_factory.mktemp("results"), report_sample.realistic_results())


@pytest.fixture(scope="session")
def page(run_directory: Path, result_directories: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the realistic run and results."""
    output = tmp_path_factory.mktemp("report") / "new" / "report.html"
    main(report_sample.arguments(run_directory, result_directories, output))
    return output


@pytest.fixture(scope="session")
def parsed(page: Path) -> Page:
    """The same page, parsed."""
    return Page(page.read_text(encoding="utf-8"))


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., str]:
    """A function that writes run records (and results) to disk, reports on them and returns the page's text."""

    def make(records: list[dict], results: list[dict] | None = None, *more: str) -> str:
        run = report_sample.write_run(tmp_path / "run", records)
        directories = report_sample.write_results(tmp_path / "results", results or [])
        output = tmp_path / "report.html"
        main([*report_sample.arguments(run, directories, output), *more])
        return output.read_text(encoding="utf-8")

    return make
