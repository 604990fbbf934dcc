// The attention of one variant, which `variants.cc` includes after `kernels.h`: keys are the outputs of a product
// with the queries, and values, if there are many rows, those of a product with the probabilities.

// Returns e to the x, for x of at most 0; 0 below -87.
INLINE Floats exponential(Floats x) {
  const Ints is_tiny = x < -87.0f;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // has the nearest integer in its last bits
  const Floats power = shifted - 12582912.0f;
  const Floats rest = x - power * 0.693359375f + power * 2.12194440e-4f;
  Floats sum = rest * 1.9875691e-4f + 1.3981999e-3f;
  sum = sum * rest + 8.3334519e-3f;
  sum = sum * rest + 4.1665795e-2f;
  sum = sum * rest + 1.6666665e-1f;
  sum = sum * rest + 5.0000001e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const Words bits = (Words)sum + ((Words)shifted << 23);
  return (Floats)(bits & ~(Words)is_tiny);
}

INLINE float largest(Floats values) {
  float most = values[0];
  for (int lane = 1; lane < kLanes; lane++) most = values[lane] > most ? values[lane] : most;
  return most;
}

INLINE float total_of(Floats values) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += values[lane];
  return sum;
}

INLINE Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < kLanes; lane++) numbers[lane] = lane;
  return numbers;
}

INLINE float bfloat16_at(const uint8_t* from, int64_t index) {
  uint16_t bits;
  __builtin_memcpy(&bits, from + 2 * index, 2);
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

// Stores the first `count` of some probabilities, as operands of a product: in bfloat16 with PAIRS.
INLINE void store_elements(Floats values, Element* to, int64_t count) {
#if PAIRS
  const Halves halves = narrow(values);
#else
  const Floats halves = values;
#endif
  if (count >= kLanes) {
    __builtin_memcpy(to, &halves, sizeof halves);
  } else {
    __builtin_memcpy(to, &halves, count * sizeof(Element));
  }
}

// Returns some numbers of a vector of values in float32.
INLINE Floats load_value(bool is_int8, const uint8_t* from) {
  return is_int8 ? widen_int8(from) : widen_bfloat16(from);
}

// The arrays that some rows of queries need, in one piece of memory.
struct Scratch {
  uint8_t* at;
  Element *queries, *probabilities;  // in the products' order
  float *scores, *weights;           // [rows, keys]
  uint8_t* rows;                     // the queries of one head, in a row each
  Element *panels, *operands;        // of the products; probabilities as their operands [rows, keys]
  uint16_t* turned;                  // values as bfloat16 [width, keys]
  float *sums, *scales, *decay;
  size_t bytes;

  template <typename T>
  TARGET T* take(int64_t count) {
    T* taken = (T*)(at + bytes);
    bytes += (count * sizeof(T) + 63) / 64 * 64;
    return taken;
  }

  TARGET Scratch(const Attention& a, int64_t count, uint8_t* memory) : at(memory), bytes(0) {
    const int64_t width = (a.width + 63) / 64 * 64;  // whole blocks
    queries = take<Element>(count * width);
    rows = take<uint8_t>(count * a.width * 4);
    scores = take<float>(count * kKeyBlock + kLanes);
    weights = take<float>(count * kKeyBlock + kLanes);
    scales = take<float>(2 * kKeyBlock);
    decay = take<float>(count);
    panels = operands = probabilities = nullptr;
    turned = nullptr;
    sums = nullptr;
    if (count <= kFewRows) return;
    panels = take<Element>((width > kKeyBlock ? width : kKeyBlock) * (width > kKeyBlock ? width : kKeyBlock));
    operands = take<Element>(count * kKeyBlock + kElements);
    probabilities = take<Element>(count * kKeyBlock);
    turned = take<uint16_t>(a.width * kKeyBlock);
    sums = take<float>(count * a.width);
  }
};

static size_t attention_scratch_bytes(const Attention& a, int64_t rows) { return Scratch(a, rows, nullptr).bytes; }

// Turns scores into exponentials, with the running maximum of each row; `decay` gets the factors of earlier sums.
// `key_positions` is null if the pattern hides none of these keys.
TARGET static void add_scores(const Attention& a, const Scratch& s, const VisibleBlocks& blocks,
                              const uint8_t* query_slots, const uint8_t* key_slots, const uint8_t* key_positions,
                              int64_t rows, int64_t keys, const Sums& sums) {
  for (int64_t row = 0; row < rows; row++) {
    const int32_t last = int32_at(query_slots, row / a.groups);
    const int32_t first = a.window ? last - (int32_t)a.window + 1 : INT32_MIN;
    const int32_t first_position = key_positions ? blocks.first_local_position(row) : 0;
    float* scores = s.scores + row * keys;
    Floats most = broadcast(kUnseen);
    for (int64_t key = 0; key < keys; key += kLanes) {
      const bool is_full = keys - key >= kLanes;
      const Ints slots = (Ints)(is_full ? load(key_slots + 4 * key) : load_some(key_slots + 4 * key, 4 * (keys - key)));
      Ints is_seen = (slots <= last) & (slots >= first);
      if (key_positions) {
        const uint8_t* from = key_positions + 4 * key;
        is_seen &= (Ints)(is_full ? load(from) : load_some(from, 4 * (keys - key))) >= first_position;
      }
      if (!is_full) is_seen &= lane_numbers() < (int32_t)(keys - key);
      const Floats values = (Floats)load(scores + key) * a.scale;
      const Floats seen = is_seen ? values : broadcast(kUnseen);
      most = seen > most ? seen : most;
      __builtin_memcpy(s.weights + row * kKeyBlock + key, &seen, BYTES);
    }
    // From half of the least number, an unseen score is far below any maximum.
    const float old = sums.maximum[row], found = largest(most), maximum = found > old ? found : old;
    s.decay[row] = exponential(broadcast(old - maximum))[0];
    sums.maximum[row] = maximum;
    Floats total = {};
    for (int64_t key = 0; key < keys; key += kLanes) {
      Floats weights = exponential((Floats)load(s.weights + row * kKeyBlock + key) - maximum);
      total += weights;
      if (a.is_int8) {
        const Floats scales = (Floats)load(s.scales + kKeyBlock + key);
        weights = weights == 0.0f ? weights : weights * scales;
      }
      __builtin_memcpy(s.weights + row * kKeyBlock + key, &weights, BYTES);
      if (rows > kFewRows) store_elements(weights, s.operands + row * keys + key, keys - key);
    }
    sums.total[row] = sums.total[row] * s.decay[row] + total_of(total);
  }
}

// Adds a block's values to the sums of a few rows.
template <bool is_int8, int rows, int vectors>
TARGET static void add_values(const Attention& a, const uint8_t* value, int64_t keys, const float* weights,
                              const float* decay, float* out) {
  constexpr int64_t item = is_int8 ? 1 : 2;
  Floats sum[rows][vectors];
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = (Floats)load(out + r * a.width + v * kLanes) * decay[r];
  }
  for (int64_t key = 0; key < keys; key++, value += item * a.width) {
    Floats values[vectors];
    UNROLL for (int v = 0; v < vectors; v++) values[v] = load_value(is_int8, value + item * v * kLanes);
    UNROLL for (int r = 0; r < rows; r++) {
      const Floats weight = broadcast(weights[r * kKeyBlock + key]);
      UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += weight * values[v];
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < vectors; v++) __builtin_memcpy(out + r * a.width + v * kLanes, &sum[r][v], BYTES);
  }
}

