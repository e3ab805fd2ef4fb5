// The packed 4-bit layer of cpu_int4.py as one operator that torch.compile sees and that runs without Python: dense and
// sparse part, bias and rounding in one pass over the weights, whatever the number of tokens.
//
// Weights are read where torch packed them (int4_panels.py): panels of P rows, byte [k, i] of a panel holding row i in its
// low and row P/2 + i in its high half. Tokens lie beside each other, a block of them at a time.
// Few tokens multiply the codes of half a panel, decoded 16 at a time straight into a vector, and apply steps once a group:
//   y = sum_g s_g (sum_k code_k x_k) + (z_g - 8 s_g) (sum_k x_k)
// For many tokens each panel is decoded once. All sums are fp32 and rounded once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int STRIP = 4;         // vectors of rows that many tokens multiply at once: 6 x 4 sums of 32 registers
constexpr int64_t TOKENS = 8;    // few, at once: with two vectors of rows their sums fill half of 32 registers
constexpr int64_t SLICE = 1024;  // columns decoded at once, a multiple of every group: they stay in the second-level cache
#else
constexpr int LANES = 8;
constexpr int STRIP = 2;        // 6 x 2 sums of 16 registers
constexpr int64_t TOKENS = 4;   // half of 16 registers
constexpr int64_t SLICE = 256;  // 16 KiB of a strip, which stay in the first-level cache
#endif
constexpr int64_t FEW = 16;  // with more than these a panel is decoded once for all of them
constexpr int64_t TILE = 6;  // many, at once
constexpr int64_t GRAIN = 1 << 18;  // products that are not worth a second thread
constexpr float ZERO_CODE = 8.0f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

// Codes as floats. GCC 12 makes scalar code of its own __builtin_convertvector from bytes.
template <bool HIGH>
inline Floats decoded(const uint8_t* packed) {
#ifdef __AVX512F__
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const __m512i codes = HIGH ? _mm512_srli_epi32(bytes, 4) : _mm512_and_si512(bytes, _mm512_set1_epi32(15));
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(codes));
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
  const __m256i codes = HIGH ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15));
  return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(codes));
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

// What `count` tokens from `first` on have summed up of ROWS rows from `first_row` on, plus bias -> y.
template <int ROWS>
void store(float (*sums)[ROWS], const Layer& layer, int64_t first, int64_t count, int64_t first_row, uint16_t* y) {
  const int64_t rows = std::min<int64_t>(ROWS, layer.rows - first_row);
  for (int64_t m = 0; m < count; ++m) {
    uint16_t* output = y + (first + m) * layer.rows + first_row;
    if (layer.bias)
      for (int64_t i = 0; i < rows; ++i) sums[m][i] += widened(layer.bias[first_row + i]);
    for (int64_t i = 0; i < rows; ++i) output[i] = rounded(sums[m][i]);
  }
}

// Scale and zero of a vector of rows: w = code * scale + zero.
struct Step {
  Floats scale, zero;

  Step(const Layer& layer, int64_t group, int64_t row) {
    Bits pairs;
    std::memcpy(&pairs, layer.steps + group * layer.padded_rows + row, sizeof pairs);
    scale = reinterpret_cast<Floats>(pairs << 16);
    zero = reinterpret_cast<Floats>(pairs & 0xFFFF0000u) - ZERO_CODE * scale;
  }
};

