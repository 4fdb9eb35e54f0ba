"""Figures: confusion matrix, predictions, stacked bars. They are drawn without pyplot, so no window opens."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


RIGHT, WRONG, TEACHER = "#1a7f37", "#cf222e", "#57606a"


DPI = 100


MAX_LABELLED_CLASSES = 30
"""Maximum number of classes for a confusion matrix with labelled rows, columns and cells."""


class Picture(NamedTuple):
    """A PNG image and its size in pixels."""

    png: bytes
    width: int
    height: int


def draw_confusion(matrix: Tensor, classes: Sequence[str] | None = None, title: str = "") -> Picture:
    """Draws a confusion matrix as percentages of each row.

    With few classes, each cell shows its percentage. With many classes, cells are only shaded, and the most
    frequently confused pairs are listed to the right.

    Args:
        matrix: (classes, classes) counts, row = label, column = prediction.
        classes: names of the classes; None: numbers.
        title: title of the figure.
    """
    from matplotlib.colors import PowerNorm

    counts = matrix.double().cpu().numpy()
    number = len(counts)
    names = [str(name) for name in classes] if classes and len(classes) == number else [str(i) for i in range(number)]
    percentages = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    small = number <= MAX_LABELLED_CLASSES
    side = max(5.0, 0.55 * number) if small else 8.5
    figure = _figure(side + 1.6 if small else side + 5.0, side)
    if small:
        axes, list_axes = figure.add_subplot(), None
    else:
        axes, list_axes = figure.subplots(1, 2, width_ratios=[side + 1.2, 3.2])
    norm = PowerNorm(0.5, vmin=0, vmax=100)  # the square root makes rare confusions visible
    image = axes.imshow(percentages, cmap="Blues", norm=norm, interpolation="nearest")
    accuracy = 100 * counts.trace() / max(counts.sum(), 1)
    axes.set_title(f"{title or 'confusion'}: {accuracy:.2f}% correct of {int(counts.sum())}", loc="left")
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if small:
        long = max(len(name) for name in names) > 3
        axes.set_xticks(range(number), names, rotation=90 if long else 0, fontsize=9, parse_math=False)
        axes.set_yticks(range(number), names, fontsize=9, parse_math=False)
        for row in range(number):
            for column in range(number):
                if counts[row, column]:
                    value = percentages[row, column]
                    text = f"{value:.0f}" if value >= 0.95 else f"{value:.1f}"
                    color = "white" if value > 45 else "black"
                    axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    else:
        ticks = range(0, number, 10 if number <= 200 else number // 10)
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_yticks(ticks, [str(t) for t in ticks])
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.set_label("% of the label's samples")
    if list_axes is not None:
        _list_confusions(list_axes, counts, percentages, names)
    return _png(figure)


def _list_confusions(axes: Any, counts: Any, percentages: Any, names: Sequence[str]) -> None:
    """Lists the most frequent confusions and the classes with the lowest accuracy."""
    confusions = [
        (percentages[row, column], row, column)
        for row in range(len(counts))
        for column in range(len(counts))
        if row != column and counts[row, column]
    ]
    confusions.sort(key=lambda item: (-item[0], item[1], item[2]))
    accuracies = [(percentages[row, row], row) for row in range(len(counts)) if counts[row].sum()]
    lines = ["most confused", ""]
    lines += [
        f"{value:4.0f}%  {_shorten(names[row])} → {_shorten(names[column])}" for value, row, column in confusions[:22]
    ]
    lines += ["", "", "lowest accuracy", ""]
    lines += [f"{value:4.0f}%  {_shorten(names[row])}" for value, row in sorted(accuracies)[:12]]
    axes.set_axis_off()
    text_style = {"va": "top", "fontsize": 9, "family": "monospace", "linespacing": 1.3, "parse_math": False}
    axes.text(0, 1, "\n".join(lines), transform=axes.transAxes, **text_style)


def draw_predictions(samples: Mapping[str, Any], classes: Sequence[str] | None = None) -> Picture:
    """Draws images with their labels and the predictions of student and teacher.

    Args:
        samples: `image` (n, channels, height, width), uint8, or float of any range; `label` (n,); `student` and
            optionally `teacher`: logits (n, classes). At most 32 images are drawn.
        classes: names of the classes; None: numbers.
    """
    images, labels = samples["image"][:32].detach().cpu(), samples["label"][:32].tolist()
    student = samples["student"][:32].detach().float().cpu().softmax(1)
    teacher = samples.get("teacher")
    teacher = None if teacher is None else teacher[:32].detach().float().cpu().softmax(1)

    def name(index: int) -> str:
        return _shorten(str(classes[index]) if classes and index < len(classes) else str(index))

    columns = min(8, len(labels)) or 1
    rows = -(-len(labels) // columns)
    figure = _figure(1.75 * columns, (2.5 if teacher is not None else 2.3) * rows, hspace=0.08)
    for position, label in enumerate(labels):
        axes = figure.add_subplot(rows, columns, position + 1)
        axes.imshow(_displayable_image(images[position]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"label {name(label)}" if label >= 0 else "no label", fontsize=9, parse_math=False)
        probability, predicted = student[position].max(0)
        color = RIGHT if int(predicted) == label else WRONG
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=2)
        text_style = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 8, "parse_math": False}
        axes.text(
            0.5, -0.04, f"student {name(int(predicted))} {_probability_text(probability)}", color=color, **text_style
        )
        if teacher is not None:
            probability, predicted = teacher[position].max(0)
            color = TEACHER if int(predicted) == label else WRONG
            axes.text(
                0.5,
                -0.15,
                f"teacher {name(int(predicted))} {_probability_text(probability)}",
                color=color,
                **text_style,
            )
    return _png(figure)


def draw_bars(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> Picture:
    """Draws one stacked horizontal bar per row, scaled to 100 %, with a legend of all percentages below.

    Names that begin with the same word (`forward teacher`, `forward student`) have shades of one colour.

    Args:
        title: title of the figure.
        names: names of the segments.
        rows: label of each bar with one value per segment.
    """
    from matplotlib.patches import Patch

    colors = _part_colors(names)
    lines = -(-len(names) // 2)
    figure = _figure(11.0, 1.0 + 0.95 * len(rows) + 0.32 * lines)
    axes, legend_axes = figure.subplots(2, 1, height_ratios=[0.95 * len(rows) + 0.6, 0.32 * lines])
    percentages = [[100 * value / (sum(values) or 1) for value in values] for _, values in rows]
    for row, values in enumerate(percentages):
        start = 0.0
        for name, percent, color in zip(names, values, colors, strict=True):
            axes.barh(row, percent, left=start, color=color, edgecolor="white", linewidth=0.8, height=0.72)
            text = name if percent > 1.05 * len(name) + 1 else f"{percent:.0f}%" if percent > 3.5 else ""
            if percent > 1.05 * len(name) + 7:
                text = f"{name} {percent:.0f}%"
            text_style = {"fontsize": 9, "color": _text_color(color), "parse_math": False}
            axes.text(start + percent / 2, row, text, ha="center", va="center", **text_style)
            start += percent
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 10), [f"{tick}%" for tick in range(0, 101, 10)])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    row_labels = " / ".join(label.split("\n")[0] for label, _ in rows)
    labels = [
        f"{name}: " + " / ".join(_percent_text(row[index]) for row in percentages) for index, name in enumerate(names)
    ]
    patches = [Patch(color=color, label=text) for color, text in zip(colors, labels, strict=True)]
    legend_axes.set_axis_off()
    legend = legend_axes.legend(
        handles=patches, ncols=2, loc="upper left", frameon=False, fontsize=9, title=f"fraction of {row_labels}"
    )
    legend._legend_box.align = "left"
    return _png(figure)


def _percent_text(percent: float) -> str:
    return (
        "0"
        if percent == 0
        else "<0.1%"
        if percent < 0.1
        else f"{percent:.1f}%"
        if percent < 9.95
        else f"{percent:.0f}%"
    )


def _part_colors(names: Sequence[str]) -> list[tuple[float, float, float]]:
    """Returns one color per name. Names with an equal first word have the same hue in different shades."""
    from matplotlib.colors import to_rgb

    hues = ("#57606a", "#9aa4af", "#0969da", "#bf5700", "#d4a72c", "#a40e26", "#1a7f37", "#8250df")
    words = list(dict.fromkeys(name.split(" ")[0] for name in names))
    names_by_word = {word: [name for name in names if name.split(" ")[0] == word] for word in words}
    colors = []
    for name in names:
        word = name.split(" ")[0]
        index, number = names_by_word[word].index(name), len(names_by_word[word])
        light = 0.5 * index / max(number - 1, 1) if number > 1 else 0.0
        red, green, blue = to_rgb(hues[words.index(word) % len(hues)])
        colors.append((red + (1 - red) * light, green + (1 - green) * light, blue + (1 - blue) * light))
    return colors


def _text_color(color: tuple[float, float, float]) -> str:
    """Returns the text color with more contrast on a background color: black or white."""
    red, green, blue = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.6 else "white"


def _displayable_image(image: Tensor) -> Any:
    """Returns an image as (height, width) or (height, width, 3) in [0, 1].

    Normalised images are scaled to their own range.
    """
    values = image.float() / 255 if not image.is_floating_point() else image.float()
    if float(values.min()) < 0 or float(values.max()) > 1:
        low, high = values.min(), values.max()
        values = (values - low) / (high - low).clamp_min(1e-12)
    values = values[:3] if values.shape[0] >= 3 else values[:1]
    return values.permute(1, 2, 0).squeeze(-1).nan_to_num().numpy()


def _probability_text(probability: Any) -> str:
    return f"{100 * float(probability):.0f}%"


def _shorten(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _figure(width: float, height: float, hspace: float = 0.02) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(hspace=hspace))
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> Picture:
    """Renders a figure as PNG. Equal figures give equal bytes, because the file contains no date and no version."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph", category=UserWarning
        )  # class names in a script that the font does not have
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    content = buffer.getvalue()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    return Picture(content, width, height)
