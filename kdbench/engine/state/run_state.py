"""Declared contents of the checkpoint files of a run: run state, model files and artifact files.

- `checkpoints/last.pt` contains a `RunState`.
- `checkpoints/best.pt`, `epoch_*.pt` and `stage_*.pt` contain a `ModelFile`.
- `stages/STAGE.NAME.pt` contains an `ArtifactFile`.

The method `from_tree` of each class checks that a file contains every declared entry with the declared type.
`RunState.from_tree` also checks that the stage and the step are possible.
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
"""Version of the format of checkpoint files. Increase it whenever an entry changes."""


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
    """One evaluation of the trained roles (networks).

    Attributes:
        stage: name of the stage.
        epoch: number of finished epochs of the stage.
        step: number of optimizer steps since the run began, over all stages.
        metrics: role -> split -> metric -> value.
    """

    stage: str
    epoch: int
    step: int
    metrics: Scores


class BestEvaluation(Evaluation):
    """The best evaluation of a stage.

    Attributes:
        selected_on: name of the split on which the evaluations of the stage were compared.
        by: name of the metric by which the evaluations were compared.
    """

    selected_on: str
    by: str


@dataclass
class History:
    """Results of a training run so far.

    Attributes:
        seconds: time in seconds that was spent in training steps.
        evaluations: all evaluations of the trained roles (networks), in order.
        best: stage -> best evaluation of the stage.
        frozen: role -> split -> metric -> value, for frozen roles. Frozen roles are evaluated once, before training.
    """

    seconds: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)
    best: dict[str, BestEvaluation] = field(default_factory=dict)
    frozen: Scores = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainingState:
    """State of one training stage between two steps. Recipe, seed and this state determine all further steps.

    Attributes:
        step: number of finished steps of the stage.
        total_steps: number of all steps of the stage.
        models: role -> state dict, for all trained roles (networks). A resumed run loads frozen roles from their
            original files.
        effective: role -> state dict of the weights that the role's forward uses. This mapping contains only roles
            with weight transforms (such as quantisation), and an exported role that reuses a module of another role.
        average: state dict of the moving average (EMA) of the exported role; None without a moving average.
        terms: loss term -> state dict, including adapters (modules between a network's feature and the loss).
        optimizers: state dicts of all optimizers.
        scaler: state dict of the fp16 gradient scaler; empty when the scaler is disabled.
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
        """Returns the content of a model file: the weights without optimizer and training state.

        Args:
            identity: identity (a hash) of the run.
            export: name of the role (network) that is the result of the training.
            epoch: number of finished epochs; None for a file that does not belong to an epoch.
        """
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
    """Everything that an interrupted run needs to continue with bit-identical results.

    Attributes:
        format: version of the file format, `CHECKPOINT_FORMAT`.
        identity: hash that identifies the run. A file with another identity is rejected.
        stage: name of the current training stage.
        finished_stages: earlier stage -> number of steps of the stage.
        export: name of the role (network) that is the result of the training.
        history: results of the run so far.
        tracker: log file -> byte offset at which a resumed run continues the log.
    """

    format: int = CHECKPOINT_FORMAT
    identity: str
    stage: str
    finished_stages: Mapping[str, int]
    export: str
    history: History
    tracker: Mapping[str, int]

    def to_tree(self) -> dict[str, Any]:
        """Returns the entries of the file as a mapping for `torch.save`."""
        return write_entries(self)

    @classmethod
    def from_tree(cls, tree: Any, path: Path, *, identity: str | None = None, stages: Sequence[str] = ()) -> RunState:
        """Checks the content of a file `last.pt`, and returns it as a `RunState`.

        Args:
            tree: content that was read from the file.
            path: path of the file, for messages.
            identity: identity that the file must have; None accepts the file of any run.
            stages: names of the run's training stages, in order; empty if the names are not known.

        Raises:
            ForeignRunError: the file belongs to another run.
            CheckpointError: an entry is missing, has the wrong type, or has an impossible value.
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
            return f"entry 'stage' is {state.stage!r}, but the stages of the recipe are {', '.join(stages)}"
        earlier = stages[: list(stages).index(state.stage)]
        if set(state.finished_stages) != set(earlier):
            names = ", ".join(state.finished_stages) or "no stage"
            expected = ", ".join(earlier) or "no stage"
            return f"entry 'finished_stages' contains {names}; expected {expected} before stage {state.stage!r}"
    return ""


@dataclass(kw_only=True)
class ModelFile:
    """Content of the files `best.pt`, `epoch_*.pt` and `stage_*.pt`: the weights of the trained roles (networks).

    A file `last.pt` (`RunState`) contains these entries too, except `epoch`.

    Attributes:
        format: version of the file format, `CHECKPOINT_FORMAT`.
        identity: hash that identifies the run that trained the weights.
        export: name of the role that is the result of the training.
        models, effective, average: the same entries as in `TrainingState`. In a file `stage_*.pt`, `models` also
            contains the frozen roles that later training stages load.
        epoch: number of finished epochs of the stage; None in a file `stage_*.pt`.
    """

    format: int = CHECKPOINT_FORMAT
    identity: str
    export: str
    models: Mapping[str, StateDict]
    effective: Mapping[str, StateDict]
    average: StateDict | None
    epoch: int | None = None

    def to_tree(self) -> dict[str, Any]:
        """Returns the entries of the file as a mapping for `torch.save`."""
        return write_entries(self)

    @classmethod
    def from_tree(cls, tree: Any, path: Path, *, identity: str | None = None) -> ModelFile:
        """Checks the content of a model file or of a file `last.pt`, and returns its weights as a `ModelFile`.

        Raises:
            ForeignRunError: the file belongs to another run; its identity is not `identity`.
            CheckpointError: an entry is missing or has the wrong type.
        """
        file = _read_file(cls, tree, path)
        check_identity(path, file.identity, identity)
        return file


@dataclass(kw_only=True)
class ArtifactFile:
    """Content of an artifact file. An artifact is data or a model that one training stage built for later stages.

    Attributes:
        format: version of the file format, `CHECKPOINT_FORMAT`.
        identity: hash that identifies the run that built the artifact.
        kind: kind of the artifact: dataset, subset, tensor or model.
        checksum: checksum of `content`.
        provenance: origin of the artifact: the class that built the artifact, the parameters of this class, and the
            data and weights that the class read.
        content: the data or model. The entries of `content` are top-level entries of the file.
    """

    format: int = CHECKPOINT_FORMAT
    identity: str
    kind: str
    checksum: str
    provenance: Mapping[str, Any]
    content: Mapping[str, Any]

    def to_tree(self) -> dict[str, Any]:
        """Returns the entries of the file as a mapping for `torch.save`."""
        tree = write_entries(self)
        return {**tree.pop("content"), **tree}

    @classmethod
    def from_tree(cls, tree: Any, path: Path, *, identity: str | None = None) -> ArtifactFile:
        """Checks the content of an artifact file, and returns it as an `ArtifactFile`.

        Raises:
            ForeignRunError: the file belongs to another run; its identity is not `identity`.
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
    """Raises a CheckpointError if the names in `values`, an entry of a checkpoint, are not the expected names."""
    names = set(expected)
    if set(values) != names:
        raise CheckpointError(
            f"{source} is damaged: entry {entry!r} contains {', '.join(sorted(values)) or 'nothing'}; expected "
            f"{', '.join(sorted(names)) or 'nothing'}"
        )


@contextmanager
def report_misfit(source: Path | str, entry: str) -> Iterator[None]:
    """Converts an error while the block loads a checkpoint entry into a CheckpointError that names file and entry."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # memory ran out, or the device failed
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{source} is damaged: entry {entry!r} does not fit the run ({reason})") from error


class ForeignRunError(CheckpointError):
    """Error about a checkpoint file that belongs to another run."""


def check_identity(path: Path, identity: str, expected: str | None) -> None:
    """Raises a ForeignRunError if a file's identity (hash of its run) is not `expected`. None accepts any identity."""
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
