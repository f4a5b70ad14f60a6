"""Train a ConvMixer on CIFAR-10.

python examples/train_cifar10.py --data FOLDER                     ConvMixer-256/8 for 25 epochs, as its authors do
python examples/train_cifar10.py --data FOLDER --preset cpu        a small model for two CPU cores
torchrun --nproc-per-node 8 examples/train_cifar10.py --data ...   processes, statistics synchronised
python examples/train_cifar10.py --data FOLDER --compare 200       fused, plain, and plain in another precision

Stopped at any moment, the same command goes on from the last checkpoint in --output, to the bit. Recipe: train.py of
github.com/locuslab/convmixer-cifar10 with the arguments of its README, which reports 92.6 % for them.
"""

import argparse
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cifar10
import processes
import torch
import torch.distributed as dist
from options import AMP, arguments
from records import History, Progress, plot, plot_differences, write_atomically, write_json
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cmx_kernels import ConvMixer


def learning_rate(highest: float, part: float) -> float:
    """Linear between 0 at the start, highest at 2/5 of the run, highest / 20 at 4/5 and 0 at the end."""
    corners = [(0.0, 0.0), (0.4, highest), (0.8, highest / 20), (1.0, 0.0)]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        if part <= x1:
            return y0 + (y1 - y0) * (part - x0) / (x1 - x0)
    return 0.0


class Training:
    """A model, its optimizer and where they are in the run: what a checkpoint holds."""

    # what may differ between two starts of one run
    FREE = (
        "data",
        "output",
        "restart",
        "save_every",
        "stop_after",
        "device",
        "workers",
        "threads",
        "preset",
        "compare",
    )

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.rank, self.world = int(os.environ.get("RANK", 0)), processes.count()
        self.settings = {key: value for key, value in vars(args).items() if key not in self.FREE}
        self.file = Path(args.output) / "last.pt"
        self.history = History()
        self.epoch = self.step = self.total = 0
        self.stopped: float = 0
        torch.manual_seed(args.seed)
        self.model: nn.Module = ConvMixer(
            args.dim, args.depth, args.kernel_size, args.patch_size, len(cifar10.CLASSES), fused=not args.plain
        ).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, weight_decay=args.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.augment = {
            "authors": lambda: cifar10.authors(args.scale, args.ra_n, args.ra_m, args.jitter),
            "light": lambda: cifar10.light,
            "none": lambda: lambda pixels: pixels,
        }[args.augment]()
        if self.file.is_file() and not args.restart:
            self.load()
        self.trained: nn.Module = self.model  # what computes the loss
        if self.world > 1:
            # first wrapped, then converted: DDP refuses a SyncBatchNorm on the CPU, where only the fused one runs
            synchronised = not args.plain or self.device.type == "cuda"
            self.trained = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=not synchronised)
            if synchronised:
                nn.SyncBatchNorm.convert_sync_batchnorm(self.model)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history.state(),
            "at": [self.epoch, self.step, self.total],
            "settings": self.settings,
        }

    def save(self) -> None:
        """Everything or nothing: a run killed meanwhile keeps its last checkpoint."""
        if self.rank == 0:
            write_atomically(self.file, lambda path: torch.save(self.state(), path))

    def load(self) -> None:
        try:
            found = torch.load(self.file, map_location="cpu", weights_only=True)
            before = found["settings"]
        except Exception as error:
            raise ValueError(
                f"--output: {self.file} is damaged, or no checkpoint of this program ({error}); --restart starts over"
            ) from error
        for key, value in self.settings.items():
            if before.get(key) != value:
                flag = "--" + key.replace("_", "-")
                raise ValueError(
                    f"{flag}: got {value}, but the run in {self.args.output} was started with "
                    f"{before.get(key)}; go on with that, or take another --output, or --restart"
                )
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.scaler.load_state_dict(found["scaler"])
        self.history.load(found["history"])
        self.epoch, self.step, self.total = found["at"]

    def autocast(self) -> Any:
        dtype = AMP[self.args.amp]
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def one_step(self, x: Tensor, labels: Tensor, count: int, part: float) -> tuple[float, int]:
        """Loss, a mean over the whole batch, and correct answers, of this process's share."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.args.lr, part)
        x, labels = x.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.trained(x)
        loss = cross_entropy(logits.float(), labels, reduction="sum") / count
        self.scaler.scale(loss * self.world).backward()  # DDP takes the mean over processes
        if self.args.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss, right, self.stopped = self.sum(float(loss.detach()), (logits.argmax(1) == labels).sum(), self.stopped)
        return loss, int(right)

    def sum(self, *values: Any) -> list[float]:
        """Over all processes, which so stop after the same step too."""
        if self.world == 1:
            return [float(value) for value in values]
        found = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return found.tolist()

    @torch.no_grad()
    def accuracy(self, images: cifar10.Images) -> float:
        self.model.eval()
        right = 0
        mine = range(len(images.labels))[self.rank :: self.world]
        for rows in torch.tensor(mine, dtype=torch.int64).split(512):
            with self.autocast():
                logits = self.model(cifar10.normalised(images.pixels[rows]).to(self.device))
            right += int((logits.argmax(1).cpu() == images.labels[rows]).sum())
        return self.sum(right)[0] / len(images.labels)

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Inside, Ctrl-C and a polite kill stop the run after its step, with a checkpoint."""

        def stop(*_: Any) -> None:
            self.stopped = 1

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, train: cifar10.Images, test: cifar10.Images, limit: int | None = None) -> None:
        """To the end, or for ``limit`` steps more."""
        args = self.args
        start = self.total
        while self.epoch < args.epochs:
            epoch = cifar10.Epoch(
                train, args.batch_size, self.epoch, args.seed, self.augment, args.erasing, self.rank, self.world
            )
            steps = len(epoch)
            loader = DataLoader(
                epoch,
                batch_size=None,
                sampler=range(self.step, steps),
                num_workers=args.workers,
                pin_memory=self.device.type == "cuda",
            )
            progress = Progress(f"epoch {self.epoch + 1}/{args.epochs}", steps * args.epochs, self.rank == 0)
            self.trained.train()
            for x, labels, count in loader:
                part = (self.total + 1) / (steps * args.epochs)
                loss, right = self.one_step(x, labels, count, part)
                self.history.step(loss, right, count)
                self.step, self.total = self.step + 1, self.total + 1
                progress.show(self.total, self.history, count)
                done = bool(self.stopped) or (limit is not None and self.total - start >= limit)
                if done or (self.step < steps and self.total % args.save_every == 0):
                    self.save()
                if done:
                    raise KeyboardInterrupt
            accuracy = self.accuracy(test)
            self.history.epoch(accuracy)
            progress.line(self.history)
            self.epoch, self.step = self.epoch + 1, 0
            self.save()


