"""The console script `kdbench`: reads the command, answers a user's mistake in one paragraph, loads torch late."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from kdbench import __version__
from kdbench.cli.arguments import split_recipe
from kdbench.errors import ConfigError, UserError, escape_control_characters, suggest

EXIT_OK, EXIT_INTERNAL_ERROR, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


HELP = f"""kdbench {__version__}: knowledge distillation from YAML recipes.

  kdbench train RECIPE [key=value ...] [-m]   run a recipe: a shipped name (digits/kd) or the path of your own YAML
  kdbench check RECIPE [key=value ...]        everything but training: models, features, terms, memory, in words
  kdbench list [KIND ...]                     what there is, one line each: models, terms, recipes, methods, ...
  kdbench show NAME                           one of them in full: formula, paper, parameters, an example
  kdbench inspect MODEL                       module paths of a model with output shapes, to copy into a recipe
  kdbench evaluate RUN                        evaluate a finished run's student and teacher again, from its folder
  kdbench profile RECIPE [key=value ...]      where a step's time goes: parts, operations, FLOPs, memory, a trace

  --debug            tracebacks of mistakes too      --plugin MODULE    add the parts that a module declares
  --help             also after a command            --version

Exit codes: 0 done, 2 a mistake in what was asked for, 1 a fault of kdbench, 130 interrupted."""


TRAIN_HELP = """kdbench train RECIPE [key=value ...] [flags]

RECIPE is a shipped name (`kdbench list recipes`) or the path of a YAML file. Repeating a command goes on where it was
interrupted, and prints the summary when it had finished.

  seed=2 terms.kd.temperature=2      override any key of the recipe
  ~terms.kd  or  terms.kd=null       remove one
  pair=resnet56_resnet20             choose from a group (protocol, pair)
  out=DIR  fresh=true                the run's folder; begin anew

Hydra's flags, in any order with the overrides:
  -m, --multirun                     one job for each combination: -m seed=1,2,3 pair=resnet56_resnet20,vgg13_vgg8
  -c, --cfg {job,hydra,all}          print the composed recipe instead of running; --resolve fills in references
  -p, --package PACKAGE              print one part of it
  -i, --info [WHAT]                  how it was composed
  hydra/launcher=joblib ...          launchers, sweepers and every other setting of Hydra
  --hydra-help                       Hydra's own help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        arguments, plugins = _split_global_flags(arguments)
        return _run_command(arguments, plugins)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"kdbench: {escape_control_characters(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\nkdbench: interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `kdbench list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich's way to say it; standard output leads nowhere now
            return EXIT_OK
        return stop.code if isinstance(stop.code, int) else EXIT_OK if stop.code is None else EXIT_INTERNAL_ERROR
    except Exception:
        traceback.print_exc()
        print("kdbench: this is a fault of kdbench, not yours; please report it with the lines above.", file=sys.stderr)
        return EXIT_INTERNAL_ERROR


def _split_global_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes out `--debug` and `--plugin MODULE`, which may stand anywhere."""
    rest: list[str] = []
    plugins: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--debug":
            continue
        if argument == "--plugin" or argument.startswith("--plugin="):
            name = argument[len("--plugin=") :] if "=" in argument else next(waiting, "")
            if not name:
                raise ConfigError("--plugin needs the name of a module, such as `--plugin my_terms`.")
            plugins.append(name)
        else:
            rest.append(argument)
    return rest, plugins


def _run_command(arguments: list[str], plugins: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return EXIT_OK if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        print(f"kdbench {__version__}")
        return EXIT_OK
    name, rest = arguments[0], arguments[1:]
    command = COMMANDS.get(name)
    if command is None:
        raise ConfigError(f"no command {name!r}.{suggest(name, COMMANDS)}")
    from kdbench.plugins import load_plugins

    load_plugins(plugins)
    return command(rest)


class _Parser(argparse.ArgumentParser):
    """Says mistakes as one paragraph."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}. See `{self.prog} --help`.")


