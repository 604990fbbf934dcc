// The kernels of one variant. `variants.cc` includes this file once for each, in a namespace of its own, after it
// has defined
//
//   TARGET  the attribute of every function here: the instructions that it may use
//   BYTES   the size of a vector: 64, 32 or 16
//   PAIRS   1: x stays bfloat16, and one instruction multiplies and adds pairs of bfloat16; 0: x becomes float32
//   NEON    1: `arm.h` has the instructions
//
// A row of a weight is read as blocks of one vector of 32-bit words. Word w of a block holds some neighbouring
// inputs (2 of bfloat16, 4 of int8, 8 of int4), and `unpack` makes operands of them, in which lane w has inputs of
// word w. So that unpacking takes few instructions, x is copied once into the order of these operands. Every lane
// sums up inputs of its words only, so that a lane can have its own scale.

#define INLINE TARGET static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));  // one for each lane

#if PAIRS
typedef uint16_t Element;
#else
typedef float Element;
#endif

constexpr int kLanes = BYTES / 4;
constexpr int kElements = BYTES / sizeof(Element);  // of one operand

template <Form form>
constexpr int kBlock = kLanes * weights_per_word(form);  // inputs

template <Form form>
constexpr int kVectors = kBlock<form> / kElements;  // operands of a block

INLINE Words load(const void* from) {
  Words words;
  __builtin_memcpy(&words, from, BYTES);
  return words;
}

INLINE float load_float(const uint8_t* from, int64_t index) {
  float value;
  __builtin_memcpy(&value, from + 4 * index, 4);
  return value;
}

INLINE Floats broadcast(float value) { return value - Floats{}; }

#include "vectors.h"

// Returns how many of the rows left are computed together. Unpacking integers to bfloat16 takes as long as multiplying
// four rows, so that eight rows share it if there are few.
template <Form form>
constexpr int64_t rows_together(int64_t rest, bool are_few) {
  if (PAIRS && form == Form::kInt8 && are_few && rest >= 8) return 8;
  const int64_t most = are_few ? kFewTogether : kManyTogether;
  return rest >= most ? most : rest > 4 ? 4 : rest;
}

// The input, counted from the first one of its block, at an element of an operand.
template <Form form>
constexpr int input_at(int vector, int element) {
#if PAIRS
  if (form == Form::kBfloat16) return element;
  return weights_per_word(form) * (element / 2) +
         (form == Form::kInt4 ? int4_number(vector) + 4 * (element % 2) : 2 * vector + element % 2);
#else
  return weights_per_word(form) * element + (form == Form::kInt4 ? int4_number(vector) : vector);
#endif
}

// Returns some inputs of x in float32, one for each lane.
INLINE Floats load_x(const Operands& p, int64_t index) {
  return p.x_is_bfloat16 ? widen_bfloat16(p.x + 2 * index) : (Floats)load(p.x + 4 * index);
}

// Returns operand `k` of a block.
template <Form form>
INLINE Words unpack(Words packed, int k) {
  if (form == Form::kInt4) return unpack_int4(packed, k);
#if PAIRS
  if (form == Form::kBfloat16) return packed;
  // An int8 fits bfloat16, so the lower half of its float32 is zero.
  return upper_halves(int8_at(packed, 2 * k), int8_at(packed, 2 * k + 1));
#else
  if (form == Form::kBfloat16) return k == 0 ? packed << 16 : packed & 0xffff0000u;
  return (Words)int8_at(packed, k);
#endif
}

// Stores the sums over the lanes of the first `count` of four vectors.
INLINE void store_totals(const Floats (&sums)[4], uint8_t* y, int64_t count) {
  alignas(16) float totals[4];
  add_lanes(sums, totals);
  if (count == 4) {
    __builtin_memcpy(y, totals, sizeof totals);
  } else {
    __builtin_memcpy(y, totals, 4 * count);
  }
}

