"""Logs of a tracker: byte-equal after a resume, and read back by TensorBoard."""

import io
import json
import math
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from kdbench.files import read_json_lines
from kdbench.report.console import ConsoleReporter
from kdbench.report.tensorboard import EVENT_FILE_NAME, flatten
from kdbench.report.tracking import TIMING_FIELDS, Tracker


def quiet() -> ConsoleReporter:
    return ConsoleReporter(Console(file=io.StringIO()))


def tracker(folder, **options) -> Tracker:
    return Tracker(folder, console=quiet(), **options)


def begin(log: Tracker) -> None:
    log.start({"name": "digits/kd", "recipe": "dataset: digits\nterms:\n  kd: {type: kd}"})
    log.hparams({"seed": 1, "terms": {"kd": {"temperature": 4.0}}, "clip": None})
    log.stage("main", 3, 30)


def epoch(log: Tracker, number: int, speed: float = 1000.0) -> None:
    """Logs one epoch (from 1) of ten steps."""
    step = 10 * number
    log.progress(step)
    log.train(
        {
            "stage": "main",
            "epoch": number,
            "step": step,
            "total": 1 / (3 * number),
            "lr": 0.1 / number,
            "grad_norm": None,
            "images_per_s": speed,
            "seconds": speed / 7,
            "terms": {"kd": {"loss": 1 / number, "weight": 0.9, "weighted": 0.9 / number}},
            "time_fractions": {"data": 0.25, "student": 0.75},
        }
    )
    metrics = {"top1": 100 / 3 * number, "agreement": 50.0, "per_class/0": math.nan}
    log.evaluation(
        {"stage": "main", "epoch": number, "step": step, "split": "test", "role": "student", "metrics": metrics}
    )
    log.evaluation(
        {"stage": "main", "epoch": number, "step": step, "split": "test", "role": "teacher", "metrics": {"top1": 98.0}}
    )


def without_time(folder) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in read_json_lines(folder / "metrics.jsonl")
    ]


