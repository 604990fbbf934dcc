// Binds the product to XLA's foreign function interface, and divides it over XLA's threads.
//
// This uses the interface's C header: `ffi.h` would take most of the time of compilation.

#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "product.h"
#include "xla/ffi/api/c_api.h"

namespace phi3_jax {
namespace {

constexpr int64_t kLeastBytes = 128 << 10;  // of a weight, for which a second thread pays
constexpr int64_t kLeastChunk = 32 << 10, kMostChunk = 512 << 10;
constexpr int64_t kChunksPerThread = 8;

// A product that several threads compute. Whoever leaves it last deletes it.
struct Job {
  Operands operands;
  const Variant* variant;
  void* copy;
  int64_t chunk, chunks;  // outputs of a chunk
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<int64_t> users;

  void run() {
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      const int64_t first = index * chunk, last = first + chunk;
      variant->multiply(operands, copy, first, last < operands.out ? last : operands.out);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  // Waits for chunks that other threads have begun. Threads that have not begun any are not waited for, so that jobs
  // on all threads of a pool cannot wait for each other.
  void wait() {
    for (int turn = 0; done.load(std::memory_order_acquire) < chunks; turn++) {
      if (turn > 1000) sched_yield();
    }
  }

  void leave() {
    if (users.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    std::free(copy);
    this->~Job();
    std::free(this);
  }
};

void help(void* data) {
  Job* job = static_cast<Job*>(data);
  job->run();
  job->leave();
}

int64_t thread_count(const XLA_FFI_CallFrame* frame);
bool schedule(const XLA_FFI_CallFrame* frame, Job* job);

// Computes a product; `frame` gives the threads, or is null: only this one. Returns false if memory is full.
bool run_product(const Operands& operands, const Variant* variant, int64_t chunk, const XLA_FFI_CallFrame* frame) {
  void* memory = std::malloc(sizeof(Job));
  if (!memory) return false;
  Job* job = new (memory) Job();
  job->operands = operands;
  job->variant = variant;
  const size_t bytes = variant->copy_bytes(operands);
  job->copy = std::aligned_alloc(64, bytes / 64 * 64 + 64);
  job->users = 1;
  if (!job->copy) {
    job->leave();
    return false;
  }
  variant->copy(operands, job->copy);

  const int64_t weight_bytes = operands.out * operands.row_bytes();
  const int64_t threads = frame && weight_bytes >= kLeastBytes ? thread_count(frame) : 1;
  if (!chunk) {
    int64_t chunk_bytes = weight_bytes / (threads * kChunksPerThread);
    chunk_bytes = chunk_bytes < kLeastChunk ? kLeastChunk : chunk_bytes > kMostChunk ? kMostChunk : chunk_bytes;
    const int64_t row_bytes = operands.row_bytes() ? operands.row_bytes() : 1;
    chunk = threads == 1 ? operands.out : chunk_bytes / row_bytes;
  }
  job->chunk = (chunk + kOutputs - 1) / kOutputs * kOutputs;
  if (job->chunk == 0) job->chunk = kOutputs;
  job->chunks = (operands.out + job->chunk - 1) / job->chunk;
  for (int64_t helper = 1; helper < threads && helper < job->chunks; helper++) {
    job->users.fetch_add(1, std::memory_order_relaxed);
    if (!schedule(frame, job)) {
      job->users.fetch_sub(1, std::memory_order_relaxed);
      break;
    }
  }
  job->run();
  job->wait();
  job->leave();
  return true;
}

// Returns false if there was an error, which it destroys.
bool succeeded(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  if (!error) return true;
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
  return false;
}

int64_t thread_count(const XLA_FFI_CallFrame* frame) {
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame->ctx,
                                             &count};
  return succeeded(frame->api, frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) && count > 1 ? count : 1;
}

bool schedule(const XLA_FFI_CallFrame* frame, Job* job) {
  XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, frame->ctx, help,
                                           job};
  return succeeded(frame->api, frame->api->XLA_FFI_ThreadPool_Schedule(&args));
}

XLA_FFI_Error* fail(const XLA_FFI_CallFrame* frame, XLA_FFI_Error_Code code, const char* message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message, code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

const XLA_FFI_Buffer& argument(const XLA_FFI_CallFrame* frame, int64_t index) {
  return *static_cast<const XLA_FFI_Buffer*>(frame->args.args[index]);
}

const uint8_t* bytes_of(const XLA_FFI_Buffer& buffer) { return static_cast<const uint8_t*>(buffer.data); }

}  // namespace
}  // namespace phi3_jax

// The handler of XLA: arguments x, weight and, unless it is bfloat16, scale and perhaps zero, as in `product.py`,
// which checks them.
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* phi3_jax_product(XLA_FFI_CallFrame* frame) {
  using namespace phi3_jax;
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    metadata->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    metadata->traits = 0;
    metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
  if (frame->args.size < 2 || frame->args.size > 4 || frame->rets.size != 1) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "phi3_jax_product takes 2 to 4 arguments");
  }
  const XLA_FFI_Buffer &x = argument(frame, 0), &weight = argument(frame, 1);
  Operands operands = {};
  operands.form = frame->args.size == 2                    ? Form::kBfloat16
                  : weight.dtype == XLA_FFI_DataType_S8 ? Form::kInt8
                                                           : Form::kInt4;
  operands.x_is_bfloat16 = x.dtype == XLA_FFI_DataType_BF16;
  operands.rows = x.dims[0];
  operands.in = x.dims[1];
  operands.out = weight.dims[0];
  operands.groups = 1;
  operands.x = bytes_of(x);
  operands.weight = bytes_of(weight);
  if (frame->args.size > 2) {
    operands.groups = argument(frame, 2).dims[1];
    operands.scale = bytes_of(argument(frame, 2));
  }
  if (frame->args.size > 3) operands.zero = bytes_of(argument(frame, 3));
  operands.y = static_cast<uint8_t*>(static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0])->data);
  if (run_product(operands, choose_variant(operands), 0, frame)) return nullptr;
  return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "phi3_jax_product: memory is full");
}

// The same on this thread alone, by a variant and in chunks of a number of outputs, for tests. Returns false if the
// variant does not run here.
extern "C" __attribute__((visibility("default"))) bool phi3_jax_product_by(
    const char* name, int form, bool x_is_bfloat16, int64_t rows, int64_t in, int64_t out, int64_t groups,
    int64_t chunk, const uint8_t* x, const uint8_t* weight, const uint8_t* scale, const uint8_t* zero, uint8_t* y) {
  using namespace phi3_jax;
  const Operands operands = {static_cast<Form>(form), x_is_bfloat16, rows, in, out, groups, x, weight, scale, zero, y};
  const Variant* variant = choose_variant(operands, name);
  return variant && run_product(operands, variant, chunk, nullptr);
}

// Returns the name of the variant for bfloat16.
extern "C" __attribute__((visibility("default"))) const char* phi3_jax_variant() {
  phi3_jax::Operands operands = {};
  operands.x_is_bfloat16 = true;
  return phi3_jax::choose_variant(operands)->name;
}