// How a product is cut into blocks, and its copy of x into parts.
struct Layout {
  int64_t row_bytes;          // of the weight
  int64_t blocks, full;       // of a row; how many of them the row fills
  int64_t segment, segments;  // blocks with the same scales, and how many such runs there are
  int64_t group;              // inputs with one scale
  int64_t per_block;          // groups in a block, if blocks have several and no group lies in two blocks
  alignas(64) int32_t lanes[kLanes];  // then the group of each lane
  int64_t sums;                       // of the groups of a row of x, if there are zeros: a multiple of the lanes
  size_t x_bytes, bytes;              // of the copy of x without and with its sums

  TARGET Layout(const Operands& p, int block) {
    row_bytes = p.row_bytes();
    full = row_bytes / BYTES;
    blocks = (row_bytes + BYTES - 1) / BYTES;
    group = p.in / p.groups;
    segment = p.groups == 1 ? blocks : group % block == 0 ? group / block : 1;
    segments = blocks == 0 ? 0 : (blocks + segment - 1) / segment;
    per_block = p.groups > 1 && block % group == 0 && block > group ? block / group : 0;
    for (int lane = 0; lane < kLanes; lane++) lanes[lane] = (int32_t)(lane * per_block / kLanes);
    x_bytes = (size_t)(p.rows * blocks * block) * sizeof(Element);
    sums = p.zero && !p.scales_first ? (p.groups + kLanes - 1) / kLanes * kLanes : 0;
    bytes = x_bytes + (size_t)(p.rows * sums) * sizeof(float);
  }
};

// Returns the scales of a segment's lanes; `from` are those of a row of the weight.
INLINE Floats of_lanes(const Operands& p, const Layout& layout, const uint8_t* from, int64_t segment, int block) {
  if (p.groups == 1 || layout.group % block == 0) return broadcast(load_float(from, segment));
  if (layout.per_block) {
    const int64_t first = segment * layout.per_block, rest = p.groups - first;
    return spread(from + 4 * first, rest < layout.per_block ? rest : layout.per_block, layout.lanes);
  }
  Floats values = {};
  for (int lane = 0; lane < kLanes; lane++) {
    const int64_t index = (segment * block + lane * (block / kLanes)) / layout.group;
    if (index < p.groups) values[lane] = load_float(from, index);
  }
  return values;
}

template <Form form, int rows, int outputs>
INLINE void add_block(Floats (&dot)[rows][outputs], const Words (&packed)[outputs], const Element* x) {
  UNROLL for (int k = 0; k < kVectors<form>; k++) {
    Words weight[outputs];
    UNROLL for (int o = 0; o < outputs; o++) weight[o] = unpack<form>(packed[o], k);
    UNROLL for (int r = 0; r < rows; r++) {
      const Words row = load(x + (k * rows + r) * kElements);
      UNROLL for (int o = 0; o < outputs; o++) dot[r][o] = multiply_add(row, weight[o], dot[r][o]);
    }
  }
}

// Some rows of x: their part of the copy, and its sums.
struct Rows {
  int64_t first;
  const Element* x;
  const float* sums;

  TARGET Rows(const Layout& layout, int block, const void* copy, int64_t first) : first(first) {
    x = (const Element*)copy + first * layout.blocks * block;
    sums = (const float*)((const char*)copy + layout.x_bytes) + first * layout.sums;
  }
};

// Begins to read bytes that are needed soon.
INLINE void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)from + at, 0, 2);
}

// Adds a segment's products, with its scales; `index` has the outputs.
template <Form form, int rows, int outputs, int columns>
INLINE void add_segment(const Operands& p, const Layout& layout, const int64_t (&index)[outputs], int64_t segment,
                        const Floats (&dot)[rows][outputs], Floats (&sum)[rows][columns], int first = 0) {
  UNROLL for (int o = 0; o < outputs; o++) {
    if (form == Form::kBfloat16) {
      UNROLL for (int r = 0; r < rows; r++) sum[r][first + o] = dot[r][o];
      continue;
    }
    const Floats scale = of_lanes(p, layout, p.scale + 4 * index[o] * p.groups, segment, kBlock<form>);
    UNROLL for (int r = 0; r < rows; r++) sum[r][first + o] += scale * dot[r][o];
  }
}

