// The packed 4-bit layer of cpu_int4.py as one operator that torch.compile sees and that runs without Python: dense and
// sparse part, bias and rounding in one pass over the weights, whatever the number of tokens.
//
// Weights are read where torch packed them (int4_panels.py): panels of P rows, byte [k, i] of a panel holding row i in its
// low and row P/2 + i in its high half. One unit of work is half a panel, times up to 8 tokens that lie beside each other.
// Few tokens multiply the codes, decoded 16 at a time straight into a vector, and apply steps once a group:
//   y = sum_g s_g (sum_k code_k x_k) + (z_g - 8 s_g) (sum_k x_k)
// For many tokens each unit is decoded once. All sums are fp32 and rounded once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int LANES = 16;
constexpr int64_t TOKENS = 8;       // at once: with two vectors of rows their sums fill half of 32 registers
constexpr int64_t MANY_BLOCKS = 3;  // of tokens: from here on a unit is decoded once for all of them
constexpr int64_t GRAIN = 1 << 18;  // products that are not worth a second thread
constexpr float ZERO_CODE = 8.0f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

// 16 codes as floats. GCC 12 makes scalar code of its own __builtin_convertvector from bytes.
template <bool HIGH>
inline Floats decoded(const uint8_t* packed) {
#ifdef __AVX512F__
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const __m512i codes = HIGH ? _mm512_srli_epi32(bytes, 4) : _mm512_and_si512(bytes, _mm512_set1_epi32(15));
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(codes));
#else
  float codes[LANES];
  for (int i = 0; i < LANES; ++i) codes[i] = static_cast<float>(HIGH ? packed[i] >> 4 : packed[i] & 15);
  Floats vector;
  std::memcpy(&vector, codes, sizeof vector);
  return vector;
#endif
}

inline float widened(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : nearest);
}

struct Layer {
  int64_t rows, padded_rows, columns, group, half;
  const uint8_t* codes;
  const uint32_t* steps;  // by group and row: the scale, and in the high half the zero, both bf16
  const int32_t* offsets = nullptr;  // of the first entry of each unit
  const uint32_t* places = nullptr;  // column * P/2 + row in its unit
  const float* values = nullptr;
  const uint16_t* bias = nullptr;
};

// Some tokens beside each other: fp32 [K, T], and their sums over each group, [K/g, T].
struct Block {
  int64_t first, count;
  const float *inputs, *sums;
};

// What has been summed up of HALF rows from `first_row` on, plus bias -> y.
template <int T, int HALF>
void store(float (&sums)[T][HALF], const Layer& layer, const Block& block, int64_t first_row, uint16_t* y) {
  const int64_t rows = std::min<int64_t>(HALF, layer.rows - first_row);
  for (int64_t m = 0; m < block.count; ++m) {
    uint16_t* output = y + (block.first + m) * layer.rows + first_row;
    if (layer.bias)
      for (int64_t i = 0; i < rows; ++i) sums[m][i] += widened(layer.bias[first_row + i]);
    for (int64_t i = 0; i < rows; ++i) output[i] = rounded(sums[m][i]);
  }
}

// Scale and zero of 16 rows: w = code * scale + zero.
struct Step {
  Floats scale, zero;

  Step(const Layer& layer, int64_t group, int64_t row) {
    Bits pairs;
    std::memcpy(&pairs, layer.steps + group * layer.padded_rows + row, sizeof pairs);
    scale = reinterpret_cast<Floats>(pairs << 16);
    zero = reinterpret_cast<Floats>(pairs & 0xFFFF0000u) - ZERO_CODE * scale;
  }
};

