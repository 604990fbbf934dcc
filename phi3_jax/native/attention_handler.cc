// Computes attention for XLA, and divides it over XLA's threads.

#include <cmath>
#include <cstring>

#include "attention.h"
#include "frame.h"
#include "threads.h"

namespace phi3_jax {
namespace {

constexpr int64_t kLeastBytes = 256 << 10;  // of keys and values, for which a second thread pays
constexpr int64_t kFewParts = 16;           // fewer are divided further
constexpr int64_t kChunk = 8 * kKeyBlock;   // keys of a part, if there are few

float* advance(float** at, int64_t count) {
  float* taken = *at;
  *at += (count + 15) / 16 * 16;
  return taken;
}

int64_t floats_of_sums(int64_t rows, int64_t width) {
  return (rows * width + 15) / 16 * 16 + 2 * ((rows + 15) / 16 * 16);
}

Sums sums_at(float* at, int64_t rows, int64_t width) {
  Sums sums;
  sums.out = advance(&at, rows * width);
  sums.maximum = advance(&at, rows);
  sums.total = advance(&at, rows);
  return sums;
}

// Some queries of one key head each; the first phase may divide their keys, and the second then adds the sums.
struct AttentionWork {
  Attention attention;
  const AttentionVariant* variant;
  uint8_t* memory;  // of each thread, then the sums
  size_t thread_bytes;
  float* sums;
  int64_t queries, blocks;  // queries of a part, and how many such parts a head has
  int64_t chunk, chunks;    // keys of a part, likewise
  int64_t sums_floats;      // of a part

  int64_t parts(int phase) const {
    if (phase == 0) return attention.heads() * blocks * chunks;
    return chunks > 1 ? attention.heads() * blocks : 0;
  }

  void run(int phase, int64_t part, int64_t thread) {
    if (phase == 1) return combine(part);
    const int64_t item = part / chunks, from = part % chunks * chunk, to = from + chunk;
    const int64_t first = first_query(item), rows = row_count(item);
    const Sums own = sums_at(sums + sums_floats * (chunks > 1 ? part : thread), rows, attention.width);
    variant->add_keys(attention, item / blocks, first, first + rows / attention.groups, from,
                      to < attention.slots ? to : attention.slots, memory + thread_bytes * thread, own);
    if (chunks == 1) finish(item, own);
  }

  // The last queries come first: they may see most keys, and would keep one thread busy at the end.
  int64_t first_query(int64_t item) const { return (blocks - 1 - item % blocks) * queries; }

  int64_t row_count(int64_t item) const {
    const int64_t rest = attention.length - first_query(item);
    return (rest < queries ? rest : queries) * attention.groups;
  }

  void combine(int64_t item) {
    const int64_t rows = row_count(item), width = attention.width;
    const Sums whole = sums_at(sums + sums_floats * item * chunks, rows, width);
    for (int64_t row = 0; row < rows; row++) {
      float maximum = whole.maximum[row], factor;
      for (int64_t part = 1; part < chunks; part++) {
        maximum = std::fmax(maximum, sums_at(sums + sums_floats * (item * chunks + part), rows, width).maximum[row]);
      }
      for (int64_t part = 0; part < chunks; part++) {
        const Sums one = sums_at(sums + sums_floats * (item * chunks + part), rows, width);
        factor = std::exp(one.maximum[row] - maximum);
        whole.total[row] = (part ? whole.total[row] : 0) + factor * one.total[row];
        for (int64_t i = 0; i < width; i++) {
          float* out = whole.out + row * width + i;
          *out = (part ? *out : 0) + factor * one.out[row * width + i];
        }
      }
      whole.maximum[row] = maximum;
    }
    finish(item, whole);
  }