// Subtracts what the zeros contribute: here, each lane has groups of its own.
template <int rows, int outputs>
INLINE void subtract_zeros(const Operands& p, const Layout& layout, const Rows& x, const int64_t (&index)[outputs],
                           Floats (&sum)[rows][4]) {
  for (int64_t group = 0; group < p.groups; group += kLanes) {
    const int64_t bytes = 4 * (p.groups - group);
    UNROLL for (int o = 0; o < outputs; o++) {
      const int64_t from = 4 * (index[o] * p.groups + group);
      const Words scale = bytes < BYTES ? load_some(p.scale + from, bytes) : load(p.scale + from);
      const Words zero = bytes < BYTES ? load_some(p.zero + from, bytes) : load(p.zero + from);
      const Floats shift = (Floats)scale * (Floats)zero;
      UNROLL for (int r = 0; r < rows; r++) sum[r][o] -= shift * (Floats)load(x.sums + r * layout.sums + group);
    }
  }
}

template <int rows>
INLINE void store_rows(const Operands& p, const Rows& x, const Floats (&sum)[rows][4], int64_t output, int64_t count) {
  UNROLL for (int r = 0; r < rows; r++) {
    store_totals(sum[r], p.y + 4 * ((x.first + r) * p.out + output), count);
  }
}

// Computes `count` outputs, at most `outputs`, of some rows. `ahead` is the distance in bytes of the weights to fetch
// meanwhile.
template <Form form, int rows, int outputs>
TARGET static void multiply_tile(const Operands& p, const Layout& layout, const Rows& x, int64_t output, int64_t count,
                                 int64_t ahead) {
  const uint8_t* weight[outputs];
  int64_t index[outputs];
  UNROLL for (int o = 0; o < outputs; o++) {
    index[o] = output + (o < count ? o : count - 1);  // outputs beyond the last one are not stored
    weight[o] = p.weight + index[o] * layout.row_bytes;
  }
  Floats sum[rows][4] = {};
  for (int64_t segment = 0, block = 0; segment < layout.segments; segment++) {
    if (form != Form::kBfloat16 && layout.segment == 1) {
      // The scales change with every block: with fewer outputs together, their sums take fewer registers.
      constexpr int together = rows <= 2 ? kScaledTogether : rows <= 4 ? outputs : 1;
      const bool is_full = block < layout.full;
      UNROLL for (int first = 0; first < outputs; first += together) {
        Words packed[together];
        UNROLL for (int o = 0; o < together; o++) {
          const uint8_t* from = weight[first + o] + block * BYTES;
          __builtin_prefetch(from + ahead, 0, 2);
          packed[o] = is_full ? load(from) : load_some(from, layout.row_bytes - block * BYTES);
        }
        int64_t own[together];
        UNROLL for (int o = 0; o < together; o++) own[o] = index[first + o];
        Floats dot[rows][together] = {};
        add_block<form, rows, together>(dot, packed, x.x + block * kBlock<form> * rows);
        add_segment<form>(p, layout, own, segment, dot, sum, first);
      }
      block++;
      continue;
    }
    Floats dot[rows][outputs] = {};
    const int64_t end = block + layout.segment < layout.blocks ? block + layout.segment : layout.blocks;
    const int64_t full = end < layout.full ? end : layout.full;
    for (; block < full; block++) {
      Words packed[outputs];
      UNROLL for (int o = 0; o < outputs; o++) {
        __builtin_prefetch(weight[o] + block * BYTES + ahead, 0, 2);
        packed[o] = load(weight[o] + block * BYTES);
      }
      add_block<form, rows, outputs>(dot, packed, x.x + block * kBlock<form> * rows);
    }
    if (block < end) {  // the row's last block is not full
      Words packed[outputs];
      UNROLL for (int o = 0; o < outputs; o++) {
        packed[o] = load_some(weight[o] + block * BYTES, layout.row_bytes - block * BYTES);
      }
      add_block<form, rows, outputs>(dot, packed, x.x + block * kBlock<form> * rows);
      block++;
    }
    add_segment<form>(p, layout, index, segment, dot, sum);
  }
  if (form == Form::kInt4 && p.zero) subtract_zeros<rows, outputs>(p, layout, x, index, sum);
  store_rows<rows>(p, x, sum, output, count);
}