template <bool is_int8, int rows>
TARGET static void add_values_to(const Attention& a, const uint8_t* value, int64_t keys, const float* weights,
                                 const float* decay, float* out) {
  for (int64_t at = 0, vectors; at < a.width; at += vectors * kLanes) {
    const int64_t rest = (a.width - at) / kLanes;
    const uint8_t* from = value + (is_int8 ? 1 : 2) * at;
    // As many sums as there are registers: with few, each addition waits for the one before.
    constexpr int most = rows <= 2 ? 8 : 4, many = rows <= 2 ? 6 : 4;
    vectors = rest >= most ? most : rest >= many ? many : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
    if (vectors == most) {
      add_values<is_int8, rows, most>(a, from, keys, weights, decay, out + at);
    } else if (vectors == many) {
      add_values<is_int8, rows, many>(a, from, keys, weights, decay, out + at);
    } else if (vectors == 4) {
      add_values<is_int8, rows, 4>(a, from, keys, weights, decay, out + at);
    } else if (vectors == 2) {
      add_values<is_int8, rows, 2>(a, from, keys, weights, decay, out + at);
    } else {
      add_values<is_int8, rows, 1>(a, from, keys, weights, decay, out + at);
    }
  }
}

// Adds a block's values to the sums of rows, few at a time.
template <bool is_int8>
TARGET static void add_few(const Attention& a, const Scratch& s, const uint8_t* value, int64_t rows, int64_t keys,
                           float* out) {
  for (int64_t row = 0, count; row < rows; row += count) {
    count = rows - row < 4 ? rows - row : 4;
    const float *weights = s.weights + row * kKeyBlock, *decay = s.decay + row;
    float* to = out + row * a.width;
    if (count == 4) add_values_to<is_int8, 4>(a, value, keys, weights, decay, to);
    if (count == 3) add_values_to<is_int8, 3>(a, value, keys, weights, decay, to);
    if (count == 2) add_values_to<is_int8, 2>(a, value, keys, weights, decay, to);
    if (count == 1) add_values_to<is_int8, 1>(a, value, keys, weights, decay, to);
  }
}

