"""One run's model, optimizer and average, and what a step does to them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure.flops import layers, totals
from ..replace import replace_layers
from .data import Normalise, evaluation_loader, readable
from .distributed import SharedDropout, World, wrap
from .labelled import Data
from .networks import build, scale_weights
from .optim import WeightAverage, build_optimizer, load_optimizer_tensors, optimizer_tensors
from .settings import Settings
from .sharding import like, share_out, whole
from .stream import mix


class Diverged(ArithmeticError):
    """The loss or its gradient stopped being a number; `step` is the one that could not be made."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: the {what} is not a finite number; a lower learning rate may help")
        self.step = step


class Trainer:
    """The state of a run between two steps; `tensors` and `load` are all of it."""

    def __init__(self, settings: Settings, data: Data, world: World, shard: bool = False) -> None:
        if settings.batch_size % world.size:
            raise ValueError(
                f"batch size {settings.batch_size} over {world.size} processes; allowed: a multiple of {world.size}"
            )
        self.settings, self.world = settings, world
        self.classes = len(data.source.classes)
        self.model, self.aux, costs = assemble(settings, self.classes, world.size)
        self.macs, self.parameters = costs
        if settings.init_scale != 1:
            scale_weights(self.model, settings.init_scale)
        if settings.winograd and (shard or world.device.type != "cpu"):
            seen = "shared-out weights" if shard else f"device {world.device.type}"
            raise ValueError(f"winograd with {seen}; allowed: whole weights on the CPU")
        self.model = replace_layers(self.model, winograd=settings.winograd)
        # FSDP2 shares out contiguous weights only.
        layout = torch.contiguous_format if shard else torch.channels_last
        self.model.to(world.device, memory_format=layout)  # type: ignore[call-overload]
        # Evaluation runs on one process, with all weights given: the model that it calls needs none of its own.
        self.judge = copy.deepcopy(self.model).to("meta") if shard else self.model
        self.called = (share_out if shard else wrap)(self.model, world, settings.batch_norm)
        self.optimizer = build_optimizer(settings.recipe, self.model)
        self.average = WeightAverage(self.model, settings.recipe.ema) if settings.recipe.ema else None
        config: Any = self.model.data_config
        self.normalise = Normalise(config.mean, config.std, world.device)
        self.steps_done = 0

    def step(self, images: Tensor, labels: Tensor, epoch: float) -> dict[str, float]:
        """One update from this process's share of the batch: uint8 [n, 3, h, w], int64 [n]. Returns what the log keeps.

        Raises:
            Diverged: before any weight was changed.
        """
        s, recipe = self.settings, self.settings.recipe
        seed = mix(s.seed, self.steps_done)
        torch.manual_seed(seed)
        lr = recipe.learning_rate(self.steps_done, s.steps, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._train_mode()
        labels = labels.to(self.world.device, non_blocking=True)
        with SharedDropout(seed, self.world), self._autocast():
            loss, logits = self._loss(self.called(self.normalise(images)), labels)
        plain = F.cross_entropy(logits.detach().float(), labels)
        correct = (logits.detach().argmax(1) == labels).float().mean()
        means = self.world.mean(torch.stack([loss.detach().float(), plain, correct])).tolist()
        if not math.isfinite(means[0]):
            raise Diverged(self.steps_done + 1, "loss")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip or math.inf)))
        if not math.isfinite(norm):
            raise Diverged(self.steps_done + 1, "gradient")
        self.optimizer.step()
        self.steps_done += 1
        if self.average is not None:
            self.average.update(self.steps_done)
        return {"loss": means[0], "cross_entropy": means[1], "accuracy": means[2], "lr": lr, "grad_norm": norm}

    def _train_mode(self) -> None:
        self.called.train()
        if self.settings.batch_norm == "frozen":
            freeze_statistics(self.model)

    def _autocast(self) -> torch.autocast:
        half = self.settings.dtype == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=half)

    def _loss(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(what is minimised, logits of the main head)."""
        logits, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        recipe = self.settings.recipe
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        for other in others:
            loss = loss + recipe.aux_weight * F.cross_entropy(
                other.float(), labels, label_smoothing=recipe.label_smoothing
            )
        return loss, logits

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, or the plain ones of a recipe without an average: what evaluation and export use."""
        return self.model.state_dict() if self.average is None else self.average.tensors

    def whole_weights(self) -> dict[str, Tensor]:
        """`weights` with nothing left on other processes; all of them must call this."""
        return {name: whole(value) for name, value in self.weights().items()}

    @torch.no_grad()
    def evaluate(self, data: Data, images: int, workers: int, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Loss (plain cross entropy) and accuracy of `weights` on at most `images` held-out ones; None where there
        are none.
        """
        if not min(images, len(data.held_out)):
            return None
        loss, correct, count = 0.0, 0, 0
        self.judge.eval()
        batches = evaluation_loader(data, images, self.settings.batch_size, self.settings.image_size, workers)
        for x, labels in readable(batches):
            labels = labels.to(self.world.device)
            with self._autocast():
                logits = torch.func.functional_call(self.judge, dict(weights), self.normalise(x)).float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
        mean = loss / count
        return {"images": count, "loss": mean if math.isfinite(mean) else None, "accuracy": correct / count}

    def tensors(self) -> dict[str, Tensor]:
        """Model, average and optimizer, whole, under one prefix each; every process must call this."""
        parts = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.optimizer, self.model)}
        if self.average is not None:
            parts["average"] = self.average.tensors
        return {f"{part}/{name}": whole(value) for part, found in parts.items() for name, value in found.items()}

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Undoes `tensors`. Raises ValueError, naming the first key or shape that differs, for those of another
        network.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        targets = {"model": self.model.state_dict()}
        if self.average is not None:
            targets["average"] = self.average.tensors
        for part, target in targets.items():
            odd = sorted(target.keys() ^ parts[part].keys()) or [
                n for n in target if target[n].shape != parts[part][n].shape
            ]
            if odd:
                raise ValueError(f"the checkpoint is of another network: its {part} differs at {odd[0]}")
        with torch.no_grad():
            for part, target in targets.items():
                for name, value in target.items():
                    value.copy_(like(parts[part][name], value))
        load_optimizer_tensors(self.optimizer, self.model, parts["optimizer"])
        self.steps_done = step


def assemble(settings: Settings, classes: int, processes: int = 1) -> tuple[nn.Module, bool, tuple[int, int]]:
    """(model, whether it has auxiliary heads, (multiply-adds of an image in training, parameters)); raises ValueError
    for bad sizes.
    """
    tries = {"on": (True,), "off": (False,), "auto": (True, False)}[settings.aux]
    for aux in tries:
        torch.manual_seed(settings.seed)
        try:
            model = build(settings.model, classes, settings.options, settings.weights, aux)
            return model, aux, _costs(settings, model, processes)
        except ValueError as error:
            if aux is tries[-1]:
                raise
            reason = str(error)
    raise AssertionError(reason)


def _costs(s: Settings, model: nn.Module, processes: int) -> tuple[int, int]:
    images = s.batch_size // (processes if s.batch_norm == "local" else 1)
    model.train()
    if s.batch_norm == "frozen":
        freeze_statistics(model)
    try:
        macs, parameters = totals(layers(model, torch.empty(images, 3, s.image_size, s.image_size, device="meta")))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"{images} image of {s.image_size}x{s.image_size} for each batch norm: one value a channel has no "
            "variance; allowed: a batch of 2 or more, larger images, or frozen batch norm"
        ) from error
    return macs // images, parameters


def freeze_statistics(model: nn.Module) -> None:
    """Lets every batch norm of `model` use the statistics that it holds, in training too."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
