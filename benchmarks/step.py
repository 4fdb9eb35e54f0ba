"""How fast is a training step? A pair of CIFAR-100, batch 64, against a bare loop, torchdistill and the arithmetic.

Every contender trains the same two networks from the same weights on the same images, with random crop, flip and
normalisation, cross-entropy plus soft targets at temperature 4, and SGD with momentum. They take turns in one process
(each in a thread of its own, one at a time), in a new order each round, so that whatever else the machine does falls on
all alike. A speed is images per second over one turn; ratios are taken within a round. The contenders:

    kdbench                        a whole run, as `kdbench train` does it, logs and all
    kdbench, compiled              the same with `compile=true`
    bare                           a hand-written eager loop, with batched augmentation of images in memory
    bare, tuned                    the same with what kdbench does to the networks (channels_last, folded BatchNorm)
    torchdistill                   1.1.5 as shipped: teacher in train mode, its models, hooks, PIL transforms, workers
    torchdistill, teacher in eval  the same after `teacher.eval()`

The bound is what the device could do if a step were its products alone: the operations of one step (teacher forward,
student forward and backward) over the best rate of a large product of matrices, measured before.

`--pair vgg13_vgg8` takes another pair (torchdistill has resnet56_resnet20 alone, and is left out elsewhere).
`--recipe cifar100/dkd` lets kdbench run another method; the others stay what they are, so that the ratio to the bare
loop says what the method costs above soft targets.

To repeat it (torchdistill goes to a folder of its own, its requirements besides torch are numpy, pyyaml and scipy):

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
OURS = {"kdbench": False, "kdbench, compiled": True}
THEIRS = {"torchdistill": False, "torchdistill, teacher in eval": True}


def networks(pair: StageConfig, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """Returns a recipe's teacher and student; the teacher's BatchNorms have seen data, so that its outputs are sane."""
    torch.manual_seed(0)
    teacher, student = (
        MODELS.build(named.type, named.params, num_classes=CLASSES)
        for named in (pair.roles[name].model for name in ("teacher", "student"))
        if named is not None
    )
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # statistics of this one pass
    with torch.no_grad():
        teacher.train()((images[:: len(images) // 256].float() / 255 - 0.5) / 0.25)
    for norm in norms:
        norm.momentum = 0.1
    return teacher.eval(), student


def bare(teacher: nn.Module, student: nn.Module, images: Tensor, labels: Tensor, device: str, tuned: bool) -> Training:
    """A loop as one writes it by hand for this one experiment."""
    teacher, student = copy.deepcopy(teacher).to(device).eval(), copy.deepcopy(student).to(device).train()
    data, target = F.pad(images.to(device), (4, 4, 4, 4)), labels.to(device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
    if tuned:
        teacher, _ = fold_batchnorm(teacher, torch.zeros(2, 3, 32, 32, device=device))
        teacher, student = (m.to(memory_format=torch.channels_last) for m in (teacher, student))  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(student.parameters(), **OPTIMIZER)
    span, channel = torch.arange(32, device=device), torch.arange(3, device=device).view(1, 3, 1, 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(data), device=device)
            for rows in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
                top, left = torch.randint(0, 9, (2, BATCH, 1), device=device)
                columns = torch.where(torch.rand(BATCH, 1, device=device) < 0.5, span.flip(0), span) + left
                ys, xs = (top + span)[:, None, :, None], columns[:, None, None, :]
                image = (data[rows.view(-1, 1, 1, 1), channel, ys, xs].float() - mean) / std
                yield image.contiguous(memory_format=torch.channels_last) if tuned else image, target[rows]

    def train(tick: Callable[[], None]) -> None:
        for image, label in batches():
            with torch.no_grad():
                soft = F.log_softmax(teacher(image) / TEMPERATURE, 1)
            logits = student(image)
            kd = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), soft, reduction="batchmean", log_target=True)
            loss = 0.1 * F.cross_entropy(logits, label) + 0.9 * TEMPERATURE**2 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tick()

    return train


def ours(recipe: Recipe) -> Training:
    """A run of kdbench: plan, logs, TensorBoard; only the progress bar gives way to the benchmark's clock."""

    def train(tick: Callable[[], None]) -> None:
        class Clock(ConsoleReporter):
            def progress(self, done: int, phase: str = "") -> None:
                if not phase:
                    tick()

        run(recipe, console=Clock(quiet=True))

    return train


def recipes(args: argparse.Namespace, teacher: nn.Module, student: nn.Module, scratch: Path) -> dict[str, Recipe]:
    """The recipe for each of our contenders, with the weights that all of them start from."""
    settings = [f"pair={args.pair}", f"device={args.device}", f"data_root={args.data.resolve()}"]
    for name, model in (("teacher", teacher), ("student", student)):
        torch.save(model.state_dict(), scratch / f"{name}.pt")
        settings += [f"{name}.weights.recipe=null", f"{name}.weights.model=null"] if name == "teacher" else []
        settings.append(f"{name}.weights.path={scratch / name}.pt")
    return {
        name: load_recipe(args.recipe, [*settings, f"compile={str(compiled).lower()}", f"out={scratch / name[-8:]}"])
        for name, compiled in OURS.items()
    }


