"""What the page says: every section, numbers equal to the inputs, nothing loaded from elsewhere, nothing injected."""

import base64
import html
import math
import re
import struct
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_sample as sample

# elements that HTML closes by itself
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects a page's tags, section ids, table rows and text; fails on tags that don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    def cells(self) -> list[list[str]]:
        """The table rows, white space squeezed."""
        return [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def words(self) -> str:
        """The text, white space squeezed."""
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def parsed(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def test_the_page_nests_and_has_every_section(parsed: Page) -> None:
    assert parsed.ids == ["summary", "pretraining", "downstream", "configuration", "commands", "versions"]
    links = [value for name, value in parsed.attributes if name == "href"]
    assert links == [f"#{name}" for name in parsed.ids[1:]]


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(page: Path, parsed: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    sources = [value or "" for name, value in parsed.attributes if name in ("src", "srcset")]
    assert len(sources) == 2 * 9  # six plots of training and three of scores, light and dark
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?i)https?://|url\(|@import|\bon\w+=|javascript:", text)


def test_each_embedded_plot_is_the_png_beside_the_page_or_its_dark_twin(page: Path, parsed: Page) -> None:
    beside = {path.read_bytes() for path in page.parent.glob("report-*.png")}
    light = {base64.b64decode((value or "").split(",")[1]) for name, value in parsed.attributes if name == "src"}
    dark = {base64.b64decode((value or "").split(",")[1]) for name, value in parsed.attributes if name == "srcset"}
    assert light == beside
    assert len(dark) == len(light)
    assert not dark & light
    for image in light | dark:
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", image[16:24])
        assert width > 900
        assert height > 250


def test_every_plot_has_a_text_for_readers_who_do_not_see_it(parsed: Page) -> None:
    texts = [value or "" for name, value in parsed.attributes if name == "alt"]
    assert len(texts) == 9
    last = [record for record in sample.realistic_records() if record["kind"] == "valid"][-1]
    assert any(f"{last['perplexity']:.2f} at step 200" in text and "17.97" in text for text in texts)
    assert any("one-hot on test 0.826 [0.793, 0.858]" in text for text in texts)


def test_every_score_of_every_result_is_a_row_of_the_table(parsed: Page) -> None:
    expected = []
    for result in sample.realistic_results():
        label = result["label"] + (f" {result['note']}" if result["note"] else "")
        for split, scores in result["splits"].items():
            cropped = f" ({scores['cropped']} cropped)" if scores["cropped"] else ""
            for metric, score in scores["metrics"].items():
                value = f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
                trained = f"{result['num_trained_parameters']:,}"
                examples = f"{scores['num_examples']:,}{cropped}"
                expected.append([label, split, metric, value, examples, trained, f"{result['seconds']:.1f}"])
    rows = [row for row in parsed.cells() if len(row) == 7 and row[0] != "Model"]
    assert sorted(rows) == sorted(expected)


def test_every_validation_is_a_row_of_the_table(parsed: Page) -> None:
    expected = [
        [
            str(record["step"]),
            f"{record['loss']:.4f}",
            f"{record['perplexity']:.3f}",
            f"{record['unigram_perplexity']:.3f}",
            f"{record['accuracy']:.4f}",
            f"{record['num_labels']:,}",
        ]
        for record in sample.realistic_records()
        if record["kind"] == "valid"
    ]
    rows = [row for row in parsed.cells() if len(row) == 6]
    assert rows[1:11] == expected


def test_the_summary_tells_what_was_trained_for_how_long_and_what_came_out(parsed: Page) -> None:
    words = parsed.words()
    last = [record for record in sample.realistic_records() if record["kind"] == "valid"][-1]
    below = 100 * (1 - last["perplexity"] / 17.97)
    assert "7.51 million parameters" in words
    assert "4,512 proteins (1.61 million residues)" in words
    assert "200 steps in 5 min 21 s on 1 process" in words
    assert "1.63 million tokens" in words
    assert f"{last['perplexity']:.2f} equally likely amino acids" in words
    assert f"gives 17.97 (the unigram baseline), so the model lies {below:.1f} % below" in words
    assert f"correctly in {100 * last['accuracy']:.1f} % of 21,345 cases" in words
    assert "proves the path, not the science" in words


def test_the_verdict_compares_the_intervals_on_the_test_split(parsed: Page) -> None:
    # [0.831, 0.891] meets [0.761, 0.832] and [0.793, 0.858]
    words = parsed.words()
    assert "On test, pretrained reaches accuracy 0.862 [0.831, 0.891]" in words
    assert "overlaps that of random-initialised and one-hot" in words
    assert "Note: ranks nothing." in words


def test_separate_intervals_are_told_from_overlapping_ones(report: Callable[..., str]) -> None:
    low = {"test": sample.scores(523, accuracy=(0.7, 0.65, 0.75))}
    page = report([sample.start()], [sample.result(), sample.result(base_model="onehot", label="1h", splits=low)])
    assert "The intervals don&#39;t overlap." in page
    assert "does not settle" not in page


def test_configuration_commands_versions_and_machine_are_shown(parsed: Page, page: Path) -> None:
    text = html.unescape(page.read_text(encoding="utf-8"))
    words = parsed.words()
    assert f"<pre><code>{sample.CONFIG}</code></pre>" in text
    commands = re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)[1:]
    assert commands == [sample.start()["command"]] + [result["command"] for result in sample.realistic_results()]
    assert "x86_64, 2 cores, CPU" in words
    assert "python 3.11.9, torch 2.13.0, megatron_plm 0.1.0" in words


def test_hostile_names_are_text_not_markup(report: Callable[..., str]) -> None:
    evil = '<img src=x onerror="alert(1)"> & $\\frac{ [bold]'
    records = [
        sample.start(command=evil, machine=evil, time=evil, versions={evil: evil}),
        sample.train(1),
        sample.valid(1),
        sample.end(1, status=evil),
    ]
    splits = {evil: sample.scores(5, **{evil: (0.5, 0.4, 0.6)})}
    result = sample.result(
        evil, label=evil, command=evil, note=evil, splits=splits, primary_metric=evil, from_pretrained=evil
    )
    page = report(records, [result], "--title", evil)
    parsed = Page(page)
    assert "onerror" not in [name for name, _ in parsed.attributes]
    assert "x" not in [value for name, value in parsed.attributes if name == "src"]
    assert parsed.words().count('<img src=x onerror="alert(1)"> & $\\frac{ [bold]') >= 10
    assert "<img src=x" not in page


def test_half_a_surrogate_pair_does_not_stop_the_page(report: Callable[..., str]) -> None:
    assert "box ?" in report([sample.start(machine="box \ud800")])


def test_a_note_marks_its_rows_and_only_those(report: Callable[..., str]) -> None:
    page = report([sample.start()], [sample.result("a"), sample.result("b", note="ranks nothing")])
    rows = re.findall(r'<tr class="(.*?)">\s*<th scope="row">(.*?)</th>', page)
    assert len(rows) == 6  # two tasks, three scores each
    assert all(("noted" in style) == ("ranks nothing" in name) for style, name in rows)
    assert sum("noted" in style for style, _ in rows) == 3


def test_a_run_without_steps_says_so_instead_of_drawing(report: Callable[..., str]) -> None:
    page = report([sample.start()])
    words = Page(page).words()
    assert "No training step has been recorded yet" in words
    assert "No validation has been recorded" in words
    assert "this run has read none yet" in words
    assert "No downstream result was given" in words
    assert "<img" not in page


def test_a_run_without_validation_has_training_plots_only(report: Callable[..., str]) -> None:
    page = report([sample.start(), sample.train(1)])
    assert page.count("<img") == 4
    assert "nothing can be said of proteins outside the training set" in page


def test_a_model_no_better_than_the_baseline_is_called_that(report: Callable[..., str]) -> None:
    words = Page(report([sample.start(), sample.train(1), sample.valid(1, perplexity=18.0)])).words()
    assert "0.2 % above the baseline: it has not learned more than the amino acids' frequencies" in words


def test_a_diverged_run_is_called_that(report: Callable[..., str]) -> None:
    records = [sample.start(), sample.train(1), sample.train(2, math.nan), sample.train(3, math.nan)]
    words = Page(report([*records, sample.valid(3, math.nan)])).words()
    assert "not a number in 2 of 3 records, first at step 2" in words
    assert "validation perplexity was not a number" in words


def test_a_run_of_serious_size_is_not_told_to_prove_the_path_only(report: Callable[..., str]) -> None:
    records = [sample.start(), sample.train(500_000, consumed_tokens=10**12)]
    page = report(records, [sample.result()])
    assert "not the science" not in page
    assert "needs several seeds" in page


def test_an_undefined_score_is_shown_as_undefined(report: Callable[..., str]) -> None:
    undefined = {"test": sample.scores(2, accuracy=(math.nan, math.nan, math.nan))}
    words = Page(report([sample.start()], [sample.result(splits=undefined)])).words()
    assert "On test, the accuracy of pretrained is undefined." in words
    assert "nan" not in words.lower().split()
