// The W8A8 layer of reference.py as one operator that torch.compile sees and that runs without Python: rounding of the
// input, product, steps and bias.
//
// VNNI multiplies four unsigned bytes by four signed ones and adds the products to an int32, without saturation. The
// unsigned side are the weights, stored as code + 128, so that inputs can be read from memory as they lie:
//   sum (c - z) w = sum c (w + 128) - 128 sum c - z sum w
// in integers, exact modulo 2^32 and therefore exact. Panels of 64 rows, [ceil(K/4), 64, 4] bytes each, times up to 6 tokens
// fill 28 of the 32 registers; a panel stays in the cache for all tokens.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#ifndef __AVX512VNNI__
#error needs a processor with AVX-512 VNNI
#endif
#include <immintrin.h>

namespace {

using at::Tensor;

constexpr int LANES = 16, VECTORS = 4, QUAD = 4;  // QUAD: columns that one instruction adds up
constexpr int64_t PANEL = LANES * VECTORS;
constexpr int64_t TOKENS = 6;       // at once
constexpr int64_t CHUNK = 16 * TOKENS;  // of one unit of work
constexpr int64_t GRAIN = 1 << 20;  // products that are not worth a second thread
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

struct Layer {
  int64_t rows, columns, quads;
  bool dynamic, symmetric;
  const uint8_t* weight;
  const float* scale;
  const int32_t* sums;  // of the codes of each row
  float input_scale = 0;
  int32_t input_zero = 0;
};

// Of a token: its step and zero point, and 128 times the sum of its codes.
struct Rounded {
  float scale;
  int32_t zero, offset;
};

// The step and zero point that cover x [K] and zero.
template <class Scalar>
Rounded range(const Scalar* x, const Layer& layer) {
  __m512 low = _mm512_setzero_ps(), high = low;
  for (int64_t k = 0; k < layer.columns; k += LANES) {
    const __m512 values = load(x + k, first_lanes(layer.columns - k));
    low = _mm512_min_ps(low, values);
    high = _mm512_max_ps(high, values);
  }
  const float lowest = _mm512_reduce_min_ps(low), highest = _mm512_reduce_max_ps(high);
  if (layer.symmetric) return {std::max(highest, -lowest) / 127.0f, 0, 0};
  const float scale = (highest - lowest) / 255.0f;
  const float from = scale > 0 && std::isfinite(scale) ? std::nearbyint(lowest * (1.0f / scale)) : 0.0f;
  return {scale, -128 - static_cast<int32_t>(from), 0};
}

// x [K] -> codes [4 ceil(K/4)], filled up with zeros. Where something in x is not a number, neither is the step.
template <class Scalar>
Rounded round(const Scalar* x, const Layer& layer, int8_t* codes) {
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
    _mm_mask_storeu_epi8(codes + k, first_lanes(QUAD * layer.quads - k), _mm512_maskz_cvtepi32_epi8(some, code));
  }
  if (nan) token.scale = std::numeric_limits<float>::quiet_NaN();
  token.offset = OFFSET * _mm512_reduce_add_epi32(sum);
  return token;
}

