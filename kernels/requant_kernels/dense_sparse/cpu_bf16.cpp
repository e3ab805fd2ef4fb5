// The layer of cpu_bf16.py in one operator that torch.compile sees and that runs without Python, on processors that
// multiply bfloat16: one instruction multiplies 16 pairs of weights by a pair of inputs and adds both products to fp32.
//
// A strip is 16 rows, a lane each; a lane holds two columns, each in 16 bits. A word of codes has columns k + 2 j + h in
// half h from bit j * BITS on; a table of 32 numbers looked up by the low 5 bits of each half then makes bfloat16 of the
// codes, whatever stands above them. Three words of five codes each, of 3 bits, have a sixteenth in their highest bits.
//
// Few tokens multiply codes, which bfloat16 holds exactly, and apply steps once a group; x is read where it lies:
//   y = sum_g s_g (sum_k c_k x_k - z_g sum_k x_k)
// For many tokens a panel of strips is decoded once, with its sparse entries, to bfloat16.

#ifndef __AVX512BF16__
#error needs a processor with AVX-512 BF16
#endif

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;

constexpr int LANES = 16, STRIPS = 4, ROWS = STRIPS * LANES;  // of a strip, of a panel
constexpr int64_t AT_ONCE = 16;     // tokens whose sums fill half of 32 registers
constexpr int64_t FEW = 32;         // with more than these a panel is decoded once for all of them
constexpr int64_t TILE = 64;        // of many tokens, at most at once
constexpr int64_t TILE_STEP = 4;    // products of few shapes: each is compiled when it comes first, in 50 us
constexpr int64_t SLICE = 1024;     // columns decoded at once: 128 KiB, which stay in the second-level cache
constexpr int64_t LINE = 32;        // columns of a line of the cache
constexpr int64_t GRAIN = 1 << 18;  // products that are not worth a second thread

struct Layer {
  int64_t rows, padded_rows, columns, group;
  const uint32_t* codes;             // [strips, columns / COLUMNS, WORDS, LANES]
  const uint32_t* steps;             // [columns / group, padded rows]: the scale, and in the high half the zero, both bf16
  const int32_t* offsets = nullptr;  // of the first entry of each panel
  const uint32_t* places = nullptr;  // column * ROWS + row in its panel, ascending
  const BFloat16* values = nullptr;
  const BFloat16* bias = nullptr;
};

