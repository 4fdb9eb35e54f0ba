"""Throughput of data loading: kdbench's sources against DataLoader pipelines, in images per second.

Resident: CIFAR-sized images in memory, as kdbench's `resident` source (batched augmentation on the device) and as a
torchvision dataset of the same images with a DataLoader (PIL images, transforms, collate), for several augmentation
lists. Streaming: JPEG files in class folders that are decoded in every epoch, as kdbench's source and as ImageFolder
with a DataLoader, with the same number of worker processes.

The two contenders take turns. A turn of streaming is a whole epoch, because a shorter turn would start with batches
that the workers decoded during the other contender's turn. Streaming is also measured with one thread in the main
process. On a CPU, kdbench flips and normalises in the main process, and if there are only as many cores as workers,
every parallel operation of the main process waits for a core.

    python benchmarks/data.py --data DATA --workers 2 --out data.json      # without --data: random images
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
from common import argument_parser, quartiles, result_header, synchronize, write_result
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from kdbench.config.load import load_recipe
from kdbench.data.loading.build import build_sources
from kdbench.registry import DATASETS

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
CROP, FLIP = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
AUGMENTATIONS: dict[str, tuple[str, list[Any] | None]] = {
    "none": ("[]", []),
    "crop, flip": ("[{type: crop, padding: 4}, flip]", [CROP, FLIP]),
    "crop, flip, colour": (
        "[{type: crop, padding: 4}, flip, color]",
        [CROP, FLIP, transforms.ColorJitter(0.4, 0.4, 0.4)],
    ),
    "crop, flip, cutout": ("[{type: crop, padding: 4}, flip, {type: cutout, size: 8}]", None),
    "crop, flip, mixup": ("[{type: crop, padding: 4}, flip, mixup]", None),
}
"""Name -> kdbench's list, and torchvision's transforms before ToTensor and Normalize (None: no equivalent)."""
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


class InMemoryImages(torch.utils.data.Dataset):
    """Images in memory that are converted to PIL and transformed one by one, as in torchvision's CIFAR."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.targets = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def kdbench_batches(dataset: str, augment: str, args: argparse.Namespace, folder: Path) -> Batches:
    """Yields the batches of kdbench's source, epoch after epoch."""
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


def dataloader_batches(dataset: Any, args: argparse.Namespace) -> Batches:
    """Yields the batches of a DataLoader on the device, epoch after epoch."""
    loader = DataLoader(
        dataset,
        args.batch,
        shuffle=True,
        num_workers=args.workers,
        pin_memory=args.device != "cpu",
        persistent_workers=args.workers > 0,
    )
    while True:
        for image, label in loader:
            yield image.to(args.device, non_blocking=True), label.to(args.device, non_blocking=True)


def compare(contenders: dict[str, Batches], rounds: int, batches: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the images per second of contenders that alternate.

    Args:
        contenders: name -> iterator over batches. One name is `kdbench`.
        rounds: number of measured rounds; one more round before them warms up.
        batches: number of batches per turn.
        args: arguments of the benchmark.

    Returns:
        Images per second of each contender, and in each round the ratio of kdbench to every other contender.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, iterator in contenders.items():
            synchronize(args.device)
            start = time.perf_counter()
            for _ in range(batches):
                next(iterator)
            synchronize(args.device)
            if number:
                speeds[name].append(batches * args.batch / (time.perf_counter() - start))
    for iterator in contenders.values():
        with contextlib.suppress(AttributeError):
            iterator.close()  # type: ignore[attr-defined]
    result: dict[str, Any] = {"images_per_second": {name: quartiles(values, 1) for name, values in speeds.items()}}
    for name, values in speeds.items():
        if name != "kdbench":
            ratios = [a / b for a, b in zip(speeds["kdbench"], values, strict=True)]
            result["kdbench_over"] = {**result.get("kdbench_over", {}), name: quartiles(ratios, 3)}
    return result


def speeds_text(result: dict[str, Any]) -> str:
    """Formats the median speeds of a comparison as text for the terminal."""
    medians = {name: values["median"] for name, values in result["images_per_second"].items()}
    return ", ".join(f"{name} {median:,.0f}" for name, median in medians.items()) + " images/s"


def resident(args: argparse.Namespace, rounds: int, batches: int, folder: Path) -> dict[str, Any]:
    """Compares the contenders on images in memory, for every augmentation list."""
    if args.data is not None:
        dataset = "cifar100"
        split = DATASETS.build("cifar100", {}, split="train", data_root=str(args.data)).load()
        images, labels = split.images, split.labels
    else:
        count = 4 * args.batch if args.quick else 20_000
        dataset = f"{{type: synthetic, shape: [3, 32, 32], classes: 10, samples: {count}}}"
        images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (count,))
    results = {}
    for name, (augment, torchvision_transforms) in AUGMENTATIONS.items():
        contenders = {"kdbench": kdbench_batches(dataset, augment, args, folder)}
        if torchvision_transforms is not None:
            steps = [*torchvision_transforms, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
            pil_dataset = InMemoryImages(images, labels, transforms.Compose(steps))
            contenders["PIL, DataLoader"] = dataloader_batches(pil_dataset, args)
        results[name] = compare(contenders, rounds, batches, args)
        print(f"resident, {name}: {speeds_text(results[name])}", flush=True)
    return results


def write_jpeg_files(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Writes JPEG files of smooth random patterns in two classes, with about the file size of ImageNet's images."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for number in range(count if split == "train" else 2):
            file = folder / split / f"class{number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = torch.randint(0, 256, (1, 3, 12, 16), generator=generator).float()
            fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255)
            noise = 12 * torch.randn(fine.shape, generator=generator)
            pixels = (fine + noise).clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(file, quality=90)


def streaming(args: argparse.Namespace, rounds: int, batches: int, folder: Path) -> dict[str, Any]:
    """Compares the contenders on JPEG files, first with one thread in the main process and then with all threads."""
    count, height, width, size = (batches * args.batch, *((64, 80, 32) if args.quick else (375, 500, 224)))
    images_folder = folder / "images"
    write_jpeg_files(images_folder, count, (height, width))
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
    dataset = f"{{type: image_folder, root: {images_folder}, size: {size}, resident: false}}"
    results: dict[str, Any] = {}
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        image_folder = datasets.ImageFolder(images_folder / "train", transform)
        contenders = {
            "kdbench": kdbench_batches(dataset, "[random_resized_crop, flip]", args, folder),
            "ImageFolder, DataLoader": dataloader_batches(image_folder, args),
        }
        result = results[f"threads {threads}"] = compare(contenders, rounds, batches, args)
        description = f"streaming, {height} x {width} JPEG to {size}, threads {threads}"
        print(f"{description}: {speeds_text(result)}", flush=True)
    return {"files": {"count": count, "height": height, "width": width, "size": size}, **results}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-100; default: random images")
    parser.add_argument("--batch", type=int, default=64, help="batch size")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of every loader")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds")
    args = parser.parse_args()
    batches = {"resident": 50, "streaming": 16}
    if args.quick:
        args.batch, args.rounds, batches = min(args.batch, 8), 2, {"resident": 3, "streaming": 2}
    result = result_header("images per second of data loading", __file__, args)
    with tempfile.TemporaryDirectory() as folder:
        result["resident"] = resident(args, args.rounds, batches["resident"], Path(folder))
        result["streaming"] = streaming(args, args.rounds, batches["streaming"], Path(folder))
    write_result(result, args.out)
    if args.out is None:
        print(json.dumps({key: result[key] for key in ("command", "machine")}))


if __name__ == "__main__":
    main()