def _train_command(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(TRAIN_HELP)
        return EXIT_OK
    from kdbench.cli.launch import launch

    return launch(arguments)


def _check_command(arguments: list[str]) -> int:
    parser = _Parser("kdbench check", description="Everything but training: the recipe, resolved and in words.")
    parser.add_argument("recipe", nargs="?", help="a shipped name or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `kdbench train`")
    parser.add_argument("--all", action="store_true", help="check every shipped recipe")
    given = parser.parse_intermixed_args(arguments)
    from kdbench.config.load import load_recipe, recipe_names

    if not given.all:
        recipe, overrides = split_recipe([given.recipe or "", *given.overrides])
        loaded = load_recipe(recipe, overrides)
        from kdbench.cli.check import check_recipe

        return check_recipe(loaded)
    overrides = [text for text in (given.recipe, *given.overrides) if text]
    if any("=" not in text and not text.startswith("~") for text in overrides):
        raise ConfigError("kdbench check --all takes no recipe, only overrides such as `data_root=DIR`.")
    return _check_all(recipe_names(), overrides)


def _check_all(names: Sequence[str], overrides: Sequence[str]) -> int:
    from kdbench.config.load import load_recipe

    mistakes = 0
    for name in names:
        try:
            loaded = load_recipe(name, overrides)
            from kdbench.cli.check import check_recipe

            mistakes += check_recipe(loaded, brief=True) != EXIT_OK
        except UserError as error:
            mistakes += 1
            print(f"kdbench: {name}: {escape_control_characters(str(error))}", file=sys.stderr)
    print(f"{len(names) - mistakes} of {len(names)} recipes are right.")
    return EXIT_USER_ERROR if mistakes else EXIT_OK


def _list_command(arguments: list[str]) -> int:
    from kdbench.cli.show import KINDS, list_kinds

    parser = _Parser("kdbench list", description="What there is, one line each.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"any of: {', '.join(KINDS)}")
    parser.add_argument("--status", help="of methods: only those that are runs, 'runs as', 'not yet' or 'not stated'")
    parser.add_argument("--markdown", action="store_true", help="of methods: the page docs/methods.md")
    given = parser.parse_intermixed_args(arguments)
    kinds = [kind for word in given.kinds for kind in word.split(",") if kind]
    if given.status is None and not given.markdown:
        return list_kinds(kinds)
    if kinds != ["methods"]:
        raise ConfigError("kdbench list: --status and --markdown are for `kdbench list methods` alone.")
    return _list_methods(given.status or "", given.markdown)


def _list_methods(status: str, markdown: bool) -> int:
    from kdbench.cli import methods

    if status and status not in methods.STATUSES:
        raise ConfigError(f"kdbench list methods: no status {status!r}.{suggest(status, methods.STATUSES)}")
    if not markdown:
        return methods.list_methods(status)
    if status:
        raise ConfigError("kdbench list methods: --markdown writes the whole page; leave --status out.")
    print(methods.methods_page(), end="")
    return EXIT_OK


def _show_command(arguments: list[str]) -> int:
    from kdbench.cli.show import show

    parser = _Parser("kdbench show", description="A part or a recipe in full.")
    parser.add_argument("name", help="a name of `kdbench list`, or KIND/NAME, such as schedules/linear")
    return show(parser.parse_args(arguments).name)


def _inspect_command(arguments: list[str]) -> int:
    parser = _Parser("kdbench inspect", description="The module paths of a model, to copy into a recipe.")
    parser.add_argument("model", help="a name of `kdbench list models`")
    parser.add_argument("params", nargs="*", metavar="key=value", help="parameters of the model")
    parser.add_argument("--image", type=_parse_image_shape, metavar="C,H,W", help="shape of an image, such as 3,32,32")
    parser.add_argument("--num-classes", type=int, metavar="N", help="size of the classifier")
    parser.add_argument("--depth", type=int, metavar="N", help="only paths of at most N parts")
    given = parser.parse_intermixed_args(arguments)
    import yaml

    from kdbench.config.yaml_reader import parse_yaml
    from kdbench.registry import MODELS

    params = {}
    for text in given.params:
        key, found, value = text.partition("=")
        if not found:
            raise ConfigError(f"kdbench inspect: {text!r} is no parameter such as `width=2`.")
        params |= parse_yaml(yaml.safe_dump({key: None}).replace("null", value), f"inspect {text}").data
    MODELS.check(given.model, params, "inspect")
    from kdbench.cli.inspect import inspect_model

    return inspect_model(given.model, params, num_classes=given.num_classes, image=given.image, depth=given.depth)


def _parse_image_shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace("x", ",").split(","))


def _evaluate_command(arguments: list[str]) -> int:
    parser = _Parser("kdbench evaluate", description="Evaluates a finished run again, from its folder.")
    parser.add_argument("run", help="the folder of a run, such as runs/digits/kd/1a2b3c4d")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="device=cpu, data_root=DIR")
    given = parser.parse_intermixed_args(arguments)
    settings: dict[str, str] = {}
    for text in given.settings:
        key, found, value = text.partition("=")
        if not found or key not in ("device", "data_root"):
            raise ConfigError(f"kdbench evaluate: {text!r} is no setting.{suggest(key, ('device', 'data_root'))}")
        settings[key] = value
    from kdbench.cli.evaluate import evaluate_run

    return evaluate_run(given.run, device=settings.get("device"), data_root=settings.get("data_root"))


def _profile_command(arguments: list[str]) -> int:
    parser = _Parser("kdbench profile", description="Where the time of a training step goes.")
    parser.add_argument("recipe", nargs="?", help="a shipped name or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `kdbench train`")
    parser.add_argument("--stage", metavar="NAME", help="of a recipe with stages; else the last one that trains")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="steps to time (20), and as many taken apart"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the files; else runs/RECIPE/profile")
    given = parser.parse_intermixed_args(arguments)
    from kdbench.config.load import load_recipe

    recipe, overrides = split_recipe([given.recipe or "", *given.overrides])
    loaded = load_recipe(recipe, overrides)
    from kdbench.cli.profile import profile_recipe

    return profile_recipe(loaded, stage=given.stage, steps=given.steps, out=given.out)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train_command,
    "check": _check_command,
    "list": _list_command,
    "show": _show_command,
    "inspect": _inspect_command,
    "evaluate": _evaluate_command,
    "profile": _profile_command,
}
