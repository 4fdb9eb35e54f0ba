"""The summary: last and best apart, honest about what chose the best and what a figure is compared with."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from kdbench.config.schema import Published, Recipe
from kdbench.errors import UserError
from kdbench.files import write_json
from kdbench.report.summary import build_summary, print_summary, score
from kdbench.report.tables import RunGroup, aggregate
from kdbench.run_folder import RUN_FORMAT, RunFolder
from kdbench.speed.profiling.latency import measure_latency


def summary(published: Published | None = None, chosen_on: str = "validation", seed: int = 1, **changes) -> dict:
    recipe = Recipe(
        name="digits/kd", file="kd.yaml", stages=(), resolved={}, locations={}, seed=seed, published=published
    )
    facts = {
        "last": {"stage": "main", "epoch": 240, "step": 9600, "metrics": scores(73.0)},
        "best": {"stage": "main", "epoch": 231, "step": 9200, "metrics": scores(73.4), "chosen_on": chosen_on},
        "frozen": {"teacher": {"test": {"top1": 79.4}}},
        "models": {
            "student": {"model": "resnet20", "parameters": 278324, "flops": 41_000_000, "latency_ms": {"batch_1": 1.5}}
        },
        "wall_seconds": 3725.0,
        "device": "cpu",
    }
    return build_summary(recipe=recipe, **{**facts, **changes})


def scores(top1: float) -> dict:
    return {"student": {"test": {"top1": top1, "nll": 1.0, "agreement": 90.0}, "train": {"agreement": 95.0}}}


def printed(told: dict, **options) -> str:
    file = io.StringIO()
    print_summary(told, Console(file=file, highlight=False, **options))
    return file.getvalue()


def test_a_narrow_terminal_loses_no_figure():
    assert all(figure in printed(summary(), width=40) for figure in ("73.00", "73.40", "79.40"))


def test_last_and_best_stand_apart_and_the_choosing_split_is_said():
    told = summary()
    assert score(told, "student", "test", "top1") == 73.0
    assert score(told, "student", "test", "top1", "best") == 73.4
    assert score(told, "teacher", "test", "top1") == 79.4
    assert score(told, "student", "test", "ece") is None
    assert "validation split, which was held out of training" in told["best"]["words"]
    assert "optimistic" in summary(chosen_on="test")["best"]["words"]


@pytest.mark.parametrize(
    ("epoch", "chosen_on", "compared", "difference", "words"),
    [
        ("last", "test", "last", -1.0, "last epoch 73.00% on test, published 74.00%"),
        ("unstated", "test", "last", -1.0, "not stated"),
        ("best", "test", "best", -0.6, "flatters both"),
        ("best", "validation", "last", -1.0, "flatters it against a last epoch"),
    ],
)
def test_a_published_figure_is_compared_with_its_like(epoch, chosen_on, compared, difference, words):
    told = summary(Published(top1=74.0, source="Tian 2020", epoch=epoch), chosen_on)["published"]
    assert told["compared"] == compared and told["difference"] == pytest.approx(difference)
    assert words in told["words"] and "one seed" in told["words"] and "no band" in told["words"]
    assert told["within"] is None


def test_the_band_is_the_recipes():
    assert summary(Published(top1=73.3, tolerance=0.3))["published"]["within"] is True
    outside = summary(Published(top1=73.31, tolerance=0.3))["published"]
    assert outside["within"] is False and "outside the recipe's band of ±0.3" in outside["words"]


def test_nothing_to_compare_is_said():
    told = summary(Published(top1=74.0), last={"epoch": 1, "metrics": {}})["published"]
    assert told["difference"] is None and "Not compared" in told["words"]


def test_is_strict_json_and_prints_after_a_round_trip(tmp_path):
    from kdbench.files import read_json

    told = summary(Published(top1=74.0))
    write_json(tmp_path / "summary.json", told)
    assert printed(read_json(tmp_path / "summary.json")) == printed(told)


def test_the_printed_summary_has_every_number_and_no_cut_line_when_piped():
    text = printed(summary(Published(top1=74.0, source="Tian 2020")))
    for part in ("73.00", "73.40", "79.40", "95.00", "278 324", "41M", "1.50 ms", "epoch 231", "1h 02m on cpu"):
        assert part in text
    assert "…" not in text
    assert any(
        line.startswith("compared: last epoch 73.00%") and line.endswith("one run.") for line in text.splitlines()
    )


def test_latency_is_positive_and_leaves_every_mode_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    model[1].eval()
    before = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    told = measure_latency(model, torch.randn(3, 8, 8), repeats=3)
    assert set(told) == {"batch_1", "batch_64"} and all(value > 0 for value in told.values())
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def finished(path, seed: int, top1: float, teacher_hash: str | None = "aa", teacher: float = 98.0) -> RunFolder:
    folder = RunFolder(path)
    with folder.lock():
        models = {
            "student": {"parameters": 1000, "flops": 5e6, "latency_ms": {"batch_1": 0.1 * seed}},
            "teacher": {"parameters": 9000, "weights_sha256": teacher_hash},
        }
        last = {"epoch": 5, "metrics": {"student": {"test": {"top1": top1, "agreement": 90.0 + seed}}}}
        told = summary(seed=seed, last=last, models=models, frozen={"teacher": {"test": {"top1": teacher}}})
        write_json(folder.manifest, {"format": RUN_FORMAT, "status": "finished"})
        write_json(folder.summary, told)
    return folder


def test_a_report_gives_mean_and_sample_deviation_over_seeds(tmp_path):
    folders = [finished(tmp_path / str(seed), seed, top1).path for seed, top1 in ((1, 90.0), (2, 92.0), (3, 94.0))]
    report = aggregate([RunGroup("teacher", folders, role="teacher"), RunGroup("distilled", folders)])
    teacher, student = report.rows
    assert (student.top1.mean, student.top1.deviation, student.seeds) == (92.0, 2.0, 3)
    assert student.agreement.mean == 92.0 and student.latency_ms == pytest.approx(0.1)
    assert (teacher.seeds, teacher.top1.mean, teacher.top1.deviation) == (1, 98.0, None)  # one teacher for all three
    told = report.json()[1]
    assert told["top1"] == {"mean": 92.0, "deviation": 2.0, "values": [90.0, 92.0, 94.0]}
    assert "| distilled | 3 | 92.00 ± 2.00 | 92.00 ± 1.00 | 1 000 | 5M | 0.10 ms |" in report.markdown()
    assert len({line.count("|") for line in report.markdown().splitlines()}) == 1
    file = io.StringIO()
    Console(file=file, width=140).print(report.table())
    assert "92.00 ± 2.00" in file.getvalue()


def test_teachers_of_their_own_count_each(tmp_path):
    folders = [finished(tmp_path / str(s), s, 90.0, teacher_hash=f"h{s}", teacher=97.0 + s).path for s in (1, 2)]
    line = aggregate([RunGroup("teacher", folders, role="teacher")]).rows[0]
    assert line.seeds == 2 and line.top1.mean == 98.5


def test_an_unfinished_run_is_refused_by_name(tmp_path):
    with RunFolder(tmp_path / "run").lock():
        pass
    for path in (tmp_path / "run", tmp_path / "none"):
        with pytest.raises(UserError, match="holds no finished run"):
            aggregate([RunGroup("x", [path])])
