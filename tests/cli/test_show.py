"""`kdbench list` and `kdbench show`, help texts, exit codes, and answers that do not import torch."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kdbench.cli.main import COMMANDS, main
from kdbench.registry import REGISTRIES

KD = """\
dataset: digits
teacher: digits_cnn
student: digits_mlp
epochs: 1
optimizer: {type: SGD, lr: 0.1}
terms: {kd: {type: kd, temprature: 4}}
"""


def test_list_prints_one_line_with_a_summary_per_part(capsys):
    assert main(["list", "terms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(REGISTRIES["terms"].entries)
    assert all(len(line.split()) > 3 for line in lines), "each with its summary"


def test_list_accepts_kinds_with_commas(capsys):
    assert main(["list", "recipes,schedules"]) == 0
    out = capsys.readouterr().out
    assert "recipes:\n" in out and "  digits/kd " in out and "schedules:\n" in out and "  cosine " in out


def test_list_without_a_kind_prints_all_kinds(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{kind}:\n" in out for kind in (*REGISTRIES, "recipes", "protocol", "pair"))


def test_list_of_models_contains_torchvision(capsys):
    assert main(["list", "models"]) == 0
    assert "torchvision/resnet18\n" in capsys.readouterr().out


def test_show_prints_formula_paper_parameters_and_example(capsys):
    assert main(["show", "kd"]) == 0
    out = capsys.readouterr().out
    for part in (
        "kd (term)",
        "T^2 * KL",
        "1503.02531",
        "temperature",
        "number or schedule = 4.0",
        "terms:",
        "type: kd",
    ):
        assert part in out


@pytest.mark.parametrize("kind", list(REGISTRIES))
def test_every_part_is_shown_with_a_valid_example(kind: str, capsys):
    import yaml

    for name in REGISTRIES[kind].entries:
        assert main(["show", f"{kind}/{name}"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{name} ({REGISTRIES[kind].kind})")
        if "\nExample (recipe):\n" in out:
            example = out.split("\nExample (recipe):\n")[1].split("\n\n")[0]
            assert isinstance(yaml.safe_load(textwrap.dedent(example)), dict)


def test_name_of_several_kinds_is_shown_for_each(capsys):
    assert main(["show", "linear"]) == 0
    out = capsys.readouterr().out
    assert "adapters/linear, schedules/linear" in out and "linear (adapter)" in out and "linear (schedule)" in out


@pytest.mark.parametrize("name", ["digits/kd", "recipes/digits/kd"])
def test_recipe_is_shown_as_its_file(name: str, capsys):
    assert main(["show", name]) == 0
    assert "type: kd" in capsys.readouterr().out


def test_groups_and_optimizers_are_shown(capsys):
    assert main(["show", "pair/resnet56_resnet20"]) == 0
    assert "resnet56" in capsys.readouterr().out
    assert main(["show", "AdamW"]) == 0
    assert "weight_decay" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["show", "kdd"], "Did you mean 'kd'?"),
        (["list", "term"], "Did you mean 'terms'?"),
        (["lst"], "Did you mean 'list'?"),
        (["show"], "name"),
        (["train"], "no recipe"),
        (["train", "digits/kdd"], "Did you mean 'digits/kd'?"),
        (["train", "a", "b"], "expected one recipe"),
        (["check", "digits/kd", "sed=1"], "Did you mean 'seed'?"),
        (["check", "--all", "digits/kd"], "accepts no recipe"),
        (["train", "digits/kd", "--multirn"], "--multirn"),
        (["train", "digits/kd", "--config-name", "x"], "is not supported"),
        (["evaluate", "x", "devce=cpu"], "Did you mean 'device'?"),
        (["inspect", "resnt20"], "Did you mean 'resnet20'?"),
        (["inspect", "resnet20", "--param", "width"], "expected KEY=VALUE"),
        (["inspect", "digits_mlp", "--param", "hiden=3"], "Did you mean 'hidden'?"),
        (["list", "--plugin", "no_such_module"], "no_such_module"),
    ],
)
def test_mistake_prints_one_paragraph_and_exits_with_2(arguments: list[str], hint: str, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("kdbench: ") and hint in captured.err
    assert "Traceback" not in captured.err


def test_debug_prints_the_traceback_of_a_mistake(capsys):
    assert main(["--debug", "show", "kdd"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bug_prints_its_traceback_and_exits_with_1(monkeypatch, capsys):
    def broken(arguments: list[str]) -> int:
        raise RuntimeError("broken")

    monkeypatch.setitem(sys.modules["kdbench.cli.main"].COMMANDS, "list", broken)
    assert main(["list"]) == 1
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_closed_pipe_is_not_an_error(monkeypatch, capsys):
    def cut(arguments: list[str]) -> int:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 - rich's console does the same

    monkeypatch.setitem(sys.modules["kdbench.cli.main"].COMMANDS, "list", cut)
    assert main(["list"]) == 0


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules["kdbench.cli.main"].COMMANDS, "list", interrupted)
    assert main(["list"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_with_an_example(command: str, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: kdbench {command}") and f"examples:\n  kdbench {command} " in out


@pytest.mark.parametrize("command", ["list", "show", "inspect"])
def test_examples_of_the_help_text_run(command: str, capsys):
    assert main([command, "--help"]) == 0
    for line in capsys.readouterr().out.split("examples:\n")[1].splitlines():
        assert main(shlex.split(line)[1:]) == 0, line


def test_help_and_version(capsys):
    assert main(["--help"]) == 0 and "kdbench train RECIPE" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("kdbench ")
    assert main([]) == 2


def run_without_torch(arguments: list[str]) -> tuple[int, str, float]:
    """Runs a command in a new process, which fails when torch is imported; returns exit code, output and seconds.

    The seconds are processor time, so that other work on the machine does not count.
    """
    code = (
        "import sys\nfrom kdbench.cli.main import main\n"
        f"code = main({arguments!r})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(code)"
    )
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    return process.returncode, process.stdout + process.stderr, seconds


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["list"], 0, "cross_entropy"),
        (["show", "kd"], 0, "temperature"),
        (["train", "kd.yaml"], 2, "Did you mean 'temperature'?"),
        (["check", "kd.yaml", "optimizer.lr=fast"], 2, "lr must be a number"),
        (["train", "kd.yaml", "-m", "seed=1,2"], 2, "Did you mean 'temperature'?"),
        (["inspect", "resnt20"], 2, "Did you mean 'resnet20'?"),
    ],
)
def test_command_answers_without_torch(arguments: list[str], code: int, expected: str):
    Path("kd.yaml").write_text(KD)
    exit_code, output, _ = run_without_torch(arguments)
    assert exit_code == code and expected in output, output


def test_command_answers_within_a_second_and_a_half():
    Path("kd.yaml").write_text(KD)
    for arguments in (["list"], ["show", "kd"], ["train", "kd.yaml"]):
        fastest = min(run_without_torch(arguments)[2] for _ in range(3))
        assert fastest < 1.5, (arguments, fastest)