inline __m512 low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 high(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline __m512bh pairs(__m512i words) { return reinterpret_cast<__m512bh>(words); }

// Codes of a strip: COLUMNS of them are WORDS vectors.
template <int BITS>
struct Codes {
  static constexpr int COLUMNS = BITS == 4 ? 8 : BITS == 2 ? 16 : 32, WORDS = BITS == 3 ? 3 : 1;
  static constexpr int PAIRS = COLUMNS / 2, PER_WORD = 16 / BITS;
  static constexpr int CHOOSE = 0xCA;  // of bits: the second argument's where the first has one, else the third's
  __m512i words[WORDS];

  explicit Codes(const uint32_t* from) {
    for (int i = 0; i < WORDS; ++i) words[i] = _mm512_loadu_si512(from + i * LANES);
  }

  // Of columns 2 j and 2 j + 1, in the low bits of each half; what stands above them is of no meaning.
  template <int J>
  __m512i at() const {
    if constexpr (J < PER_WORD * WORDS) {
      return _mm512_srli_epi32(words[J / PER_WORD], J % PER_WORD * BITS);
    } else {  // of 3 bits
      const auto bit = [&](int i) { return _mm512_srli_epi16(words[i], 15 - i); };
      const __m512i two = _mm512_ternarylogic_epi32(_mm512_set1_epi16(2), bit(1), bit(0), CHOOSE);
      return _mm512_ternarylogic_epi32(_mm512_set1_epi16(4), bit(2), two, CHOOSE);
    }
  }
};

// What the table makes of a code: how far it is above half of all codes.
template <int BITS>
inline __m512i table() {
  std::array<uint16_t, 32> numbers;
  for (int i = 0; i < 32; ++i)
    numbers[i] = BFloat16(static_cast<float>(i % (1 << BITS) - (1 << (BITS - 1)))).x;
  return _mm512_loadu_si512(numbers.data());
}

template <int J, int END, class Body>
inline __attribute__((always_inline)) void unrolled(const Body& body) {
  if constexpr (J < END) {
    body.template operator()<J>();
    unrolled<J + 1, END>(body);
  }
}

inline __m512i pair_of(const BFloat16* x) {
  int32_t two;
  std::memcpy(&two, x, sizeof two);
  return _mm512_set1_epi32(two);
}

// sums [T, ROWS] of V strips from `strip` on, without sparse entries. x: T tokens, `pitch` from one to the next, totals:
// their sums over each group, [groups, T].
template <int BITS, int T, int V>
void multiply(const Layer& layer, const BFloat16* x, int64_t pitch, const float* totals, int64_t strip, float* sums) {
  using Of = Codes<BITS>;
  constexpr int CHAINS = T * V < 8 ? 2 : 1;  // of so few additions each would wait for the last
  const __m512i numbers = table<BITS>();
  const int64_t stride = layer.columns / Of::COLUMNS * Of::WORDS * LANES;
  const uint32_t* codes = layer.codes + strip * stride;
  __m512 total[T][V];
  for (int m = 0; m < T; ++m)
    for (int v = 0; v < V; ++v) total[m][v] = _mm512_setzero_ps();
  for (int64_t g = 0, k = 0; g < layer.columns / layer.group; ++g) {
    __m512 part[CHAINS][T][V];
#pragma GCC unroll 2
    for (int c = 0; c < CHAINS; ++c)
#pragma GCC unroll 16
      for (int m = 0; m < T; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) part[c][m][v] = _mm512_setzero_ps();
    for (const int64_t end = k + layer.group; k < end; k += Of::COLUMNS, codes += Of::WORDS * LANES) {
      const auto columns = [&]<int J>() __attribute__((always_inline)) {
        __m512bh weights[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          weights[v] = pairs(_mm512_permutexvar_epi16(Of(codes + v * stride).template at<J>(), numbers));
#pragma GCC unroll 16
        for (int m = 0; m < T; ++m) {
          const __m512bh input = pairs(pair_of(x + m * pitch + k + 2 * J));
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            part[J % CHAINS][m][v] = _mm512_dpbf16_ps(part[J % CHAINS][m][v], weights[v], input);
        }
      };
      unrolled<0, Of::PAIRS>(columns);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512i step = _mm512_loadu_si512(layer.steps + g * layer.padded_rows + (strip + v) * LANES);
      const __m512 scale = low(step), zero = high(step);
#pragma GCC unroll 16
      for (int m = 0; m < T; ++m) {
        __m512 sum = part[0][m][v];
        if (CHAINS == 2) sum = _mm512_add_ps(sum, part[CHAINS - 1][m][v]);
        sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(totals[g * T + m]), sum);
        total[m][v] = _mm512_fmadd_ps(scale, sum, total[m][v]);
      }
    }
  }
  for (int m = 0; m < T; ++m)
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + m * ROWS + v * LANES, total[m][v]);
}

// Sums [ROWS] of some rows of a panel, plus bias -> y of one token.
inline void store(const float* sums, const Layer& layer, int64_t first_row, BFloat16* y) {
  for (int64_t row = first_row; row < std::min(first_row + ROWS, layer.rows); row += LANES, sums += LANES) {
    const __mmask16 some = layer.rows - row < LANES ? (1u << (layer.rows - row)) - 1 : 0xFFFF;
    __m512 sum = _mm512_loadu_ps(sums);
    if (layer.bias) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, layer.bias + row));
      sum = _mm512_add_ps(sum, low(wide));
    }
    _mm256_mask_storeu_epi16(y + row, some, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  }
}

// sums [T, ROWS] plus those of the panel's sparse entries. inputs: fp32 [columns, T], tokens beside each other, so that an
// entry takes one vector of them.
template <int T>
void add_entries(const Layer& layer, int64_t panel, const float* inputs, float* sums) {
  float sparse[ROWS][T] = {};
  for (int32_t e = layer.offsets[panel]; e < layer.offsets[panel + 1]; ++e) {
    const float* input = inputs + layer.places[e] / ROWS * T;
    float* sum = sparse[layer.places[e] % ROWS];
    const float value = layer.values[e];
    for (int m = 0; m < T; ++m) sum[m] += value * input[m];
  }
  for (int m = 0; m < T; ++m)
    for (int i = 0; i < ROWS; ++i) sums[m * ROWS + i] += sparse[i][m];
}

