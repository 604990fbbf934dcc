// Computes the product for XLA, and divides it over XLA's threads.

#include "frame.h"
#include "product.h"
#include "threads.h"

namespace phi3_jax {
namespace {

constexpr int64_t kLeastBytes = 128 << 10;  // of a weight, read by few rows, for which a second thread pays
constexpr int64_t kLeastChunk = 32 << 10, kMostChunk = 512 << 10;
constexpr int64_t kChunksPerThread = 8;
constexpr int64_t kMostRows = 40 * kRows;  // of a job, so that its copy of x is small

// First, rows of x are copied; then outputs are computed.
struct ProductWork {
  Operands operands;
  const Variant* variant;
  uint8_t *memory, *scratch;  // the copy, and after it the memory of each thread
  size_t thread_bytes;
  int64_t copies;         // parts of the rows to copy
  int64_t chunk, chunks;  // outputs of a chunk

  int64_t parts(int phase) const { return phase == 0 ? copies : chunks; }

  void run(int phase, int64_t part, int64_t thread) {
    if (phase == 0) {
      const int64_t rows = copies == 1 ? operands.rows : kRows;
      const int64_t first = part * rows, last = first + rows;
      variant->copy(operands, memory, first, last < operands.rows ? last : operands.rows);
    } else {
      const int64_t first = part * chunk, last = first + chunk;
      uint8_t* own = scratch + thread_bytes * thread;
      variant->multiply(operands, memory, own, first, last < operands.out ? last : operands.out);
    }
  }
};

// Returns how many outputs a thread computes at a time.
int64_t choose_chunk(const Operands& operands, int64_t threads, int64_t output_bytes) {
  if (threads == 1 && operands.rows <= kFewRows) return operands.out;
  const int64_t bytes = operands.out * output_bytes / (threads * kChunksPerThread);
  return (bytes < kLeastChunk ? kLeastChunk : bytes > kMostChunk ? kMostChunk : bytes) / output_bytes;
}

// Computes the product of at most `kMostRows` rows.
bool run_part(const Operands& operands, const Variant* variant, int64_t chunk, const XLA_FFI_CallFrame* frame) {
  ProductWork work = {operands, variant};
  const int64_t read_bytes = operands.out * operands.row_bytes() * (operands.rows > 8 ? operands.rows / 8 : 1);
  const int64_t threads = read_bytes >= kLeastBytes ? thread_count(frame) : 1;
  const int64_t row_bytes = operands.row_bytes() ? operands.row_bytes() : 1;
  const int64_t scratch_bytes = (int64_t)variant->scratch_bytes(operands);
  if (!chunk) chunk = choose_chunk(operands, threads, scratch_bytes > row_bytes ? scratch_bytes : row_bytes);
  work.chunk = chunk < kOutputs ? kOutputs : (chunk + kOutputs - 1) / kOutputs * kOutputs;
  work.chunks = (operands.out + work.chunk - 1) / work.chunk;
  work.copies = threads == 1 || operands.rows <= kFewRows ? 1 : (operands.rows + kRows - 1) / kRows;
  const size_t copy_bytes = rounded(variant->copy_bytes(operands) + 1);
  work.thread_bytes = rounded(work.chunk * scratch_bytes);
  work.memory = static_cast<uint8_t*>(std::aligned_alloc(64, copy_bytes + threads * work.thread_bytes));
  work.scratch = work.memory + copy_bytes;
  return work.memory && share(work, threads, frame);
}

// Computes a product; `frame` gives the threads, or is null: only this one. Returns false if memory is full.
bool run_product(const Operands& operands, const Variant* variant, int64_t chunk, const XLA_FFI_CallFrame* frame) {
  for (int64_t row = 0; row < operands.rows; row += kMostRows) {
    Operands part = operands;
    part.scales_first = operands.groups > 1 && operands.rows > kFewRows;
    part.rows = operands.rows - row < kMostRows ? operands.rows - row : kMostRows;
    part.x += row * operands.in * (operands.x_is_bfloat16 ? 2 : 4);
    part.y += 4 * row * operands.out;
    if (!run_part(part, variant, chunk, frame)) return false;
  }
  return true;
}

}  // namespace
}  // namespace phi3_jax

// The handler of XLA: arguments x, weight and, unless it is bfloat16, scale and perhaps zero, as in `product.py`,
// which checks them.
HANDLER phi3_jax_product(XLA_FFI_CallFrame* frame) {
  using namespace phi3_jax;
  if (answered_version(frame)) return nullptr;
  if (frame->args.size < 2 || frame->args.size > 4 || frame->rets.size != 1) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "phi3_jax_product takes 2 to 4 arguments");
  }
  const XLA_FFI_Buffer &x = argument(frame, 0), &weight = argument(frame, 1);
  Operands operands = {};
  operands.form = frame->args.size == 2                    ? Form::kBfloat16
                  : weight.dtype == XLA_FFI_DataType_S8 ? Form::kInt8
                                                           : Form::kInt4;
  operands.x_is_bfloat16 = x.dtype == XLA_FFI_DataType_BF16;
  operands.rows = x.dims[0];
  operands.in = x.dims[1];
  operands.out = weight.dims[0];
  operands.groups = 1;
  operands.x = bytes_of(x);
  operands.weight = bytes_of(weight);
  if (frame->args.size > 2) {
    operands.groups = argument(frame, 2).dims[1];
    operands.scale = bytes_of(argument(frame, 2));
  }
  if (frame->args.size > 3) operands.zero = bytes_of(argument(frame, 3));
  operands.y = result(frame, 0);
  if (run_product(operands, choose_variant(operands), 0, frame)) return nullptr;
  return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "phi3_jax_product: memory is full");
}

// The same on this thread alone, by a variant and in chunks of a number of outputs, for tests. Returns false if the
// variant does not run here.
extern "C" __attribute__((visibility("default"))) bool phi3_jax_product_by(
    const char* name, int form, bool x_is_bfloat16, int64_t rows, int64_t in, int64_t out, int64_t groups,
    int64_t chunk, const uint8_t* x, const uint8_t* weight, const uint8_t* scale, const uint8_t* zero, uint8_t* y) {
  using namespace phi3_jax;
  const Operands operands = {static_cast<Form>(form), x_is_bfloat16, rows, in, out, groups, x, weight, scale, zero, y};
  const Variant* variant = choose_variant(operands, name);
  return variant && run_product(operands, variant, chunk, nullptr);
}

// Returns the name of the variant for bfloat16.
extern "C" __attribute__((visibility("default"))) const char* phi3_jax_variant() {
  phi3_jax::Operands operands = {};
  operands.x_is_bfloat16 = true;
  return phi3_jax::choose_variant(operands)->name;
}