template <Form form>
TARGET static void multiply_few(const Operands& p, const void* x_copy, int64_t first, int64_t last) {
  const Layout layout(p, kBlock<form>);
  for (int64_t output = first; output < last; output += kOutputs) {
    const int64_t count = last - output < kOutputs ? last - output : kOutputs;
    // The next outputs' weights are fetched while these ones are multiplied, by the first rows.
    int64_t ahead = output + kOutputs < last ? kOutputs * layout.row_bytes : 0;
    if (ahead && form != Form::kBfloat16) {
      const int64_t numbers = 4 * p.groups, next = (output + kOutputs) * numbers;
      const int64_t bytes = (last - output < 2 * kOutputs ? last - output - kOutputs : kOutputs) * numbers;
      fetch(p.scale + next, bytes);
      if (p.zero) fetch(p.zero + next, bytes);
    }
    for (int64_t row = 0, rows; row < p.rows; row += rows, ahead = 0) {
      rows = rows_together<form>(p.rows - row, true);
      const Rows x(layout, kBlock<form>, x_copy, row);
      if constexpr (rows_together<form>(8, true) == 8) {
        for (int64_t o = 0; rows == 8 && o < count; o += 2) {
          multiply_tile<form, 8, 2>(p, layout, x, output + o, count - o < 2 ? 1 : 2, ahead);
        }
      }
      if (rows == 4) multiply_tile<form, 4, 4>(p, layout, x, output, count, ahead);
      if (rows == 3) multiply_tile<form, 3, 4>(p, layout, x, output, count, ahead);
      if (rows == 2) multiply_tile<form, 2, 4>(p, layout, x, output, count, ahead);
      if (rows == 1) multiply_tile<form, 1, 4>(p, layout, x, output, count, ahead);
    }
  }
}

// With many rows, the weights of a chunk are first unpacked to panels of `kOutputs` outputs, in the order in which
// they are multiplied. They stay in the second level of the cache while the rows pass.

// Returns an operand with weights in place of integers.
INLINE Words scaled(Words operand, Floats scale, Floats zero) {
#if PAIRS
  const Floats low = ((Floats)(operand << 16) - zero) * scale, high = ((Floats)(operand & 0xffff0000u) - zero) * scale;
  return __builtin_convertvector(narrow(low), Words) | __builtin_convertvector(narrow(high), Words) << 16;
#else
  return (Words)(((Floats)operand - zero) * scale);
#endif
}

template <Form form>
TARGET static void unpack_panel(const Operands& p, const Layout& layout, int64_t output, int64_t count, Element* to) {
  int64_t index[kOutputs];
  UNROLL for (int o = 0; o < kOutputs; o++) index[o] = output + (o < count ? o : count - 1);
  for (int64_t block = 0; block < layout.blocks; block++) {
    Words packed[kOutputs];
    const int64_t size = block < layout.full ? BYTES : layout.row_bytes - block * BYTES;
    UNROLL for (int o = 0; o < kOutputs; o++) {
      const uint8_t* from = p.weight + index[o] * layout.row_bytes + block * BYTES;
      __builtin_prefetch(from + kOutputs * layout.row_bytes, 0, 2);
      packed[o] = size == BYTES ? load(from) : load_some(from, size);
    }
    if (form == Form::kBfloat16 || !p.scales_first) {
      UNROLL for (int k = 0; k < kVectors<form>; k++) {
        UNROLL for (int o = 0; o < kOutputs; o++, to += kElements) {
          const Words operand = unpack<form>(packed[o], k);
          __builtin_memcpy(to, &operand, BYTES);
        }
      }
      continue;
    }
    UNROLL for (int o = 0; o < kOutputs; o++) {
      const int64_t first = 4 * index[o] * p.groups, segment = block / layout.segment;
      const Floats scale = of_lanes(p, layout, p.scale + first, segment, kBlock<form>);
      const Floats zero = p.zero ? of_lanes(p, layout, p.zero + first, segment, kBlock<form>) : Floats{};
      UNROLL for (int k = 0; k < kVectors<form>; k++) {
        const Words operand = scaled(unpack<form>(packed[o], k), scale, zero);
        __builtin_memcpy(to + (k * kOutputs + o) * kElements, &operand, BYTES);
      }
    }
    to += kVectors<form> * kOutputs * kElements;
  }
}