// y of T tokens.
template <int BITS, int T>
void few(const Layer& layer, const BFloat16* x, BFloat16* y) {
  constexpr int V = T <= 4 ? 4 : T <= 8 ? 2 : 1;
  const int64_t groups = layer.columns / layer.group, panels = (layer.rows + ROWS - 1) / ROWS;
  std::vector<float> totals(groups * T);
  const auto inputs = std::make_unique_for_overwrite<float[]>(layer.offsets ? layer.columns * T : 0);
  const __m512bh ones = pairs(_mm512_set1_epi32(0x3F803F80));
  // more tokens than the first-level cache has ways must not lie a multiple of its size apart
  const int64_t pitch = T < 8 || layer.columns / LINE % 2 ? layer.columns : layer.columns + LINE;
  const auto apart = std::make_unique_for_overwrite<BFloat16[]>(pitch == layer.columns ? 0 : T * pitch);
  for (int m = 0; m < T; ++m) {
    const BFloat16* token = x + m * layer.columns;
    if (pitch != layer.columns) std::copy_n(token, layer.columns, &apart[m * pitch]);
    for (int64_t g = 0; g < groups; ++g) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = g * layer.group; k < (g + 1) * layer.group; k += 2 * LANES)
        sum = _mm512_dpbf16_ps(sum, pairs(_mm512_loadu_si512(token + k)), ones);
      totals[g * T + m] = _mm512_reduce_add_ps(sum);
    }
  }
  if (pitch != layer.columns) x = apart.get();
  for (int64_t k = 0; layer.offsets && k < layer.columns; k += LANES)
    for (int m = 0; m < T; ++m)
      for (int i = 0; i < LANES; ++i) inputs[(k + i) * T + m] = x[m * pitch + k + i];
  at::parallel_for(0, panels, GRAIN / (layer.columns * ROWS * T) + 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      float sums[T][ROWS];
      for (int v = 0; v < STRIPS; v += V)
        multiply<BITS, T, V>(layer, x, pitch, totals.data(), panel * STRIPS + v, &sums[0][v * LANES]);
      if (layer.offsets) add_entries<T>(layer, panel, inputs.get(), &sums[0][0]);
      for (int m = 0; m < T; ++m) store(sums[m], layer, panel * ROWS, y + m * layer.rows);
    }
  });
}

