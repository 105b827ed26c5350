"""TensorFlow's RMSProp, the optimizers of the recipes, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._numbers import is_number, plain
from ..backends.update import is_dense, update
from .recipe import Recipe
from .sharding import like, local


class RMSpropTF(torch.optim.Optimizer):
    """g += weight_decay * p;  s = decay * s + (1 - decay) * g^2;  m = momentum * m + lr * g / sqrt(s + epsilon);  p
    -= m.

    TensorFlow 1's form, for which the papers' epsilon of 1.0 is meant: epsilon is inside the root, s starts at one,
    and the learning rate is inside the momentum. `torch.optim.RMSprop` computes g / (sqrt(s) + epsilon), starts at
    zero, and scales m by the current rate. Gradients are dense; lr may be a tensor of one number.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.045,
        decay: float = 0.9,
        momentum: float = 0.9,
        epsilon: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        rates: dict[str, Any] = dict(lr=lr, decay=decay, momentum=momentum, epsilon=epsilon, weight_decay=weight_decay)
        for name, value in rates.items():
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else plain(value)
            below = 1.0 if name == "decay" else math.inf
            if not is_number(number) or not 0 <= number < below:
                raise ValueError(f"{name} {value!r}; allowed: a number from 0 to below {below}")
        super().__init__(params, {k: v if isinstance(v, Tensor) else plain(v) for k, v in rates.items()})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            sparse = next((p.grad.layout for p in params if p.grad.layout is not torch.strided), None)
            if sparse is not None:
                raise RuntimeError(f"a gradient of layout {sparse}; allowed: torch.strided")
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"square": torch.ones_like(p), "momentum": torch.zeros_like(p)}
        # Every value's update is its own: where weights are shared out, each process makes those of its part.
        squares = [local(self.state[p]["square"]) for p in params]
        moments = [local(self.state[p]["momentum"]) for p in params]
        grads = [local(p.grad) for p in params if p.grad is not None]
        params = [local(p) for p in params]
        if _natively(params, grads, squares, moments):
            rates = [group[name] for name in ("lr", "decay", "momentum", "epsilon", "weight_decay")]
            update(params, grads, squares, moments, rates)
            return
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        torch._foreach_mul_(squares, group["decay"])
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
        roots = torch._foreach_add(squares, group["epsilon"])
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(moments, group["momentum"])
        lr = group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"]
        torch._foreach_addcdiv_(moments, grads, roots, lr)
        torch._foreach_sub_(params, moments)


def _natively(*lists: list[Tensor]) -> bool:
    """Whether the native kernels take the update: float32 on a CPU, all four of a parameter in one order."""
    return not torch.compiler.is_compiling() and all(
        all(t.device.type == "cpu" and t.dtype is torch.float32 and t.stride() == p.stride() for t in four)
        and is_dense(p)
        for p, *four in zip(lists[0], *lists, strict=True)
    )


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over `model`; weights decay, biases and batch norm's parameters do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "rmsprop_tf":
        return RMSpropTF(groups, recipe.lr, recipe.rms_decay, recipe.momentum, recipe.epsilon)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's whole memory as `parameter name / slot` -> tensor."""
    found = {}
    for name, p in model.named_parameters():
        for slot, value in optimizer.state.get(p, {}).items():
            if value is not None:
                found[f"{name}/{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return found


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Undoes `optimizer_tensors`. Raises ValueError for a slot of an unknown parameter or of another shape."""
    params = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in params:
            raise ValueError(f"optimizer state of {name!r}; allowed: a parameter of the model")
        p = params[name]
        if value.shape != p.shape and value.ndim:
            raise ValueError(f"optimizer state {key} of shape {tuple(value.shape)}; allowed: {tuple(p.shape)}")
        optimizer.state[p][slot] = torch.empty_like(p).copy_(like(value, p)) if value.ndim else value.clone()


class WeightAverage:
    """Exponential average of a model's parameters and running statistics, a state dict at any moment.

    The decay after n updates is min(decay, (1 + n) / (10 + n)): TensorFlow's warm-up, without which the start would
    weigh for 10000 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        live = model.state_dict()  # of the model's own storage: it shows every later update
        self.tensors = {name: value.detach().clone() for name, value in live.items()}
        floats = [name for name, value in live.items() if value.is_floating_point()]
        self.floats = [local(self.tensors[name]) for name in floats], [local(live[name]) for name in floats]
        self.counters = [(self.tensors[name], live[name]) for name in live.keys() - set(floats)]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes in the model's weights after `updates` optimizer steps."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(*self.floats, 1 - decay)
        for mine, live in self.counters:
            mine.copy_(live)
