// cpu_int8.h with AVX2, which has no exact product of bytes: its byte instruction adds two products in 16 bits and saturates.
// So both sides become 16-bit numbers, weights on the way from memory, inputs when they are rounded; one instruction
// multiplies eight pairs of them into eight int32 without loss, twice as many products as fp32 has. Panels of 16 rows
// times up to 6 tokens fill all 16 registers.

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error needs a processor with AVX2, FMA and F16C
#endif

#include <immintrin.h>

#include "cpu_int8.h"

namespace {

using requant::Layer;
using requant::Rounded;

constexpr int LANES = 8, VECTORS = 2;

inline __m256 load(const float* from) { return _mm256_loadu_ps(from); }
inline __m256 load(const at::BFloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline __m256 load(const at::Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void store(float* to, __m256 values) { _mm256_storeu_ps(to, values); }
inline void store(at::BFloat16* to, __m256 values) {  // to the nearest, ties to even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i halves = _mm256_blendv_epi8(_mm256_srli_epi32(nearest, 16), _mm256_set1_epi32(0x7FC0), nan);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
}
inline void store(at::Half* to, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

// The first `count` of 8, and zeros.
template <class Scalar>
inline __m256 load(const Scalar* from, int64_t count) {
  if (count >= LANES) return load(from);
  Scalar some[LANES] = {};
  std::copy_n(from, count, some);
  return load(some);
}

template <class Scalar>
inline void store(Scalar* to, int64_t count, __m256 values) {
  if (count >= LANES) return store(to, values);
  Scalar all[LANES];
  store(all, values);
  std::copy_n(all, count, to);
}

// The step and zero point that cover x [K] and zero.
template <class Scalar>
Rounded range(const Scalar* x, const Layer& layer) {
  __m256 low = _mm256_setzero_ps(), high = low;
  for (int64_t k = 0; k < layer.columns; k += LANES) {
    const __m256 values = load(x + k, layer.columns - k);
    low = _mm256_min_ps(low, values);
    high = _mm256_max_ps(high, values);
  }
  float lows[LANES], highs[LANES];
  store(lows, low);
  store(highs, high);
  return requant::step_of(*std::min_element(lows, lows + LANES), *std::max_element(highs, highs + LANES), layer);
}

struct Avx2 {
  using Code = int16_t;
  static constexpr int64_t PANEL = LANES * VECTORS, BLOCK = 2, TOKENS = 6;

  // Where something in x is not a number, neither is the step.
  template <class Scalar>
  static Rounded round(const Scalar* x, const Layer& layer, int16_t* codes) {
    Rounded token = layer.dynamic ? range(x, layer) : Rounded{layer.input_scale, layer.input_zero, 0};
    const __m256 inverse = _mm256_set1_ps(token.scale > 0 ? 1.0f / token.scale : 0.0f);
    const __m256 bound = _mm256_set1_ps(4096.0f), other = _mm256_set1_ps(-4096.0f);  // what no zero point brings back
    const __m256i zero = _mm256_set1_epi32(token.zero);
    __m256 nan = _mm256_setzero_ps();
    for (int64_t k = 0; k < layer.columns; k += LANES) {
      const __m256 values = load(x + k, layer.columns - k), steps = _mm256_mul_ps(values, inverse);
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(values, values, _CMP_UNORD_Q));
      const __m256i whole = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(steps, bound), other));
      const __m256i code = _mm256_max_epi32(
          _mm256_min_epi32(_mm256_add_epi32(whole, zero), _mm256_set1_epi32(127)), _mm256_set1_epi32(-128));
      const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      int16_t all[LANES];
      auto* to = k + LANES <= layer.columns ? codes + k : all;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
      if (to == all) {
        std::fill(all + (layer.columns - k), all + LANES, 0);
        std::copy_n(all, BLOCK * layer.blocks - k, codes + k);
      }
    }
    if (_mm256_movemask_ps(nan)) token.scale = std::numeric_limits<float>::quiet_NaN();
    return token;
  }

  template <int T, class Scalar>
  static void multiply(const Layer& layer, int64_t panel, const int16_t* codes, const Rounded* tokens,
                       const Scalar* bias, Scalar* y) {
    const auto* weight = static_cast<const __m128i*>(layer.weight) + panel * layer.blocks * VECTORS;
    __m256i sums[T][VECTORS];
#pragma GCC unroll 6
    for (int m = 0; m < T; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[m][v] = _mm256_setzero_si256();
    for (int64_t b = 0; b < layer.blocks; ++b, weight += VECTORS) {
      __m256i weights[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) weights[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(weight + v));
#pragma GCC unroll 6
      for (int m = 0; m < T; ++m) {
        int32_t two;
        std::memcpy(&two, codes + (m * layer.blocks + b) * BLOCK, sizeof two);
        const __m256i inputs = _mm256_set1_epi32(two);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          __m256i sum = _mm256_add_epi32(sums[m][v], _mm256_madd_epi16(weights[v], inputs));
          asm volatile("" : "+x"(sum));  // or GCC reads all tokens first and has no registers left for their sums
          sums[m][v] = sum;
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t row = panel * PANEL + v * LANES, count = layer.rows - row;
      if (count <= 0) return;
      int32_t some[LANES] = {};
      std::copy_n(layer.sums + row, std::min<int64_t>(count, LANES), some);
      const __m256i codes_sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(some));
      const __m256 scale = load(layer.scale + row, count);
      const __m256 added = bias ? load(bias + row, count) : _mm256_setzero_ps();
#pragma GCC unroll 6
      for (int m = 0; m < T; ++m) {
        const __m256i zeros = _mm256_mullo_epi32(codes_sum, _mm256_set1_epi32(tokens[m].zero));
        const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[m][v], zeros));
        const __m256 step = _mm256_mul_ps(scale, _mm256_set1_ps(tokens[m].scale));
        store(y + m * layer.rows + row, count, _mm256_fmadd_ps(exact, step, added));
      }
    }
  }
};

}  // namespace

REQUANT_W8A8_LINEAR(cpu_int8_avx2_linear, Avx2)