  void finish(int64_t item, const Sums& own) {
    const Attention& a = attention;
    const int64_t head = item / blocks, first = first_query(item), rows = row_count(item);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t query = head / a.kv_heads * a.length + first + row / a.groups;
      const int64_t to = (query * a.kv_heads + head % a.kv_heads) * a.groups + row % a.groups;
      const float factor = own.total[row] > 0 ? 1 / own.total[row] : 0;
      const float log_sum = own.total[row] > 0 ? own.maximum[row] + std::log(own.total[row]) : kUnseen;
      std::memcpy(a.log_sum + 4 * to, &log_sum, 4);
      for (int64_t i = 0; i < a.width; i++) {
        const float value = own.out[row * a.width + i] * factor;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (a.is_bfloat16) {
          const uint16_t half = std::isnan(value) ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
          std::memcpy(a.out + 2 * (to * a.width + i), &half, 2);
        } else {
          std::memcpy(a.out + 4 * (to * a.width + i), &value, 4);
        }
      }
    }
  }
};

// Returns false if memory is full.
bool run_attention(const Attention& a, const AttentionVariant* variant, const XLA_FFI_CallFrame* frame) {
  if (!a.heads() || !a.length) return true;
  AttentionWork work = {a, variant};
  work.queries = kQueryRows / a.groups < 1 ? 1 : kQueryRows / a.groups;
  if (work.queries > a.length) work.queries = a.length;
  work.blocks = (a.length + work.queries - 1) / work.queries;
  // The division does not depend on the number of threads, so that the results do not.
  work.chunk = a.heads() * work.blocks < kFewParts && a.slots > kChunk ? kChunk : a.slots > 0 ? a.slots : 1;
  work.chunks = a.slots > 0 ? (a.slots + work.chunk - 1) / work.chunk : 1;
  const int64_t rows = work.queries * a.groups;
  const int64_t read_bytes = 2 * a.key_heads() * a.slots * a.width * (a.is_int8 ? 1 : 2) * (rows > 8 ? rows / 8 : 1);
  const int64_t threads = read_bytes >= kLeastBytes ? thread_count(frame) : 1;
  work.thread_bytes = rounded(variant->scratch_bytes(a, rows));
  work.sums_floats = floats_of_sums(rows, a.width);
  const int64_t sums = work.chunks > 1 ? work.parts(0) : threads;
  const size_t bytes = threads * work.thread_bytes + sums * work.sums_floats * sizeof(float);
  work.memory = static_cast<uint8_t*>(std::aligned_alloc(64, rounded(bytes)));
  work.sums = reinterpret_cast<float*>(work.memory + threads * work.thread_bytes);
  return work.memory && share(work, threads, frame);
}

}  // namespace
}  // namespace phi3_jax

// The handler of XLA: arguments query, key, value, perhaps the scales of keys and values, slots of queries and keys,
// perhaps positions of both and the shifts of a pattern, as in `attention.py`, which checks them.
HANDLER phi3_jax_attention(XLA_FFI_CallFrame* frame) {
  using namespace phi3_jax;
  if (answered_version(frame)) return nullptr;
  const int64_t count = frame->args.size;
  if (count < 5 || count == 6 || count == 9 || count > 10 || frame->rets.size != 2 || frame->attrs.size != 5) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "phi3_jax_attention takes 5, 7, 8 or 10 arguments");
  }
  const XLA_FFI_Buffer &query = argument(frame, 0), &key = argument(frame, 1);
  Attention a = {};
  a.is_bfloat16 = query.dtype == XLA_FFI_DataType_BF16;
  a.is_int8 = count == 7 || count == 10;
  a.batch = query.dims[0];
  a.length = query.dims[1];
  a.kv_heads = query.dims[2];
  a.groups = query.dims[3];
  a.width = query.dims[4];
  a.slots = key.dims[2];
  // Attributes are sorted by name.
  a.pattern.size = attribute<int64_t>(frame, 0);
  a.pattern.local = attribute<int64_t>(frame, 1);
  a.scale = attribute<float>(frame, 2);
  a.pattern.stride = attribute<int64_t>(frame, 3);
  a.window = attribute<int64_t>(frame, 4);
  a.query = bytes_of(query);
  a.key = bytes_of(key);
  a.value = bytes_of(argument(frame, 2));
  int64_t next = 3;
  if (a.is_int8) {
    a.key_scale = bytes_of(argument(frame, next++));
    a.value_scale = bytes_of(argument(frame, next++));
  }
  a.query_slots = bytes_of(argument(frame, next++));
  a.key_slots = bytes_of(argument(frame, next++));
  if (a.pattern.size) {
    a.pattern.query_positions = bytes_of(argument(frame, next++));
    a.pattern.key_positions = bytes_of(argument(frame, next++));
    a.pattern.shifts = bytes_of(argument(frame, next));
    a.pattern.sharing = a.groups;
    a.kv_heads *= a.groups;
    a.groups = 1;
  }
  a.out = result(frame, 0);
  a.log_sum = result(frame, 1);
  if (run_attention(a, choose_attention(a), frame)) return nullptr;
  return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "phi3_jax_attention: memory is full");
}