// Multiplies some rows with a panel. There is one scale for each output, or the weights were multiplied by theirs.
template <Form form, int rows>
TARGET static void multiply_panel(const Operands& p, const Layout& layout, const Rows& x, const Element* panel,
                                  int64_t output, int64_t count) {
  const Element* of_x = x.x;
  const Element* const end = of_x + layout.blocks * kBlock<form> * rows;
  Floats dot[rows][kOutputs] = {};
  for (; of_x != end; of_x += rows * kElements, panel += kOutputs * kElements) {
    Words weight[kOutputs];
    UNROLL for (int o = 0; o < kOutputs; o++) weight[o] = load(panel + o * kElements);
    UNROLL for (int r = 0; r < rows; r++) {
      const Words row = load(of_x + r * kElements);
      UNROLL for (int o = 0; o < kOutputs; o++) dot[r][o] = multiply_add(row, weight[o], dot[r][o]);
    }
  }
  if (form == Form::kBfloat16 || p.scales_first) return store_rows<rows>(p, x, dot, output, count);
  int64_t index[kOutputs];
  UNROLL for (int o = 0; o < kOutputs; o++) index[o] = output + (o < count ? o : count - 1);
  Floats sum[rows][kOutputs] = {};
  add_segment<form>(p, layout, index, 0, dot, sum);
  if (form == Form::kInt4 && p.zero) subtract_zeros<rows, kOutputs>(p, layout, x, index, sum);
  store_rows<rows>(p, x, sum, output, count);
}

template <Form form>
TARGET static void multiply_many(const Operands& p, const void* x_copy, Element* panels, int64_t first, int64_t last) {
  if (first == last) return;
  const Layout layout(p, kBlock<form>);
  const int64_t panel_size = layout.blocks * kBlock<form> * kOutputs;
  for (int64_t output = first; output < last; output += kOutputs) {
    const int64_t count = last - output < kOutputs ? last - output : kOutputs;
    unpack_panel<form>(p, layout, output, count, panels + (output - first) / kOutputs * panel_size);
  }
  for (int64_t row = 0, rows; row < p.rows; row += rows) {
    rows = rows_together<form>(p.rows - row, false);
    const Rows x(layout, kBlock<form>, x_copy, row);
    const Element* panel = panels;
    const Element* next = x.x + rows * layout.blocks * kBlock<form>;  // the next rows are fetched meanwhile
    const int64_t part = row + rows < p.rows ? rows * panel_size / (last - first) : 0;
    for (int64_t output = first; output < last; output += kOutputs, panel += panel_size, next += part) {
      const int64_t count = last - output < kOutputs ? last - output : kOutputs;
      fetch(next, part * sizeof(Element));
      if constexpr (rows_together<form>(6, false) == 6) {
        if (rows == 6) multiply_panel<form, 6>(p, layout, x, panel, output, count);
      }
      if (rows == 4) multiply_panel<form, 4>(p, layout, x, panel, output, count);
      if (rows == 3) multiply_panel<form, 3>(p, layout, x, panel, output, count);
      if (rows == 2) multiply_panel<form, 2>(p, layout, x, panel, output, count);
      if (rows == 1) multiply_panel<form, 1>(p, layout, x, panel, output, count);
    }
  }
}

