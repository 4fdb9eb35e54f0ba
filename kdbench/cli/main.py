"""The console script `kdbench`, which parses the command line, runs one command, and converts errors to exit codes.

The module of a command is imported when the command runs. `kdbench list` therefore starts without torch and Hydra,
and a mistake in a recipe is reported without an import of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from kdbench import __version__
from kdbench.cli.arguments import split_recipe
from kdbench.errors import ConfigError, UserError, escape_control_characters, suggest
from kdbench.plugins import load_plugins

EXIT_OK, EXIT_INTERNAL_ERROR, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

HELP = f"""kdbench {__version__}: knowledge distillation from YAML recipes

commands:
  kdbench train RECIPE [key=value ...] [flags]   train a recipe: a shipped name (digits/kd) or the path of a YAML file
  kdbench check RECIPE [key=value ...]           check a recipe without training: diagram, shapes, sizes, memory
  kdbench list [KIND ...]                        list models, datasets, terms, recipes, methods, ...
  kdbench show NAME                              print a model, term, recipe, ...: formula, paper, parameters, example
  kdbench inspect MODEL                          print the module paths of a model and the output shapes of the modules
  kdbench evaluate RUN                           evaluate the student and the teacher of a finished run again
  kdbench profile RECIPE [key=value ...]         measure a training step: time, operations, FLOPs, memory
  kdbench schema                                 print the JSON schema of a recipe, for editors

options of every command:
  --help            print the help of the command
  --plugin MODULE   import a Python module that registers further models, terms, datasets, ...
  --debug           print a traceback for user errors too
  --version         print the version

examples:
  kdbench check digits/kd
  kdbench train digits/kd seed=2 terms.kd.temperature=2
  kdbench list terms schedules

exit codes: 0 success, 1 bug in kdbench, 2 user error (such as a mistake in a recipe), 130 interrupted"""

TRAIN_HELP = """usage: kdbench train RECIPE [key=value ...] [flags]

Trains a recipe. RECIPE is a name that `kdbench list recipes` prints, or the path of a YAML file. If the same command
is repeated, an interrupted run continues from its last checkpoint, and a finished run only prints its summary.

overrides of keys of the recipe:
  seed=2 terms.kd.temperature=2   set keys
  ~terms.kd  or  terms.kd=null    remove a key
  pair=resnet56_resnet20          select a file of a config group (`kdbench list pair protocol`)
  out=DIR                         folder of the run
  fresh=true                      train again from the start

flags of Hydra, which may be mixed with the overrides:
  -m, --multirun                  train every combination of values: -m seed=1,2,3 pair=resnet56_resnet20,vgg13_vgg8
  -c, --cfg {job,hydra,all}       print the composed recipe instead of training; --resolve also evaluates ${...}
  -p, --package PACKAGE           with --cfg: print only one key of the composed recipe
  -i, --info [TOPIC]              print from which files and overrides the recipe is composed
  --hydra-help                    print Hydra's help
  hydra/launcher=concurrent ...   set Hydra's launcher, sweeper and other settings

examples:
  kdbench train digits/kd
  kdbench train digits/kd -m seed=1,2,3 terms.kd.temperature=2,4 hydra/launcher=concurrent"""


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
        print("\nkdbench: interrupted. Repeat the command to continue from the last checkpoint.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `kdbench list | head`
        # Python flushes standard output once more at its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich exits so after a broken pipe
            return EXIT_OK
        return error.code if isinstance(error.code, int) else EXIT_OK if error.code is None else EXIT_INTERNAL_ERROR
    except Exception:
        traceback.print_exc()
        print("kdbench: this is a bug in kdbench. Please report it with the traceback above.", file=sys.stderr)
        return EXIT_INTERNAL_ERROR


def _split_global_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Removes the flags `--debug` and `--plugin MODULE` from the command line. The flags may be at any position.

    Returns:
        List of the remaining arguments, and list of plug-in modules.

    Raises:
        ConfigError: `--plugin` is not followed by a module.
    """
    remaining: list[str] = []
    plugins: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        if argument == "--debug":
            continue
        if argument == "--plugin" or argument.startswith("--plugin="):
            name = argument[len("--plugin=") :] if "=" in argument else next(iterator, "")
            if not name:
                raise ConfigError("--plugin needs the name of a module, such as `--plugin my_terms`.")
            plugins.append(name)
        else:
            remaining.append(argument)
    return remaining, plugins


