"""Training speed of one step: a CIFAR-100 pair at batch size 64 against a bare loop, torchdistill and a compute bound.

Every contender trains the same two networks from the same weights on the same images, with random crop, flip and
normalisation, cross-entropy plus soft targets at temperature 4, and SGD with momentum. The contenders alternate in one
process, in a new order each round, so that the load of other processes affects all contenders equally. A speed is
images per second over one turn; ratios are computed within a round. The contenders:

    kdbench                        a complete run of `kdbench train`, including logs
    kdbench, compiled              the same with `compile=true`
    bare                           a hand-written eager loop with batched augmentation of images in memory
    bare, tuned                    the same with kdbench's network optimisations (channels_last, folded BatchNorm)
    torchdistill                   1.1.5 as shipped: teacher in train mode, its models, hooks, PIL transforms, workers
    torchdistill, teacher in eval  the same after `teacher.eval()`

The bound is the speed if a step consisted of its matrix products only: the FLOPs of one step (teacher forward, student
forward and backward) divided by the measured peak rate of a large matrix product.

`--pair vgg13_vgg8` selects another pair; torchdistill has only resnet56_resnet20 and is left out otherwise. `--recipe
cifar100/dkd` selects another method for kdbench; the other contenders do not change, so that the ratio to the bare loop
is the cost of the method relative to soft targets.

To reproduce (torchdistill is installed into a separate folder; it needs torch, numpy, pyyaml and scipy):

    python unpack_cifar100.py DATA          # or let torchvision download CIFAR-100 to DATA
    pip install --no-deps --target OVERLAY torchdistill==1.1.5
    python benchmarks/step.py --data DATA --torchdistill OVERLAY --out benchmarks/results/step.json
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import PacedTraining, Training, describe_machine, measure, quartiles, today, write_result
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe, StageConfig
from kdbench.engine.state.fold_batchnorm import fold_batchnorm
from kdbench.experiment.run import run
from kdbench.registry import DATASETS, MODELS
from kdbench.report.console import ConsoleReporter

BATCH, CLASSES, TEMPERATURE = 64, 100, 4.0
OPTIMIZER: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
KDBENCH_CONTENDERS = {"kdbench": False, "kdbench, compiled": True}
"""Contender -> `compile`."""
TORCHDISTILL_CONTENDERS = {"torchdistill": False, "torchdistill, teacher in eval": True}
"""Contender -> whether the teacher is set to eval mode."""


def build_networks(stage: StageConfig, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """Builds the teacher and the student of a recipe. Estimates the teacher's BatchNorm statistics on `images`."""
    torch.manual_seed(0)
    teacher, student = (
        MODELS.build(model.type, model.params, num_classes=CLASSES)
        for model in (stage.roles[name].model for name in ("teacher", "student"))
        if model is not None
    )
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # average over this single pass
    with torch.no_grad():
        teacher.train()((images[:: len(images) // 256].float() / 255 - 0.5) / 0.25)
    for norm in norms:
        norm.momentum = 0.1
    return teacher.eval(), student


def bare_training(
    teacher: nn.Module, student: nn.Module, images: Tensor, labels: Tensor, device: str, tuned: bool
) -> Training:
    """Builds a minimal hand-written training loop.

    Args:
        teacher: teacher, of which a copy is used.
        student: student, of which a copy is trained.
        images: uint8 (samples, 3, 32, 32).
        labels: int64 (samples,).
        device: cpu or cuda.
        tuned: whether to use channels_last and folded BatchNorm, as kdbench does.
    """
    teacher, student = copy.deepcopy(teacher).to(device).eval(), copy.deepcopy(student).to(device).train()
    data, target = F.pad(images.to(device), (4, 4, 4, 4)), labels.to(device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
    if tuned:
        teacher, _ = fold_batchnorm(teacher, torch.zeros(2, 3, 32, 32, device=device))
        teacher = teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        student = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(student.parameters(), **OPTIMIZER)
    pixels, channel = torch.arange(32, device=device), torch.arange(3, device=device).view(1, 3, 1, 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(data), device=device)
            for rows in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
                # Random crop and flip of the whole batch by one gather.
                offset_y, offset_x = torch.randint(0, 9, (2, BATCH, 1), device=device)
                columns = torch.where(torch.rand(BATCH, 1, device=device) < 0.5, pixels.flip(0), pixels) + offset_x
                ys, xs = (offset_y + pixels)[:, None, :, None], columns[:, None, None, :]
                image = (data[rows.view(-1, 1, 1, 1), channel, ys, xs].float() - mean) / std
                yield image.contiguous(memory_format=torch.channels_last) if tuned else image, target[rows]

    def train(tick: Callable[[], None]) -> None:
        for image, label in batches():
            with torch.no_grad():
                targets = F.log_softmax(teacher(image) / TEMPERATURE, 1)
            logits = student(image)
            kd = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), targets, reduction="batchmean", log_target=True)
            loss = 0.1 * F.cross_entropy(logits, label) + 0.9 * TEMPERATURE**2 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tick()

    return train


def kdbench_training(recipe: Recipe) -> Training:
    """Returns a complete run of kdbench (plan, logs, TensorBoard) as a training that reports each step."""

    def train(tick: Callable[[], None]) -> None:
        class StepCounter(ConsoleReporter):
            def progress(self, steps_done: int, phase: str = "") -> None:
                if not phase:
                    tick()

        run(recipe, console=StepCounter(quiet=True))

    return train


def contender_recipes(
    args: argparse.Namespace, teacher: nn.Module, student: nn.Module, scratch: Path
) -> dict[str, Recipe]:
    """Returns name -> recipe of the kdbench contenders. All recipes load the same initial weights from files."""
    settings = [f"pair={args.pair}", f"device={args.device}", f"data_root={args.data.resolve()}"]
    for name, model in (("teacher", teacher), ("student", student)):
        torch.save(model.state_dict(), scratch / f"{name}.pt")
        settings += [f"{name}.weights.recipe=null", f"{name}.weights.model=null"] if name == "teacher" else []
        settings.append(f"{name}.weights.path={scratch / name}.pt")
    return {
        name: load_recipe(args.recipe, [*settings, f"compile={str(compiled).lower()}", f"out={scratch / name[-8:]}"])
        for name, compiled in KDBENCH_CONTENDERS.items()
    }


def compute_bound(teacher: nn.Module, student: nn.Module, device: str) -> dict[str, float]:
    """Measures the peak rate of a matrix product, and computes an upper bound of the images per second from it."""
    image = torch.zeros(BATCH, 3, 32, 32, device=device)
    teacher, student = (copy.deepcopy(model).to(device) for model in (teacher, student))
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher.eval()(image)
        student.train()(image).sum().backward()
    flops, size = counter.get_total_flops(), 1536 if device == "cpu" else 8192
    first, second = torch.randn(2, size, size, device=device)
    min_seconds = math.inf
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(first, second)
        if device != "cpu":
            torch.cuda.synchronize()
        min_seconds = min(min_seconds, time.perf_counter() - start)
    peak = 2 * size**3 / min_seconds
    return {
        "flops_per_step": flops,
        "measured_peak_gflops": round(peak / 1e9, 1),
        "images_per_second": round(BATCH * peak / flops, 1),
    }


class InMemoryCIFAR(torchvision.datasets.CIFAR100):
    """torchvision's CIFAR-100 on images in memory, with its `__getitem__` (array -> PIL image -> transforms)."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.targets = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform, self.target_transform = transform, None


def torchdistill_training(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    device: str,
    workers: int,
    teacher_eval: bool,
    registry_models: bool = True,
    batch: int = BATCH,
) -> Training:
    """Builds torchdistill's box and the loop of its example script (examples/torchvision/image_classification.py).

    Args:
        teacher: the teacher.
        student: the student.
        images: uint8 (samples, 3, 32, 32).
        labels: int64 (samples,).
        device: cpu or cuda.
        workers: processes of the data loader.
        teacher_eval: whether to set the teacher to eval mode. torchdistill leaves it in train mode.
        registry_models: whether to train torchdistill's own resnet56 and resnet20, with the weights of `teacher` and
            `student`. False: train `teacher` and `student`, for architectures that torchdistill does not have.
        batch: batch size.
    """
    from torchdistill.core.distillation import get_distillation_box  # pyright: ignore[reportMissingImports]
    from torchdistill.misc.log import MetricLogger, SmoothedValue  # pyright: ignore[reportMissingImports]
    from torchdistill.models.registry import get_model  # pyright: ignore[reportMissingImports]

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    models = []
    for name, network in (("resnet56", teacher), ("resnet20", student)):
        if registry_models:
            model = get_model(name, None, num_classes=CLASSES, pretrained=False, progress=False)
            model.load_state_dict(network.state_dict())
        else:
            model = network
        models.append(model.to(device))
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    data = {"train": InMemoryCIFAR(images, labels, transform)}
    config = torchdistill_config(batch, workers, pin_memory=device != "cpu")
    box = get_distillation_box(models[0], models[1], data, config, torch.device(device), None, False, 1)
    if teacher_eval:
        box.teacher_model.eval()

    def train(tick: Callable[[], None]) -> None:
        while True:
            box.pre_epoch_process(epoch=0)
            logger = MetricLogger(delimiter="  ")
            logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
            logger.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
            # The body of this loop is that of the example script, including its synchronisation by `loss.item()`.
            for batch, targets, extra in logger.log_every(box.train_data_loader, 100, "Epoch"):
                start = time.time()
                batch, targets = batch.to(device), targets.to(device)
                loss = box.forward_process(batch, targets, extra)
                box.post_forward_process(loss=loss)
                logger.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
                logger.meters["img/s"].update(len(batch) / (time.time() - start))
                if torch.isnan(loss) or torch.isinf(loss):
                    raise ValueError(f"loss = {loss}")
                tick()

    return train


def torchdistill_config(batch: int, workers: int, *, pin_memory: bool) -> dict[str, Any]:
    """Returns torchdistill's configuration for soft targets, with the loss and the optimizer of all contenders."""
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    kd_loss = {
        "key": "KDLoss",
        "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": 0.1, "reduction": "batchmean"},
    }
    return {
        "num_epochs": 240,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": None},
            "kwargs": {"batch_size": batch, "num_workers": workers, "pin_memory": pin_memory, "drop_last": False},
        },
        "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(OPTIMIZER)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd_loss, "weight": 1.0}}},
        },
    }


