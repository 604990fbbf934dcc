// The variants of the kernels, and the choice between them.

#include "attention.h"
#include "product.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace phi3_jax {

// Any processor, by the vectors that it always has.
namespace portable {
#define TARGET
#define BYTES 16
#define PAIRS 0
#include "kernels.h"
#include "attention_kernels.h"
#undef TARGET
#undef BYTES
#undef PAIRS
#undef INLINE
#undef UNROLL
}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
#define BYTES 32
#define PAIRS 0
#include "kernels.h"
#include "attention_kernels.h"
#undef TARGET
#undef BYTES
#undef PAIRS
#undef INLINE
#undef UNROLL
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define BYTES 64
#define PAIRS 0
#include "kernels.h"
#include "attention_kernels.h"
#undef TARGET
#undef BYTES
#undef PAIRS
#undef INLINE
#undef UNROLL
}  // namespace avx512

// Products of bfloat16 are exact here, too, but bfloat16 numbers below the normal ones count as zero.
namespace avx512bf16 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define BYTES 64
#define PAIRS 1
#include "kernels.h"
#include "attention_kernels.h"
#undef TARGET
#undef BYTES
#undef PAIRS
#undef INLINE
#undef UNROLL
}  // namespace avx512bf16

#endif

// Groups that cut through a word of the weight: not fast, and never of a model that this package writes.
namespace any_groups {

template <typename T>
T read(const uint8_t* from, int64_t index) {
  T value;
  std::memcpy(&value, from + index * (int64_t)sizeof(T), sizeof(T));
  return value;
}

float widen(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  return read<float>((const uint8_t*)&wide, 0);
}

float weight_at(const Operands& p, int64_t output, int64_t input) {
  const int64_t index = output * p.in + input;
  if (p.form == Form::kBfloat16) return widen(read<uint16_t>(p.weight, index));
  const int64_t group = output * p.groups + input / (p.in / p.groups);
  const float scale = read<float>(p.scale, group);
  if (p.form == Form::kInt8) return scale * (float)(int8_t)p.weight[index];
  const int nibble = p.weight[index / 2] >> (4 * (index % 2)) & 15;
  return scale * ((float)(nibble - 8) - (p.zero ? read<float>(p.zero, group) : 0.0f));
}

size_t copy_bytes(const Operands&) { return 0; }

void copy(const Operands&, void*, int64_t, int64_t) {}

size_t scratch_bytes(const Operands&) { return 0; }

void multiply(const Operands& p, const void*, uint8_t*, int64_t first, int64_t last) {
  for (int64_t row = 0; row < p.rows; row++) {
    for (int64_t output = first; output < last; output++) {
      double sum = 0;
      for (int64_t input = 0; input < p.in; input++) {
        const int64_t index = row * p.in + input;
        const float x = p.x_is_bfloat16 ? widen(read<uint16_t>(p.x, index)) : read<float>(p.x, index);
        sum += (double)x * weight_at(p, output, input);
      }
      const float y = (float)sum;
      std::memcpy(p.y + 4 * (row * p.out + output), &y, 4);
    }
  }
}

}  // namespace any_groups

static bool always() { return true; }

#define NAMED_VARIANT(text, name, runs_here, bfloat16_only) \
  {text, runs_here, bfloat16_only, name::copy_bytes, name::copy, name::scratch_bytes, name::multiply}
#define VARIANT(name, runs_here, bfloat16_only) NAMED_VARIANT(#name, name, runs_here, bfloat16_only)

static const Variant kAnyGroups = NAMED_VARIANT("any groups", any_groups, always, false);

#if defined(__x86_64__)
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// From the fastest to the slowest.
static const Variant kVariants[] = {
#if defined(__x86_64__)
    VARIANT(avx512bf16, has_avx512bf16, true), VARIANT(avx512, has_avx512, false), VARIANT(avx2, has_avx2, false),
#endif
    VARIANT(portable, always, false)};

#define ATTENTION(name, runs_here, bfloat16_only) \
  {#name, runs_here, bfloat16_only, name::attention_scratch_bytes, name::add_keys}

static const AttentionVariant kAttentions[] = {
#if defined(__x86_64__)
    ATTENTION(avx512bf16, has_avx512bf16, true), ATTENTION(avx512, has_avx512, false), ATTENTION(avx2, has_avx2, false),
#endif
    ATTENTION(portable, always, false)};

// Returns the first variant that this machine runs, or the one called `name`.
template <typename V, size_t count>
static const V* first_here(const V (&variants)[count], bool is_bfloat16, const char* name) {
  for (const V& variant : variants) {
    if (name ? std::strcmp(name, variant.name) == 0 : is_bfloat16 || !variant.bfloat16_only) {
      if (variant.runs_here() && (is_bfloat16 || !variant.bfloat16_only)) return &variant;
    }
  }
  return nullptr;
}

const AttentionVariant* choose_attention(const Attention& a, const char* name) {
  return first_here(kAttentions, a.is_bfloat16, name);
}

const Variant* choose_variant(const Operands& p, const char* name) {
  if (p.groups > 1 && p.in / p.groups % weights_per_word(p.form) != 0) return &kAnyGroups;
  return first_here(kVariants, p.x_is_bfloat16, name);
}

}  // namespace phi3_jax