def _run_command(arguments: list[str], plugins: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return EXIT_OK if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        print(f"kdbench {__version__}")
        return EXIT_OK
    command = COMMANDS.get(arguments[0])
    if command is None:
        raise ConfigError(f"no command {arguments[0]!r}.{suggest(arguments[0], COMMANDS)}")
    load_plugins(plugins)
    return command(arguments[1:])


class _Parser(argparse.ArgumentParser):
    """Argument parser of one command. For a wrong argument it raises a `ConfigError` instead of exiting."""

    def __init__(self, command: str, description: str, *examples: str) -> None:
        epilog = "\n".join(["examples:", *(f"  kdbench {command} {example}" for example in examples)])
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(f"kdbench {command}", description=description, epilog=epilog, formatter_class=formatter)
        self.command = command

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.command}: {message}. See `{self.prog} --help`.")

    def add_recipe_arguments(self) -> None:
        """Adds arguments for a recipe and its overrides to the parser. Users may write them in any order."""
        recipe_help = "a name that `kdbench list recipes` prints, or the path of a YAML file"
        self.add_argument("recipe", nargs="?", help=recipe_help)
        self.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to override")


def _train_command(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(TRAIN_HELP)
        return EXIT_OK
    from kdbench.cli.launch import launch

    return launch(arguments)


def _check_command(arguments: list[str]) -> int:
    description = "Checks a recipe without training. Prints a diagram, tables and estimates for every stage."
    parser = _Parser("check", description, "digits/kd terms.kd.temperature=2", "--all data_root=DIR")
    parser.add_recipe_arguments()
    parser.add_argument("--all", action="store_true", help="check all shipped recipes, and print one line per recipe")
    options = parser.parse_intermixed_args(arguments)
    words = [word for word in (options.recipe, *options.overrides) if word]
    from kdbench.cli.check import check_recipe
    from kdbench.config.load import load_recipe, recipe_names

    if not options.all:
        recipe, overrides = split_recipe(words)
        return check_recipe(load_recipe(recipe, overrides))
    if any("=" not in word and not word.startswith("~") for word in words):
        raise ConfigError("check: --all accepts no recipe, only overrides such as `data_root=DIR`.")
    return _check_all(recipe_names(), words)


def _check_all(names: Sequence[str], overrides: Sequence[str]) -> int:
    from kdbench.cli.check import check_recipe
    from kdbench.config.load import load_recipe

    failures = 0
    for name in names:
        try:
            check_recipe(load_recipe(name, overrides), brief=True)
        except UserError as error:
            failures += 1
            print(f"kdbench: {name}: {escape_control_characters(str(error))}", file=sys.stderr)
    print(f"{len(names) - failures} of {len(names)} recipes pass.")
    return EXIT_USER_ERROR if failures else EXIT_OK


def _list_command(arguments: list[str]) -> int:
    from kdbench.cli.show import KINDS, list_kinds, parts_page

    description = "Lists models, datasets, terms, recipes, ...: one line per name, with a summary."
    parser = _Parser("list", description, "terms schedules", "methods --status 'not yet'")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"kinds to list, of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--status", help="with KIND `methods`: list only methods of this status (runs, 'runs as', ...)")
    parser.add_argument(
        "--markdown", action="store_true", help="print the page docs/parts.md, or docs/methods.md with KIND `methods`"
    )
    options = parser.parse_intermixed_args(arguments)
    kinds = [kind for word in options.kinds for kind in word.split(",") if kind]
    if options.status is None and not options.markdown:
        return list_kinds(kinds)
    if options.markdown and not kinds and options.status is None:
        print(parts_page(), end="")
        return EXIT_OK
    if kinds != ["methods"]:
        raise ConfigError("list: --status needs the kind `methods`. --markdown needs the kind `methods` or no kind.")
    return _list_methods(options.status or "", options.markdown)


def _list_methods(status: str, markdown: bool) -> int:
    from kdbench.cli import methods

    if status and status not in methods.STATUSES:
        raise ConfigError(f"list: no status {status!r}.{suggest(status, methods.STATUSES)}")
    if not markdown:
        return methods.list_methods(status)
    if status:
        raise ConfigError("list: --markdown prints all methods; omit --status.")
    print(methods.methods_page(), end="")
    return EXIT_OK


