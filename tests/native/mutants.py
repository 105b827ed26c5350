"""Mistakes that a kernel could have, each with the driver's test that must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `file`, `old` becomes `new`; `unit` is the translation unit to compile, `test` what fails on `tier`."""

    name: str
    file: str
    old: str
    new: str
    test: str
    unit: str = "tier_generic.cpp"
    tier: str = "generic"
    seeds: int = 30

    def applied(self, source: str) -> str:
        """The spoilt source. Raises ValueError unless it holds the old text once: the table is out of date then."""
        if source.count(self.old) != 1:
            raise ValueError(f"mutant '{self.name}': {self.file} has its text {source.count(self.old)} times, not once")
        return source.replace(self.old, self.new)


def _conv(name: str, old: str, new: str, test: str = "conv", seeds: int = 30) -> Mutant:
    return Mutant(name, "conv.h", old, new, test, seeds=seeds)


def _operands(name: str, old: str, new: str, test: str = "conv", seeds: int = 30) -> Mutant:
    return Mutant(name, "operands.h", old, new, test, seeds=seeds)


def _tiles(name: str, file: str, old: str, new: str, test: str, seeds: int = 30) -> Mutant:
    return Mutant(name, file, old, new, test, "tier_amx_emulated.cpp", "amx_bf16_emulated", seeds)


def _lines(name: str, old: str, new: str, test: str = "lines", seeds: int = 30) -> Mutant:
    return _tiles(name, "conv_amx.h", old, new, test, seeds)


def _winograd(name: str, old: str, new: str, seeds: int = 30) -> Mutant:
    return Mutant(name, "winograd.h", old, new, "winograd", "tier_generic_winograd.cpp", seeds=seeds)


def _share(name: str, old: str, new: str, test: str = "shared") -> Mutant:
    return Mutant(name, "share.h", old, new, test)


def _pair(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "pair.h", old, new, "pair")


def _depthwise(name: str, old: str, new: str, seeds: int = 30) -> Mutant:
    return Mutant(f"depthwise: {name}", "depthwise.h", old, new, "depthwise", seeds=seeds)