// Few tokens: each weight is decoded where it is used.
template <int T, int V, bool HIGH>
void multiply(const Layer& layer, const Block& block, int64_t unit, uint16_t* y) {
  const int64_t panel = unit / 2, first_row = unit * layer.half;
  const uint8_t* codes = layer.codes + panel * layer.columns * layer.half;
  Floats total[T][V] = {};
  for (int64_t g = 0; g < layer.columns / layer.group; ++g) {
    Floats part[T][V] = {};
    for (int64_t k = g * layer.group; k < (g + 1) * layer.group; ++k)
      for (int v = 0; v < V; ++v) {
        const Floats code = decoded<HIGH>(codes + k * layer.half + LANES * v);
        for (int m = 0; m < T; ++m) part[m][v] += code * block.inputs[k * T + m];
      }
    for (int v = 0; v < V; ++v) {
      const Step step(layer, g, first_row + LANES * v);
      for (int m = 0; m < T; ++m) total[m][v] += step.scale * part[m][v] + step.zero * block.sums[g * T + m];
    }
  }
  constexpr int HALF = V * LANES;
  float sums[T][HALF];
  std::memcpy(sums, total, sizeof sums);
  if (layer.offsets && layer.offsets[unit] < layer.offsets[unit + 1]) {
    float sparse[HALF][T] = {};  // transposed: one vector an entry, and no branch that depends on the entries of a row
    for (int32_t e = layer.offsets[unit]; e < layer.offsets[unit + 1]; ++e) {
      const float* input = block.inputs + layer.places[e] / HALF * T;
      float* sum = sparse[layer.places[e] % HALF];
      for (int m = 0; m < T; ++m) sum[m] += layer.values[e] * input[m];
    }
    for (int m = 0; m < T; ++m)
      for (int i = 0; i < HALF; ++i) sums[m][i] += sparse[i][m];
  }
  store<T, HALF>(sums, layer, block, first_row, y);
}

template <int V, bool HIGH>
void multiply(const Layer& layer, const Block& block, int64_t lanes, int64_t unit, uint16_t* y) {
  switch (lanes) {
    case 1: return multiply<1, V, HIGH>(layer, block, unit, y);
    case 2: return multiply<2, V, HIGH>(layer, block, unit, y);
    case 4: return multiply<4, V, HIGH>(layer, block, unit, y);
    default: return multiply<TOKENS, V, HIGH>(layer, block, unit, y);
  }
}

// Many tokens: a unit is decoded once, with its sparse entries, into fp32 [K, HALF], which stays in the cache.
template <int V, bool HIGH>
void decode(const Layer& layer, int64_t unit, float* weights) {
  constexpr int HALF = V * LANES;
  const uint8_t* codes = layer.codes + unit / 2 * layer.columns * HALF;
  for (int64_t g = 0; g < layer.columns / layer.group; ++g)
    for (int v = 0; v < V; ++v) {
      const Step step(layer, g, unit * HALF + LANES * v);
      for (int64_t k = g * layer.group; k < (g + 1) * layer.group; ++k) {
        const Floats weight = decoded<HIGH>(codes + k * HALF + LANES * v) * step.scale + step.zero;
        std::memcpy(weights + k * HALF + LANES * v, &weight, sizeof weight);
      }
    }
  if (layer.offsets)
    for (int32_t e = layer.offsets[unit]; e < layer.offsets[unit + 1]; ++e) weights[layer.places[e]] += layer.values[e];
}

template <int T, int V>
void multiply_decoded(const Layer& layer, const Block& block, int64_t unit, const float* weights, uint16_t* y) {
  constexpr int HALF = V * LANES;
  Floats total[T][V] = {};
  for (int64_t k = 0; k < layer.columns; ++k)
    for (int v = 0; v < V; ++v) {
      Floats weight;
      std::memcpy(&weight, weights + k * HALF + LANES * v, sizeof weight);
      for (int m = 0; m < T; ++m) total[m][v] += weight * block.inputs[k * T + m];
    }
  float sums[T][HALF];
  std::memcpy(sums, total, sizeof sums);
  store<T, HALF>(sums, layer, block, unit * HALF, y);
}

// Tokens beside each other: zeros fill them up.
int64_t lanes_for(int64_t tokens, int64_t blocks) {
  return blocks > 1 || tokens > 4 ? TOKENS : tokens > 2 ? 4 : tokens;
}

