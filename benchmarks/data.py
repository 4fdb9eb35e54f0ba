"""How fast do batches come? kdbench's data against the loaders that people use, images per second.

Resident: CIFAR-sized images in memory, as kdbench's `resident` source (on the device, a batch at a time) and as a
torchvision dataset of the same images under a DataLoader (PIL, transforms, collate), for several lists of
augmentation. Streaming: JPEG files in class folders, decoded in every epoch, as kdbench's source and as ImageFolder
under a DataLoader, with the same number of worker processes. All contenders of a list take turns; one of streaming is
a whole epoch, since a shorter one would begin with what workers have read while others had their turn. It is measured
with one thread in the main process too: on a CPU that has no more cores than workers, every parallel operation of the
main process (kdbench flips and normalises there, which on a GPU the device does) waits for a core that a worker holds.

    python benchmarks/data.py --data DATA --workers 2 --out data.json      # DATA holds CIFAR-100; else random images
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, quartiles, result_header, synchronise, write_result
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from kdbench.config.load import load_recipe
from kdbench.data.loading.build import build_sources
from kdbench.registry import DATASETS

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
CROP, FLIP = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
LISTS: dict[str, tuple[str, list[Any] | None]] = {
    "none": ("[]", []),
    "crop, flip": ("[{type: crop, padding: 4}, flip]", [CROP, FLIP]),
    "crop, flip, colour": (
        "[{type: crop, padding: 4}, flip, color]",
        [CROP, FLIP, transforms.ColorJitter(0.4, 0.4, 0.4)],
    ),
    "crop, flip, cutout": ("[{type: crop, padding: 4}, flip, {type: cutout, size: 8}]", None),
    "crop, flip, mixup": ("[{type: crop, padding: 4}, flip, mixup]", None),
}
"""Name -> kdbench's list, and torchvision's transforms before ToTensor and Normalize; None: it has no such one."""
RECIPE = """
dataset: {dataset}
augment: {augment}
student: {{model: {{type: torchvision/resnet18}}}}
terms: {{ce: cross_entropy}}
optimizer: {{type: SGD, lr: 0.1}}
batch_size: {batch}
epochs: 1
"""
Batches = Iterator[Any]


class Images(torch.utils.data.Dataset):
    """Images in memory, each made a PIL image and transformed on its own, as torchvision's CIFAR does."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.targets = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def ours(dataset: str, augment: str, args: argparse.Namespace, folder: Path) -> Batches:
    """Batches of kdbench's source, epoch after epoch."""
    file = folder / "data.yaml"
    file.write_text(RECIPE.format(dataset=dataset, augment=augment, batch=args.batch), encoding="utf-8")
    settings = [f"device={args.device}", *([f"data_root={args.data.resolve()}"] if args.data else [])]
    recipe = load_recipe(str(file), settings)
    sources = build_sources(
        {"train": recipe.stages[0].data["train"]},
        validation=None,
        seed=1,
        device=args.device,
        data_root=recipe.data_root,
        workers=args.workers,
    )
    epoch = 0
    try:
        while True:
            yield from sources["train"].batches(epoch)
            epoch += 1
    finally:
        sources["train"].close()


def loader(dataset: Any, args: argparse.Namespace) -> Batches:
    """Batches of a DataLoader, moved to the device, epoch after epoch."""
    batches = DataLoader(
        dataset,
        args.batch,
        shuffle=True,
        num_workers=args.workers,
        pin_memory=args.device != "cpu",
        persistent_workers=args.workers > 0,
    )
    while True:
        for image, label in batches:
            yield image.to(args.device, non_blocking=True), label.to(args.device, non_blocking=True)


