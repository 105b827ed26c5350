"""What the papers and the article say about training, as comparisons that end in minutes on two cores.

Each is data: more steps, seeds, or another data set by the flags of `inception-fast compare` make it larger.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .comparison import Variant
from .networks import REDUCTIONS, TINY
from .recipe import Recipe, get_recipe
from .settings import Settings

PLAIN = get_recipe("modern", schedule="exponential", warmup=0.0, label_smoothing=0.0, weight_decay=0.0, clip=0.0)
"""SGD at a constant rate: nothing that could make up for what a variant lacks."""


@dataclass(frozen=True)
class Experiment:
    """A claim, the contestants that would show it, and a budget. source: where the claim stands. drift_every: as in
    `Options`. minutes: what the budget takes on two cores at most, judgement of the ends included.
    """

    name: str
    title: str
    claim: str
    source: str
    variants: tuple[Variant, ...]
    seeds: int = 2
    steps: int = 150
    batch_size: int = 32
    image_size: int = 16
    recipe: Recipe = field(default=PLAIN)
    drift_every: int = 0
    minutes: int = 1

    def settings(self, **changed: object) -> Settings:
        """Its budget, with the fields given changed."""
        own = {"steps": self.steps, "batch_size": self.batch_size, "image_size": self.image_size, "recipe": self.recipe}
        return Settings(self.variants[0].model, **(own | changed))  # type: ignore[arg-type]

    def about(self) -> dict[str, str]:
        return {"name": self.name, "title": self.title, "claim": self.claim, "source": self.source}


def _norms(text: str, values: tuple[float, ...], part: str, key: str) -> tuple[Variant, ...]:
    """With and without batch norm at each value of one field of `part`, "settings" or "recipe"."""
    return tuple(
        Variant(f"{'with' if norm else 'without'} BN, {text} {value:g}", TINY, {"norm": norm}, **{part: {key: value}})
        for norm in (True, False)
        for value in values
    )


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "batchnorm_rate",
            "Batch norm and the learning rate",
            "Batch norm lets the learning rate be much higher without the training diverging.",
            "arXiv:1502.03167, sections 3.3 and 4.2",
            _norms("rate", (0.02, 0.1, 0.5), "recipe", "lr"),
        ),
        Experiment(
            "batchnorm_scale",
            "Batch norm and the initial weights",
            "With batch norm the scale of the initial weights hardly matters: BN(Wu) = BN((aW)u).",
            "arXiv:1502.03167, section 3.3",
            _norms("scale", (0.2, 1.0, 4.0), "settings", "init_scale"),
        ),
        Experiment(
            "batchnorm_sigmoid",
            "Batch norm and the sigmoid",
            "With batch norm a network of saturating nonlinearities trains; without, it stays at chance.",
            "arXiv:1502.03167, section 4.2.2",
            tuple(
                Variant(f"{name}, {'with' if norm else 'without'} BN", TINY, {"norm": norm, "activation": name})
                for name in ("sigmoid", "relu")
                for norm in (True, False)
            ),
        ),
        Experiment(
            "covariate_shift",
            "Batch norm and the drift of layer inputs",
            "Batch norm keeps the distribution of each layer's input from moving while the layers below it train.",
            "arXiv:1502.03167, sections 1 and 4.1",
            _norms("rate", (0.02, 0.1), "recipe", "lr"),
            drift_every=10,
            minutes=1,
        ),
        Experiment(
            "label_smoothing",
            "Label smoothing",
            "Label smoothing by 0.1 raises accuracy on images not seen in training by about 0.2 %.",
            "arXiv:1512.00567, section 7",
            tuple(Variant(f"smoothing {s:g}", TINY, recipe={"label_smoothing": s}) for s in (0.0, 0.1)),
            seeds=4,
            steps=250,
            minutes=2,
        ),
        Experiment(
            "grid_reduction",
            "Three ways to halve the grid",
            "A strided convolution beside a pool is as good as convolution then pool, at a fraction of its work; "
            "pool then convolution makes a bottleneck.",
            "arXiv:1512.00567, section 5",
            tuple(Variant(kind, TINY, {"reduction": kind}) for kind in REDUCTIONS),
        ),
        Experiment(
            "residual",
            "Residual and plain Inception blocks",
            "Residual connections make Inception networks train faster to about the same accuracy.",
            "arXiv:1602.07261, sections 1 and 5",
            tuple(
                Variant("residual" if residual else "plain", TINY, {"depth": 4, "residual": residual})
                for residual in (True, False)
            ),
        ),
        Experiment(
            "residual_v4",
            "Inception v4 and Inception-ResNet v2",
            "Inception-ResNet-v2 trains faster than Inception v4 of about the same cost.",
            "arXiv:1602.07261, section 5",
            (Variant("inception_v4", "inception_v4"), Variant("inception_resnet_v2", "inception_resnet_v2")),
            seeds=1,
            steps=360,  # Inception v4 learns nothing in the first 200
            batch_size=16,
            image_size=75,
            recipe=get_recipe("paper"),
            minutes=9,
        ),
    )
}


def get_experiment(name: str) -> Experiment:
    """The experiment `name`; ValueError, with all names, for an unknown one."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r}; allowed: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
