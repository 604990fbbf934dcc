// Writes rows into an array in place, for XLA, which would widen and copy a whole array of 16-bit numbers.

#include <cstring>

#include "frame.h"

namespace phi3_jax {
namespace {

// Returns an int32, but at least 0 and at most `last`.
int64_t number_at(const XLA_FFI_Buffer& numbers, int64_t index, int64_t last) {
  int32_t number;
  std::memcpy(&number, bytes_of(numbers) + 4 * index, 4);
  return number < 0 ? 0 : number > last ? last : number;
}

}  // namespace
}  // namespace phi3_jax

// The handler of XLA: an array [batch, heads, slots, ...], new vectors [count, heads, length, ...], and the row and the
// first slot [count] of each; the result is the first argument. As in XLA's update, what would lie outside is moved in.
HANDLER phi3_jax_write(XLA_FFI_CallFrame* frame) {
  using namespace phi3_jax;
  if (answered_version(frame)) return nullptr;
  if (frame->args.size != 4 || frame->rets.size != 1) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "phi3_jax_write takes 4 arguments");
  }
  const XLA_FFI_Buffer &whole = argument(frame, 0), &added = argument(frame, 1);
  const int64_t batch = whole.dims[0], heads = whole.dims[1], slots = whole.dims[2], length = added.dims[2];
  int64_t bytes = whole.dtype == XLA_FFI_DataType_S8 ? 1 : 2;
  for (int64_t axis = 3; axis < whole.rank; axis++) bytes *= whole.dims[axis];
  uint8_t* const out = result(frame, 0);
  if (out != bytes_of(whole)) std::memcpy(out, bytes_of(whole), batch * heads * slots * bytes);
  for (int64_t index = 0; index < added.dims[0]; index++) {
    const int64_t row = number_at(argument(frame, 2), index, batch - 1);
    const int64_t first = number_at(argument(frame, 3), index, slots - length);
    for (int64_t head = 0; head < heads; head++) {
      std::memcpy(out + ((row * heads + head) * slots + first) * bytes,
                  bytes_of(added) + (index * heads + head) * length * bytes, length * bytes);
    }
  }
  return nullptr;
}