def speed_ratios(speeds: dict[str, list[float]], contender: str) -> dict[str, dict[str, float]]:
    """Returns name -> quartiles of the speed of a kdbench contender divided by the speed of the named peer.

    Each ratio is computed within one round.
    """
    return {
        name: quartiles([a / b for a, b in zip(speeds[contender], values, strict=True)], 3)
        for name, values in speeds.items()
        if name not in KDBENCH_CONTENDERS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-100")
    parser.add_argument("--torchdistill", type=Path, help="folder of the torchdistill installation; default: left out")
    parser.add_argument("--pair", default="resnet56_resnet20", help="name of the pair in configs/pair")
    parser.add_argument("--recipe", default="cifar100/kd", help="recipe of the kdbench contenders, with a teacher")
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds")
    parser.add_argument("--steps", type=int, default=12, help="steps per turn")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of torch")
    parser.add_argument("--workers", type=int, default=2, help="processes of torchdistill's data loader")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = describe_machine(args.device)

    train = DATASETS.build("cifar100", {}, split="train", data_root=str(args.data)).load()
    images, labels = train.images, train.labels
    teacher, student = build_networks(load_recipe("cifar100/kd", [f"pair={args.pair}"]).stages[0], images)
    compute_limit = compute_bound(teacher, student, args.device)
    with tempfile.TemporaryDirectory() as scratch:
        # All contenders start from the same weights, which the kdbench recipes load from files.
        recipes = contender_recipes(args, teacher, student, Path(scratch))
        trainings: dict[str, Training] = {name: kdbench_training(recipe) for name, recipe in recipes.items()}
        for name, tuned in (("bare", False), ("bare, tuned", True)):
            trainings[name] = bare_training(teacher, student, images, labels, args.device, tuned=tuned)
        if args.torchdistill is not None and args.pair == "resnet56_resnet20":
            sys.path.append(str(args.torchdistill))
            for name, teacher_eval in TORCHDISTILL_CONTENDERS.items():
                trainings[name] = torchdistill_training(
                    teacher, student, images, labels, args.device, args.workers, teacher_eval=teacher_eval
                )
        contenders = {name: PacedTraining(training, args.threads) for name, training in trainings.items()}
        speeds = measure(contenders, args.rounds, args.steps, args.device, batch=BATCH)
        for contender in contenders.values():
            contender.stop()

    # Written by hand, because the paths of this machine must not be part of the result.
    flags = [f"--pair {args.pair} --recipe {args.recipe} --rounds {args.rounds} --steps {args.steps}"]
    flags += [f"--threads {args.threads} --workers {args.workers} --device {args.device}"]
    result = {
        "what": f"{args.pair} on CIFAR-100, {args.recipe}, batch {BATCH}: images per second",
        "date": today(),
        "command": " ".join(["python benchmarks/step.py", *flags]),
        "machine": machine,
        "images_per_second": {name: quartiles(values, 1) for name, values in speeds.items()},
        "bound": compute_limit,
        "kdbench_over": speed_ratios(speeds, "kdbench"),
        "kdbench_compiled_over": speed_ratios(speeds, "kdbench, compiled"),
        "turns": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
    }
    print(json.dumps({key: result[key] for key in result if key.endswith(("second", "bound", "over"))}, indent=1))
    write_result(result, args.out)


if __name__ == "__main__":
    main()
