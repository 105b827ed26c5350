"""The jobs of the measuring queue, the most telling first, and the shapes that they measure."""

from __future__ import annotations

from collections.abc import Sequence

from store import Job

BATCHES = (32, 128, 1, 256, 8)
DTYPES = ("bfloat16", "float16")
MODELS = ("inception_v3", "inception_v4", "inception_resnet_v2")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = ("conv", "pair", "pool", "pool_tiles", "norm", "promises", "backend", "gpu_plan", "hopper_device")
# Layers by what they cost in the networks: (map, c, oc, kernel, stride, padding (top, bottom, left, right)).
LAYERS = {
    "stem_3x3s2": (299, 3, 32, (3, 3), 2, (0, 0, 0, 0)),
    "stem_3x3": (149, 32, 32, (3, 3), 1, (0, 0, 0, 0)),
    "stem_3x3_64": (147, 32, 64, (3, 3), 1, (1, 1, 1, 1)),
    "stem_3x3_192": (73, 80, 192, (3, 3), 1, (0, 0, 0, 0)),
    "35_1x1_176": (35, 288, 176, (1, 1), 1, (0, 0, 0, 0)),
    "35_3x3_96": (35, 96, 96, (3, 3), 1, (1, 1, 1, 1)),
    "35_5x5_64": (35, 48, 64, (5, 5), 1, (2, 2, 2, 2)),
    "35_3x3s2_384": (35, 288, 384, (3, 3), 2, (0, 0, 0, 0)),
    "17_1x1_576": (17, 768, 576, (1, 1), 1, (0, 0, 0, 0)),
    "17_1x7_192": (17, 192, 192, (1, 7), 1, (0, 0, 3, 3)),
    "17_7x1_192": (17, 192, 192, (7, 1), 1, (3, 3, 0, 0)),
    "17_1x7_128": (17, 128, 128, (1, 7), 1, (0, 0, 3, 3)),
    "17_7x1_256": (17, 224, 256, (7, 1), 1, (3, 3, 0, 0)),
    "17_1x1_1088": (17, 384, 1088, (1, 1), 1, (0, 0, 0, 0)),
    "8_1x1_1280": (8, 1280, 1280, (1, 1), 1, (0, 0, 0, 0)),
    "8_1x3_384": (8, 384, 384, (1, 3), 1, (0, 0, 1, 1)),
    "8_3x3_384": (8, 448, 384, (3, 3), 1, (1, 1, 1, 1)),
}
PAIRS = ("v3_192", "v3_128", "v4_256", "resnet_192")


FIRST = "inception_v3"  # the network that is measured first
LARGE = 128  # the batch at which the CUDA kernels are measured first


def jobs() -> list[Job]:
    """Every job. Whether the kernels are right comes before how fast they are; of either the most telling first, so
    that a quarter of an hour on a GPU gives every kind of answer once; what nobody has measured yet before what refines
    it. With "build" each fits a slice of 400 seconds.
    """
    wide, fewest = DTYPES[0], BATCHES[:3]
    first = [f"{FIRST}/{n}/{wide}" for n in BATCHES]
    large = [f"{model}/{LARGE}/{wide}" for model in MODELS]
    cut = list(dict.fromkeys([f"{FIRST}/{fewest[0]}/{wide}", *large]))
    found = [Job("build", 40, 400), Job("machine", 10, 60)]
    found += [Job(f"exact/{name}", 100, 240 if name == "hopper_device" else 300, "exact") for name in TESTS]
    found += [Job(f"sanitizer/{tool}/few", 100, 200, "exact") for tool in TOOLS]
    found.append(Job("exact/hopper_device/few", 30, 100, asked=True))
    found += [Job(f"tiles/{name}/cuda", 60, 200, "cuts", 20) for name in cut]
    found += [Job(f"tiles/{name}/new", 60, 200, "cuts", 20, asked=True) for name in cut]
    found += beside("network/{}", list(dict.fromkeys([*first, *large])), "networks")
    found += beside("network/{}/tuned", cut, "networks")
    found += beside("peers/{}/xla", [f"{FIRST}/{n}/{wide}" for n in (1, LARGE)], "xla")
    found += [Job(f"walk/{model}/1/{wide}", 40, 200) for model in MODELS]
    found.append(Job("exact/batch_invariance", 100, 300, "exact"))
    for n in (LARGE, *(n for n in fewest if n != LARGE)):
        found += [Job(f"tiles/{FIRST}/{n}/{wide}", 100, 300), Job(f"profile/{FIRST}/{n}/{wide}/tuned", 30, 100)]
    found += [Job(f"marks/{LARGE}/{wide}", 60, 200), Job(f"tails/{LARGE}/{wide}", 40, 150)]
    found.append(Job(f"pitches/{LARGE}/{wide}", 40, 150))
    found += [Job(f"hopper/{LARGE}/{wide}", 90, 300), Job("probe/hopper", 20, 100), Job("probe/rates", 30, 100)]
    found += [Job(f"counters/{PAIRS[0]}/{form}", 10, 200) for form in ("separate", "fused")]
    found += beside("steady/{}", large, "steady")
    found += beside("peers/{}/invariant", [f"{FIRST}/{n}/{wide}" for n in (1, LARGE)], "invariant")
    found += [Job(f"hopper/{fewest[0]}/{wide}", 90, 350), Job(f"peers/{FIRST}/{fewest[0]}/{wide}", 240, 350)]
    found += [Job(f"hopper/{n}/{wide}", 90, 350) for n in BATCHES[1:] if n != LARGE]
    found += [Job(f"peers/{FIRST}/{n}/{wide}", 240, 350) for n in fewest[1:]]
    found += [Job(f"layers/{n}/{dtype}", 150, 350) for dtype in DTYPES for n in BATCHES]
    found += [Job(f"training/{dtype}", 200, 350) for dtype in DTYPES]
    found += [Job(f"sanitizer/{tool}", 240, 500, "sanitizer in full") for tool in TOOLS]
    names = {job.name for job in found}
    found += [job for job in _networks() if job.name not in names]
    found += [Job(f"tune/{name}/{wide}", 200, 350) for name in LAYERS if name != "stem_3x3s2"]
    found += [Job(f"counters/{pair}/{form}", 10, 200) for pair in PAIRS[1:] for form in ("separate", "fused")]
    return found


def beside(name: str, networks: Sequence[str], together: str) -> list[Job]:
    """Networks that are made side by side and timed in turn."""
    return [Job(name.format(network), 100, 300, together, 12) for network in networks]


def _networks() -> list[Job]:
    """Every network at every batch, then with tiles of its own, then beside all its peers."""
    found: list[Job] = []
    for dtype in DTYPES:
        for model in MODELS:
            names = [f"{model}/{n}/{dtype}" for n in BATCHES]
            found += beside("network/{}", names, f"networks {model} {dtype}")
            if dtype == DTYPES[0]:
                found += [Job(f"tiles/{name}", 120, 400) for name in names]
                found += beside("network/{}/tuned", names, f"tuned {model}")
            found += [Job(f"peers/{name}", 360, 520) for name in names]
    return found