// bf16 [columns / 2, ROWS, 2] of a panel's columns from `first` on, with their sparse entries.
template <int BITS>
void decode(const Layer& layer, int64_t panel, int64_t first, int64_t columns, BFloat16* weights) {
  using Of = Codes<BITS>;
  const __m512i numbers = table<BITS>();
  // evens in the low half and odds in the high one -> pairs
  const __m512i order = _mm512_or_si512(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_slli_epi32(_mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
  const int64_t stride = layer.columns / Of::COLUMNS * Of::WORDS * LANES;
  const int64_t under_one_step = std::gcd(layer.group, SLICE);
  for (int64_t k = first; k < first + columns; k += under_one_step)
    for (int v = 0; v < STRIPS; ++v) {
      const int64_t strip = panel * STRIPS + v;
      const __m512i step = _mm512_loadu_si512(layer.steps + k / layer.group * layer.padded_rows + strip * LANES);
      const __m512 scale = low(step), zero = _mm512_mul_ps(high(step), scale);
      const uint32_t* codes = layer.codes + strip * stride + k / Of::COLUMNS * Of::WORDS * LANES;
      BFloat16* to = weights + (k - first) * ROWS + v * LANES * 2;
      for (int64_t i = 0; i < under_one_step; i += Of::COLUMNS, codes += Of::WORDS * LANES) {
        const Of words(codes);
        const auto columns_of = [&]<int J>() __attribute__((always_inline)) {
          const __m512i pair = _mm512_permutexvar_epi16(words.template at<J>(), numbers);
          const __m512 even = _mm512_fmsub_ps(low(pair), scale, zero), odd = _mm512_fmsub_ps(high(pair), scale, zero);
          const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
          _mm512_storeu_si512(to + (i / 2 + J) * ROWS * 2, _mm512_permutexvar_epi16(order, both));
        };
        unrolled<0, Of::PAIRS>(columns_of);
      }
    }
  if (!layer.offsets) return;
  const uint32_t *begin = layer.places + layer.offsets[panel], *end = layer.places + layer.offsets[panel + 1];
  for (const uint32_t* e = std::lower_bound(begin, end, first * ROWS); e < end; ++e) {
    const int64_t column = *e / ROWS - first, row = *e % ROWS;
    if (column >= columns) break;
    BFloat16& weight = weights[(column / 2 * ROWS + row) * 2 + column % 2];
    weight = static_cast<float>(weight) + static_cast<float>(layer.values[e - layer.places]);
  }
}

template <int BITS>
void many(const Layer& layer, const BFloat16* x, int64_t tokens, BFloat16* y) {
  const int64_t tiles = (tokens + TILE - 1) / TILE;
  const int64_t tile_tokens = std::min(tokens, ((tokens + tiles - 1) / tiles + TILE_STEP - 1) / TILE_STEP * TILE_STEP);
  const int64_t panels = (layer.rows + ROWS - 1) / ROWS;
  const int64_t slice = std::min(layer.columns, SLICE);
  at::parallel_for(0, panels * tiles, GRAIN / (layer.columns * ROWS * tile_tokens) + 1, [&](int64_t first, int64_t last) {
    const auto weights = std::make_unique_for_overwrite<BFloat16[]>(slice * ROWS);
    std::vector<float> sums;
    while (first < last) {
      const int64_t panel = first / tiles, begin = first % tiles, count = std::min(tiles - begin, last - first);
      sums.assign(count * tile_tokens * ROWS, 0.0f);
      // the last tile begins where it is whole: what it has in common with the one before is computed twice
      const auto token = [&](int64_t tile) { return std::min(tile * tile_tokens, tokens - tile_tokens); };
      for (int64_t k = 0; k < layer.columns; k += slice) {
        const int64_t columns = std::min(slice, layer.columns - k);
        decode<BITS>(layer, panel, k, columns, weights.get());
        for (int64_t t = 0; t < count; ++t)
          at::native::cpublas::brgemm(tile_tokens, ROWS, columns, layer.columns, ROWS, ROWS, true,
                                      x + token(begin + t) * layer.columns + k, weights.get(),
                                      &sums[t * tile_tokens * ROWS]);
      }
      for (int64_t t = 0; t < count; ++t)
        for (int64_t m = 0; m < tile_tokens; ++m)
          store(&sums[(t * tile_tokens + m) * ROWS], layer, panel * ROWS, y + (token(begin + t) + m) * layer.rows);
      first += count;
    }
    at::native::cpublas::brgemm_release();
  });
}

template <int BITS, size_t... LESS>
void choose(const Layer& layer, const BFloat16* x, int64_t tokens, BFloat16* y, std::index_sequence<LESS...> less) {
  constexpr void (*multiply[])(const Layer&, const BFloat16*, BFloat16*) = {few<BITS, LESS + 1>...};
  if (tokens <= AT_ONCE) return multiply[tokens - 1](layer, x, y);
  if (tokens > FEW) return many<BITS>(layer, x, tokens, y);
  const int64_t half = tokens / 2;
  choose<BITS>(layer, x, half, y, less);
  choose<BITS>(layer, x + half * layer.columns, tokens - half, y + half * layer.rows, less);
}

template <int BITS>
void run(const Layer& layer, const BFloat16* x, int64_t tokens, BFloat16* y) {
  choose<BITS>(layer, x, tokens, y, std::make_index_sequence<AT_ONCE>());
}

Tensor cpu_bf16_linear(const Tensor& x, at::TensorList weights, const std::optional<Tensor>& bias, int64_t out_features,
                       int64_t bits, int64_t group) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "cpu_bf16_linear: x is ", x.scalar_type(), ", not bfloat16");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  const Tensor y = at::empty(shape, x.options());
  if (!x.numel()) return y;
  const Tensor flat = x.reshape({-1, x.size(-1)}).contiguous();
  Layer layer{out_features, weights[1].size(1), flat.size(1), group,
              static_cast<const uint32_t*>(weights[0].const_data_ptr()),
              static_cast<const uint32_t*>(weights[1].const_data_ptr())};
  if (weights.size() > 2) {
    layer.offsets = weights[2].const_data_ptr<int32_t>();
    layer.places = static_cast<const uint32_t*>(weights[3].const_data_ptr());
    layer.values = weights[4].const_data_ptr<BFloat16>();
  }
  const Tensor added = bias ? bias->to(x.scalar_type()).contiguous() : Tensor();
  if (bias) layer.bias = added.const_data_ptr<BFloat16>();
  const auto multiply = bits == 2 ? run<2> : bits == 3 ? run<3> : run<4>;
  multiply(layer, flat.const_data_ptr<BFloat16>(), flat.size(0), y.mutable_data_ptr<BFloat16>());
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(requant, library) {
  library.def(
      "cpu_bf16_linear(Tensor x, Tensor[] weights, Tensor? bias, int out_features, int bits, int group) -> Tensor");
}

TORCH_LIBRARY_IMPL(requant, CPU, library) { library.impl("cpu_bf16_linear", cpu_bf16_linear); }
