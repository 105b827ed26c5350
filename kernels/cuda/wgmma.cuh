// wgmma m64nNk16 for every N: D (fp32, registers) += A (64 x 16) * B (N x 16)^T, both operands K-major in shared
// memory, named by descriptors. The fragment of thread t of the warpgroup begins at row 16 * (t / 32) + t % 32 / 4 and
// column 2 * (t % 4): d[4j .. 4j + 3] are (row, column + 8j), (row, column + 8j + 1), (row + 8, column + 8j) and (row +
// 8, column + 8j + 1). An operand list of inline assembly has to be spelled out; each list here is the shorter one and
// four more registers.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace inception_fast::hopper {

template <int N, class T> struct Wgmma; // run(d, a, b, accumulate); without accumulate D is overwritten

// clang-format off
#define WGMMA_NAMES_8 "%0, %1, %2, %3"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %4, %5, %6, %7"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %8, %9, %10, %11"
#define WGMMA_NAMES_32 WGMMA_NAMES_24 ", %12, %13, %14, %15"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %16, %17, %18, %19"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %20, %21, %22, %23"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %24, %25, %26, %27"
#define WGMMA_NAMES_64 WGMMA_NAMES_56 ", %28, %29, %30, %31"
#define WGMMA_NAMES_72 WGMMA_NAMES_64 ", %32, %33, %34, %35"
#define WGMMA_NAMES_80 WGMMA_NAMES_72 ", %36, %37, %38, %39"
#define WGMMA_NAMES_88 WGMMA_NAMES_80 ", %40, %41, %42, %43"
#define WGMMA_NAMES_96 WGMMA_NAMES_88 ", %44, %45, %46, %47"
#define WGMMA_NAMES_104 WGMMA_NAMES_96 ", %48, %49, %50, %51"
#define WGMMA_NAMES_112 WGMMA_NAMES_104 ", %52, %53, %54, %55"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %56, %57, %58, %59"
#define WGMMA_NAMES_128 WGMMA_NAMES_120 ", %60, %61, %62, %63"
#define WGMMA_NAMES_136 WGMMA_NAMES_128 ", %64, %65, %66, %67"
#define WGMMA_NAMES_144 WGMMA_NAMES_136 ", %68, %69, %70, %71"
#define WGMMA_NAMES_152 WGMMA_NAMES_144 ", %72, %73, %74, %75"
#define WGMMA_NAMES_160 WGMMA_NAMES_152 ", %76, %77, %78, %79"
#define WGMMA_NAMES_168 WGMMA_NAMES_160 ", %80, %81, %82, %83"
#define WGMMA_NAMES_176 WGMMA_NAMES_168 ", %84, %85, %86, %87"
#define WGMMA_NAMES_184 WGMMA_NAMES_176 ", %88, %89, %90, %91"
#define WGMMA_NAMES_192 WGMMA_NAMES_184 ", %92, %93, %94, %95"
#define WGMMA_NAMES_200 WGMMA_NAMES_192 ", %96, %97, %98, %99"
#define WGMMA_NAMES_208 WGMMA_NAMES_200 ", %100, %101, %102, %103"
#define WGMMA_NAMES_216 WGMMA_NAMES_208 ", %104, %105, %106, %107"
#define WGMMA_NAMES_224 WGMMA_NAMES_216 ", %108, %109, %110, %111"
#define WGMMA_NAMES_232 WGMMA_NAMES_224 ", %112, %113, %114, %115"
#define WGMMA_NAMES_240 WGMMA_NAMES_232 ", %116, %117, %118, %119"
#define WGMMA_NAMES_248 WGMMA_NAMES_240 ", %120, %121, %122, %123"
#define WGMMA_NAMES_256 WGMMA_NAMES_248 ", %124, %125, %126, %127"
#define WGMMA_REGISTERS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define WGMMA_REGISTERS_16 WGMMA_REGISTERS_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WGMMA_REGISTERS_24 WGMMA_REGISTERS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define WGMMA_REGISTERS_32 WGMMA_REGISTERS_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WGMMA_REGISTERS_40 WGMMA_REGISTERS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define WGMMA_REGISTERS_56 WGMMA_REGISTERS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WGMMA_REGISTERS_72 WGMMA_REGISTERS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define WGMMA_REGISTERS_80 WGMMA_REGISTERS_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define WGMMA_REGISTERS_88 WGMMA_REGISTERS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define WGMMA_REGISTERS_96 WGMMA_REGISTERS_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define WGMMA_REGISTERS_104 WGMMA_REGISTERS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define WGMMA_REGISTERS_112 WGMMA_REGISTERS_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define WGMMA_REGISTERS_120 WGMMA_REGISTERS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define WGMMA_REGISTERS_128 WGMMA_REGISTERS_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA_REGISTERS_136 WGMMA_REGISTERS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define WGMMA_REGISTERS_144 WGMMA_REGISTERS_136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define WGMMA_REGISTERS_152 WGMMA_REGISTERS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define WGMMA_REGISTERS_160 WGMMA_REGISTERS_152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define WGMMA_REGISTERS_168 WGMMA_REGISTERS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define WGMMA_REGISTERS_176 WGMMA_REGISTERS_168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define WGMMA_REGISTERS_184 WGMMA_REGISTERS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define WGMMA_REGISTERS_192 WGMMA_REGISTERS_184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define WGMMA_REGISTERS_200 WGMMA_REGISTERS_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define WGMMA_REGISTERS_208 WGMMA_REGISTERS_200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define WGMMA_REGISTERS_216 WGMMA_REGISTERS_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define WGMMA_REGISTERS_224 WGMMA_REGISTERS_216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define WGMMA_REGISTERS_232 WGMMA_REGISTERS_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define WGMMA_REGISTERS_240 WGMMA_REGISTERS_232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define WGMMA_REGISTERS_248 WGMMA_REGISTERS_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define WGMMA_REGISTERS_256 WGMMA_REGISTERS_248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define WGMMA_OF_TYPE(N, TYPE, NAME, A, B, P)                                                                          \
  template <> struct Wgmma<N, TYPE> {                                                                                  \
    static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                                     \
                   " {" WGMMA_NAMES_##N "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}\n"                                     \
                   : WGMMA_REGISTERS_##N                                                                               \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                 \
    }                                                                                                                  \
  };
