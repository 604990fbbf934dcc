// What depends on the processor: x86 with AVX2 or AVX-512, 64-bit Arm (`arm.h`), or any one by vectors of 16 bytes.

// Returns the first `bytes`, less than a vector, and then zeros.
INLINE Words load_some(const void* from, int64_t bytes) {
#if BYTES == 64
  return (Words)_mm512_maskz_loadu_epi8((__mmask64)((1ull << bytes) - 1), from);
#else
  Words words = {};
  __builtin_memcpy(&words, from, bytes);
  return words;
#endif
}

// Returns the first `count` numbers, each for as many neighbouring lanes as `lanes` says; then zeros.
INLINE Floats spread(const uint8_t* from, int64_t count, const int32_t* lanes) {
#if BYTES == 64
  const __m512 numbers = _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
  return (Floats)_mm512_permutexvar_ps(_mm512_load_si512(lanes), numbers);
#elif BYTES == 32
  const __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256 numbers = _mm256_maskload_ps((const float*)from, first);
  return (Floats)_mm256_permutevar8x32_ps(numbers, _mm256_load_si256((const __m256i*)lanes));
#else
  Floats values = {};
  for (int lane = 0; lane < kLanes; lane++) {
    if (lanes[lane] < count) values[lane] = load_float(from, lanes[lane]);
  }
  return values;
#endif
}

#if NEON
#include "arm.h"
#else

// How many rows are computed together, if there are few and many: as many as there are registers for their sums.
constexpr int64_t kFewTogether = BYTES == 32 ? 2 : 4, kManyTogether = BYTES == 64 ? 6 : kFewTogether;

// How many outputs of one or two rows are computed together, if the scales change with every block.
constexpr int kScaledTogether = 2;

// Returns bfloat16 as float32, one for each lane.
INLINE Floats widen_bfloat16(const uint8_t* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// Returns int8 as float32, one for each lane.
INLINE Floats widen_int8(const uint8_t* from) {
#if BYTES == 64
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif BYTES == 32
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  Floats values;
  for (int lane = 0; lane < kLanes; lane++) values[lane] = (float)(int8_t)from[lane];
  return values;
#endif
}

// Returns int8 number `k` of each word as float32.
INLINE Floats int8_at(Words packed, int k) {
  return __builtin_convertvector((Ints)(packed << (24 - 8 * k)) >> 24, Floats);
}

// The number of each word that is operand `k` of int4, or the first one of a pair, whose second one is 4 after it.
constexpr int int4_number(int k) { return k; }

// Returns operand `k` of int4, which are numbers from -8.
INLINE Words unpack_int4(Words packed, int k) {
#if PAIRS
  alignas(64) static constexpr uint16_t kNibbles[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
      0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
      0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // -8 to 7, twice
  // Five bits are the index of a 16-bit lane; the fifth does not matter, as the table repeats.
  return (Words)_mm512_permutexvar_epi16((__m512i)(packed >> (4 * k)), _mm512_load_si512(kNibbles));
#elif BYTES == 64
  const __m512 nibbles = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return (Words)_mm512_permutexvar_ps((__m512i)(packed >> (4 * k)), nibbles);
#else
  const Words flipped = packed ^ 0x88888888u;  // nibbles of u - 8 in two's complement
  return (Words)__builtin_convertvector((Ints)(flipped << (28 - 4 * k)) >> 28, Floats);
#endif
}

INLINE Floats multiply_add(Words x, Words weight, Floats sum) {
#if PAIRS
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weight);
#elif BYTES == 64
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)weight, (__m512)sum);
#elif BYTES == 32
  return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)weight, (__m256)sum);
#else
  return (Floats)x * (Floats)weight + sum;
#endif
}

#if PAIRS
// Returns words with the upper half of `low`, whose lower half is zero as that of `high`, and the upper half of `high`.
INLINE Words upper_halves(Floats low, Floats high) { return (Words)low >> 16 | (Words)high; }

// Rounds to bfloat16.
INLINE Halves narrow(Floats values) { return (Halves)_mm512_cvtneps_pbh((__m512)values); }
#endif

// Writes the sum over the lanes of each vector to `totals`, at a multiple of 16.
INLINE void add_lanes(const Floats (&sums)[4], float* totals) {
#if BYTES == 64
  const __m512 a = (__m512)sums[0], b = (__m512)sums[1], c = (__m512)sums[2], d = (__m512)sums[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(abcd),
                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1)));
#elif BYTES == 32
  const __m256 a = (__m256)sums[0], b = (__m256)sums[1], c = (__m256)sums[2], d = (__m256)sums[3];
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
#if BYTES >= 32
  _mm_store_ps(totals, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int o = 0; o < 4; o++) totals[o] = (sums[o][0] + sums[o][1]) + (sums[o][2] + sums[o][3]);
#endif
}

#endif