// Few tokens: each weight is decoded where it is used, of HALVES of a panel from half FIRST on.
template <int T, int V, int FIRST, int HALVES>
void multiply(const Layer& layer, const Block& block, int64_t panel, uint16_t* y) {
  constexpr int HALF = V * LANES, WIDE = HALVES * V;
  const int64_t first_row = (2 * panel + FIRST) * HALF;
  const uint8_t* codes = layer.codes + panel * layer.columns * HALF;
  constexpr int CHAINS = T == 1 ? 2 : 1;  // of so few additions each would wait for the last
  Floats total[T][WIDE] = {};
  for (int64_t g = 0; g < layer.columns / layer.group; ++g) {
    Floats part[CHAINS][T][WIDE] = {};
    for (int64_t k = g * layer.group; k < (g + 1) * layer.group; k += CHAINS)
      for (int c = 0; c < CHAINS; ++c)
        for (int v = 0; v < V; ++v)
          for (int h = 0; h < HALVES; ++h) {
            const uint8_t* packed = codes + (k + c) * HALF + LANES * v;
            const Floats code = FIRST + h ? decoded<true>(packed) : decoded<false>(packed);
            for (int m = 0; m < T; ++m) part[c][m][h * V + v] += code * block.inputs[(k + c) * T + m];
          }
    for (int v = 0; v < WIDE; ++v) {
      const Step step(layer, g, first_row + LANES * v);
      for (int m = 0; m < T; ++m) {
        for (int c = 1; c < CHAINS; ++c) part[0][m][v] += part[c][m][v];
        total[m][v] += step.scale * part[0][m][v] + step.zero * block.sums[g * T + m];
      }
    }
  }
  float sums[T][WIDE * LANES];
  std::memcpy(sums, total, sizeof sums);
  for (int h = 0; layer.offsets && h < HALVES; ++h) {
    const int32_t *offsets = layer.offsets + 2 * panel + FIRST + h;
    if (offsets[0] == offsets[1]) continue;
    float sparse[HALF][T] = {};  // transposed: one vector an entry, and no branch that depends on the entries of a row
    for (int32_t e = offsets[0]; e < offsets[1]; ++e) {
      const float* input = block.inputs + layer.places[e] / HALF * T;
      float* sum = sparse[layer.places[e] % HALF];
      for (int m = 0; m < T; ++m) sum[m] += layer.values[e] * input[m];
    }
    for (int m = 0; m < T; ++m)
      for (int i = 0; i < HALF; ++i) sums[m][h * HALF + i] += sparse[i][m];
  }
  store<WIDE * LANES>(sums, layer, block.first, block.count, first_row, y);
}

template <int T, int V>
void multiply_half(const Layer& layer, const Block& block, int64_t unit, uint16_t* y) {
  (unit % 2 ? multiply<T, V, 1, 1> : multiply<T, V, 0, 1>)(layer, block, unit / 2, y);
}

// One or two tokens: unit is a panel, whose bytes are then loaded once; more: half of one, or registers would not suffice.
template <int V>
void multiply(const Layer& layer, const Block& block, int64_t lanes, int64_t unit, uint16_t* y) {
  switch (lanes) {
    case 1: return multiply<1, V, 0, 2>(layer, block, unit, y);
    case 2: return multiply<2, V, 0, 2>(layer, block, unit, y);
    case 4: return multiply_half<4, V>(layer, block, unit, y);
    default: return multiply_half<TOKENS, V>(layer, block, unit, y);
  }
}

// Many tokens: a panel is decoded once, SLICE columns at a time, which stay in a core's own cache while all tokens pass.
// 6 tokens times a strip of rows are summed up in three quarters of the registers: of all tiles this loads least for a
// multiplication.
template <int V>
struct Panel {
  static constexpr int HALF = V * LANES, ROWS = 2 * HALF;
  static constexpr int WIDE = std::min(STRIP, 2 * V), STRIPS = 2 * V / WIDE;  // vectors of a strip, strips of a panel
  static constexpr int64_t SUMS = TILE * WIDE;                               // vectors of a block and a strip

