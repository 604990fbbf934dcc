// What the handlers of XLA's foreign function interface share. They use its C header: `ffi.h` would take most of the
// time of compilation.

#pragma once

#include <cstdint>

#include "xla/ffi/api/c_api.h"

#define HANDLER extern "C" __attribute__((visibility("default"))) XLA_FFI_Error*

namespace phi3_jax {

// Returns whether XLA asks for the version of the interface only, and answers.
inline bool answered_version(const XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
  metadata->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  metadata->traits = 0;
  metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
  return true;
}

inline XLA_FFI_Error* fail(const XLA_FFI_CallFrame* frame, XLA_FFI_Error_Code code, const char* message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message, code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

inline const XLA_FFI_Buffer& argument(const XLA_FFI_CallFrame* frame, int64_t index) {
  return *static_cast<const XLA_FFI_Buffer*>(frame->args.args[index]);
}

inline const uint8_t* bytes_of(const XLA_FFI_Buffer& buffer) { return static_cast<const uint8_t*>(buffer.data); }

// Returns an attribute; they are sorted by name.
template <typename T>
T attribute(const XLA_FFI_CallFrame* frame, int64_t index) {
  return *static_cast<T*>(static_cast<XLA_FFI_Scalar*>(frame->attrs.attrs[index])->value);
}

inline uint8_t* result(const XLA_FFI_CallFrame* frame, int64_t index) {
  return static_cast<uint8_t*>(static_cast<XLA_FFI_Buffer*>(frame->rets.rets[index])->data);
}

}  // namespace phi3_jax
