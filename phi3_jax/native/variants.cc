// The variants of the kernels, and the choice between them.

#include "attention_blocks.h"
#include "product.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

// Linux says whether a processor has `bfdot`, and these compilers can use it where only some processors have it.
#if defined(__aarch64__) && defined(HWCAP2_BF16) && (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10)
#define NEONBF16 1
#else
#define NEONBF16 0
#endif

namespace phi3_jax {

// Any processor, by vectors that compilers make of what it has.
namespace portable {
#define TARGET
#define BYTES 16
#define PAIRS 0
#define NEON 0
#include "kernels.h"
#include "attention_kernels.h"
}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
#define BYTES 32
#define PAIRS 0
#define NEON 0
#include "kernels.h"
#include "attention_kernels.h"
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define BYTES 64
#define PAIRS 0
#define NEON 0
#include "kernels.h"
#include "attention_kernels.h"
}  // namespace avx512

// Products of bfloat16 are exact here, too, but bfloat16 numbers below the normal ones count as zero.
namespace avx512bf16 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define BYTES 64
#define PAIRS 1
#define NEON 0
#include "kernels.h"
#include "attention_kernels.h"
}  // namespace avx512bf16

#elif defined(__aarch64__)

// Any 64-bit Arm processor.
namespace neon {
#define TARGET
#define BYTES 16
#define PAIRS 0
#define NEON 1
#include "kernels.h"
#include "attention_kernels.h"
}  // namespace neon

#if NEONBF16
// Here, too, products of two bfloat16 are exact, and numbers below the normal ones count as zero. `bfdot` adds a pair
// of products before it adds them to the sum. It sets the last bit of both results if they are not exact, so that each
// has an error of less than one unit of this bit, instead of half a unit.
namespace neonbf16 {
#define TARGET __attribute__((target("arch=armv8.2-a+bf16")))
#define BYTES 16
#define PAIRS 1
#define NEON 1
#include "kernels.h"
#include "attention_kernels.h"
}  // namespace neonbf16
#endif

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
#define PRODUCT(name, runs_here, bfloat16_only) NAMED_VARIANT(#name, name, runs_here, bfloat16_only)
#define ATTENTION(name, runs_here, bfloat16_only) \
  {#name, runs_here, bfloat16_only, name::attention_scratch_bytes, name::add_keys}

static const Variant kAnyGroups = NAMED_VARIANT("any groups", any_groups, always, false);

#if defined(__x86_64__)
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif NEONBF16
static bool has_neonbf16() { return getauxval(AT_HWCAP2) & HWCAP2_BF16; }
#endif

// From the fastest to the slowest.
#if defined(__x86_64__)
#define VARIANTS(OF) \
  OF(avx512bf16, has_avx512bf16, true), OF(avx512, has_avx512, false), OF(avx2, has_avx2, false), \
      OF(portable, always, false)
#elif NEONBF16
#define VARIANTS(OF) OF(neonbf16, has_neonbf16, true), OF(neon, always, false), OF(portable, always, false)
#elif defined(__aarch64__)
#define VARIANTS(OF) OF(neon, always, false), OF(portable, always, false)
#else
#define VARIANTS(OF) OF(portable, always, false)
#endif

static const Variant kVariants[] = {VARIANTS(PRODUCT)};
static const AttentionVariant kAttentions[] = {VARIANTS(ATTENTION)};

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
