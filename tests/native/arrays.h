// Random arrays for checks under sanitizers: each has a block of memory of its own, which ends where the array ends and
// begins at an odd address, so that reading or writing beside an array ends the program.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

static uint32_t state = 1;

static uint32_t draw(uint32_t below) {
  state = state * 1664525u + 1013904223u;
  return (state >> 8) % below;
}

static float draw_float() { return (float)draw(2001) / 1000.0f - 1.0f; }

// Bytes at an odd address.
struct Array {
  uint8_t* memory;
  explicit Array(size_t size) : memory((uint8_t*)std::malloc(size + 1)) {}
  Array(const Array&) = delete;
  ~Array() { std::free(memory); }
  uint8_t* bytes() const { return memory + 1; }

  float at(int64_t index) const {
    float value;
    std::memcpy(&value, bytes() + 4 * index, 4);
    return value;
  }

  void set(int64_t index, float value) { std::memcpy(bytes() + 4 * index, &value, 4); }

  float bfloat16_at(int64_t index) const {
    uint32_t wide = bytes()[2 * index] << 16 | (uint32_t)bytes()[2 * index + 1] << 24;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }

  void set_bfloat16(int64_t index, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bytes()[2 * index] = (uint8_t)(bits >> 16);
    bytes()[2 * index + 1] = (uint8_t)(bits >> 24);
  }
};