// Turns values [keys, width] to bfloat16 [width, keys].
template <bool is_int8>
TARGET static void turn(const Attention& a, const uint8_t* value, int64_t keys, uint16_t* to) {
  for (int64_t key = 0; key < keys; key++) {
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const Words bits = (Words)load_value(is_int8, value + (is_int8 ? 1 : 2) * (key * a.width + i)) >> 16;
      UNROLL for (int lane = 0; lane < kLanes; lane++) to[(i + lane) * keys + key] = (uint16_t)bits[lane];
    }
  }
}

// Multiplies a block's values with the probabilities of many rows.
TARGET static void multiply_values(const Attention& a, const Scratch& s, const uint8_t* value, int64_t rows,
                                   int64_t keys, float* out) {
  a.is_int8 ? turn<true>(a, value, keys, s.turned) : turn<false>(a, value, keys, s.turned);
  const Operands product = {Form::kBfloat16, PAIRS == 1, rows,    keys,    a.width, 1, (const uint8_t*)s.operands,
                            (const uint8_t*)s.turned, nullptr, nullptr, (uint8_t*)s.sums};
  copy(product, s.probabilities, 0, rows);
  multiply(product, s.probabilities, (uint8_t*)s.panels, 0, a.width);
  for (int64_t row = 0; row < rows; row++) {
    const float decay = s.decay[row];
    float* to = out + row * a.width;
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const Floats sum = (Floats)load(to + i) * decay + (Floats)load(s.sums + row * a.width + i);
      __builtin_memcpy(to + i, &sum, BYTES);
    }
  }
}

// Returns whether some query, of slots from `least` to `most`, may see one of these keys.
TARGET static bool is_seen(const Attention& a, const uint8_t* key_slots, int64_t keys, int32_t least, int32_t most) {
  const int32_t first = a.window ? least - (int32_t)a.window + 1 : INT32_MIN;
  for (int64_t key = 0; key < keys; key++) {
    const int32_t slot = int32_at(key_slots, key);
    if (slot <= most && slot >= first) return true;
  }
  return false;
}

TARGET static void add_keys(const Attention& a, int64_t head, int64_t first, int64_t last, int64_t from, int64_t to,
                            uint8_t* memory, const Sums& sums) {
  const int64_t rows = (last - first) * a.groups, batch = head / a.kv_heads, item = a.is_int8 ? 1 : 2;
  const int64_t row_bytes = a.width * (a.is_bfloat16 ? 2 : 4);
  const Scratch s(a, rows, memory);
  for (int64_t query = first; query < last; query++) {
    const int64_t row = (batch * a.length + query) * a.kv_heads + head % a.kv_heads;
    __builtin_memcpy(s.rows + (query - first) * a.groups * row_bytes, a.query + row * a.groups * row_bytes,
                     a.groups * row_bytes);
  }
  for (int64_t row = 0; row < rows; row++) {
    sums.maximum[row] = kUnseen / 2;
    sums.total[row] = 0;
  }
  __builtin_memset(sums.out, 0, rows * a.width * sizeof(float));
  const uint8_t* query_slots = a.query_slots + 4 * (batch * a.length + first);
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t query = 0; query < last - first; query++) {
    const int32_t slot = int32_at(query_slots, query);
    least = slot < least ? slot : least;
    most = slot > most ? slot : most;
  }
  Operands product = {a.is_int8 ? Form::kInt8 : Form::kBfloat16, a.is_bfloat16, rows, a.width, 0, 1, s.rows,
                      nullptr, nullptr, nullptr, (uint8_t*)s.scores};
  copy(product, s.queries, 0, rows);
  const VisibleBlocks blocks(a, head, first, last);
  for (KeyRun run = blocks.next(from, to); run.keys; run = blocks.next(run.slot + run.keys, to)) {
    const int64_t keys = run.keys, at = head / a.pattern.sharing * a.slots + run.slot;
    const uint8_t* key_slots = a.key_slots + 4 * (batch * a.slots + run.slot);
    const uint8_t* key_positions = run.is_whole ? nullptr : blocks.key_positions + 4 * run.slot;
    if (!is_seen(a, key_slots, keys, least, most)) continue;
    product.out = keys;
    product.weight = a.key + item * at * a.width;
    if (a.is_int8) {
      for (int64_t key = 0; key < keys; key++) {
        s.scales[key] = bfloat16_at(a.key_scale, at + key);
        s.scales[kKeyBlock + key] = bfloat16_at(a.value_scale, at + key);
      }
      product.scale = (const uint8_t*)s.scales;
    }
    multiply(product, s.queries, (uint8_t*)s.panels, 0, keys);
    add_scores(a, s, blocks, query_slots, key_slots, key_positions, rows, keys, sums);
    const uint8_t* value = a.value + item * at * a.width;
    if (rows > kFewRows) {
      multiply_values(a, s, value, rows, keys, sums.out);
    } else if (a.is_int8) {
      add_few<true>(a, s, value, rows, keys, sums.out);
    } else {
      add_few<false>(a, s, value, rows, keys, sums.out);
    }
  }
}

// The next variant defines them again.
#undef TARGET
#undef BYTES
#undef PAIRS
#undef NEON
#undef INLINE
#undef UNROLL
