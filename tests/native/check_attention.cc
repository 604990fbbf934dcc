// Runs every variant of the attention on odd shapes, and compares with plain sums. `.ci/run kernels` compiles it with
// sanitizers.

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "arrays.h"
#include "attention.h"

using phi3_jax::Attention;

namespace {

int checks = 0;  // by the variant that is asked for

// Returns a vector's number.
double number_at(const Attention& a, const uint8_t* vectors, const uint8_t* scale, int64_t index) {
  uint32_t bits;
  float value;
  if (a.is_int8) {
    bits = scale[2 * (index / a.width)] << 16 | (uint32_t)scale[2 * (index / a.width) + 1] << 24;
    std::memcpy(&value, &bits, 4);
    return (double)(int8_t)vectors[index] * value;
  }
  bits = vectors[2 * index] << 16 | (uint32_t)vectors[2 * index + 1] << 24;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Returns whether a random attention of these sizes is right, if the variant runs here. One call computes one head.
bool check(const char* name, Attention a) {
  const int64_t queries = a.batch * a.length * a.kv_heads * a.groups * a.width;
  const int64_t vectors = a.key_heads() * a.slots, numbers = vectors * a.width;
  Array query(queries * (a.is_bfloat16 ? 2 : 4)), key(numbers * (a.is_int8 ? 1 : 2)), value(numbers * (a.is_int8 ? 1 : 2));
  Array key_scale(2 * vectors), value_scale(2 * vectors), query_slots(4 * a.batch * a.length);
  Array key_slots(4 * a.batch * a.slots);
  for (int64_t i = 0; i < queries; i++) {
    a.is_bfloat16 ? query.set_bfloat16(i, draw_float()) : query.set(i, draw_float());
  }
  for (int64_t i = 0; i < numbers; i++) {
    if (a.is_int8) {
      key.bytes()[i] = (uint8_t)draw(256);
      value.bytes()[i] = (uint8_t)draw(256);
    } else {
      key.set_bfloat16(i, draw_float());
      value.set_bfloat16(i, draw_float());
    }
  }
  for (int64_t i = 0; i < vectors; i++) {
    key_scale.set_bfloat16(i, 0.01f + 0.005f * draw_float());
    value_scale.set_bfloat16(i, 0.01f + 0.005f * draw_float());
  }
  std::vector<int32_t> of_queries, of_keys;
  for (int64_t i = 0; i < a.batch * a.length; i++) {
    of_queries.push_back((int32_t)(a.slots > a.length ? a.slots - a.length : 0) + (int32_t)(i % a.length));
    std::memcpy(query_slots.bytes() + 4 * i, &of_queries[i], 4);
  }
  for (int64_t i = 0; i < a.batch * a.slots; i++) {
    of_keys.push_back(draw(8) ? (int32_t)(i % a.slots) : phi3_jax::kNoKey);
    std::memcpy(key_slots.bytes() + 4 * i, &of_keys[i], 4);
  }
  // Keys that are none have the position of the slot before; the first real one has 0.
  Array query_positions(4 * a.batch * a.length), key_positions(4 * a.batch * a.slots), shifts(4 * a.kv_heads);
  std::vector<int32_t> of_query_blocks, of_key_blocks, of_shifts;
  if (a.pattern.size) {
    std::vector<int32_t> positions;
    for (int64_t i = 0; i < a.batch * a.slots; i++) {
      const int32_t before = i % a.slots ? positions.back() : -1;
      positions.push_back(before + (of_keys[i] != phi3_jax::kNoKey));
      std::memcpy(key_positions.bytes() + 4 * i, &positions[i], 4);
      of_key_blocks.push_back(positions[i] / (int32_t)a.pattern.size);
    }
    for (int64_t i = 0; i < a.batch * a.length; i++) {
      const int64_t after = of_queries[i] - a.slots + 1, slot = after > 0 ? a.slots - 1 : of_queries[i];
      const int32_t position = positions[i / a.length * a.slots + slot] + (int32_t)(after > 0 ? after : 0);
      std::memcpy(query_positions.bytes() + 4 * i, &position, 4);
      of_query_blocks.push_back(position / (int32_t)a.pattern.size);
    }
    for (int64_t i = 0; i < a.kv_heads; i++) {
      of_shifts.push_back((int32_t)draw((uint32_t)a.pattern.stride));
      std::memcpy(shifts.bytes() + 4 * i, &of_shifts[i], 4);
    }
    a.pattern.query_positions = query_positions.bytes();
    a.pattern.key_positions = key_positions.bytes();
    a.pattern.shifts = shifts.bytes();
  }
  a.query = query.bytes();
  a.key = key.bytes();
  a.value = value.bytes();
  a.key_scale = key_scale.bytes();
  a.value_scale = value_scale.bytes();
  a.query_slots = query_slots.bytes();
  a.key_slots = key_slots.bytes();
  const phi3_jax::AttentionVariant* variant = phi3_jax::choose_attention(a, name);
  if (!variant) return true;
  checks += !std::strcmp(variant->name, name);

  const int64_t head = draw((uint32_t)a.heads()), batch = head / a.kv_heads, key_head = head / a.pattern.sharing;
  const int64_t first = draw((uint32_t)a.length), last = first + 1 + draw((uint32_t)(a.length - first));
  const int64_t from = draw((uint32_t)a.slots), to = draw(2) ? a.slots : from + 1 + draw((uint32_t)(a.slots - from));
  const int64_t rows = (last - first) * a.groups;
  std::vector<float> out(rows * a.width), maximum(rows), total(rows);
  void* scratch = std::aligned_alloc(64, variant->scratch_bytes(a, rows) / 64 * 64 + 64);
  variant->add_keys(a, head, first, last, from, to, (uint8_t*)scratch, {out.data(), maximum.data(), total.data()});
  std::free(scratch);

  for (int64_t row = 0; row < rows; row++) {
    const int64_t at = batch * a.length + first + row / a.groups;
    const int64_t vector = (at * a.kv_heads + head % a.kv_heads) * a.groups + row % a.groups;
    std::vector<double> scores;
    double most = -1e30, sum = 0;
    for (int64_t slot = from; slot < to; slot++) {
      const int32_t where = of_keys[batch * a.slots + slot], own = of_queries[at];
      double score = 0;
      for (int64_t i = 0; i < a.width; i++) {
        const double x = a.is_bfloat16 ? query.bfloat16_at(vector * a.width + i) : query.at(vector * a.width + i);
        score += x * number_at(a, a.key, a.key_scale, (key_head * a.slots + slot) * a.width + i);
      }
      bool is_seen = where <= own && (!a.window || where > own - a.window);
      if (a.pattern.size) {
        const int32_t of_key = of_key_blocks[batch * a.slots + slot];
        is_seen &= of_query_blocks[at] - of_key < a.pattern.local ||
                   (of_key + of_shifts[head % a.kv_heads] + 1) % a.pattern.stride == 0;
      }
      scores.push_back(is_seen ? score * a.scale : -INFINITY);
      most = std::fmax(most, scores.back());
    }
    for (double& score : scores) sum += score = std::exp(score - most);
    if (sum == 0) {
      if (total[row] == 0) continue;
      std::printf("%s: a query that sees no key has the sum %g\n", name, total[row]);
      return false;
    }
    if (!(std::fabs(maximum[row] + std::log(total[row]) - most - std::log(sum)) <= 2e-5)) {
      std::printf("%s: the log-sum-exp is %g instead of %g\n", name, maximum[row] + std::log(total[row]),
                  most + std::log(sum));
      return false;
    }
    for (int64_t i = 0; i < a.width; i++) {
      double expected = 0, magnitude = 0;
      for (int64_t slot = from; slot < to; slot++) {
        const double term =
            scores[slot - from] / sum * number_at(a, a.value, a.value_scale, (key_head * a.slots + slot) * a.width + i);
        expected += term;
        magnitude += std::fabs(term);
      }
      // Many rows' probabilities are rounded to bfloat16, if that is the dtype of the products.
      const double tolerance = a.is_bfloat16 && rows > 16 ? 4e-3 : 1e-5;
      const double found = out[row * a.width + i] / total[row];
      if (!(std::fabs(found - expected) <= tolerance * magnitude + 1e-6)) {
        std::printf("%s, queries %s, keys %s, %lld rows x %lld x %lld: [%lld, %lld] is %g instead of %g\n", name,
                    a.is_bfloat16 ? "bfloat16" : "float32", a.is_int8 ? "int8" : "bfloat16", (long long)rows,
                    (long long)(to - from), (long long)a.width, (long long)row, (long long)i, found, expected);
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
    for (int turn = 0; turn < 500; turn++) {
      Attention a = {};
      a.is_bfloat16 = draw(2);
      a.is_int8 = draw(2);
      a.batch = 1 + draw(2);
      a.length = 1 + draw(draw(2) ? 3 : 30);
      a.kv_heads = 1 + draw(2);
      a.groups = 1 + draw(4);
      a.width = 16 * (1 + draw(10));
      a.slots = 1 + draw(draw(2) ? 40 : 400);
      a.window = draw(2) ? 1 + draw(100) : 0;
      a.scale = 0.3f;
      if (draw(2)) {
        a.pattern.size = 1 + draw(draw(4) ? 20 : 200);
        a.pattern.local = 1 + draw(3);
        a.pattern.stride = 1 + draw(5);
        a.pattern.sharing = a.groups;
        a.kv_heads *= a.groups;
        a.groups = 1;
      }
      failures += !check(name, a);
    }
    if (checks > before) std::printf("%s: %d attentions\n", name, checks - before);
  }
  std::printf("%d wrong\n", failures);
  return failures > 0;
}