// T tokens times one panel.
template <int T, class Scalar>
void multiply(const Layer& layer, int64_t panel, const int8_t* codes, const Rounded* tokens, const Scalar* bias,
              Scalar* y) {
  const uint8_t* weight = layer.weight + panel * layer.quads * PANEL * QUAD;
  __m512i sums[T][VECTORS];
#pragma GCC unroll 6
  for (int m = 0; m < T; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[m][v] = _mm512_setzero_si512();
  for (int64_t q = 0; q < layer.quads; ++q, weight += PANEL * QUAD) {
    __m512i weights[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) weights[v] = _mm512_loadu_si512(weight + v * LANES * QUAD);
#pragma GCC unroll 6
    for (int m = 0; m < T; ++m) {
      int32_t four;
      std::memcpy(&four, codes + (m * layer.quads + q) * QUAD, sizeof four);
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

template <class Scalar, class... Rest>
void multiply(int64_t count, const Rest&... rest) {
  switch (count) {
    case 1: return multiply<1, Scalar>(rest...);
    case 2: return multiply<2, Scalar>(rest...);
    case 3: return multiply<3, Scalar>(rest...);
    case 4: return multiply<4, Scalar>(rest...);
    case 5: return multiply<5, Scalar>(rest...);
    default: return multiply<TOKENS, Scalar>(rest...);
  }
}

template <class Scalar>
void run(const Layer& layer, int64_t tokens, const Scalar* x, const Scalar* bias, Scalar* y) {
  const int64_t stride = QUAD * layer.quads;
  const Tensor workspace = at::empty({tokens, stride + static_cast<int64_t>(sizeof(Rounded))}, at::kChar);
  auto* rounded = reinterpret_cast<Rounded*>(workspace.mutable_data_ptr());  // first, because memory is aligned there
  auto* codes = reinterpret_cast<int8_t*>(rounded + tokens);
  at::parallel_for(0, tokens, GRAIN / 16 / layer.columns + 1, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) rounded[m] = round(x + m * layer.columns, layer, codes + m * stride);
  });
  const int64_t panels = (layer.rows + PANEL - 1) / PANEL, chunks = (tokens + CHUNK - 1) / CHUNK;
  const int64_t products = layer.columns * PANEL * std::min(tokens, CHUNK);
  at::parallel_for(0, panels * chunks, GRAIN / products + 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t panel = unit / chunks, start = unit % chunks * CHUNK, count = std::min(CHUNK, tokens - start);
      const int64_t blocks = (count + TOKENS - 1) / TOKENS;
      for (int64_t b = 0; b < blocks; ++b) {  // of equal size: 8 tokens are twice 4
        const int64_t m = start + count * b / blocks, next = start + count * (b + 1) / blocks;
        multiply<Scalar>(next - m, layer, panel, codes + m * stride, rounded + m, bias, y + m * layer.rows);
      }
    }
  });
}

Tensor cpu_int8_linear(const Tensor& x, at::TensorList weights, const std::optional<Tensor>& bias,
                       int64_t out_features, bool dynamic, bool symmetric) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  const Tensor y = at::empty(shape, x.options());
  if (!x.numel()) return y;
  const Tensor flat = x.contiguous();
  const int64_t columns = x.size(-1);
  Layer layer{out_features, columns, (columns + QUAD - 1) / QUAD, dynamic, symmetric,
              weights[0].const_data_ptr<uint8_t>(), weights[1].const_data_ptr<float>(),
              weights[2].const_data_ptr<int32_t>()};
  if (!dynamic) layer.input_scale = *weights[3].const_data_ptr<float>();
  if (!dynamic && !symmetric) layer.input_zero = *weights[4].const_data_ptr<int32_t>();
  const Tensor added = bias ? bias->to(x.scalar_type()).contiguous() : Tensor();
  const auto call = [&]<class Scalar>(Scalar*) {
    run(layer, x.numel() / columns, flat.const_data_ptr<Scalar>(), bias ? added.const_data_ptr<Scalar>() : nullptr,
        y.mutable_data_ptr<Scalar>());
  };
  switch (x.scalar_type()) {
    case at::kFloat: call(static_cast<float*>(nullptr)); break;
    case at::kBFloat16: call(static_cast<at::BFloat16*>(nullptr)); break;
    case at::kHalf: call(static_cast<at::Half*>(nullptr)); break;
    default: TORCH_CHECK(false, "cpu_int8_linear: x is ", x.scalar_type(), ", not float32, bfloat16 or float16");
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(requant, library) {
  library.def(
      "cpu_int8_linear(Tensor x, Tensor[] weights, Tensor? bias, int out_features, bool dynamic, bool symmetric) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(requant, CPU, library) { library.impl("cpu_int8_linear", cpu_int8_linear); }
