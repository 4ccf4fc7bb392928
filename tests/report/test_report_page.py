"""What the page says: every section, numbers equal to the inputs, nothing loaded from elsewhere, nothing injected."""

import base64
import html
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import report_sample as sample
from page_parser import Page


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
    (peptides,) = [text for text in texts if "one-hot on test 0.826 [0.793, 0.858]" in text]
    assert "ranks nothing" not in peptides
    assert sum("test ranks nothing" in text for text in texts) == 2


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


def test_wording_keeps_masked_labels_and_all_labels_apart(parsed: Page) -> None:
    words = parsed.words()
    assert "perplexity is not exp(loss)" in words
    assert "Over the labels hidden behind <mask>" in words
    assert "of 21,345 masked residues" in words
    assert "per masked token" not in words


def test_configuration_commands_versions_and_machine_are_shown(parsed: Page, page: Path) -> None:
    text = html.unescape(page.read_text(encoding="utf-8"))
    words = parsed.words()
    assert f"<pre><code>{sample.CONFIG}</code></pre>" in text
    commands = re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)[1:]
    assert commands[0] == sample.start()["command"]
    assert sorted(commands[1:]) == sorted(result["command"] for result in sample.realistic_results())
    assert "x86_64, 2 cores, CPU" in words
    assert "python 3.11.9, torch 2.13.0, megatron_plm 0.1.0" in words


def test_the_throughput_caption_gives_the_median_and_what_a_dip_is(report: Callable[..., str]) -> None:
    speeds = (5_000, 1_000, 5_200)
    records = [sample.train(step, tokens_per_second=float(speed)) for step, speed in enumerate(speeds, start=1)]
    words = Page(report([sample.start(), *records])).words()
    assert "the median is 5,000. Padding is not counted, nor the time of evaluation and saving" in words


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