  // fp32 [STRIPS, columns, WIDE, LANES] of the columns from `first` on, with their sparse entries.
  static void decode(const Layer& layer, int64_t panel, int64_t first, int64_t columns, Floats* weights) {
    const auto place = [&](int64_t column, int64_t vector) {
      return (vector / WIDE * columns + column) * WIDE + vector % WIDE;
    };
    for (int64_t k = first; k < first + columns; k += layer.group)
      for (int v = 0; v < V; ++v) {
        const int64_t row = panel * ROWS + LANES * v, group = k / layer.group;
        const Step low(layer, group, row), high(layer, group, row + HALF);
        const uint8_t* codes = layer.codes + (panel * layer.columns + k) * HALF + LANES * v;
        Floats *lower = weights + place(k - first, v), *higher = weights + place(k - first, V + v);
        for (int64_t i = 0; i < layer.group; ++i, codes += HALF) {
          lower[i * WIDE] = decoded<false>(codes) * low.scale + low.zero;
          higher[i * WIDE] = decoded<true>(codes) * high.scale + high.zero;
        }
      }
    if (!layer.offsets) return;
    auto* numbers = reinterpret_cast<float*>(weights);
    for (int64_t unit = 2 * panel; unit < 2 * panel + 2; ++unit)
      for (int32_t e = layer.offsets[unit]; e < layer.offsets[unit + 1]; ++e) {
        const int64_t column = layer.places[e] / HALF - first, row = unit % 2 * HALF + layer.places[e] % HALF;
        if (column >= 0 && column < columns)
          numbers[place(column, row / LANES) * LANES + row % LANES] += layer.values[e];
      }
  }

  // sums [TILE, WIDE] += inputs [columns / LANES, TILE, LANES] times weights [columns, WIDE] of a strip.
  static void multiply(const float* inputs, const Floats* weights, int64_t columns, Floats* sums) {
    Floats total[TILE][WIDE];
    std::memcpy(total, sums, sizeof total);
    for (int64_t k = 0; k < columns; k += LANES, inputs += TILE * LANES)
      for (int i = 0; i < LANES; ++i, weights += WIDE)
        for (int m = 0; m < TILE; ++m)
          for (int v = 0; v < WIDE; ++v) total[m][v] += weights[v] * inputs[m * LANES + i];
    std::memcpy(sums, total, sizeof total);
  }

  // Of the tokens of `count` blocks, the first of which is `first_block`.
  static void run(const Layer& layer, int64_t panel, const float* inputs, int64_t tokens, int64_t first_block,
                  int64_t count, uint16_t* y) {
    std::vector<Floats> weights(std::min(SLICE, layer.columns) * 2 * V), sums(STRIPS * count * SUMS);
    for (int64_t k = 0; k < layer.columns; k += SLICE) {
      const int64_t columns = std::min(SLICE, layer.columns - k);
      decode(layer, panel, k, columns, weights.data());
      for (int64_t strip = 0; strip < STRIPS; ++strip)
        for (int64_t b = 0; b < count; ++b)
          multiply(inputs + ((first_block + b) * layer.columns + k) * TILE, &weights[strip * columns * WIDE], columns,
                   &sums[(strip * count + b) * SUMS]);
    }
    for (int64_t strip = 0; strip < STRIPS; ++strip)
      for (int64_t b = 0; b < count; ++b) {
        constexpr int rows = WIDE * LANES;
        const int64_t token = (first_block + b) * TILE, row = panel * ROWS + strip * rows;
        store<rows>(reinterpret_cast<float(*)[rows]>(&sums[(strip * count + b) * SUMS]), layer, token,
                    std::min(TILE, tokens - token), row, y);
      }
  }
};

// x bf16 [M, K] -> fp32 [K, lanes] of `count` tokens from `first` on; zeros fill them up.
void transpose(const uint16_t* x, const Layer& layer, int64_t first, int64_t count, int64_t lanes, float* inputs) {
  for (int64_t k = 0; k < layer.columns; ++k)
    for (int64_t m = 0; m < lanes; ++m)
      inputs[k * lanes + m] = m < count ? widened(x[(first + m) * layer.columns + k]) : 0.0f;
}