def _show_command(arguments: list[str]) -> int:
    from kdbench.cli.show import show

    description = "Prints the full description of a model, dataset, term, ..., or a recipe, a group file or a method."
    parser = _Parser("show", description, "kd", "schedules/linear", "digits/kd")
    parser.add_argument("name", help="a name that `kdbench list` prints; KIND/NAME if several kinds have this name")
    return show(parser.parse_args(arguments).name)


def _inspect_command(arguments: list[str]) -> int:
    description = "Prints the paths of a model's modules for a recipe, with types, output shapes and parameters."
    parser = _Parser("inspect", description, "resnet20 --depth 1", "digits_mlp --param hidden=64")
    parser.add_argument("model", help="a name that `kdbench list models` prints")
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE", help="a parameter of the model")
    parser.add_argument("--image", type=_parse_image_shape, metavar="C,H,W", help="image shape, such as 3,32,32")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes")
    parser.add_argument("--depth", type=int, metavar="N", help="print only paths with at most N components")
    options = parser.parse_args(arguments)
    from kdbench.cli.inspect import inspect_model
    from kdbench.config.yaml_reader import parse_yaml

    params: dict[str, object] = {}
    for text in options.param:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"inspect: expected KEY=VALUE after --param, such as `--param width=2`; got {text!r}.")
        params |= parse_yaml(f"{json.dumps(key)}: {value}", f"inspect --param {text}").data
    return inspect_model(
        options.model, params, num_classes=options.num_classes, image=options.image, depth=options.depth
    )


def _parse_image_shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.replace("x", ",").split(","))


def _evaluate_command(arguments: list[str]) -> int:
    description = "Evaluates the student, the teacher, ... of a finished run again, from the checkpoint in its folder."
    parser = _Parser("evaluate", description, "runs/digits/kd/1a2b3c4d device=cpu")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="device=DEVICE or data_root=DIR")
    options = parser.parse_intermixed_args(arguments)
    overrides: dict[str, str] = {}
    for text in options.overrides:
        key, separator, value = text.partition("=")
        if not separator or key not in ("device", "data_root"):
            hint = suggest(key, ("device", "data_root"))
            raise ConfigError(f"evaluate: only device=... and data_root=... can be overridden, got {text!r}.{hint}")
        overrides[key] = value
    from kdbench.cli.evaluate import evaluate_run

    return evaluate_run(options.run, device=overrides.get("device"), data_root=overrides.get("data_root"))


def _profile_command(arguments: list[str]) -> int:
    description = (
        "Measures the training step of a stage. Prints time, operations, FLOPs and memory, and writes a trace."
    )
    parser = _Parser("profile", description, "digits/kd --steps 50", "cifar100/kd compile=true device=cuda")
    parser.add_recipe_arguments()
    parser.add_argument("--stage", metavar="NAME", help="name of the stage (default: the last stage that trains)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="number of timed steps (default: 20)")
    parser.add_argument("--out", metavar="DIR", help="folder of the output files (default: runs/RECIPE/profile)")
    options = parser.parse_intermixed_args(arguments)
    from kdbench.cli.profile import profile_recipe
    from kdbench.config.load import load_recipe

    recipe, overrides = split_recipe([options.recipe or "", *options.overrides])
    return profile_recipe(load_recipe(recipe, overrides), stage=options.stage, steps=options.steps, out=options.out)


def _schema_command(arguments: list[str]) -> int:
    description = "Prints the JSON schema (draft 2020-12) of recipes. An editor uses it to complete and check keys."
    parser = _Parser("schema", description, "> recipe.schema.json", "--markdown docs/recipe.md")
    parser.add_argument("--markdown", metavar="FILE", help="update the tables of keys in a Markdown file instead")
    options = parser.parse_args(arguments)
    if options.markdown is None:
        from kdbench.config.json_schema import recipe_schema

        print(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))
        return EXIT_OK
    from kdbench.config.key_tables import update_file

    update_file(options.markdown)
    return EXIT_OK


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train_command,
    "check": _check_command,
    "list": _list_command,
    "show": _show_command,
    "inspect": _inspect_command,
    "evaluate": _evaluate_command,
    "profile": _profile_command,
    "schema": _schema_command,
}