#define WGMMA(N, A, B, P)                                                                                              \
  WGMMA_OF_TYPE(N, __nv_bfloat16, "bf16", A, B, P)                                                                     \
  WGMMA_OF_TYPE(N, __half, "f16", A, B, P)
WGMMA(8, 4, 5, 6)
WGMMA(16, 8, 9, 10)
WGMMA(24, 12, 13, 14)
WGMMA(32, 16, 17, 18)
WGMMA(40, 20, 21, 22)
WGMMA(48, 24, 25, 26)
WGMMA(56, 28, 29, 30)
WGMMA(64, 32, 33, 34)
WGMMA(72, 36, 37, 38)
WGMMA(80, 40, 41, 42)
WGMMA(88, 44, 45, 46)
WGMMA(96, 48, 49, 50)
WGMMA(104, 52, 53, 54)
WGMMA(112, 56, 57, 58)
WGMMA(120, 60, 61, 62)
WGMMA(128, 64, 65, 66)
WGMMA(136, 68, 69, 70)
WGMMA(144, 72, 73, 74)
WGMMA(152, 76, 77, 78)
WGMMA(160, 80, 81, 82)
WGMMA(168, 84, 85, 86)
WGMMA(176, 88, 89, 90)
WGMMA(184, 92, 93, 94)
WGMMA(192, 96, 97, 98)
WGMMA(200, 100, 101, 102)
WGMMA(208, 104, 105, 106)
WGMMA(216, 108, 109, 110)
WGMMA(224, 112, 113, 114)
WGMMA(232, 116, 117, 118)
WGMMA(240, 120, 121, 122)
WGMMA(248, 124, 125, 126)
WGMMA(256, 128, 129, 130)
#undef WGMMA_OF_TYPE
#undef WGMMA
// clang-format on

} // namespace inception_fast::hopper
