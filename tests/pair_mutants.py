"""Mistakes that the fused pair could have, each of which the emulated device must notice."""

from __future__ import annotations

from native.mutants import Mutant


def _kernel(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "pair.cuh", old, new, "pair")


def _schedule(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "pair_schedule.h", old, new, "pair")


MUTANTS = (
    _kernel("the intermediate keeps the pixel order", "(pixel % SIDE * SIDE + pixel / SIDE) * 16", "pixel * 16"),
    _kernel("stores of the intermediate are not published", "    fence_async_shared();\n", ""),
    _kernel(
        "nobody waits for the whole intermediate",
        "    sync_named(1, GROUPS * 128); // the intermediate is whole\n",
        "",
    ),
    _kernel("guards are never cleared", "  clear_guards<GROUPS>(s, thread);\n", ""),
    _kernel("weights are read before they are there", "  barrier_wait(&s.full[stage], w.place.parity);\n", ""),
    _kernel("a stage is filled while it is in use", "barrier_wait(&s.empty[place.stage], place.parity);", ""),
    _kernel("a stage is let go before its products are done", "  wgmma_wait<0>();\n  release_weights(s, w, stage);",
            "  release_weights(s, w, stage);\n  wgmma_wait<0>();"),
    _kernel("products begin without a fence", "  wgmma_fence();\n", ""),
    _kernel("a product that nobody commits", "  wgmma_commit();\n", ""),
    _kernel("the second step of K takes the first planes", "b + 2 * k * (plane >> 4)", "b + k * (plane >> 4)"),
    _kernel("one barrier for both input stages", "Barrier *full = &s.input_full[place.stage];",
            "Barrier *full = &s.input_full[0];"),
    _kernel("input expected short of a plane", "barrier_expect(full, INPUT_BYTES);",
            "barrier_expect(full, INPUT_BYTES - INPUT_PLANE);"),
    _kernel("input begins at the first row", "0, 0, -1, c / 8", "0, 0, 0, c / 8"),
    _kernel("the first image for all", "c / 8, image + rank);", "c / 8, rank);"),
    _kernel("a fresh input stage passes for full",
            "Place place{0, 1};\n  for (int image = first; image < p.n; image += step)\n    for (int pass = 0",
            "Place place{0, 0};\n  for (int image = first; image < p.n; image += step)\n    for (int pass = 0"),
    _kernel("every warpgroup multiplies the first one's weights", " + w.warpgroup * WEIGHT_GROUP;", ";"),
    _kernel("a pass stores the next one's pixels", "if (pixel < pass_end(GROUPS, PASS) && image < p.n)",
            "if (image < p.n)"),
    _kernel("ReLU of the second convolution alone", "channel + lane / 4, p.relu1)", "channel + lane / 4, 0)"),
    _kernel("scales of neighbours", "by[8], plus[8]", "by[1], plus[1]"),
    _kernel("x is loaded before the earlier grid ends", "      grid_wait(); // before x is read\n", ""),
    _kernel("y is written before the earlier grid ends", "    grid_wait(); // before y is written\n", ""),
    _schedule("a tap leaves out one group too many", "missing / 8 * 8", "(missing + 7) / 8 * 8"),
    _schedule("taps run the other way", "SIDE * (tap - taps / 2)", "SIDE * (taps / 2 - tap)"),
    Mutant("axes are exchanged", "pair_plan.h", "pair.wide_first ? row : pixel, pair.wide_first ? pixel : row",
           "pair.wide_first ? pixel : row, pair.wide_first ? row : pixel", "pair"),
    Mutant("y has its axes exchanged", "pair_plan.h", "pair.wide_first ? SIDE : 1;", "pair.wide_first ? 1 : SIDE;",
           "pair"),
)  # fmt: skip
