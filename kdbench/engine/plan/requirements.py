"""What roles, terms and their parts need of the sources that they read: fields, labels, enough samples, equal rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdbench.config.parse.data import is_evaluation
from kdbench.config.schema import ArtifactConfig, OperandConfig, RoleConfig, StageConfig, TermConfig
from kdbench.data.source_spec import SourceSpec
from kdbench.engine.network.operands import operand_source
from kdbench.engine.network.roles import input_addresses
from kdbench.errors import ConfigError, Location, suggest
from kdbench.registry import ARTIFACTS, ROUTERS, SAMPLE_WEIGHTS, SELECTORS, TERMS, Entry

Specs = Mapping[str, SourceSpec]


def check_requirements(
    stage: StageConfig, terms: Sequence[str], sources: Mapping[str, str], specs: Specs, world_size: int
) -> None:
    """Finds fault with what a stage reads and its sources cannot give.

    Args:
        terms: those that are not left out.
        sources: the source at the root of each role's input.

    Raises:
        ConfigError: a field, a label, a sample or a row is missing, with the place of what misses it.
    """
    for name in terms:
        _check_reads(stage.terms[name], sources, specs, stage, world_size)
    _check_choosers(stage, sources, specs)
    _check_amounts(stage, specs, world_size)
    for config in stage.roles.values():
        _check_side_by_side(config, stage, specs, world_size)


def batch_sizes(stage: StageConfig, source: str, specs: Specs, world_size: int) -> tuple[int, ...]:
    """How many rows a process's batches of a source have: whole ones, and those that end (or begin) an epoch."""
    config, spec = stage.data[source], specs[source]
    size, sizes = config.batch_size, [config.batch_size]
    if spec.classes is not None and spec.samples is not None:  # noise is drawn, so that every batch is whole
        sizes.append(-(-(spec.samples % (size * world_size)) // world_size))
    if config.overlap:
        sizes.append(size // 2)
    return tuple(dict.fromkeys(rows for rows in sizes if rows))


def equal_batch_sizes(stage: StageConfig, first: str, second: str, specs: Specs, world_size: int) -> bool:
    """Whether the batches of two sources have equally many rows at every step."""
    sizes = [batch_sizes(stage, source, specs, world_size) for source in (first, second)]
    return sizes[0] == sizes[1] and (len(sizes[0]) == 1 or specs[first].samples == specs[second].samples)


def batch_sizes_text(stage: StageConfig, sources: Sequence[str], specs: Specs, world_size: int) -> str:
    """`train: 16, then 2; noise: 16`."""
    found = ((source, batch_sizes(stage, source, specs, world_size)) for source in sources)
    return "; ".join(f"{source}: {', then '.join(map(str, sizes))}" for source, sizes in found)


def _check_reads(
    config: TermConfig, sources: Mapping[str, str], specs: Specs, stage: StageConfig, world_size: int
) -> None:
    """What a term reads besides its operands must be fields of the source that its student sees."""
    entry = TERMS.entry(config.type)
    what = f"term {config.name!r} ({config.type})"
    for leaf in config.read_operands():
        if leaf.kind == "field" and leaf.path not in specs[leaf.role].fields:
            known = ", ".join(sorted(specs[leaf.role].fields))
            raise ConfigError(f"{leaf.location}: source {leaf.role!r} has no field {leaf.path!r}. Its fields: {known}")
    for edge in config.edges:
        source = operand_source(edge.student, sources, stage.terms) or sources[stage.export]
        fields = specs[source].fields
        own = {"student", "teacher", "mask", "weight", *config.operands}
        _refuse_missing(entry, own, source, specs, f"{config.location}: {what}")
        for part, registry in ((config.sample_weight, SAMPLE_WEIGHTS), (config.route, ROUTERS)):
            if part is not None:
                given = {"student", "teachers", "losses", *part.operands, *config.operands}
                given |= {"teacher"} if edge.teacher is not None else set()
                said = f"{part.location}: {registry.kind} {part.type!r} of {what}"
                _refuse_missing(registry.entry(part.type), given, source, specs, said)
        if config.mask is not None and fields.get(config.mask, ((), ""))[1] != "bool":
            masks = [name for name, (_, dtype) in fields.items() if dtype == "bool"]
            hint = suggest(config.mask, masks) if masks else " It has none."
            raise ConfigError(f"{config.location}: {what}: source {source!r} has no mask {config.mask!r}.{hint}")
        if entry.facts.get("space") == "batch" and world_size > 1:
            _refuse_padded(config, source, sources, specs, stage, world_size)
        if edge.teacher is None or entry.facts.get("space") in ("batch", "model"):
            continue
        other = operand_source(edge.teacher, sources, stage.terms)
        if other is not None and other != source:
            raise ConfigError(
                f"{config.location}: {what} compares row by row, but {edge.student} sees source {source!r} and "
                f"{edge.teacher} sees {other!r}"
            )


def _refuse_padded(
    config: TermConfig, own: str, sources: Mapping[str, str], specs: Specs, stage: StageConfig, world_size: int
) -> None:
    """Several processes pad a last batch; a term that couples rows knows the padding of its own source only."""
    for leaf in config.read_operands():
        source = operand_source(leaf, sources, stage.terms)
        if source in (None, own) or len(batch_sizes(stage, source, specs, world_size)) == 1:  # type: ignore[arg-type]
            continue
        raise ConfigError(
            f"{leaf.location}: term {config.name!r} couples rows of source {own!r} with those of {source!r}, whose "
            f"last batch is smaller ({batch_sizes_text(stage, [str(source)], specs, world_size)}): "
            f"{world_size} processes would pad it. Choose a batch_size that leaves no smaller last batch, or one "
            "process."
        )


def _refuse_missing(entry: Entry, given: set[str], source: str, specs: Specs, what: str) -> None:
    """Raises for the first thing that a part cannot do without and that is neither given nor a field."""
    fields = specs[source].fields
    for name in entry.inputs:
        if name not in given and name not in entry.optional_inputs and name not in fields:
            hint = " It has no labels." if name == "label" else ""
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{what} reads {name!r}, which source {source!r} has not; it has {known}.{hint}")


def _check_choosers(stage: StageConfig, sources: Mapping[str, str], specs: Specs) -> None:
    """Selectors read fields of the source that they choose from, and keep no more rows than a batch has."""
    for update in stage.updates:
        part = update.select
        if part is None or update.keep is None:
            continue
        first = next(iter(part.operands.values()), None)
        source = (operand_source(first, sources, stage.terms) if first is not None else None) or sources[stage.export]
        _check_selector(part.type, part.operands, source, specs, part.location)
        size = stage.data[source].batch_size
        if update.keep > max(size, 1):
            said = f"`keep: {update.keep}` is more than the {size} rows of a batch of source {source!r}"
            raise ConfigError(f"{part.location}: {said}, so nothing would be chosen")


def check_artifact(artifact: ArtifactConfig, specs: Specs) -> None:
    """Finds fault with a maker, or its selector, that reads labels or other fields which its source has not."""
    entry, source = ARTIFACTS.entry(artifact.part.type), artifact.source or "train"
    if entry.facts.get("labels"):
        _refuse_unlabelled(source, specs, f"{artifact.location}: {artifact.part.type} reads the labels")
    chooser = artifact.part.params.get(entry.facts.get("selector", ""))
    if isinstance(chooser, Mapping):
        _check_selector(str(chooser["type"]), artifact.part.operands, source, specs, artifact.location)


def _check_selector(
    kind: str, operands: Mapping[str, OperandConfig], source: str, specs: Specs, place: Location
) -> None:
    given = {"count", "excluded", "seed", *operands}
    _refuse_missing(SELECTORS.entry(kind), given, source, specs, f"{place}: selector {kind!r}")


def _refuse_unlabelled(source: str, specs: Specs, what: str) -> None:
    known = sorted(specs[source].fields)
    if "label" not in known:
        raise ConfigError(f"{what} of source {source!r}, which has none; it has {', '.join(known)}")


def _check_amounts(stage: StageConfig, specs: Specs, world_size: int) -> None:
    """A number of labels, or of rows, must not be more than the samples that there are."""
    for name, config in stage.data.items():
        samples = specs[name].samples
        if isinstance(config.label_fraction, float | int):
            place = config.locations.get("labels", config.location)
            _refuse_unlabelled(name, specs, f"{place}: label_fraction {config.label_fraction} keeps labels")
            if samples is not None and config.label_fraction > max(samples, 1):
                raise ConfigError(
                    f"{place}: {config.label_fraction} labels, but source {name!r} has only {samples} samples"
                )
        drawn = specs[name].classes is None
        if samples is not None and config.batch_size * world_size > samples and not drawn and not is_evaluation(name):
            place = config.locations.get("batch_size", config.location)
            each = f" on each of {world_size} processes" if world_size > 1 else ""
            raise ConfigError(
                f"{place}: batch_size {config.batch_size}{each} is more than the {samples} samples of source {name!r}"
            )


def _check_side_by_side(config: RoleConfig, stage: StageConfig, specs: Specs, world_size: int) -> None:
    """A role that sees two sources row by row needs batches of equal size from both, at every step."""
    found, waiting = set(), [config]
    while waiting:
        for address in input_addresses(waiting.pop()):
            head = address.split(":" if ":" in address else ".", 1)[0]
            if ":" in address:
                waiting.append(stage.roles[head])
            else:
                found.add(head)
    first, *others = sorted(found)
    if not all(equal_batch_sizes(stage, first, other, specs, world_size) for other in others):
        raise ConfigError(
            f"{config.location}: role {config.name!r} sees {' and '.join((first, *others))} side by side, but their "
            f"batches differ in size ({batch_sizes_text(stage, (first, *others), specs, world_size)}). Give all of them "
            "one `batch_size` that leaves no smaller last batch."
        )
