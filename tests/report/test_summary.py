"""Summary and table over seeds: last and best epoch, how the best was selected, comparison with the published score."""

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
from kdbench.run_folder import RUN_FORMAT, RunFolder, read_summary
from kdbench.speed.profiling.latency import measure_latency


def summary(published: Published | None = None, selected_on: str = "validation", seed: int = 1, **changes) -> dict:
    recipe = Recipe(
        name="digits/kd", file="kd.yaml", stages=(), resolved={}, locations={}, seed=seed, published=published
    )
    entries = {
        "last": {"stage": "main", "epoch": 240, "step": 9600, "metrics": scores(73.0)},
        "best": {"stage": "main", "epoch": 231, "step": 9200, "metrics": scores(73.4), "selected_on": selected_on},
        "frozen": {"teacher": {"test": {"top1": 79.4}}},
        "models": {
            "student": {"model": "resnet20", "parameters": 278324, "flops": 41_000_000, "latency_ms": {"batch_1": 1.5}}
        },
        "wall_seconds": 3725.0,
        "device": "cpu",
    }
    return build_summary(recipe=recipe, **{**entries, **changes})


def scores(top1: float) -> dict:
    return {"student": {"test": {"top1": top1, "nll": 1.0, "agreement": 90.0}, "train": {"agreement": 95.0}}}


def printed(content: dict, **options) -> str:
    file = io.StringIO()
    print_summary(content, Console(file=file, highlight=False, **options))
    return file.getvalue()


def test_a_narrow_terminal_shows_every_score():
    assert all(value in printed(summary(), width=40) for value in ("73.00", "73.40", "79.40"))


def test_last_and_best_are_separate_and_the_selecting_split_is_named():
    content = summary()
    assert score(content, "student", "test", "top1") == 73.0
    assert score(content, "student", "test", "top1", "best") == 73.4
    assert score(content, "teacher", "test", "top1") == 79.4
    assert score(content, "student", "test", "ece") is None
    assert "validation split, which was held out of training" in content["best"]["description"]
    assert "optimistic" in summary(selected_on="test")["best"]["description"]


@pytest.mark.parametrize(
    ("epoch", "selected_on", "compared", "difference", "sentence"),
    [
        ("last", "test", "last", -1.0, "last epoch 73.00% on test, published 74.00%"),
        ("unstated", "test", "last", -1.0, "does not state"),
        ("best", "test", "best", -0.6, "biases both upwards"),
        ("best", "validation", "last", -1.0, "biases it upwards against a last epoch"),
    ],
)
def test_a_published_score_is_compared_with_the_matching_epoch(epoch, selected_on, compared, difference, sentence):
    comparison = summary(Published(top1=74.0, source="Tian 2020", epoch=epoch), selected_on)["published"]
    assert comparison["compared"] == compared and comparison["difference"] == pytest.approx(difference)
    for part in (sentence, "One seed", "no tolerance"):
        assert part in comparison["description"]
    assert comparison["within"] is None


def test_the_tolerance_is_the_recipes():
    assert summary(Published(top1=73.3, tolerance=0.3))["published"]["within"] is True
    outside = summary(Published(top1=73.31, tolerance=0.3))["published"]
    assert outside["within"] is False and "outside the recipe's tolerance of ±0.3" in outside["description"]


def test_a_run_without_test_score_is_not_compared():
    comparison = summary(Published(top1=74.0), last={"epoch": 1, "metrics": {}})["published"]
    assert comparison["difference"] is None and "Not compared" in comparison["description"]


def test_a_summary_prints_the_same_after_a_round_trip_through_its_file(tmp_path):
    content = summary(Published(top1=74.0))
    write_json(tmp_path / "summary.json", content)
    assert printed(read_summary(tmp_path / "summary.json")) == printed(content)


def test_the_piped_summary_has_every_number_and_no_truncated_line():
    text = printed(summary(Published(top1=74.0, source="Tian 2020")))
    for part in ("73.00", "73.40", "79.40", "95.00", "278 324", "41M", "1.50 ms", "epoch 231", "1h 02m on cpu"):
        assert part in text
    assert "…" not in text
    assert any(
        line.startswith("compared: last epoch 73.00%") and line.endswith("is not known.") for line in text.splitlines()
    )


def test_measuring_latency_restores_modes_and_state():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    model[1].eval()
    before = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    latencies = measure_latency(model, torch.randn(3, 8, 8), repeats=3)
    assert set(latencies) == {"batch_1", "batch_64"} and all(value > 0 for value in latencies.values())
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def write_finished_run(
    path, seed: int, top1: float, teacher_hash: str | None = "aa", teacher: float = 98.0
) -> RunFolder:
    folder = RunFolder(path)
    with folder.lock():
        models = {
            "student": {"parameters": 1000, "flops": 5e6, "latency_ms": {"batch_1": 0.1 * seed}},
            "teacher": {"parameters": 9000, "weights_sha256": teacher_hash},
        }
        last = {"epoch": 5, "metrics": {"student": {"test": {"top1": top1, "agreement": 90.0 + seed}}}}
        content = summary(seed=seed, last=last, models=models, frozen={"teacher": {"test": {"top1": teacher}}})
        write_json(folder.manifest, {"format": RUN_FORMAT, "identity": "", "status": "finished"})
        write_json(folder.summary, content)
    return folder


def test_a_table_has_mean_and_sample_deviation_over_seeds(tmp_path):
    folders = [
        write_finished_run(tmp_path / str(seed), seed, top1).path for seed, top1 in ((1, 90.0), (2, 92.0), (3, 94.0))
    ]
    table = aggregate([RunGroup("teacher", folders, role="teacher"), RunGroup("distilled", folders)])
    teacher, student = table.rows
    assert (student.top1.mean, student.top1.deviation, student.seeds) == (92.0, 2.0, 3)
    assert student.agreement.mean == 92.0 and student.latency_ms == pytest.approx(0.1)
    assert (teacher.seeds, teacher.top1.mean, teacher.top1.deviation) == (1, 98.0, None)  # one teacher for all three
    distilled = table.json()[1]
    assert distilled["top1"] == {"mean": 92.0, "deviation": 2.0, "values": [90.0, 92.0, 94.0]}
    assert "| distilled | 3 | 92.00 ± 2.00 | 92.00 ± 1.00 | 1 000 | 5M | 0.10 ms |" in table.markdown()
    assert len({line.count("|") for line in table.markdown().splitlines()}) == 1
    file = io.StringIO()
    Console(file=file, width=140).print(table.table())
    assert "92.00 ± 2.00" in file.getvalue()


def test_different_teachers_count_separately(tmp_path):
    folders = [
        write_finished_run(tmp_path / str(s), s, 90.0, teacher_hash=f"h{s}", teacher=97.0 + s).path for s in (1, 2)
    ]
    (row,) = aggregate([RunGroup("teacher", folders, role="teacher")]).rows
    assert row.seeds == 2 and row.top1.mean == 98.5


def test_an_unfinished_run_is_rejected_by_name(tmp_path):
    with RunFolder(tmp_path / "run").lock():
        pass
    for path in (tmp_path / "run", tmp_path / "none"):
        with pytest.raises(UserError, match=f"{path.name} has no finished run"):
            aggregate([RunGroup("x", [path])])
