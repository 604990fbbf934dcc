// Softmax attention of queries over a cache, with scores and sums in float32.

#pragma once

#include <cstddef>
#include <cstdint>

namespace phi3_jax {

constexpr int32_t kNoKey = INT32_MAX;  // the slot of a key that no query sees
constexpr float kUnseen = -3.4028234663852886e38f;  // the log-sum-exp of a query that sees no key

// The blocks of keys that each query head sees, as in `BlockPattern` in Python. Heads that read the same keys see
// different blocks, so that each counts as a key head with one group, whose keys `sharing` neighbours have in common.
struct BlockPattern {
  int64_t size = 0;  // of a block; 0: there is no pattern
  int64_t local, stride;
  int64_t sharing = 1;
  const uint8_t *query_positions, *key_positions;  // int32 [batch, length] and [batch, slots]
  const uint8_t* shifts;                           // int32 [kv_heads]
};

// The arrays of an attention. Their addresses need no alignment.
struct Attention {
  bool is_bfloat16;  // queries and results; otherwise float32
  bool is_int8;      // keys and values, with scales; otherwise bfloat16
  int64_t batch, length, kv_heads, groups, width, slots;
  int64_t window;  // the most keys that a query sees; 0: no limit
  float scale;     // of the scores
  const uint8_t* query;                       // [batch, length, kv_heads, groups, width]
  const uint8_t *key, *value;                 // [batch, kv_heads, slots, width]
  const uint8_t *key_scale, *value_scale;     // bfloat16 [batch, kv_heads, slots], or null
  const uint8_t *query_slots, *key_slots;     // int32 [batch, length] and [batch, slots]
  BlockPattern pattern;
  uint8_t* out;                               // like query
  uint8_t* log_sum;                           // float32 [batch, length, kv_heads, groups]: of exp(score)

  int64_t heads() const { return batch * kv_heads; }
  int64_t key_heads() const { return heads() / pattern.sharing; }
};

// Keys that are multiplied at a time.
constexpr int64_t kKeyBlock = 128;

// Queries, times groups, that are multiplied at a time.
constexpr int64_t kQueryRows = 256;

// Sums over some keys, for rows of `width` numbers: exp(score - maximum) times values, and of these exponentials.
struct Sums {
  float *out, *maximum, *total;
};

// The kernels for one set of instructions.
struct AttentionVariant {
  const char* name;
  bool (*runs_here)();
  bool bfloat16_only;  // of queries
  // The bytes that `add_keys` needs for so many rows.
  size_t (*scratch_bytes)(const Attention&, int64_t rows);
  // Computes the sums of queries `first` up to `last`, times groups, over the slots `from` up to `to`.
  void (*add_keys)(const Attention&, int64_t head, int64_t first, int64_t last, int64_t from, int64_t to,
                   uint8_t* scratch, const Sums& sums);
};

const AttentionVariant* choose_attention(const Attention& attention, const char* name = nullptr);

}  // namespace phi3_jax
