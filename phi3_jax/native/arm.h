// What `vectors.h` says, for 64-bit Arm. Vectors have 16 bytes, in 32 registers.

constexpr int64_t kFewTogether = 4, kManyTogether = 6;
constexpr int kScaledTogether = 4;

INLINE Floats widen_bfloat16(const uint8_t* from) {
  return (Floats)vshll_n_u16(vreinterpret_u16_u8(vld1_u8(from)), 16);
}

// Returns bytes of `packed` as float32: those of which `indices` has the numbers, each after three others, which are
// beyond the vector, so that `TBL` makes zeros of them. The conversion divides by 2^24.
INLINE Floats bytes_to_floats(Words packed, Words indices) {
  return (Floats)vcvtq_n_f32_s32((int32x4_t)vqtbl1q_u8((uint8x16_t)packed, (uint8x16_t)indices), 24);
}

INLINE Floats widen_int8(const uint8_t* from) {
  uint32_t word;
  __builtin_memcpy(&word, from, 4);
  return bytes_to_floats((Words)vdupq_n_u32(word), Words{0x00ffffff, 0x01ffffff, 0x02ffffff, 0x03ffffff});
}

INLINE Floats int8_at(Words packed, int k) {
  return bytes_to_floats(packed, Words{0x00ffffff, 0x04ffffff, 0x08ffffff, 0x0cffffff} + ((uint32_t)k << 24));
}

// Operands from the same bytes follow each other: in float32, also the two of a pair.
constexpr int int4_number(int k) {
  return PAIRS ? k / 2 + k % 2 * 2 : k / 4 + k / 2 % 2 * 2 + k % 2 * 4;
}

// Looks up the bytes of bfloat16, which cost no conversion.
INLINE Words unpack_int4(Words packed, int k) {
  uint8x16_t upper = {0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf, 0, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40};
  uint8x16_t lower = {0, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0, 0x80, 0, 0x80, 0, 0x40, 0x80, 0xa0, 0xc0, 0xe0};
  asm("" : "+w"(upper), "+w"(lower));  // otherwise GCC loads the constants for each use
  const int number = int4_number(k) % 4;
  const uint8x16_t bytes = (uint8x16_t)packed, odd = vshrq_n_u8(bytes, 4), even = vandq_u8(bytes, vdupq_n_u8(15));
  const uint8x16_t nibbles = number % 2 ? odd : even;
  const uint8x16_t uppers = vqtbl1q_u8(upper, nibbles), lowers = vqtbl1q_u8(lower, nibbles);
  const Words pairs = (Words)(number < 2 ? vtrn1q_u8(lowers, uppers) : vtrn2q_u8(lowers, uppers));
  return PAIRS ? pairs : k % 2 ? pairs & 0xffff0000u : pairs << 16;
}

INLINE Floats multiply_add(Words x, Words weight, Floats sum) {
#if PAIRS
  return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)weight);
#else
  return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)weight);
#endif
}

#if PAIRS
INLINE Words upper_halves(Floats low, Floats high) { return (Words)vtrn2q_u16((uint16x8_t)low, (uint16x8_t)high); }

INLINE Halves narrow(Floats values) { return (Halves)vcvt_bf16_f32((float32x4_t)values); }
#endif

INLINE void add_lanes(const Floats (&sums)[4], float* totals) {
  const float32x4_t ab = vpaddq_f32((float32x4_t)sums[0], (float32x4_t)sums[1]);
  const float32x4_t cd = vpaddq_f32((float32x4_t)sums[2], (float32x4_t)sums[3]);
  vst1q_f32(totals, vpaddq_f32(ab, cd));
}