void sum_groups(const float* inputs, const Layer& layer, int64_t lanes, float* sums) {
  for (int64_t g = 0; g < layer.columns / layer.group; ++g) {
    float total[TOKENS] = {};  // of all tokens beside each other: one after the other, each addition waits for the last
    for (int64_t k = g * layer.group; k < (g + 1) * layer.group; ++k)
      for (int64_t m = 0; m < lanes; ++m) total[m] += inputs[k * lanes + m];
    std::copy_n(total, lanes, sums + g * lanes);
  }
}

void few(const Layer& layer, const uint16_t* x, int64_t tokens, uint16_t* y) {
  const int64_t blocks = (tokens + TOKENS - 1) / TOKENS, groups = layer.columns / layer.group;
  const int64_t lanes = tokens > 4 ? TOKENS : tokens > 2 ? 4 : tokens, stride = (layer.columns + groups) * lanes;
  const auto inputs = std::make_unique_for_overwrite<float[]>(blocks * stride);
  std::vector<Block> all;
  for (int64_t b = 0; b < blocks; ++b) {
    float *block = &inputs[b * stride], *sums = block + layer.columns * lanes;
    all.push_back({b * TOKENS, std::min(TOKENS, tokens - b * TOKENS), block, sums});
    transpose(x, layer, all[b].first, all[b].count, lanes, block);
    sum_groups(block, layer, lanes, sums);
  }
  const int64_t vectors = layer.half / LANES, rows = lanes > 2 ? layer.half : 2 * layer.half;
  const auto run = vectors == 1 ? multiply<1> : vectors == 2 ? multiply<2> : multiply<4>;
  const int64_t units = (layer.rows + rows - 1) / rows;
  at::parallel_for(0, units, GRAIN / (layer.columns * rows * tokens) + 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit)
      for (const Block& block : all) run(layer, block, lanes, unit, y);
  });
}

// x bf16 [M, K] -> fp32 [K / LANES, TILE, LANES] of `count` tokens from `first` on; zeros fill them up.
void widen(const uint16_t* x, const Layer& layer, int64_t first, int64_t count, float* inputs) {
  for (int64_t m = 0; m < TILE; ++m)
    for (int64_t k = 0; k < layer.columns; k += LANES)
      for (int i = 0; i < LANES; ++i)
        inputs[k * TILE + m * LANES + i] = m < count ? widened(x[(first + m) * layer.columns + k + i]) : 0.0f;
}

void many(const Layer& layer, const uint16_t* x, int64_t tokens, uint16_t* y) {
  const int64_t blocks = (tokens + TILE - 1) / TILE, stride = layer.columns * TILE;
  const auto inputs = std::make_unique_for_overwrite<float[]>(blocks * stride);
  at::parallel_for(0, blocks, GRAIN / stride + 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      widen(x, layer, b * TILE, std::min(TILE, tokens - b * TILE), &inputs[b * stride]);
  });
  const int64_t vectors = layer.half / LANES;
  const auto run = vectors == 1 ? Panel<1>::run : vectors == 2 ? Panel<2>::run : Panel<4>::run;
  const int64_t panels = (layer.rows + 2 * layer.half - 1) / (2 * layer.half);
  const int64_t work = layer.columns * 2 * layer.half * TILE;  // of one panel and one block: there may be few panels
  at::parallel_for(0, panels * blocks, GRAIN / work + 1, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t block = first % blocks, count = std::min(blocks - block, last - first);
      run(layer, first / blocks, inputs.get(), tokens, block, count, y);
      first += count;
    }
  });
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

  (flat.size(0) > FEW ? many : few)(layer, static_cast<const uint16_t*>(flat.const_data_ptr()), flat.size(0),
                                    static_cast<uint16_t*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(requant, library) {
  library.def(
      "cpu_int4_linear(Tensor x, Tensor[] weights, Tensor? bias, int out_features, int group, int panel) -> Tensor");
}

TORCH_LIBRARY_IMPL(requant, CPU, library) { library.impl("cpu_int4_linear", cpu_int4_linear); }
