"""Mistakes that the kernels of training could have."""

from __future__ import annotations

from native.mutants import Mutant

UNITS = {"amx_bf16_emulated": "amx_emulated"}


def _gradient(name: str, old: str, new: str, file: str = "weight_gradient.h") -> Mutant:
    unit = file if file.endswith(".cpp") else "tier_generic_gradient.cpp"
    return Mutant(name, file, old, new, "weight_gradient", unit)


def _gradient_tiles(name: str, old: str, new: str, file: str = "winograd_gradient.h") -> Mutant:
    unit = file if file.endswith(".cpp") else "tier_generic_gradient.cpp"
    return Mutant(name, file, old, new, "gradient_tiles", unit)


def _trained_pool(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "train_pool.h", old, new, "train_pool")


def _train(name: str, file: str, old: str, new: str, test: str = "train_conv", tier: str = "generic") -> Mutant:
    part = "_winograd" if file == "train_weights.h" else ""
    unit = file if file.endswith(".cpp") else f"tier_{UNITS.get(tier, tier)}{part}.cpp"
    return Mutant(name, file, old, new, test, unit, tier)


TRAINING_MUTANTS = (
    _gradient("columns before the map count", "start < 0 ? (-start", "start < 0 ? (-start - 1"),
    _gradient("columns behind the map count", "(op.w - start + op.stride_w - 1)", "(op.w - start + op.stride_w)"),
    _gradient("rows outside of the map count", "bool in = uint64_t(iy) < uint64_t(op.h);", "bool in = true;"),
    _gradient("the next image never comes", "      ++image;\n", ""),
    _gradient("a stretch begins a row", "ox = first % map % op.ow;", "ox = 0;"),
    _gradient(
        "x is dense", "((image * op.h + iy) * op.w + start) * op.x_pitch", "((image * op.h + iy) * op.w + start) * op.c"
    ),
    _gradient("steps on the map follow each other", "int32_t>(p / pixels) * op.rows", "int32_t>(count) * op.rows"),
    _gradient("the first step on the map is all", "steps[count++] =", "steps[count = 1] ="),
    _gradient("every stretch starts anew", "first == op.begin}", "true}"),
    _gradient("whole tiles at the last rows", "static_cast<int>(lesser_of(op.oc - row, Rows))", "Rows"),
    _gradient("whole vectors at the last channels", "lesser_of(op.c - c, NV * Isa::lanes)", "NV * Isa::lanes"),
    _gradient("a share ends a vector early", "to = tile_from(high);", "to = tile_from(high - 1);"),
    _gradient(
        "nobody waits for the packed gradient",
        "    meet();\n    each(job.kernels.multiply);",
        "    each(job.kernels.multiply);",
        "weight_gradient.cpp",
    ),
    _gradient(
        "a chunk too few",
        "int64_t chunk = 1; chunk < job.chunks",
        "int64_t chunk = 2; chunk < job.chunks",
        "weight_gradient.cpp",
    ),
    _gradient(
        "all chunks have one sum", "one.dw = job.sums + chunk * job.size;", "one.dw = job.sums;", "weight_gradient.cpp"
    ),
    _gradient_tiles(
        "opposite points of a gradient are one",
        "u[(2 * pair + 2) * step] = even - odd;",
        "u[(2 * pair + 2) * step] = even + odd;",
    ),
    _gradient_tiles("a gradient's last row is its first", "= g[(A::M - 1) * step];", "= g[0];"),
    _gradient_tiles("opposite points of a tap are one", "tap % 2 ? difference : sum", "sum"),
    _gradient_tiles("the first tap knows no point 0", "if (tap == 0)", "if (false)"),
    _gradient_tiles("the last tap knows no infinity", "value + m[(A::n - 1) * step] : value", "value : value"),
    _gradient_tiles("every map of training is of floats", "op.of.type == Type::bfloat16", "op.of.type == Type::uint8"),
    _gradient_tiles("tiles know no right edge", "uint32_t(x + j) < uint32_t(w)", "uint32_t(x + j) <= uint32_t(w)"),
    _gradient_tiles("tiles at the right edge are inside", "x + NW <= w", "x + NW <= w + 1"),
    _gradient_tiles("tiles of a gradient have one image", "((image * h + y) * w + x) * pitch", "(y * w + x) * pitch"),
    _gradient_tiles("a transformed gradient is dense", "zeros(op), op.of.grad_pitch,", "zeros(op), op.of.oc,"),
    _gradient_tiles("a worker leaves out its last tile", "at = low; at < high; ++at", "at = low; at + 1 < high; ++at"),
    _gradient_tiles("every block starts anew", "op.begin == op.first}", "true}"),
    _gradient_tiles("the first chunk alone counts", "chunk = 1; chunk < op.chunks", "chunk = 1; chunk < 1"),
    _gradient_tiles(
        "all chunks of tiles have one sum",
        "op.sums = job.op.sums + chunk * op.points * op.sums_apart;",
        "op.sums = job.op.sums;",
        "winograd_gradient.cpp",
    ),
    _gradient_tiles(
        "nobody waits for the transformed tiles",
        "    meet();\n    job.kernels.multiply(op, worker);",
        "    job.kernels.multiply(op, worker);",
        "winograd_gradient.cpp",
    ),
    _gradient_tiles(
        "nobody waits for the products",
        "    job.kernels.multiply(op, worker);\n    meet();",
        "    job.kernels.multiply(op, worker);",
        "winograd_gradient.cpp",
    ),
    _trained_pool(
        "the last of equals is the largest",
        "(value > best[v]) | (value != value)",
        "(value >= best[v]) | (value != value)",
    ),
    _trained_pool("a trained maximum drops NaN", "(value > best[v]) | (value != value)", "(value > best[v])"),
    _trained_pool("padding is a place of the map", "int32_t first = from < 0 ? 0 : from,", "int32_t first = from,"),
    _trained_pool("windows end at the padding", "to < size ? to : size;", "to < most ? to : most;"),
    _trained_pool(
        "gradients have one image",
        "{(int64_t(image) * op.oh + oy) * op.ow + ox, tap, share}",
        "{int64_t(oy) * op.ow + ox, tap, share}",
    ),
    _trained_pool("a window more reaches back", "(at - kernel) / stride + 1", "(at - kernel) / stride"),
    _trained_pool(
        "what is read is dense",
        "from.at[i].pixel * op.pitch + c;\n    const Ints",
        "from.at[i].pixel * op.c + c;\n    const Ints",
    ),
    _trained_pool(
        "places of the first channels for all",
        "op.taps + source.pixel * op.c + c;",
        "op.taps + source.pixel * op.c;",
    ),
    _trained_pool(
        "whole vectors of places at the last channel",
        "if (count < Isa::lanes)\n    __builtin_memcpy(p, &bytes",
        "if (false)\n    __builtin_memcpy(p, &bytes",
    ),
    _trained_pool(
        "an average of what is inside",
        "found.divisor = static_cast<float>(rows.counted)",
        "found.divisor = static_cast<float>(rows.end - rows.first)",
    ),
    _train(
        "rounded weights are cut off", "train_pairs.h", "return Isa::load(row);", "return Isa::load_some(from, count);"
    ),
    _train(
        "an odd channel has a neighbour", "train_pairs.h", "if (c + 1 < high)", "if (true)", tier="amx_bf16_emulated"
    ),
    _train("halves of two columns change places", "train_pairs.h", "zip<1>(rows[r]", "zip<0>(rows[r]"),
    _train(
        "rows of taps run forwards",
        "train_pairs.h",
        "tap / op.kw * op.row",
        "tap / op.kw * (op.row < 0 ? -op.row : op.row)",
    ),
    _train(
        "every share of channels is the first",
        "train_pairs.h",
        "% conv.row_taps) * packed + low",
        "% conv.row_taps) * packed",
    ),
    _train("channels of a column are neighbours", "train_pairs.h", "if (step == 1) {", "if (true) {"),
    _train("nothing scales the sums", "train_conv.cpp", "std::fill_n(tail, columns, 1.0f);", ""),
    _train("what memory held is added", "train_conv.cpp", "std::fill_n(tail + columns, columns, 0.0f);", ""),
    _train(
        "a thread packs a share too few",
        "train_conv.cpp",
        "i < items * (worker.index + 1) / worker.count",
        "i + 1 < items * (worker.index + 1) / worker.count",
    ),
    _train("nobody waits for the weights", "train_conv.cpp", "  pack(job, worker);\n  meet();", "  pack(job, worker);"),
    _train("maps are dense", "train_conv.cpp", "static_cast<int32_t>(from.y_pitch)", "op.oc"),
    _train(
        "a tile unit meets what memory held",
        "train_conv.cpp",
        "(row + 1) * op.row_depth / 2 * columns, 0.0f);",
        '(row + 1) * op.row_depth / 2 * columns, __builtin_nanf(""));',
        tier="amx_bf16_emulated",
    ),
    _train(
        "weights of tiles: a column is the first",
        "train_weights.h",
        "from[i * op.column + c * op.channel]",
        "from[c * op.channel]",
        "train_tiles",
    ),
    _train(
        "weights of tiles: opposite points are one", "train_weights.h", "= even - odd;", "= even + odd;", "train_tiles"
    ),
    _train(
        "weights of tiles: columns beyond the width",
        "train_weights.h",
        "panel.width - v * Isa::lanes)",
        "Isa::lanes)",
        "train_tiles",
    ),
    _train(
        "weights of tiles: every gathering is the first",
        "train_weights.h",
        "+ int64_t(c0) * columns + at",
        "+ at",
        "train_tiles",
    ),
    _train("weights of tiles: every tap is the first", "train_weights.h", "+ tap % op.kw * op.tap", "", "train_tiles"),
    Mutant(
        "the second of a pair is the first",
        "simd_avx512_bf16.h",
        "second = _mm512_maskz_loadu_epi16(mask, b);",
        "second = first;",
        "weight_gradient",
        "tier_avx512_bf16_gradient.cpp",
        "avx512_bf16",
    ),
)
