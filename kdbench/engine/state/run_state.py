"""Declared contents of the checkpoint files of a run: run state, model files and artifact files.

| file | content |
|---|---|
| `checkpoints/last.pt` | `RunState` |
| `checkpoints/best.pt`, `epoch_*.pt`, `stage_*.pt` | `ModelFile` |
| `stages/STAGE.NAME.pt` | `ArtifactFile` |

`from_tree` checks that every declared entry is there and has its type, and that positions are possible.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from torch import Tensor

from kdbench.entries import EntryError, read_entries, write_entries
from kdbench.errors import CheckpointError

CHECKPOINT_FORMAT = 2
"""Format of all files declared here. Raise it whenever an entry changes."""


StateDict = Mapping[str, Any]
"""A state dict of torch: name -> tensor."""


Scores = dict[str, dict[str, dict[str, float]]]
"""role -> split -> metric -> value."""


CONTENT_ENTRIES = {
    "dataset": {"images": Tensor, "labels": Tensor, "classes": Sequence},
    "subset": {"index": Tensor},
    "tensor": {"value": Tensor},
    "model": {"type": str, "params": dict},
}
"""Kind of an artifact -> required entries of its content and their types."""


T = TypeVar("T")


class Evaluation(TypedDict):
    """One evaluation of the trained roles.

    stage: name. epoch: finished epochs of the stage. step: optimizer steps since the run began, over all stages.
    """

    stage: str
    epoch: int
    step: int
    metrics: Scores


class BestEvaluation(Evaluation):
    """The best evaluation of a stage. selected_on: the split that selected it. by: the metric."""

    selected_on: str
    by: str


@dataclass
class History:
    """Results of a run so far.

    Attributes:
        seconds: time in training steps.
        evaluations: of the trained roles, in order.
        best: the best evaluation of each stage.
        frozen: scores of the frozen roles, evaluated once before training.
    """

    seconds: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)
    best: dict[str, BestEvaluation] = field(default_factory=dict)
    frozen: Scores = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainingState:
    """State of one stage between two steps. With recipe and seed, it determines all further steps.

    Attributes:
        step: finished steps of the stage.
        total_steps: steps of the stage.
        models: role -> state dict, of all trained roles. Frozen roles are loaded from their origin again.
        effective: role -> state dict of the weights that its forward uses, for roles with weight transforms
            (such as quantisation) and for an exported role that reuses a module of another role.
        average: state dict of the moving average (EMA) of the exported role; None without one.
        terms: term -> state dict, adapters included.
        optimizers: state dict of each update's optimizer.
        scaler: state dict of the fp16 gradient scaler; empty when it is disabled.
        meters: loss sums of the current log interval.
        grad_norm: last gradient norm, for the next log line.
    """

    step: int
    total_steps: int
    models: Mapping[str, StateDict]
    effective: Mapping[str, StateDict]
    average: StateDict | None
    terms: Mapping[str, StateDict]
    optimizers: list[Mapping[str, Any]]
    scaler: Mapping[str, Any]
    meters: Mapping[str, Any]
    grad_norm: Tensor | None

    def model_file(self, identity: str, export: str, epoch: int | None = None) -> ModelFile:
        """Returns the weights alone, as a model file of a run."""
        return ModelFile(
            identity=identity,
            export=export,
            models=self.models,
            effective=self.effective,
            average=self.average,
            epoch=epoch,
        )


@dataclass(kw_only=True)
class RunState(TrainingState):
    """Everything that an interrupted run needs to continue to the same bits.

    Attributes:
        format: `CHECKPOINT_FORMAT`.
        identity: of the run; the file of another run is rejected.
        stage: name of the current stage.
        finished_stages: earlier stage -> its number of steps.
        export: the role whose weights are the result.
        history: results so far.
        tracker: log -> byte offset.
    """

    format: int = CHECKPOINT_FORMAT
    identity: str
    stage: str
    finished_stages: Mapping[str, int]
    export: str
    history: History
    tracker: Mapping[str, int]

    def to_tree(self) -> dict[str, Any]:
        """Returns the entries as a mapping that torch can save."""
        return write_entries(self)

    @classmethod
    def from_tree(cls, tree: Any, path: Path, *, identity: str | None = None, stages: Sequence[str] = ()) -> RunState:
        """Checks and returns the content of a `last.pt`.

        Args:
            tree: as read from the file.
            path: of the file, for messages.
            identity: of the run; None accepts every run.
            stages: names of the run's stages, in order; empty: unknown.

        Raises:
            ForeignRunError: the file belongs to another run.
            CheckpointError: an entry is missing, has the wrong type, or is not possible.
        """
        state = _read_file(cls, tree, path)
        check_identity(path, state.identity, identity)
        problem = _position_problem(state, stages)
        if problem:
            raise CheckpointError(f"{path} is damaged: {problem}")
        return state


def _position_problem(state: RunState, stages: Sequence[str]) -> str:
    if not 0 <= state.step <= state.total_steps:
        return f"entry 'step' is {state.step}, but stage {state.stage!r} has {state.total_steps} steps"
    if stages:
        if state.stage not in stages:
            return f"entry 'stage' is {state.stage!r}; the recipe has {', '.join(stages)}"
        earlier = stages[: list(stages).index(state.stage)]
        if set(state.finished_stages) != set(earlier):
            names = ", ".join(state.finished_stages) or "no stage"
            return (
                f"entry 'finished_stages' has {names}; before stage {state.stage!r} come {', '.join(earlier) or 'none'}"
            )
    return ""


@dataclass(kw_only=True)
class ModelFile:
    """Weights of the trained roles: `best.pt`, `epoch_*.pt` and `stage_*.pt`. A `RunState` has these entries too.

    Attributes:
        format: `CHECKPOINT_FORMAT`.
        identity: of the run that trained the weights.
        export: the role whose weights are the result.
        models, effective, average: as in `TrainingState`. A `stage_*.pt` also has the frozen roles that later stages
            load from it.
        epoch: finished epochs of the stage; None in a file that is not of one epoch.
    """

    format: int = CHECKPOINT_FORMAT
    identity: str
    export: str
    models: Mapping[str, StateDict]
    effective: Mapping[str, StateDict]
    average: StateDict | None
    epoch: int | None = None

    def to_tree(self) -> dict[str, Any]:
        """Returns the entries as a mapping that torch can save."""
        return write_entries(self)

    @classmethod
    def from_tree(cls, tree: Any, path: Path, *, identity: str | None = None) -> ModelFile:
        """Checks and returns the content of a model file, or the weights of a `last.pt`.

        Raises:
            ForeignRunError: the file belongs to another run than `identity`.
            CheckpointError: an entry is missing or has the wrong type.
        """
        file = _read_file(cls, tree, path)
        check_identity(path, file.identity, identity)
        return file


@dataclass(kw_only=True)
class ArtifactFile:
    """An artifact that a stage built for later stages.

    Attributes:
        format: `CHECKPOINT_FORMAT`.
        identity: of the run that built it.
        kind: dataset, subset, tensor or model.
        checksum: of `content`.
        provenance: entries for the manifest: builder, parameters, source, weights of the roles it read.
        content: the builder's result; its entries are top-level entries of the file.
    """

    format: int = CHECKPOINT_FORMAT
    identity: str
    kind: str
    checksum: str
    provenance: Mapping[str, Any]
    content: Mapping[str, Any]

    def to_tree(self) -> dict[str, Any]:
        """Returns the entries as a mapping that torch can save."""
        tree = write_entries(self)
        return {**tree.pop("content"), **tree}

    @classmethod
    def from_tree(cls, tree: Any, path: Path, *, identity: str | None = None) -> ArtifactFile:
        """Checks and returns the content of an artifact file.

        Raises:
            ForeignRunError: the file belongs to another run than `identity`.
            CheckpointError: an entry is missing or has the wrong type.
        """
        header = ("format", "identity", "kind", "checksum", "provenance")
        if isinstance(tree, Mapping):
            content = {key: value for key, value in tree.items() if key not in header}
            tree = {**{key: tree[key] for key in header if key in tree}, "content": content}
        file = _read_file(cls, tree, path)
        check_identity(path, file.identity, identity)
        for name, expected in CONTENT_ENTRIES.get(file.kind, {}).items():
            if not isinstance(file.content.get(name), expected):
                raise CheckpointError(
                    f"{path} is damaged: a {file.kind} needs an entry {name!r} of type {expected.__name__}"
                )
        return file


def check_names(source: Path | str, entry: str, values: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raises CheckpointError when the names in an entry are not the expected ones."""
    names = set(expected)
    if set(values) != names:
        raise CheckpointError(
            f"{source} is damaged: entry {entry!r} has {', '.join(sorted(values)) or 'nothing'}; expected "
            f"{', '.join(sorted(names)) or 'nothing'}"
        )


@contextmanager
def report_misfit(source: Path | str, entry: str) -> Iterator[None]:
    """Raises CheckpointError, with file and entry, when the block cannot load the entry."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # memory ran out, or the device failed
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{source} is damaged: entry {entry!r} does not fit the run ({reason})") from error


class ForeignRunError(CheckpointError):
    """A file of another run in the folder of this one."""


def check_identity(path: Path, identity: str, expected: str | None) -> None:
    """Raises ForeignRunError when a file belongs to another run."""
    if expected is not None and identity != expected:
        raise ForeignRunError(
            f"{path} belongs to another run (identity {identity}, expected {expected}). Put the right file back, "
            "choose another folder with out=DIR, or train again with fresh=true."
        )


def _read_file(declaration: type[T], tree: Any, path: Path) -> T:
    version = tree.get("format") if isinstance(tree, Mapping) else None
    if version is None:
        raise CheckpointError(f"{path} is not a checkpoint of kdbench (it has no entry 'format')")
    if type(version) is not int or version != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of another version of kdbench (format {version!r}; this version reads "
            f"{CHECKPOINT_FORMAT})"
        )
    try:
        return read_entries(declaration, tree)
    except EntryError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