def events(folder) -> dict[str, list[tuple[int, float]]]:
    """Scalars by tag, as TensorBoard reads them."""
    accumulator = load(folder)
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def load(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_one_line_per_record_with_exact_numbers(tmp_path):
    log = tracker(tmp_path)
    begin(log)
    epoch(log, 1)
    log.close()
    train, student, teacher = read_json_lines(tmp_path / "metrics.jsonl")
    assert (train["event"], student["event"], teacher["role"]) == ("train", "evaluation", "teacher")
    assert train["total"] == 1 / 3 and train["grad_norm"] is None
    assert student["metrics"] == {"top1": 100 / 3, "agreement": 50.0, "per_class/0": "nan"}


def test_a_resumed_run_ends_with_the_logs_of_an_uninterrupted_one(tmp_path):
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    log = tracker(uninterrupted)
    begin(log)
    for number in (1, 2, 3):
        epoch(log, number)
    log.close()

    log = tracker(resumed)
    begin(log)
    epoch(log, 1)
    state = json.loads(json.dumps(log.state_dict()))
    epoch(log, 2, speed=5.0)  # written, but never checkpointed: killed here
    log.close()
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write('{"event": "tra')
    log = tracker(resumed)
    log.load_state_dict(state)
    begin(log)
    for number in (2, 3):
        epoch(log, number, speed=77.0)
    log.close()

    assert without_time(resumed) == without_time(uninterrupted)
    assert read_json_lines(resumed / "metrics.jsonl")[0]["images_per_s"] == 1000.0
    resumed_events, expected_events = events(resumed), events(uninterrupted)
    timing_tags = {tag for tag in expected_events if tag.startswith(("speed/", "time_fraction/"))}
    assert resumed_events.keys() == expected_events.keys()
    for tag in expected_events.keys() - timing_tags:
        assert repr(resumed_events[tag]) == repr(expected_events[tag])  # as text, because NaN is unequal to itself
    assert load(resumed).Tags()["tensors"] == load(uninterrupted).Tags()["tensors"]


def test_lines_are_byte_equal_except_for_timing_fields(tmp_path):
    for name in ("a", "b"):
        log = tracker(tmp_path / name)
        begin(log)
        epoch(log, 1)
        log.close()
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_tensorboard_reads_back_every_tag(tmp_path):
    log = tracker(tmp_path)
    begin(log)
    epoch(log, 1)
    epoch(log, 2)
    log.close()
    read = events(tmp_path)
    assert read["loss/total"] == [(10, pytest.approx(1 / 3)), (20, pytest.approx(1 / 6))]
    assert read["term/kd"] == [(10, 1.0), (20, 0.5)]
    assert read["weighted/kd"] == [(10, pytest.approx(0.9)), (20, pytest.approx(0.45))]
    assert read["optimizer/lr"][1] == (20, pytest.approx(0.05))
    assert read["eval/test/top1"][1] == (20, pytest.approx(200 / 3))
    assert read["eval_teacher/test/top1"] == [(10, 98.0), (20, 98.0)]
    assert math.isnan(read["per_class/test/0"][0][1])
    assert "optimizer/grad_norm" not in read
    tensors = load(tmp_path).Tags()["tensors"]
    assert "recipe" in tensors and "_hparams_/session_start_info" in tensors


def test_hyperparameters_are_read_back(tmp_path):
    from tensorboard.plugins.hparams import metadata

    log = tracker(tmp_path)
    begin(log)
    log.hparams({"seed": 2})  # a run has one row
    log.close()
    content = load(tmp_path).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    read = metadata.parse_session_start_info_plugin_data(content).hparams
    assert read["terms.kd.temperature"].number_value == 4.0 and read["seed"].number_value == 1.0
    assert read["clip"].string_value == "None"


def test_figures_are_written_to_tensorboard_and_the_folder(tmp_path):
    log = tracker(tmp_path)
    log.start({"classes": ["zero", "one", "two"]})
    matrix = torch.tensor([[8, 1, 0], [0, 9, 0], [2, 0, 5]])
    logits = torch.randn(4, 3)
    samples = {
        "image": torch.rand(4, 1, 8, 8),
        "label": torch.tensor([0, 1, 2, -100]),
        "student": logits,
        "teacher": logits,
    }
    log.figures(30, confusion=matrix, samples=samples)
    log.close()
    accumulator = load(tmp_path)
    assert accumulator.Tags()["images"] == ["confusion/test", "predictions/test"]
    for name in ("confusion", "predictions"):
        image = accumulator.Images(f"{name}/test")[0]
        png = (tmp_path / "figures" / f"{name}_test.png").read_bytes()
        assert image.encoded_image_string == png and image.step == 30
        assert (image.width, image.height) == tuple(int.from_bytes(png[at : at + 4], "big") for at in (16, 20))


def test_other_ranks_write_nothing(tmp_path):
    log = Tracker(tmp_path, is_main=False)
    begin(log)
    epoch(log, 1)
    log.figures(1, confusion=torch.eye(3))
    log.notice("hello")
    log.load_state_dict(log.state_dict())
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_only_the_lines_are_written(tmp_path):
    log = tracker(tmp_path, tensorboard=False)
    begin(log)
    epoch(log, 1)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("lost_bytes", [1, 13, 40, 10_000])
def test_logs_that_lost_their_end_stay_readable(tmp_path, lost_bytes):
    log = tracker(tmp_path)
    begin(log)
    epoch(log, 1)
    state = log.state_dict()
    log.close()
    for path in (tmp_path / "metrics.jsonl", tmp_path / "tensorboard" / EVENT_FILE_NAME):
        path.write_bytes(path.read_bytes()[:-lost_bytes])
    log = tracker(tmp_path)
    log.load_state_dict(state)
    epoch(log, 2)
    log.close()
    assert read_json_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 20
    assert [step for step, _ in events(tmp_path)["loss/total"]][-1] == 20


def test_lost_lines_give_a_notice(tmp_path):
    log = tracker(tmp_path)
    log.load_state_dict({"metrics.jsonl": 500, "tensorboard": 0})
    assert "missing" in log.console.console.file.getvalue()


def test_tensorboard_is_imported_at_the_first_write_and_without_torch(tmp_path):
    code = (
        "import sys\n"
        "from kdbench.report.tracking import Tracker\n"
        f"log = Tracker({str(tmp_path)!r})\n"
        "assert not {'torch', 'tensorboard', 'matplotlib'} & set(sys.modules)\n"
        "log.evaluation({'step': 1, 'metrics': {'top1': 1.0}})\n"
        "assert 'tensorboard' in sys.modules and 'torch' not in sys.modules and 'tensorflow' not in sys.modules\n"
        "log.close()\n"
    )
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "tensorboard" / EVENT_FILE_NAME).exists()


def test_nested_settings_get_dotted_names():
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": "[1, 2]", "d": "None"}