def race(contenders: dict[str, Batches], rounds: int, batches: int, args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of each contender, in turns of some batches; the first round warms up. Ratios are by round."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, waiting in contenders.items():
            synchronise(args.device)
            start = time.perf_counter()
            for _ in range(batches):
                next(waiting)
            synchronise(args.device)
            if number:
                speeds[name].append(batches * args.batch / (time.perf_counter() - start))
    for waiting in contenders.values():
        with contextlib.suppress(AttributeError):
            waiting.close()  # type: ignore[attr-defined]
    first = speeds["kdbench"]
    found: dict[str, Any] = {"images_per_second": {name: quartiles(values, 1) for name, values in speeds.items()}}
    for name, values in speeds.items():
        if name != "kdbench":
            ratios = [a / b for a, b in zip(first, values, strict=True)]
            found["kdbench_over"] = {**found.get("kdbench_over", {}), name: quartiles(ratios, 3)}
    return found


def resident(args: argparse.Namespace, rounds: int, batches: int, folder: Path) -> dict[str, Any]:
    if args.data is not None:
        dataset = "cifar100"
        split = DATASETS.build("cifar100", {}, split="train", data_root=str(args.data)).load()
        images, labels = split.images, split.labels
    else:
        count = 4 * args.batch if args.quick else 20_000
        dataset = f"{{type: synthetic, shape: [3, 32, 32], classes: 10, samples: {count}}}"
        images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (count,))
    found = {}
    for name, (augment, theirs) in LISTS.items():
        contenders = {"kdbench": ours(dataset, augment, args, folder)}
        if theirs is not None:
            steps = [*theirs, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
            contenders["PIL, DataLoader"] = loader(Images(images, labels, transforms.Compose(steps)), args)
        found[name] = race(contenders, rounds, batches, args)
        told = ", ".join(f"{who} {v['median']:,.0f}" for who, v in found[name]["images_per_second"].items())
        print(f"resident, {name}: {told} images/s", flush=True)
    return found


def photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Writes JPEG files of smooth random patterns, two classes, about as large as ImageNet's."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for number in range(count if split == "train" else 2):
            place = folder / split / f"class{number % 2}" / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            coarse = torch.randint(0, 256, (1, 3, 12, 16), generator=generator).float()
            fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255)
            noise = 12 * torch.randn(fine.shape, generator=generator)
            pixels = (fine + noise).clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(place, quality=90)


def streaming(args: argparse.Namespace, rounds: int, batches: int, folder: Path) -> dict[str, Any]:
    count, high, wide, size = (batches * args.batch, *((64, 80, 32) if args.quick else (375, 500, 224)))
    photographs(folder / "photographs", count, (high, wide))
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
    dataset = f"{{type: image_folder, root: {folder / 'photographs'}, size: {size}, resident: false}}"
    found: dict[str, Any] = {}
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        contenders = {
            "kdbench": ours(dataset, "[random_resized_crop, flip]", args, folder),
            "ImageFolder, DataLoader": loader(datasets.ImageFolder(folder / "photographs" / "train", transform), args),
        }
        found[f"threads {threads}"] = race(contenders, rounds, batches, args)
        speeds = found[f"threads {threads}"]["images_per_second"]
        told = ", ".join(f"{who} {v['median']:,.0f}" for who, v in speeds.items())
        print(f"streaming, {high} x {wide} JPEG to {size}, threads {threads}: {told} images/s", flush=True)
    return {"files": {"count": count, "height": high, "width": wide, "size": size}, **found}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds CIFAR-100; without: random images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode, of every loader")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    batches = {"resident": 50, "streaming": 16}
    if args.quick:
        args.batch, args.rounds, batches = min(args.batch, 8), 2, {"resident": 3, "streaming": 2}
    result = result_header("images per second of data paths", __file__, args)
    with tempfile.TemporaryDirectory() as folder:
        result["resident"] = resident(args, args.rounds, batches["resident"], Path(folder))
        result["streaming"] = streaming(args, args.rounds, batches["streaming"], Path(folder))
    write_result(result, args.out)
    if args.out is None:
        print(json.dumps({key: result[key] for key in ("command", "machine")}))


if __name__ == "__main__":
    main()
