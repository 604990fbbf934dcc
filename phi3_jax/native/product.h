// The product with a packed weight: y = x @ weight.T, with sums in float32.

#pragma once

#include <cstddef>
#include <cstdint>

namespace phi3_jax {

enum class Form { kBfloat16, kInt8, kInt4 };

// How many weights a 32-bit word holds.
constexpr int weights_per_word(Form form) { return form == Form::kBfloat16 ? 2 : form == Form::kInt8 ? 4 : 8; }

// With more rows, the weights of a chunk of outputs are unpacked once for all of them, and those in groups multiplied
// by their scales: for each row it would take as long as the product.
constexpr int64_t kFewRows = 16;

// The arrays of a product. Their addresses need no alignment.
struct Operands {
  Form form;
  bool x_is_bfloat16;
  int64_t rows, in, out;
  int64_t groups;         // of inputs with one scale, in a row of the weight; they divide `in`
  const uint8_t* x;       // [rows, in], bfloat16 or float32
  const uint8_t* weight;  // [out, in] bfloat16 or int8, or [out, in / 2] with two int4, as number + 8, in a byte
  const uint8_t* scale;   // float32 [out, groups]; null for bfloat16
  const uint8_t* zero;    // float32 [out, groups], or null: 0; int4 only
  uint8_t* y;             // float32 [rows, out]
  // Whether the weights are multiplied by their scales, and rounded to the dtype of the product. It must be so for more
  // than a few rows and several groups, and may be for few, if they are part of many.
  bool scales_first;

  bool are_few() const { return rows <= kFewRows && !scales_first; }
  int64_t row_bytes() const { return in * 4 / weights_per_word(form); }  // of the weight
};

// The kernels for one set of instructions. The results depend neither on the limits of `multiply` nor on the number
// of rows, but only on `scales_first`: each element of y is one sum, always in the same order.
struct Variant {
  const char* name;
  bool (*runs_here)();
  bool bfloat16_only;  // of x
  // The bytes of a copy of x in the order in which `multiply` reads it, and the function that copies the rows `first`
  // up to `last`, without `last`; both limits are multiples of `kRows`, or the last row.
  size_t (*copy_bytes)(const Operands&);
  void (*copy)(const Operands&, void*, int64_t first, int64_t last);
  // The bytes that `multiply` needs for each output that it computes, a multiple of `kOutputs`, from a multiple of 64.
  size_t (*scratch_bytes)(const Operands&);
  // Computes the outputs `first` up to `last`, without `last`.
  void (*multiply)(const Operands&, const void* copy, uint8_t* scratch, int64_t first, int64_t last);
};

// Outputs that are computed together; limits for `multiply` should be multiples of it.
constexpr int64_t kOutputs = 4;

// A multiple of every number of rows that are computed together.
constexpr int64_t kRows = 24;

// Returns the fastest variant that this machine runs, or the one called `name`; null if it does not run here.
const Variant* choose_variant(const Operands& operands, const char* name = nullptr);

}  // namespace phi3_jax