// x bf16 [M, K] -> `inputs` and `sums` of the tokens from `first` on.
void transpose(const uint16_t* x, const Layer& layer, int64_t first, int64_t count, int64_t lanes, float* inputs,
               float* sums) {
  for (int64_t k = 0; k < layer.columns; ++k)
    for (int64_t m = 0; m < lanes; ++m)
      inputs[k * lanes + m] = m < count ? widened(x[(first + m) * layer.columns + k]) : 0.0f;
  for (int64_t g = 0; g < layer.columns / layer.group; ++g) {
    float total[TOKENS] = {};  // of all tokens beside each other: one after the other, each addition waits for the last
    for (int64_t k = g * layer.group; k < (g + 1) * layer.group; ++k)
      for (int64_t m = 0; m < lanes; ++m) total[m] += inputs[k * lanes + m];
    std::copy_n(total, lanes, sums + g * lanes);
  }
}

Tensor cpu_int4_linear(const Tensor& x, at::TensorList weights, const std::optional<Tensor>& bias, int64_t out_features,
                       int64_t group, int64_t panel) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "cpu_int4_linear: x is ", x.scalar_type(), ", not bfloat16");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  const Tensor y = at::empty(shape, x.options());
  if (!x.numel()) return y;
  const Tensor flat = x.reshape({-1, x.size(-1)}).contiguous();
  Layer layer{out_features, weights[1].size(1), flat.size(1), group, panel / 2, weights[0].const_data_ptr<uint8_t>(),
              static_cast<const uint32_t*>(weights[1].const_data_ptr())};
  if (weights.size() > 2) {
    layer.offsets = weights[2].const_data_ptr<int32_t>();
    layer.places = static_cast<const uint32_t*>(weights[3].const_data_ptr());
    layer.values = weights[4].const_data_ptr<float>();
  }
  const Tensor added = bias ? bias->to(x.scalar_type()).contiguous() : Tensor();
  if (bias) layer.bias = static_cast<const uint16_t*>(added.const_data_ptr());

  const int64_t tokens = flat.size(0), blocks = (tokens + TOKENS - 1) / TOKENS, groups = layer.columns / group;
  const Tensor workspace = at::empty({blocks, (layer.columns + groups) * TOKENS}, x.options().dtype(at::kFloat));
  auto* inputs = workspace.mutable_data_ptr<float>();
  const auto* given = static_cast<const uint16_t*>(flat.const_data_ptr());
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  const int64_t stride = workspace.size(1), sums = layer.columns * TOKENS;
  const int64_t lanes = lanes_for(tokens, blocks);
  const auto count = [&](int64_t b) { return std::min(TOKENS, tokens - b * TOKENS); };
  const auto block = [&](int64_t b) {
    return Block{b * TOKENS, count(b), inputs + b * stride, inputs + b * stride + sums};
  };
  at::parallel_for(0, blocks, GRAIN / (layer.columns * TOKENS) + 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      transpose(given, layer, b * TOKENS, count(b), lanes, inputs + b * stride, inputs + b * stride + sums);
  });
  const bool wide = layer.half == 2 * LANES;
  const int64_t units = (out_features + layer.half - 1) / layer.half;
  at::parallel_for(0, units, GRAIN / (layer.columns * layer.half * tokens) + 1, [&](int64_t first, int64_t last) {
    std::vector<float> weights(blocks < MANY_BLOCKS ? 0 : layer.columns * layer.half);
    for (int64_t unit = first; unit < last; ++unit) {
      const bool high = unit % 2;
      if (blocks < MANY_BLOCKS) {
        const auto run = wide ? (high ? multiply<2, true> : multiply<2, false>)
                              : (high ? multiply<1, true> : multiply<1, false>);
        for (int64_t b = 0; b < blocks; ++b) run(layer, block(b), lanes, unit, out);
      } else {
        const auto fill = wide ? (high ? decode<2, true> : decode<2, false>)
                               : (high ? decode<1, true> : decode<1, false>);
        const auto run = wide ? multiply_decoded<TOKENS, 2> : multiply_decoded<TOKENS, 1>;
        fill(layer, unit, weights.data());
        for (int64_t b = 0; b < blocks; ++b) run(layer, block(b), unit, weights.data(), out);
      }
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(requant, library) {
  library.def(
      "cpu_int4_linear(Tensor x, Tensor[] weights, Tensor? bias, int out_features, int group, int panel) -> Tensor");
}

TORCH_LIBRARY_IMPL(requant, CPU, library) { library.impl("cpu_int4_linear", cpu_int4_linear); }
