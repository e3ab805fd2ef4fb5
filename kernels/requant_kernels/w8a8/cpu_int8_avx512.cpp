// cpu_int8.h with AVX-512 VNNI: one instruction multiplies four unsigned bytes by four signed ones and adds the products to
// an int32, without saturation. The unsigned side are the weights, stored as code + 128, so that inputs can be read from
// memory as they lie:
//   sum (c - z) w = sum c (w + 128) - 128 sum c - z sum w
// in integers, exact modulo 2^32 and therefore exact. Panels of 64 rows times up to 6 tokens fill 28 of the 32 registers; a
// panel stays in the cache for all tokens.

#ifndef __AVX512VNNI__
#error needs a processor with AVX-512 VNNI
#endif

#include <immintrin.h>

#include "cpu_int8.h"

namespace {

using requant::Layer;
using requant::Rounded;

constexpr int LANES = 16, VECTORS = 4;
constexpr int32_t OFFSET = 128;

inline __mmask16 first_lanes(int64_t count) { return count < LANES ? (1u << count) - 1 : 0xFFFF; }

inline __m512 load(const float* from, __mmask16 some) { return _mm512_maskz_loadu_ps(some, from); }
inline __m512 load(const at::BFloat16* from, __mmask16 some) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 load(const at::Half* from, __mmask16 some) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from));
}

inline void store(float* to, __mmask16 some, __m512 values) { _mm512_mask_storeu_ps(to, some, values); }
inline void store(at::BFloat16* to, __mmask16 some, __m512 values) {  // to the nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i halves = _mm512_mask_set1_epi32(_mm512_srli_epi32(nearest, 16), nan, 0x7FC0);
  _mm256_mask_storeu_epi16(to, some, _mm512_cvtepi32_epi16(halves));
}
inline void store(at::Half* to, __mmask16 some, __m512 values) {
  _mm256_mask_storeu_epi16(to, some, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

// The step and zero point that cover x [K] and zero.
template <class Scalar>
Rounded range(const Scalar* x, const Layer& layer) {
  __m512 low = _mm512_setzero_ps(), high = low;
  for (int64_t k = 0; k < layer.columns; k += LANES) {
    const __m512 values = load(x + k, first_lanes(layer.columns - k));
    low = _mm512_min_ps(low, values);
    high = _mm512_max_ps(high, values);
  }
  return requant::step_of(_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), layer);
}

struct Avx512 {
  using Code = int8_t;
  static constexpr int64_t PANEL = LANES * VECTORS, BLOCK = 4, TOKENS = 6;

  // Where something in x is not a number, neither is the step.
  template <class Scalar>
  static Rounded round(const Scalar* x, const Layer& layer, int8_t* codes) {
    Rounded token = layer.dynamic ? range(x, layer) : Rounded{layer.input_scale, layer.input_zero, 0};
    const __m512 inverse = _mm512_set1_ps(token.scale > 0 ? 1.0f / token.scale : 0.0f);
    const __m512 bound = _mm512_set1_ps(4096.0f), other = _mm512_set1_ps(-4096.0f);  // what no zero point brings back
    const __m512i zero = _mm512_set1_epi32(token.zero);
    __m512i sum = _mm512_setzero_si512();
    __mmask16 nan = 0;
    for (int64_t k = 0; k < layer.columns; k += LANES) {
      const __mmask16 some = first_lanes(layer.columns - k);
      const __m512 values = load(x + k, some), steps = _mm512_mul_ps(values, inverse);
      nan |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
      const __m512i whole = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(steps, bound), other));
      const __m512i code = _mm512_max_epi32(
          _mm512_min_epi32(_mm512_add_epi32(whole, zero), _mm512_set1_epi32(127)), _mm512_set1_epi32(-128));
      sum = _mm512_mask_add_epi32(sum, some, sum, code);
      _mm_mask_storeu_epi8(codes + k, first_lanes(BLOCK * layer.blocks - k), _mm512_maskz_cvtepi32_epi8(some, code));
    }
    if (nan) token.scale = std::numeric_limits<float>::quiet_NaN();
    token.offset = OFFSET * _mm512_reduce_add_epi32(sum);
    return token;
  }

  template <int T, class Scalar>
  static void multiply(const Layer& layer, int64_t panel, const int8_t* codes, const Rounded* tokens,
                       const Scalar* bias, Scalar* y) {
    const auto* weight = static_cast<const uint8_t*>(layer.weight) + panel * layer.blocks * PANEL * BLOCK;
    __m512i sums[T][VECTORS];
#pragma GCC unroll 6
    for (int m = 0; m < T; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[m][v] = _mm512_setzero_si512();
    for (int64_t b = 0; b < layer.blocks; ++b, weight += PANEL * BLOCK) {
      __m512i weights[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) weights[v] = _mm512_loadu_si512(weight + v * LANES * BLOCK);
#pragma GCC unroll 6
      for (int m = 0; m < T; ++m) {
        int32_t four;
        std::memcpy(&four, codes + (m * layer.blocks + b) * BLOCK, sizeof four);
        const __m512i inputs = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[m][v] = _mm512_dpbusd_epi32(sums[m][v], weights[v], inputs);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t row = panel * PANEL + v * LANES;
      if (row >= layer.rows) return;
      const __mmask16 some = first_lanes(layer.rows - row);
      const __m512 scale = _mm512_maskz_loadu_ps(some, layer.scale + row);
      const __m512i codes_sum = _mm512_maskz_loadu_epi32(some, layer.sums + row);
      const __m512 added = bias ? load(bias + row, some) : _mm512_setzero_ps();
#pragma GCC unroll 6
      for (int m = 0; m < T; ++m) {
        __m512i exact = _mm512_sub_epi32(sums[m][v], _mm512_set1_epi32(tokens[m].offset));
        exact = _mm512_sub_epi32(exact, _mm512_mullo_epi32(codes_sum, _mm512_set1_epi32(tokens[m].zero)));
        const __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(tokens[m].scale));
        store(y + m * layer.rows + row, some, _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), step, added));
      }
    }
  }
};

}  // namespace

REQUANT_W8A8_LINEAR(cpu_int8_avx512_linear, Avx512)