MUTANTS = (
    _operands(
        "padding one pixel late", "uint32_t(t.x[r] + kw) < uint32_t(op.w)", "uint32_t(t.x[r] + kw) <= uint32_t(op.w)"
    ),
    _operands("no padding below", "t.y_high + kh < op.h", "t.y_high + kh <= op.h"),
    _operands("no padding on the right", "t.x_high + op.kw <= op.w", "t.x_high + op.kw <= op.w + 1"),
    _operands("input is dense", "op.x.offset, op.w, op.x.pitch}", "op.x.offset, op.w, op.c}"),
    _operands("one image", "(image + op.y_image) * op.y_map + oy", "op.y_image * op.y_map + oy"),
    _operands("taps of a slice are neighbours", "x_inside && x.pitch == channels && ", "x_inside && ", seeds=120),
    _operands("odd taps of pairs are neighbours", "== channels && packed == channels;", "== channels;", seeds=120),
    _operands(
        "odd taps are packed without a gap", "int64_t(tap) * packed + chunk.c0", "int64_t(tap) * channels + chunk.c0"
    ),
    _operands("padding is skipped beside infinities", "*segment) || !op.skip", "*segment)", "specials"),
    _operands("rows are widened up to the first tap", "- op.top + op.kh, 0, op.h)", "- op.top + 1, 0, op.h)"),
    _operands("rows are widened from the last tap on", "o0 * op.stride_h - op.top,", "o0 * op.stride_h,", "shared"),
    _operands(
        "columns are widened up to the first tap", "- op.left + op.kw, 0, op.w)", "- op.left + 1, 0, op.w)", "columns"
    ),
    _operands(
        "columns are widened from the last tap on", "o0 * op.stride_w - op.left,", "o0 * op.stride_w,", "columns"
    ),
    _operands("one image is widened", "image1 * op.h + within", "image0 * op.h + within"),
    _operands("a pair widens the first image", "box.bottom + op.x_image * op.h", "box.bottom", "pair", 60),
    _operands(
        "widened columns begin at the left",
        "(box.top * columns + box.left) * pitch",
        "box.top * columns * pitch",
        "columns",
    ),
    _operands("a slice is widened as it lies", "x.pitch == op.c && pitch == op.c", "pitch == op.c"),
    _operands("joined taps begin at the map", "within(op.left, 0, row),", "0,", "joined"),
    _operands(
        "joined rows end with the map",
        "within(op.w - first, 0, row - before)",
        "within(op.w - first, 0, row)",
        "joined",
    ),
    _operands(
        "joined rows on padding are the map's",
        "bool in = uint32_t(t.y[r] + kh) < uint32_t(op.h);",
        "bool in = true;",
        "joined",
    ),
    _operands("joined taps of a slice are copied", "(x.pitch == op.c ? 0 : inside)", "0", "joined"),
    _conv("a tile on padding is left out", "begin[0] == begin[1] && !job.first && !job.last", "begin[0] == begin[1]"),
    _conv("the last chunk alone counts", "if (!job.first) {", "if (false) {", "deep"),
    Mutant("no ReLU", "sink.h", "if (sink.relu)", "if (false)", "conv"),
    Mutant(
        "residual unscaled",
        "sink.h",
        "Isa::fma(Isa::set(sink.residual_scale), value,",
        "Isa::fma(Isa::set(1), value,",
        "conv",
    ),
    Mutant(
        "whole vectors at the last column",
        "sink.h",
        "if (count < Isa::lanes)\n      Isa::store_some(y +",
        "if (count < 0)\n      Isa::store_some(y +",
        "conv",
    ),
    _conv("the first group for all", "int64_t(op.panels[p].group) * (op.c / op.groups)", "0", "groups"),
    _conv("a tile's last pixel is finished twice", "job, pixels, sums, rows);", "job, pixels, sums, R);"),
    _conv("whole tiles at the last pixel", "lesser(Isa::rows, m - (high - 1) * Isa::rows)", "Isa::rows"),
    _share(
        "the remainder has no thread",
        "part.high = units * (place + 1) / members",
        "part.high = units / members * (place + 1)",
    ),
    _share("the remainder has no group", "tiles * (first + members) / count", "tiles / count * (first + members)"),
    Mutant(
        "a group's last thread is nobody's",
        "share.h",
        "ceil_div((group + 1) * count, groups) - first",
        "greater(1, (group + 1) * count / groups - first)",
        "winograd",
        "tier_generic_winograd.cpp",
        seeds=150,
    ),
    _share("the last tile is nobody's", ": tiles * vectors;", ": (tiles - 1) * vectors;"),
    _share("a tile at the end is not read", "ceil_div(high, vectors), low", "high / vectors, low"),
    _share("a tile at the beginning is not read", "return {low / vectors,", "return {ceil_div(low, vectors),"),
    _pair("a strip goes on in the next image", "lesser(extent, low + end - line)", "low + end - line"),
    _pair("every strip begins its image", "low = static_cast<int32_t>(line % extent)", "low = 0"),
    _pair("the first image for all", "run(line / extent,", "run(0,"),
    _depthwise("no padding on the right", "within(op.w - left, low, s.width)", "s.width"),
    _depthwise("no padding below", "row >= 0 && row < op.h", "row >= 0"),
    _depthwise("a strip goes on in the next image", "lesser(end - begin, op.oh - top)", "end - begin"),
    _depthwise("the first image for all", "from.x + image * from.image", "from.x"),
    _depthwise("the last chunk alone counts", "i ? Isa::load(at) + sum[p][v] : sum[p][v]", "sum[p][v]"),
    _depthwise(
        "a panel begins with a whole channel", "(c + 1) * multiplier - panel.column", "(c + 1 - first) * multiplier"
    ),
    _depthwise("strips are not strided", "left * op.stride_w - op.left", "left - op.left", 60),
    _depthwise("tiles are not strided", "x += P * op.stride_w * NV", "x += P * NV"),
    Mutant(
        "a tap's row for its column",
        "pack.cpp",
        "from.data + tap / op.kw * block.row",
        "from.data + tap % op.kw * block.row",
        "depthwise",
        "pack.cpp",
    ),
    _winograd(
        "a tile knows no padding on the right",
        "uint32_t(left + j) < uint32_t(op.w)",
        "uint32_t(left + j) <= uint32_t(op.w)",
    ),
    _winograd("tiles have one image", "(place.image + op.x_image) * op.h", "op.x_image * op.h"),
    _winograd("the last tile is whole", "lesser(W::M, op.ow - place.x)", "int64_t(W::M)"),
    _winograd("the last row of tiles is whole", "lesser(H::M, op.oh - place.y)", "int64_t(H::M)"),
    _winograd("infinity is no point", "i == A::M - 1 ? value + m[(A::n - 1) * from] : value", "value"),
    _winograd("opposite points are one", "i % 2 ? difference : sum", "sum"),
    _winograd(
        "odd inputs count as even ones",
        "v[(2 * pair + 2) * step] = even - odd;",
        "v[(2 * pair + 2) * step] = even + odd;",
    ),
    _winograd("rows of inputs are channels apart", "pixel * op.x.pitch : zeros", "pixel * op.c : zeros"),
    _winograd("one point's weights for all", "++p, u += slab)", "++p)"),
    _winograd("every map is of floats", "op.x.type == Type::bfloat16", "op.x.type == Type::uint8"),
    _winograd(
        "a panel's first tile is the block's",
        "multiply<NV>(op, u, room, low - tile0, high - tile0);",
        "multiply<NV>(op, u, room, 0, high - low);",
        seeds=60,
    ),
    Mutant(
        "weights are turned over",
        "winograd_pack.cpp",
        "w[kh * block.row + kw * block.tap];",
        "w[(op.kh - 1 - kh) * block.row + kw * block.tap];",
        "winograd",
        "winograd_pack.cpp",
    ),
    Mutant("strips of a pair begin at its left", "pair.h", "first.left -= low * first.stride_w;", "", "pair", seeds=60),
    Mutant("strips of a pair begin at its top", "pair.h", "first.top -= low * first.stride_h;", "", "pair", seeds=60),
    Mutant("strips of a pair end at its left", "pair.h", "second.y_start = low;", "", "pair", seeds=60),
    Mutant(
        "an intermediate lies in the working memory",
        "pair.h",
        "worker.scratch + op.local_bytes",
        "worker.scratch",
        "pair",
    ),
    Mutant("a maximum is never negative", "pool.h", "-__builtin_inff()", "0.0f", "maximum"),
    Mutant("a maximum drops NaN", "simd_generic.h", "((v > a) | (v != v)) ? v : a", "(v > a) ? v : a", "specials"),
    Mutant("halves below zero are turned round", "pool.h", "bits < smallest[v]", "bits > smallest[v]", "maximum"),
    Mutant(
        "a maximum drops NaN of halves",
        "pool.h",
        "top[v] > MINUS_INFINITY ? top[v] : found",
        "found",
        "specials",
        seeds=1000,
    ),
    Mutant(
        "padding counts where it must not",
        "pool.h",
        "if (op.count_include_pad)",
        "if (!op.count_include_pad)",
        "average",
    ),
    Mutant(
        "what hangs over counts",
        "pool.h",
        "right = left + op.kw < op.w + op.right ? left + op.kw : op.w + op.right",
        "right = left + op.kw",
        "average",
        seeds=120,
    ),
    Mutant("a pool has one image", "pool.h", "((image * op.h + y0) * op.w + x0)", "(y0 * op.w + x0)", "maximum"),
    Mutant("an element is its own residual", "pointwise.h", "residual.read(i, count)", "x.read(i, count)", "eltwise"),
    Mutant("the window reaches ahead", "pointwise.h", "back = op.size / 2", "back = (op.size - 1) / 2", "lrn"),
    Mutant("eps is added", "pointwise.h", "norm < op.eps ? op.eps : norm", "norm + op.eps", "normalize"),
    Mutant("images are dense in channels", "pointwise.h", "x[i * from.w + k * from.c]", "x[i * from.w + k]", "import"),
    Mutant("imported slices are dense", "pointwise.h", "op.y.pitch == c ? 1 : count", "1", "import"),
    Mutant("halves round away from zero", "simd_generic.h", "bits + 0x7fff + (upper & 1)", "bits + 0x8000", "conv"),
    Mutant(
        "a chunk goes past the channels", "pack.cpp", "std::min(channels, c + step)", "c + step", "deep", "pack.cpp"
    ),
    Mutant(
        "all weights pass for finite",
        "pack.cpp",
        "finite &= is_finite(row[i * per])",
        "finite &= true",
        "specials",
        "pack.cpp",
    ),
    Mutant(
        "a part of the weights begins its panel",
        "pack.cpp",
        "low - panel.column, high - low, &block",
        "0, high - low, &block",
        "conv",
        "pack.cpp",
    ),
    Mutant(
        "a panel begins its part of the weights",
        "pack.cpp",
        "block.data + (low - first) * block.column",
        "block.data",
        "conv",
        "pack.cpp",
    ),
    Mutant("all parts of weights begin at one column", "pack.cpp", "first += block.columns;", "", "conv", "pack.cpp"),
    Mutant(
        "rows of weights are taps apart",
        "pack.cpp",
        "block.channel + tap / op.kw * block.row",
        "block.channel + tap / op.kw * op.kw * block.tap",
        "conv",
        "pack.cpp",
    ),
    Mutant(
        "tiles' weights: parts begin their panel",
        "winograd_pack.cpp",
        "width + from.column + i]",
        "width + i]",
        "winograd",
        "winograd_pack.cpp",
    ),
    Mutant(
        "every panel begins its range", "pack.cpp", "panel.y.offset += column - range_begin;", "", "scatter", "pack.cpp"
    ),
    Mutant("nobody waits", "ledger.cpp", "  return wait;", "  return false;", "mix", "ledger.cpp"),
    Mutant("every slice is the first", "plan.cpp", "held_at(image, buffer.n) * each", "0 * each", "stages", "plan.cpp"),
    Mutant(
        "every slice reads the first",
        "plan.cpp",
        "+ image * inputs[i].n *",
        "+ 0 * inputs[i].n *",
        "stages",
        "plan.cpp",
    ),
    Mutant(
        "the order of slices is that of whole steps",
        "order.cpp",
        "whole && each.images == 0",
        "whole",
        "stages",
        "order.cpp",
    ),
    Mutant(
        "the first slice alone waits",
        "order.cpp",
        "fences[i] = true;",
        "fences[i] = !run.image;",
        "stages",
        "order.cpp",
        seeds=60,
    ),
    Mutant("small steps run on every thread", "plan.cpp", "else if (worker.index == 0)", "else", "mix", "plan.cpp"),
    Mutant(
        "padding of the wrong side",
        "build.cpp",
        "op.left = s.padding[2];",
        "op.left = s.padding[3];",
        "conv",
        "build.cpp",
    ),
    Mutant(
        "the mask misses the first lane",
        "simd_avx2.h",
        "_mm256_setr_epi32(0, 1,",
        "_mm256_setr_epi32(1, 1,",
        "conv",
        "tier_avx2.cpp",
        "avx2",
    ),
    Mutant(
        "ReLU drops NaN",
        "simd_avx2.h",
        "_mm256_max_ps(zero(), v)",
        "_mm256_max_ps(v, zero())",
        "specials",
        "tier_avx2.cpp",
        "avx2",
    ),
    Mutant(
        "ReLU of sixteen drops NaN",
        "simd_avx512.h",
        "_mm512_max_ps(least, v)",
        "_mm512_max_ps(v, least)",
        "specials",
        "tier_avx512.cpp",
        "avx512",
    ),
    _tiles(
        "the last sums stay behind", "conv_amx.h", "  stage.waiting.finish_all(tiles);\n  tiles.release();", "", "conv"
    ),
    _tiles("sums outlive their pixels", "conv_amx.h", "stage.waiting.finish_all(tiles); // they", "// they", "deep"),
    _tiles("another kind's sums are overwritten", "tile_multiply.h", "open_ != &kind<NV, Y>()", "false", "scatter"),
    _tiles(
        "the third tile is the second again",
        "tile_multiply.h",
        "load<6>(x[2], x_pitch[2])",
        "load<6>(x[1], x_pitch[1])",
        "long",
    ),
    _tiles("the second vector meets the first weights", "tile_multiply.h", "dot<3, 6, 7>", "dot<2, 6, 7>", "long"),
    _tiles(
        "rows are finished once too few",
        "tile_multiply.h",
        "ceil_div(count, greater(1, depth.steps()))",
        "count / greater(1, depth.steps())",
        "conv",
    ),
    _tiles("the next sums go on from the last", "tile_multiply.h", "    tiles.template zero<sum>();\n", "", "conv"),
    _tiles("one held tile is taken for two", "tile_multiply.h", "before.held != M || ", "", "conv"),
    _tiles(
        "rows of weights are those of padding",
        "tile_multiply.h",
        "  w += depth.first * depth.width() * SLOT * NV * Isa::lanes;\n",
        "",
        "lines",
    ),
    _tiles("all panels are whole", "tile_multiply.h", "sink.width == NV * Isa::lanes && ", "", "conv"),
    _lines("lines share more zeros than there are", "lesser(before, behind))", "greater(before, behind))"),
    _lines("pixels between lines are kept", "return inner < walk.inner;", "return true;"),
    _lines("ends of every row of taps are the first's", "{pixel * walk.step, pixel * SLOT}", "{pixel * walk.step, 0}"),
    _lines("an end holds what follows it", "size_t(filled) * sizeof(bf16)", "sizeof slot", seeds=150),
    _lines("a row of taps on the last line is padding", "walk.extent - low)", "walk.extent - low - 1)"),
    _lines("a row of taps on the first line is padding", "lesser(walk.rows, -high)", "lesser(walk.rows, 1 - high)"),
    _lines("what is right of a line is not copied", "(walk.inner - 1) * op.stride_w + op.kw, to)", "walk.span, to)"),
    _lines("short rows are one pixel apart", "from += op.w * stage.pitch)", "from += stage.pitch)", "joined", 150),
    _lines("short rows begin where they like", "y >= 0 && x >= 0 && y", "y", "joined", 150),
)
