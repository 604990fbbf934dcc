// The blocks of keys that queries of one head see.

#pragma once

#include <cstring>

#include "attention.h"

namespace phi3_jax {

inline int32_t int32_at(const uint8_t* numbers, int64_t index) {
  int32_t number;
  std::memcpy(&number, numbers + 4 * index, 4);
  return number;
}

// Neighbouring keys that are multiplied at a time. The pattern hides none from any query if `is_whole`; otherwise the
// queries see those that are local to them.
struct KeyRun {
  int64_t slot, keys;
  bool is_whole;
};

// Finds the blocks of keys that some queries of one head see. A key's position is at most one more than that of the
// slot before it, and not less.
struct VisibleBlocks {
  const BlockPattern& pattern;
  const uint8_t *query_positions = nullptr, *key_positions = nullptr;
  int32_t shift = 0, first = 0, last = 0;  // blocks of the queries

  VisibleBlocks(const Attention& a, int64_t head, int64_t query, int64_t end) : pattern(a.pattern) {
    if (!pattern.size) return;
    const int64_t batch = head / a.kv_heads;
    query_positions = pattern.query_positions + 4 * (batch * a.length + query);
    key_positions = pattern.key_positions + 4 * batch * a.slots;
    shift = int32_at(pattern.shifts, head % a.kv_heads);
    first = INT32_MAX;
    for (int64_t index = 0; index < end - query; index++) {
      const int32_t block = block_of(int32_at(query_positions, index));
      first = block < first ? block : first;
      last = block > last ? block : last;
    }
  }

  int32_t block_of(int32_t position) const { return position / (int32_t)pattern.size; }

  // Returns the position of the first key that a query sees as a near one.
  int32_t first_local_position(int64_t query) const {
    const int32_t block = block_of(int32_at(query_positions, query));
    return (int32_t)((block - pattern.local + 1) * pattern.size);
  }

  bool is_whole(int32_t block) const {
    return last - block < pattern.local || (block + shift + 1) % pattern.stride == 0;
  }

  bool is_visible(int32_t block) const { return first - block < pattern.local || is_whole(block); }

  // Returns the first keys between two slots that some query may see; none if the queries see no more.
  KeyRun next(int64_t slot, int64_t end) const {
    KeyRun run = {slot, 0, true};
    if (!pattern.size) {
      run.keys = end - slot < kKeyBlock ? end - slot : kKeyBlock;
      return run;
    }
    while (slot < end && run.keys < kKeyBlock) {
      const int32_t position = int32_at(key_positions, slot), block = block_of(position);
      if (block > last) break;
      const bool whole = is_whole(block);
      if (run.keys && whole != run.is_whole) break;
      const int64_t next_block = (block + 1) * pattern.size;
      int64_t after = slot + next_block - position;  // no earlier slot is in another block
      while (after < end && int32_at(key_positions, after) < next_block) after++;
      after = after < end ? after : end;
      if (is_visible(block)) {
        if (!run.keys) run = {slot, 0, whole};
        run.keys = after - run.slot;
      } else if (run.keys) {
        break;
      }
      slot = after;
    }
    run.keys = run.keys < kKeyBlock ? run.keys : kKeyBlock;
    return run;
  }
};

}  // namespace phi3_jax
