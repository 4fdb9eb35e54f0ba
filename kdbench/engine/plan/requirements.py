"""Requirements of a stage on its sources: fields, labels, number of samples, equal batch sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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
    """Checks that a stage's sources provide everything that the stage reads.

    Args:
        stage: the stage.
        terms: names of the terms whose weight is not constantly 0.
        sources: role -> name of the source from which its input comes, directly or through other roles.
        specs: source -> specification of its fields and sizes.
        world_size: number of processes that share a batch.

    Raises:
        ConfigError: a field, labels, samples or rows are missing. The message has the location in the recipe that
            requires them.
    """
    for name in terms:
        _check_term(stage.terms[name], sources, specs, stage, world_size)
    _check_selectors(stage, sources, specs)
    _check_sizes(stage, specs, world_size)
    for config in stage.roles.values():
        _check_role_sources(config, stage, specs, world_size)


def batch_sizes(stage: StageConfig, source: str, specs: Specs, world_size: int) -> tuple[int, ...]:
    """Returns the distinct batch sizes of a source in one process.

    The first entry is the batch size of the recipe. A second entry is the size of a smaller last batch of an epoch
    (or, with `overlap`, of a smaller first batch).
    """
    config, spec = stage.data[source], specs[source]
    size, sizes = config.batch_size, [config.batch_size]
    if spec.classes is not None and spec.samples is not None:  # batches of noise are always full
        sizes.append(-(-(spec.samples % (size * world_size)) // world_size))
    if config.overlap:
        sizes.append(size // 2)
    return tuple(dict.fromkeys(rows for rows in sizes if rows))


def equal_batch_sizes(stage: StageConfig, first: str, second: str, specs: Specs, world_size: int) -> bool:
    """Returns True if the batches of two sources have the same number of rows at every step."""
    sizes = [batch_sizes(stage, source, specs, world_size) for source in (first, second)]
    return sizes[0] == sizes[1] and (len(sizes[0]) == 1 or specs[first].samples == specs[second].samples)


def batch_sizes_text(stage: StageConfig, sources: Sequence[str], specs: Specs, world_size: int) -> str:
    """Returns the batch sizes of sources as text, such as `train: 16, then 2; noise: 16`."""
    sizes_by_source = ((source, batch_sizes(stage, source, specs, world_size)) for source in sources)
    return "; ".join(f"{source}: {', then '.join(map(str, sizes))}" for source, sizes in sizes_by_source)


def _check_term(
    config: TermConfig, sources: Mapping[str, str], specs: Specs, stage: StageConfig, world_size: int
) -> None:
    """Checks the requirements of a term: its fields, mask and rows, and the fields of its sample weight and router."""
    entry = TERMS.entry(config.type)
    title = f"term {config.name!r} ({config.type})"
    for operand in config.read_operands():
        if operand.kind == "field" and operand.path not in specs[operand.role].fields:
            raise ConfigError(f"{operand.location}: {_no_field(operand.role, operand.path, specs)}")
    for edge in config.edges:
        # A term reads its fields from the source that its student sees.
        source = operand_source(edge.student, sources, stage.terms) or sources[stage.export]
        operands = {"student", "teacher", "mask", "weight", *config.operands}
        _check_inputs(entry, operands, source, specs, f"{config.location}: {title}")
        for part, registry in ((config.sample_weight, SAMPLE_WEIGHTS), (config.route, ROUTERS)):
            if part is not None:
                operands = {"student", "teachers", "losses", *part.operands, *config.operands}
                operands |= {"teacher"} if edge.teacher is not None else set()
                prefix = f"{part.location}: {registry.kind} {part.type!r} of {title}"
                _check_inputs(registry.entry(part.type), operands, source, specs, prefix)
        _check_mask(config, title, source, specs)
        if entry.facts.get("space") == "batch" and world_size > 1:
            _check_padding(config, source, sources, specs, stage, world_size)
        if edge.teacher is None or entry.facts.get("space") in ("batch", "model"):
            continue
        teacher_source = operand_source(edge.teacher, sources, stage.terms)
        if teacher_source is not None and teacher_source != source:
            raise ConfigError(
                f"{config.location}: {title} compares row by row, but the rows of {edge.student} come from source "
                f"{source!r} and those of {edge.teacher} from source {teacher_source!r}"
            )


def _no_field(source: str, name: str, specs: Specs) -> str:
    return f"source {source!r} has no field {name!r}. Its fields: {', '.join(sorted(specs[source].fields))}"


def _check_mask(config: TermConfig, title: str, source: str, specs: Specs) -> None:
    fields = specs[source].fields
    if config.mask is not None and fields.get(config.mask, ((), ""))[1] != "bool":
        masks = [name for name, (_, dtype) in fields.items() if dtype == "bool"]
        hint = suggest(config.mask, masks) if masks else " The source has no boolean field."
        raise ConfigError(f"{config.location}: {title}: source {source!r} has no mask {config.mask!r}.{hint}")


def _check_padding(
    config: TermConfig, source: str, sources: Mapping[str, str], specs: Specs, stage: StageConfig, world_size: int
) -> None:
    """Raises a ConfigError if a term compares its rows with padded rows of another source.

    With several processes, a smaller last batch of an epoch is padded. The term excludes padded rows of its own
    source, but padded rows of another source would change its loss.
    """
    for operand in config.read_operands():
        name = operand_source(operand, sources, stage.terms)
        if name is None or name == source or len(batch_sizes(stage, name, specs, world_size)) == 1:
            continue
        raise ConfigError(
            f"{operand.location}: term {config.name!r} couples rows of source {source!r} with rows of {name!r}, whose "
            f"last batch is smaller ({batch_sizes_text(stage, [name], specs, world_size)}); {world_size} processes "
            "would pad it. Use a batch_size that leaves no smaller last batch, or one process."
        )


def _check_inputs(entry: Entry, operands: Collection[str], source: str, specs: Specs, title: str) -> None:
    """Raises a ConfigError if a part (term, router, ...) requires an input that is not available.

    An input is available if it is an operand or a field of the source.
    """
    fields = specs[source].fields
    for name in entry.inputs:
        if name not in operands and name not in entry.optional_inputs and name not in fields:
            hint = " The source has no labels." if name == "label" else ""
            raise ConfigError(f"{title} reads {name!r}, but {_no_field(source, name, specs)}.{hint}")


def _check_selectors(stage: StageConfig, sources: Mapping[str, str], specs: Specs) -> None:
    """Checks that the fields that selectors read exist, and that `keep` is at most the batch size."""
    for update in stage.updates:
        part = update.select
        if part is None or update.keep is None:
            continue
        operand = next(iter(part.operands.values()), None)
        source = (operand_source(operand, sources, stage.terms) if operand is not None else None) or sources[
            stage.export
        ]
        _check_selector(part.type, part.operands, source, specs, part.location)
        size = stage.data[source].batch_size
        if update.keep > max(size, 1):
            raise ConfigError(
                f"{part.location}: `keep: {update.keep}` is more than the {size} rows of a batch of source {source!r}, "
                "so every row would be selected"
            )


def check_artifact(artifact: ArtifactConfig, specs: Specs) -> None:
    """Checks that an artifact's source has the labels and fields that the artifact's builder and selector read."""
    entry, source = ARTIFACTS.entry(artifact.part.type), artifact.source or "train"
    if entry.facts.get("labels"):
        _check_labels(source, specs, f"{artifact.location}: {artifact.part.type} reads the labels")
    selector = artifact.part.params.get(entry.facts.get("selector", ""))
    if isinstance(selector, Mapping):
        _check_selector(str(selector["type"]), artifact.part.operands, source, specs, artifact.location)


def _check_selector(
    kind: str, operands: Mapping[str, OperandConfig], source: str, specs: Specs, location: Location
) -> None:
    # The arguments that every selector gets from its caller.
    names = {"count", "excluded", "seed", *operands}
    _check_inputs(SELECTORS.entry(kind), names, source, specs, f"{location}: selector {kind!r}")


def _check_labels(source: str, specs: Specs, title: str) -> None:
    names = sorted(specs[source].fields)
    if "label" not in names:
        raise ConfigError(f"{title} of source {source!r}, which has none. The fields of the source: {', '.join(names)}")


def _check_sizes(stage: StageConfig, specs: Specs, world_size: int) -> None:
    """Checks that every source has at least as many samples as its `label_fraction` and `batch_size` require."""
    for name, config in stage.data.items():
        samples = specs[name].samples
        if isinstance(config.label_fraction, float | int):
            location = config.locations.get("label_fraction", config.location)
            _check_labels(name, specs, f"{location}: label_fraction {config.label_fraction} keeps labels")
            if samples is not None and config.label_fraction > max(samples, 1):
                raise ConfigError(
                    f"{location}: {config.label_fraction} labels, but source {name!r} has only {samples} samples"
                )
        is_noise = specs[name].classes is None
        if samples is None or is_noise or is_evaluation(name):
            continue
        if config.batch_size * world_size > samples:
            location = config.locations.get("batch_size", config.location)
            ranks = f" on each of {world_size} processes" if world_size > 1 else ""
            raise ConfigError(
                f"{location}: batch_size {config.batch_size}{ranks} is more than the {samples} samples of source "
                f"{name!r}"
            )


def _check_role_sources(config: RoleConfig, stage: StageConfig, specs: Specs, world_size: int) -> None:
    """Checks that the batches of all sources that a role reads have equal sizes at every step."""
    sources, pending = set(), [config]
    while pending:
        for address in input_addresses(pending.pop()):
            name = address.split(":" if ":" in address else ".", 1)[0]
            if ":" in address:
                pending.append(stage.roles[name])
            else:
                sources.add(name)
    first, *rest = sorted(sources)
    if not all(equal_batch_sizes(stage, first, source, specs, world_size) for source in rest):
        raise ConfigError(
            f"{config.location}: role {config.name!r} combines rows of the sources {' and '.join((first, *rest))}, but "
            f"their batches differ in size ({batch_sizes_text(stage, (first, *rest), specs, world_size)}). Give all of "
            "them one `batch_size` that leaves no smaller last batch."
        )