def bound(teacher: nn.Module, student: nn.Module, device: str) -> dict[str, float]:
    """Images per second if a step were its products alone, and they ran as fast as one large product of matrices."""
    image = torch.zeros(BATCH, 3, 32, 32, device=device)
    teacher, student = (copy.deepcopy(model).to(device) for model in (teacher, student))
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher.eval()(image)
        student.train()(image).sum().backward()
    flops, size = counter.get_total_flops(), 1536 if device == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(left, right)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    peak = 2 * size**3 / best
    return {
        "flops_per_step": flops,
        "measured_peak_gflops": round(peak / 1e9, 1),
        "images_per_second": round(BATCH * peak / flops, 1),
    }


class InMemoryCIFAR(torchvision.datasets.CIFAR100):
    """torchvision's dataset with its own `__getitem__` (array -> PIL -> transforms), on images that are in memory."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.targets = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform, self.target_transform = transform, None


def torchdistill(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    device: str,
    workers: int,
    fixed: bool,
    own: bool = False,
    batch: int = BATCH,
) -> Training:
    """torchdistill's box under the loop of its own example script (examples/torchvision/image_classification.py).

    Args:
        fixed: put the teacher in eval mode, which torchdistill leaves to nobody.
        own: the networks as they are given, where torchdistill has none of their architecture.
    """
    from torchdistill.core.distillation import get_distillation_box  # pyright: ignore[reportMissingImports]
    from torchdistill.misc.log import MetricLogger, SmoothedValue  # pyright: ignore[reportMissingImports]
    from torchdistill.models.registry import get_model  # pyright: ignore[reportMissingImports]

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    theirs = []
    for name, model in (("resnet56", teacher), ("resnet20", student)):
        if own:
            theirs.append(model.to(device))
            continue
        built = get_model(name, None, num_classes=CLASSES, pretrained=False, progress=False)
        built.load_state_dict(model.state_dict())
        theirs.append(built.to(device))
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    config = {
        "num_epochs": 240,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": None},
            "kwargs": {"batch_size": batch, "num_workers": workers, "pin_memory": device != "cpu", "drop_last": False},
        },
        "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(OPTIMIZER)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": 0.1, "reduction": "batchmean"},
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    data = {"train": InMemoryCIFAR(images, labels, transform)}
    box = get_distillation_box(theirs[0], theirs[1], data, config, torch.device(device), None, False, 1)
    if fixed:
        box.teacher_model.eval()

    def train(tick: Callable[[], None]) -> None:
        while True:
            box.pre_epoch_process(epoch=0)
            logger = MetricLogger(delimiter="  ")
            logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
            logger.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
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


def ratios(speeds: dict[str, list[float]], own: str) -> dict[str, dict[str, float]]:
    """How many times as fast one of ours is as each of the others, within the rounds."""
    others = {name: values for name, values in speeds.items() if name not in OURS}
    return {
        name: quartiles([a / b for a, b in zip(speeds[own], values, strict=True)], 3) for name, values in others.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CIFAR-100")
    parser.add_argument(
        "--torchdistill", type=Path, help="folder that torchdistill was installed to; without: left out"
    )
    parser.add_argument("--pair", default="resnet56_resnet20", help="of configs/pair")
    parser.add_argument("--recipe", default="cifar100/kd", help="what kdbench runs, a recipe with a teacher")
    parser.add_argument("--rounds", type=int, default=20, help="pairs to measure")
    parser.add_argument("--steps", type=int, default=12, help="steps per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes of torchdistill's data loader")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = describe_machine(args.device)

    train = DATASETS.build("cifar100", {}, split="train", data_root=str(args.data)).load()
    images, labels = train.images, train.labels
    teacher, student = networks(load_recipe("cifar100/kd", [f"pair={args.pair}"]).stages[0], images)
    limit = bound(teacher, student, args.device)
    with tempfile.TemporaryDirectory() as scratch:
        own = recipes(args, teacher, student, Path(scratch))
        trainings: dict[str, Training] = {name: ours(recipe) for name, recipe in own.items()}
        for name, tuned in (("bare", False), ("bare, tuned", True)):
            trainings[name] = bare(teacher, student, images, labels, args.device, tuned=tuned)
        if args.torchdistill is not None and args.pair == "resnet56_resnet20":
            sys.path.append(str(args.torchdistill))
            for name, fixed in THEIRS.items():
                trainings[name] = torchdistill(teacher, student, images, labels, args.device, args.workers, fixed=fixed)
        contenders = {name: PacedTraining(training, args.threads) for name, training in trainings.items()}
        speeds = measure(contenders, args.rounds, args.steps, args.device, batch=BATCH)
        for contender in contenders.values():
            contender.stop()

    words = [f"--pair {args.pair} --recipe {args.recipe} --rounds {args.rounds} --steps {args.steps}"]
    words += [f"--threads {args.threads} --workers {args.workers} --device {args.device}"]
    result = {
        "what": f"{args.pair} on CIFAR-100, {args.recipe}, batch {BATCH}: images per second",
        "date": today(),
        "command": " ".join(["python benchmarks/step.py", *words]),
        "machine": machine,
        "images_per_second": {name: quartiles(values, 1) for name, values in speeds.items()},
        "bound": limit,
        "kdbench_over": ratios(speeds, "kdbench"),
        "kdbench_compiled_over": ratios(speeds, "kdbench, compiled"),
        "turns": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
    }
    print(json.dumps({key: result[key] for key in result if key.endswith(("second", "bound", "over"))}, indent=1))
    write_result(result, args.out)


if __name__ == "__main__":
    main()
