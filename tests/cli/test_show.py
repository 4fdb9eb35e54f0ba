"""`kdbench list` and `kdbench show`, and what is answered before torch is imported."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kdbench.cli.main import main
from kdbench.registry import REGISTRIES

KD = """\
dataset: digits
teacher: digits_cnn
student: digits_mlp
epochs: 1
optimizer: {type: SGD, lr: 0.1}
terms: {kd: {type: kd, temprature: 4}}
"""


def test_list_has_one_line_for_each_part(capsys):
    assert main(["list", "terms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(REGISTRIES["terms"].entries)
    assert all(len(line.split()) > 3 for line in lines), "each with its summary"


def test_list_takes_kinds_with_commas_and_recipes(capsys):
    assert main(["list", "recipes,schedules"]) == 0
    out = capsys.readouterr().out
    assert "recipes:\n" in out and "  digits/kd " in out and "schedules:\n" in out and "  cosine " in out


def test_list_without_a_kind_has_them_all(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{kind}:\n" in out for kind in (*REGISTRIES, "recipes", "protocol", "pair"))


def test_list_of_models_names_foreign_ones(capsys):
    assert main(["list", "models"]) == 0
    assert "torchvision/resnet18\n" in capsys.readouterr().out


def test_show_has_formula_paper_parameters_and_an_example(capsys):
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
def test_every_part_can_be_shown_and_its_example_is_valid(kind: str, capsys):
    import yaml

    for name in REGISTRIES[kind].entries:
        assert main(["show", f"{kind}/{name}"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{name} ({REGISTRIES[kind].kind})")
        if "Example:\n" in out:
            example = out.split("Example:\n")[1].split("\n\n")[0]
            assert isinstance(yaml.safe_load(example), dict)


def test_a_name_of_several_kinds_is_shown_for_each(capsys):
    assert main(["show", "linear"]) == 0
    out = capsys.readouterr().out
    assert "adapters/linear, schedules/linear" in out and "linear (adapter)" in out and "linear (schedule)" in out


@pytest.mark.parametrize("name", ["digits/kd", "recipes/digits/kd"])
def test_a_recipe_is_shown_as_it_stands(name: str, capsys):
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
        (["train"], "which recipe?"),
        (["train", "digits/kdd"], "Did you mean 'digits/kd'?"),
        (["train", "a", "b"], "one recipe at a time"),
        (["check", "digits/kd", "sed=1"], "Did you mean 'seed'?"),
        (["check", "--all", "digits/kd"], "takes no recipe"),
        (["train", "digits/kd", "--multirn"], "--multirn"),
        (["train", "digits/kd", "--config-name", "x"], "has no use here"),
        (["evaluate", "x", "devce=cpu"], "Did you mean 'device'?"),
        (["inspect", "resnt20"], "Did you mean 'resnet20'?"),
        (["list", "--plugin", "no_such_module"], "no_such_module"),
    ],
)
def test_a_mistake_ends_with_2_and_one_paragraph(arguments: list[str], hint: str, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("kdbench: ") and hint in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback_of_a_mistake(capsys):
    assert main(["--debug", "show", "kdd"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_ends_with_1_and_its_traceback(monkeypatch, capsys):
    def broken(arguments: list[str]) -> int:
        raise RuntimeError("broken")

    monkeypatch.setitem(sys.modules["kdbench.cli.main"].COMMANDS, "list", broken)
    assert main(["list"]) == 1
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_a_pipe_closed_under_a_table_is_no_fault(monkeypatch, capsys):
    def cut(arguments: list[str]) -> int:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 - as rich's console does

    monkeypatch.setitem(sys.modules["kdbench.cli.main"].COMMANDS, "list", cut)
    assert main(["list"]) == 0


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules["kdbench.cli.main"].COMMANDS, "list", interrupted)
    assert main(["list"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "check", "list", "show", "inspect", "evaluate"])
def test_every_command_has_help(command: str, capsys):
    assert main([command, "--help"]) == 0
    assert f"kdbench {command}" in capsys.readouterr().out


def test_help_and_version(capsys):
    assert main(["--help"]) == 0 and "kdbench train RECIPE" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("kdbench ")
    assert main([]) == 2


def without_torch(arguments: list[str]) -> tuple[int, str, float]:
    """Runs the command in a process of its own, which fails when torch was imported: exit code, output, seconds.

    The seconds are the processor's, which on a quiet machine are the clock's: other work does not count.
    """
    code = (
        "import sys\nfrom kdbench.cli.main import main\n"
        f"code = main({arguments!r})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout + done.stderr, spent


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["list"], 0, "cross_entropy"),
        (["show", "kd"], 0, "temperature"),
        (["train", "kd.yaml"], 2, "Did you mean 'temperature'?"),
        (["check", "kd.yaml", "optimizer.lr=fast"], 2, "lr must be a number"),
        (["train", "kd.yaml", "-m", "seed=1,2"], 2, "Did you mean 'temperature'?"),
        (["inspect", "resnt20"], 2, "Did you mean 'resnet20'?"),
    ],
)
def test_is_answered_without_torch(arguments: list[str], code: int, said: str):
    Path("kd.yaml").write_text(KD)
    returned, output, _ = without_torch(arguments)
    assert returned == code and said in output, output


def test_is_answered_within_a_second_and_a_half():
    Path("kd.yaml").write_text(KD)
    for arguments in (["list"], ["show", "kd"], ["train", "kd.yaml"]):
        fastest = min(without_torch(arguments)[2] for _ in range(3))
        assert fastest < 1.5, (arguments, fastest)
