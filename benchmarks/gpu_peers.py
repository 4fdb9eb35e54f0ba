"""Peers (other distillation frameworks) in the GPU benchmark: torchdistill and mdistiller with their data loaders."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Training, quartiles
from gpu_common import FASTEST, HEADLINE_PAIR, PartContext, PartSkipped, StepTimer, run_speed
from torch import nn

from kdbench.registry import DATASETS, MODELS


def compare_with_peer(peer: str) -> Callable[[PartContext], dict[str, Any]]:
    """Returns a measurement of 300 steps of a peer (torchdistill or mdistiller) and of kdbench's fastest settings."""

    def measure(context: PartContext) -> dict[str, Any]:
        train = {"torchdistill": _torchdistill, "mdistiller": _mdistiller}[peer](context)
        every, steps = (1, 6) if context.quick else (25, 300)
        timer = StepTimer(context.device, every)
        steps_done = 0

        class EnoughSteps(BaseException):
            """Raised in the peer's training loop to end it."""

        def tick() -> None:
            nonlocal steps_done
            steps_done += 1
            timer.progress(steps_done)
            if steps_done > steps:
                raise EnoughSteps

        with contextlib.suppress(EnoughSteps):
            train(tick)
        peer_speed = quartiles([every * context.batch / seconds for seconds in timer.intervals(2)], 1)
        kdbench = run_speed(context, *FASTEST)
        ratio = kdbench["images_per_second"]["median"] / peer_speed["median"]
        return {peer: {"images_per_second": peer_speed}, "kdbench": kdbench, "kdbench_over": round(ratio, 2)}

    return measure


def _networks(context: PartContext) -> tuple[nn.Module, nn.Module]:
    names = ("resnet8x4", "resnet8x4") if context.quick else HEADLINE_PAIR
    teacher, student = (MODELS.build(name, {}, num_classes=4 if context.quick else 100) for name in names)
    return teacher, student


def _torchdistill(context: PartContext) -> Training:
    if context.args.torchdistill is None:
        raise PartSkipped("--torchdistill FOLDER is missing")
    sys.path.append(str(context.args.torchdistill))
    from step import torchdistill_training

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    if context.args.data and not context.quick:
        split = DATASETS.build("cifar100", {}, split="train", data_root=str(context.args.data)).load()
        images, labels = split.images, split.labels
    else:
        count, classes = (16, 4) if context.quick else (50_000, 100)
        images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(classes, (count,))
    teacher, student = _networks(context)
    return torchdistill_training(
        teacher,
        student,
        images,
        labels,
        context.device,
        workers=0 if context.quick else context.args.workers,
        teacher_eval=False,
        registry_models=False,
        batch=context.batch,
    )


def _mdistiller(context: PartContext) -> Training:
    """Returns mdistiller's training loop: `train_iter` with its data loader and tqdm, as in tools/train.py."""
    args = context.args
    if args.mdistiller is None:
        raise PartSkipped("--mdistiller FOLDER (a checkout of megvii-research/mdistiller) is missing")
    if args.data is None or torch.device(context.device).type != "cuda":
        raise PartSkipped("mdistiller needs --data with CIFAR-100 and a GPU")
    sys.path.insert(0, str(args.mdistiller))
    from mdistiller.dataset import cifar100, get_dataset  # pyright: ignore[reportMissingImports]
    from mdistiller.distillers import distiller_dict  # pyright: ignore[reportMissingImports]
    from mdistiller.engine import trainer_dict  # pyright: ignore[reportMissingImports]
    from mdistiller.engine.cfg import CFG  # pyright: ignore[reportMissingImports]
    from mdistiller.engine.utils import AverageMeter, log_msg  # pyright: ignore[reportMissingImports]
    from mdistiller.models import cifar_model_dict  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]

    CFG.merge_from_file(str(args.mdistiller / "configs" / "cifar100" / "kd" / "res32x4_res8x4.yaml"))
    CFG.LOG.WANDB, CFG.LOG.PREFIX = False, str(context.folder / "mdistiller")
    cifar100.get_data_folder = lambda: str(_cifar_folder(args.data))
    torch.backends.cudnn.benchmark = True  # as tools/train.py sets it
    loader, validation, _, classes = get_dataset(CFG)
    # The distiller's constructor takes the student first.
    networks = (
        cifar_model_dict[name][0](num_classes=classes) for name in (CFG.DISTILLER.STUDENT, CFG.DISTILLER.TEACHER)
    )
    distiller = torch.nn.DataParallel(distiller_dict[CFG.DISTILLER.TYPE](*networks, CFG).cuda())
    trainer = trainer_dict[CFG.SOLVER.TRAINER]("kd", distiller, loader, validation, CFG)

    def train(tick: Callable[[], None]) -> None:
        distiller.train()
        while True:
            meters = {n: AverageMeter() for n in ("training_time", "data_time", "losses", "top1", "top5")}
            bar = tqdm(range(len(loader)))
            for data in loader:
                bar.set_description(log_msg(trainer.train_iter(data, 1, meters), "TRAIN"))
                bar.update()
                tick()
            bar.close()

    return train


def _cifar_folder(data: Path) -> Path:
    """Returns the folder that contains the folder `cifar-100-python`, as torchvision expects."""
    return next((path.parent for path in data.rglob("cifar-100-python")), data)
