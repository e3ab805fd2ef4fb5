// The W8A8 layer of reference.py on a CPU, in one pass and without Python: rounding of the input, product, steps and bias.
//
// What depends on the processor is a Machine, one for each cpu_int8_*.cpp:
//   Code         what a rounded input is stored as
//   PANEL, BLOCK rows and columns of weights that lie beside each other: [ceil(N/PANEL), ceil(K/BLOCK), PANEL, BLOCK]
//   TOKENS       that it multiplies at once
//   round        x [K] -> codes [BLOCK ceil(K/BLOCK)], filled up with zeros
//   multiply<T>  T tokens times one panel, with steps and bias -> y

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace requant {

using at::Tensor;

constexpr int64_t BLOCKS_OF_TOKENS = 16;  // of one unit of work
constexpr int64_t GRAIN = 1 << 20;        // products that are not worth a second thread

struct Layer {
  int64_t rows, columns, blocks;
  bool dynamic, symmetric;
  const void* weight;
  const float* scale;
  const int32_t* sums;  // of the codes of each row
  float input_scale = 0;
  int32_t input_zero = 0;
};

// Of a token: its step and zero point, and what has to come off its sums where weights are stored with an offset.
struct Rounded {
  float scale;
  int32_t zero, offset;
};

// The step and zero point of a token whose values lie in [lowest, highest], which includes zero.
inline Rounded step_of(float lowest, float highest, const Layer& layer) {
  if (layer.symmetric) return {std::max(highest, -lowest) / 127.0f, 0, 0};
  const float scale = (highest - lowest) / 255.0f;
  const float from = scale > 0 && std::isfinite(scale) ? std::nearbyint(lowest * (1.0f / scale)) : 0.0f;
  return {scale, -128 - static_cast<int32_t>(from), 0};
}

// machine.multiply<count>(rest...), for a count from 1 to Machine::TOKENS.
template <class Machine, int T = 1, class... Rest>
void multiply(int64_t count, const Rest&... rest) {
  if constexpr (T < Machine::TOKENS)
    if (count > T) return multiply<Machine, T + 1>(count, rest...);
  Machine::template multiply<T>(rest...);
}

template <class Machine, class Scalar>
void run(const Layer& layer, int64_t tokens, const Scalar* x, const Scalar* bias, Scalar* y) {
  using Code = typename Machine::Code;
  constexpr int64_t chunk = BLOCKS_OF_TOKENS * Machine::TOKENS;
  const int64_t stride = Machine::BLOCK * layer.blocks;
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(Code)) + static_cast<int64_t>(sizeof(Rounded));
  const Tensor workspace = at::empty({tokens, bytes}, at::kChar);
  auto* rounded = reinterpret_cast<Rounded*>(workspace.mutable_data_ptr());  // first, because memory is aligned there
  auto* codes = reinterpret_cast<Code*>(rounded + tokens);
  at::parallel_for(0, tokens, GRAIN / 16 / layer.columns + 1, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m)
      rounded[m] = Machine::round(x + m * layer.columns, layer, codes + m * stride);
  });
  const int64_t panels = (layer.rows + Machine::PANEL - 1) / Machine::PANEL, chunks = (tokens + chunk - 1) / chunk;
  const int64_t products = layer.columns * Machine::PANEL * std::min(tokens, chunk);
  at::parallel_for(0, panels * chunks, GRAIN / products + 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t panel = unit / chunks, start = unit % chunks * chunk, count = std::min(chunk, tokens - start);
      const int64_t parts = (count + Machine::TOKENS - 1) / Machine::TOKENS;
      for (int64_t part = 0; part < parts; ++part) {  // of equal size: 8 tokens are twice 4
        const int64_t m = start + count * part / parts, next = start + count * (part + 1) / parts;
        multiply<Machine>(next - m, layer, panel, codes + m * stride, rounded + m, bias, y + m * layer.rows);
      }
    }
  });
}

template <class Machine>
Tensor linear(const Tensor& x, at::TensorList weights, const std::optional<Tensor>& bias, int64_t out_features,
              bool dynamic, bool symmetric) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  const Tensor y = at::empty(shape, x.options());
  if (!x.numel()) return y;
  const Tensor flat = x.contiguous();
  const int64_t columns = x.size(-1);
  Layer layer{out_features, columns, (columns + Machine::BLOCK - 1) / Machine::BLOCK, dynamic, symmetric,
              weights[0].const_data_ptr(), weights[1].const_data_ptr<float>(), weights[2].const_data_ptr<int32_t>()};
  if (!dynamic) layer.input_scale = *weights[3].const_data_ptr<float>();
  if (!dynamic && !symmetric) layer.input_zero = *weights[4].const_data_ptr<int32_t>();
  const Tensor added = bias ? bias->to(x.scalar_type()).contiguous() : Tensor();
  const auto call = [&]<class Scalar>(Scalar*) {
    run<Machine>(layer, x.numel() / columns, flat.const_data_ptr<Scalar>(),
                 bias ? added.const_data_ptr<Scalar>() : nullptr, y.mutable_data_ptr<Scalar>());
  };
  switch (x.scalar_type()) {
    case at::kFloat: call(static_cast<float*>(nullptr)); break;
    case at::kBFloat16: call(static_cast<at::BFloat16*>(nullptr)); break;
    case at::kHalf: call(static_cast<at::Half*>(nullptr)); break;
    default: TORCH_CHECK(false, "W8A8: x is ", x.scalar_type(), ", not float32, bfloat16 or float16");
  }
  return y;
}

}  // namespace requant

// Registers requant::NAME, as native.load_linear expects it.
#define REQUANT_W8A8_LINEAR(NAME, MACHINE)                                                                             \
  TORCH_LIBRARY_FRAGMENT(requant, library) {                                                                           \
    library.def(#NAME "(Tensor x, Tensor[] weights, Tensor? bias, int out_features, bool dynamic, bool symmetric) -> " \
                      "Tensor");                                                                                       \
  }                                                                                                                    \
  TORCH_LIBRARY_IMPL(requant, CPU, library) { library.impl(#NAME, requant::linear<MACHINE>); }