def compare(args: argparse.Namespace, train: cifar10.Images, test: cifar10.Images) -> None:
    """Fused and plain from one seed, batch for batch, and plain in another precision: is fused as near to plain?"""
    precision = "bf16" if args.amp == "none" else "none"
    other = f"plain {'float32' if precision == 'none' else precision}"
    curves: dict[str, list[float]] = {}
    for name, change in (("fused", {}), ("plain", {"plain": True}), (other, {"plain": True, "amp": precision})):
        kind = argparse.Namespace(**{**vars(args), "restart": True, **change})
        training = Training(kind)
        training.file = Path(args.output) / f"{name.replace(' ', '_')}.pt"
        with contextlib.suppress(KeyboardInterrupt):
            training.run(train, test, args.compare)
        curves[name] = training.history.losses
    losses = {name: torch.tensor(curve) for name, curve in curves.items()}
    write_json(Path(args.output) / "compare.json", curves)
    why_not = plot_differences(Path(args.output) / "compare.png", curves, "plain")
    means = []
    for name in ("fused", other):
        difference = (losses[name] - losses["plain"]).abs()
        means.append(difference.mean())
        print(
            f"{name} against plain: losses differ by {difference.mean():.2e} on average, {difference.max():.2e} at most"
        )
    print(f"fused is {'nearer to' if means[0] <= means[1] else 'FURTHER FROM'} plain than {other} is")
    if why_not:
        print(why_not, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """0; 2 after one sentence on stderr about what was wrong with the input; 130 when stopped."""
    args = arguments(argv, __doc__)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = processes.device(args.device)
    with processes.group(args.device):
        try:
            return run(args)
        except (ValueError, ImportError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            return 130


def run(args: argparse.Namespace) -> int:
    """``main`` but for its errors."""
    with processes.first_of_machine():
        train, test = (cifar10.load(args.data, part) for part in ("train", "test"))
    if args.compare:
        compare(args, train, test)
        return 0
    training = Training(args)
    if training.total and training.rank == 0:
        print(f"going on after step {training.total}, in epoch {training.epoch + 1}", file=sys.stderr)
    with training.stopped_by_signals():
        training.run(train, test, args.stop_after)
    if training.rank == 0:
        finish(training)
    return 0


def finish(training: Training) -> None:
    """The weights by themselves, the curves, and the settings they came from."""
    from safetensors.torch import save_file

    folder, history = Path(training.args.output), training.history
    weights = {key: value.cpu().contiguous() for key, value in training.model.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda path: save_file(weights, path))
    write_json(folder / "history.json", {"settings": training.settings, **history.state()})
    why_not = plot(folder / "curves.png", {"plain" if training.args.plain else "fused": history})
    print(f"test accuracy {history.test_accuracy[-1]:.2%}; {folder / 'model.safetensors'}")
    if why_not:
        print(why_not, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