INLINE float x_at(const Operands& p, int64_t index) {
  if (!p.x_is_bfloat16) return load_float(p.x, index);
  uint16_t bits;
  __builtin_memcpy(&bits, p.x + 2 * index, 2);
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

INLINE Element read_x(const Operands& p, int64_t index) {
#if PAIRS
  Element bits;
  __builtin_memcpy(&bits, p.x + 2 * index, 2);
  return bits;
#else
  return x_at(p, index);
#endif
}

// Returns the sum of `count` inputs.
INLINE float sum_x(const Operands& p, int64_t first, int64_t count) {
  Floats sums = {};
  int64_t done = 0;
  for (; done + kLanes <= count; done += kLanes) sums += load_x(p, first + done);
  float sum = 0;
  UNROLL for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
  for (; done < count; done++) sum += x_at(p, first + done);
  return sum;
}

// Copies rows of x into the order in which `multiply_tile` reads it: for some rows, by block, operand, row and element.
template <Form form>
TARGET static void copy_form(const Operands& p, void* copy, int64_t first, int64_t last) {
  const Layout layout(p, kBlock<form>);
  for (int64_t row = first, rows; row < last; row += rows) {
    rows = rows_together<form>(p.rows - row, p.are_few());
    const Rows part(layout, kBlock<form>, copy, row);
    Element* to = const_cast<Element*>(part.x);
    for (int64_t block = 0; block < layout.blocks; block++) {
      const int64_t start = block * kBlock<form>, rest = p.in - start;
      for (int k = 0; k < kVectors<form>; k++) {
        for (int64_t r = 0; r < rows; r++, to += kElements) {
          const int64_t from = (row + r) * p.in + start;
          if (PAIRS && form == Form::kBfloat16 && rest >= kBlock<form>) {
            __builtin_memcpy(to, p.x + 2 * from, BYTES);
          } else if (rest >= kBlock<form>) {
            for (int e = 0; e < kElements; e++) to[e] = read_x(p, from + input_at<form>(k, e));
          } else {
            for (int e = 0; e < kElements; e++) {
              to[e] = input_at<form>(k, e) < rest ? read_x(p, from + input_at<form>(k, e)) : Element(0);
            }
          }
        }
      }
    }
    if (!layout.sums) continue;
    float* sums = const_cast<float*>(part.sums);
    for (int64_t r = 0; r < rows; r++, sums += layout.sums) {
      for (int64_t group = 0; group < layout.sums; group++) {
        sums[group] = group < p.groups ? sum_x(p, (row + r) * p.in + group * layout.group, layout.group) : 0;
      }
    }
  }
}

static size_t copy_bytes(const Operands& p) { return Layout(p, kLanes * weights_per_word(p.form)).bytes; }

static void copy(const Operands& p, void* to, int64_t first, int64_t last) {
  if (p.form == Form::kBfloat16) return copy_form<Form::kBfloat16>(p, to, first, last);
  if (p.form == Form::kInt8) return copy_form<Form::kInt8>(p, to, first, last);
  copy_form<Form::kInt4>(p, to, first, last);
}

static size_t scratch_bytes(const Operands& p) {
  if (p.are_few()) return 0;
  const int block = kLanes * weights_per_word(p.form);
  return (size_t)(Layout(p, block).blocks * block) * sizeof(Element);
}

template <Form form>
TARGET static void multiply_form(const Operands& p, const void* copy, uint8_t* scratch, int64_t first, int64_t last) {
  if (p.are_few()) return multiply_few<form>(p, copy, first, last);
  multiply_many<form>(p, copy, (Element*)scratch, first, last);
}

static void multiply(const Operands& p, const void* copy, uint8_t* scratch, int64_t first, int64_t last) {
  if (p.form == Form::kBfloat16) return multiply_form<Form::kBfloat16>(p, copy, scratch, first, last);
  if (p.form == Form::kInt8) return multiply_form<Form::kInt8>(p, copy, scratch, first, last);
  multiply_form<Form::kInt4>(p, copy, scratch, first, last);
}
