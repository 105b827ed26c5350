"""The jobs of the measuring queue, the most telling first."""

from __future__ import annotations

from store import Job

BATCHES = (32, 128, 1, 256, 8)
DTYPES = ("bfloat16", "float16")
MODELS = ("inception_v3", "inception_v4", "inception_resnet_v2")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = ("conv", "pair", "pool", "norm", "promises", "backend", "gpu_plan", "hopper_device")
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


def jobs() -> list[Job]:
    """Every job. Whether the kernels are right comes before how fast they are, and both before tuning."""
    found = [Job("build", 120, 400), Job("machine", 15, 60)]
    found += [Job(f"exact/{name}", 60, 400) for name in TESTS]
    found += [Job(f"sanitizer/{tool}", 240, 500) for tool in TOOLS]
    found += [Job("probe/hopper", 60, 300)]
    found += [Job(f"hopper/{n}/{dtype}", 200, 500) for n in BATCHES for dtype in DTYPES[:1]]
    found += [Job(f"layers/{n}/{dtype}", 150, 500) for n in BATCHES for dtype in DTYPES]
    found += [Job(f"network/{model}/{n}/{dtype}", 360, 520) for model in MODELS for n in BATCHES for dtype in DTYPES]
    found += [Job(f"training/{dtype}", 200, 500) for dtype in DTYPES]
    found += [Job(f"tune/{name}/{dtype}", 200, 500) for name in LAYERS if name != "stem_3x3s2" for dtype in DTYPES[:1]]
    found += [Job(f"counters/{pair}/{form}", 60, 300) for pair in PAIRS for form in ("separate", "fused")]
    return found
