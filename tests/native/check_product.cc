// Runs every variant of the product on odd shapes, and compares with a plain sum. `.ci/run kernels` compiles it with
// sanitizers.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "arrays.h"
#include "product.h"

using phi3_jax::Form;

namespace {

int checks = 0;  // by the variant that is asked for

// Returns whether a random product of these sizes is right, if the variant runs here.
bool check(const char* name, Form form, bool x_is_bfloat16, int64_t rows, int64_t in, int64_t out, int64_t groups,
           bool has_zero) {
  Array x(rows * in * (x_is_bfloat16 ? 2 : 4)), weight(out * in * 4 / phi3_jax::weights_per_word(form));
  Array scale(4 * out * groups), zero(4 * out * groups), y(4 * rows * out);
  for (int64_t i = 0; i < rows * in; i++) {
    x_is_bfloat16 ? x.set_bfloat16(i, draw_float()) : x.set(i, draw_float());
  }
  for (int64_t i = 0; i < out * in * 4 / phi3_jax::weights_per_word(form); i++) weight.bytes()[i] = (uint8_t)draw(256);
  if (form == Form::kBfloat16) {
    for (int64_t i = 0; i < out * in; i++) weight.set_bfloat16(i, draw_float());
  }
  for (int64_t i = 0; i < out * groups; i++) {
    scale.set(i, draw_float());
    zero.set(i, 8 * draw_float());
  }
  const bool packed = form != Form::kBfloat16;
  const phi3_jax::Operands operands = {form,
                                       x_is_bfloat16,
                                       rows,
                                       in,
                                       out,
                                       groups,
                                       x.bytes(),
                                       weight.bytes(),
                                       packed ? scale.bytes() : nullptr,
                                       has_zero ? zero.bytes() : nullptr,
                                       y.bytes(),
                                       groups > 1 && (rows > phi3_jax::kFewRows || draw(2))};
  const phi3_jax::Variant* variant = phi3_jax::choose_variant(operands, name);
  if (!variant) return true;
  checks += !std::strcmp(variant->name, name);
  const size_t bytes = variant->copy_bytes(operands);
  void* copy = std::aligned_alloc(64, bytes / 64 * 64 + 64);
  const int64_t first_rows = draw((uint32_t)rows + 1) / phi3_jax::kRows * phi3_jax::kRows;
  variant->copy(operands, copy, first_rows, rows);
  variant->copy(operands, copy, 0, first_rows);
  const int64_t middle = draw((uint32_t)out + 1) / phi3_jax::kOutputs * phi3_jax::kOutputs;
  const int64_t most = middle > out - middle ? middle : out - middle;
  const int64_t scratch_outputs = (most + phi3_jax::kOutputs - 1) / phi3_jax::kOutputs * phi3_jax::kOutputs;
  const size_t scratch_bytes = scratch_outputs * variant->scratch_bytes(operands);
  uint8_t* scratch = (uint8_t*)std::aligned_alloc(64, scratch_bytes / 64 * 64 + 64);
  variant->multiply(operands, copy, scratch, middle, out);
  variant->multiply(operands, copy, scratch, 0, middle);
  std::free(scratch);
  std::free(copy);

  for (int64_t row = 0; row < rows; row++) {
    for (int64_t output = 0; output < out; output++) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < in; i++) {
        const int64_t at = output * in + i, group = output * groups + i / (in / groups);
        double value = 0;
        if (form == Form::kBfloat16) value = weight.bfloat16_at(at);
        if (form == Form::kInt8) value = (double)(int8_t)weight.bytes()[at] * scale.at(group);
        if (form == Form::kInt4) {
          const int number = weight.bytes()[at / 2] >> (at % 2 ? 4 : 0) & 15;
          value = (number - 8 - (has_zero ? (double)zero.at(group) : 0.0)) * scale.at(group);
        }
        const double term = value * (x_is_bfloat16 ? x.bfloat16_at(row * in + i) : x.at(row * in + i));
        sum += term;
        magnitude += std::fabs(term);
      }
      const double error = std::fabs(y.at(row * out + output) - sum);
      const bool is_rounded = operands.scales_first && variant->bfloat16_only;
      if (!(error <= (is_rounded ? 4e-3 : 1e-5) * magnitude + 1e-5)) {
        std::printf("%s, form %d, x %s, %lld x %lld x %lld, %lld groups: [%lld, %lld] is %g instead of %g\n", name,
                    (int)form, x_is_bfloat16 ? "bfloat16" : "float32", (long long)rows, (long long)in, (long long)out,
                    (long long)groups, (long long)row, (long long)output, y.at(row * out + output), sum);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  int failures = 0;
  for (const char* name : {"portable", "avx2", "avx512", "avx512bf16", "neon", "neonbf16"}) {
    const int before = checks;
    for (const Form form : {Form::kBfloat16, Form::kInt8, Form::kInt4}) {
      for (int turn = 0; turn < 400; turn++) {
        const int64_t sizes[] = {0, 1, 4, 8, 12, 32, 64, 96, 128, 256};  // of a group; 0: one group
        const int64_t group = form == Form::kBfloat16 ? 0 : sizes[draw(10)];
        int64_t in = group ? group * (1 + draw(700 / (uint32_t)group + 1)) : turn < 80 ? turn : 1 + draw(700);
        if (form == Form::kInt4) in += in % 2 * (group ? group : 1);
        if (in == 0) in = 2;
        const int64_t groups = group ? in / group : 1;
        const int64_t rows = 1 + draw(draw(3) ? 9 : 40);
        failures += !check(name, form, draw(2), rows, in, 1 + draw(21), groups, form == Form::kInt4 && draw(2));
      }
    }
    if (checks > before) std::printf("%s: %d products\n", name, checks - before);
  }
  std::printf("%d wrong\n", failures);
  return failures > 0;
}
