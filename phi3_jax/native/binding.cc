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

constexpr int64_t kLeastBytes = 128 << 10;  // of a weight, read by few rows, for which a second thread pays
constexpr int64_t kLeastChunk = 32 << 10, kMostChunk = 512 << 10;
constexpr int64_t kChunksPerThread = 8;
constexpr int64_t kMostRows = 40 * kRows;  // of a job, so that its copy of x is small

// A product that several threads compute. Whoever leaves it last deletes it.
struct Job {
  Operands operands;
  const Variant* variant;
  uint8_t *copy, *scratch;
  size_t thread_bytes;    // of `scratch`, for one thread
  int64_t copies;         // parts of the rows to copy
  int64_t chunk, chunks;  // outputs of a chunk
  std::atomic<int64_t> next_copy{0}, copied{0};
  std::atomic<int64_t> threads{0}, next{0}, done{0};
  std::atomic<int64_t> users;

  void run() {
    const int64_t rows = copies == 1 ? operands.rows : kRows;
    for (int64_t index; (index = next_copy.fetch_add(1, std::memory_order_relaxed)) < copies;) {
      const int64_t first = index * rows, last = first + rows;
      variant->copy(operands, copy, first, last < operands.rows ? last : operands.rows);
      copied.fetch_add(1, std::memory_order_release);
    }
    wait(copied, copies);
    uint8_t* own = scratch + thread_bytes * threads.fetch_add(1, std::memory_order_relaxed);
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      const int64_t first = index * chunk, last = first + chunk;
      variant->multiply(operands, copy, own, first, last < operands.out ? last : operands.out);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  // Waits for parts that other threads have begun. Threads that have not begun any are not waited for, so that jobs
  // on all threads of a pool cannot wait for each other.
  static void wait(const std::atomic<int64_t>& count, int64_t all) {
    for (int turn = 0; count.load(std::memory_order_acquire) < all; turn++) {
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

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Returns how many outputs a thread computes at a time.
int64_t choose_chunk(const Operands& operands, int64_t threads, int64_t output_bytes) {
  if (threads == 1 && operands.rows <= kFewRows) return operands.out;
  const int64_t bytes = operands.out * output_bytes / (threads * kChunksPerThread);
  return (bytes < kLeastChunk ? kLeastChunk : bytes > kMostChunk ? kMostChunk : bytes) / output_bytes;
}

// Computes the product of at most `kMostRows` rows.
bool run_job(const Operands& operands, const Variant* variant, int64_t chunk, const XLA_FFI_CallFrame* frame) {
  void* memory = std::malloc(sizeof(Job));
  if (!memory) return false;
  Job* job = new (memory) Job();
  job->operands = operands;
  job->variant = variant;
  job->users = 1;

  const int64_t read_bytes = operands.out * operands.row_bytes() * (operands.rows > 8 ? operands.rows / 8 : 1);
  const int64_t threads = frame && read_bytes >= kLeastBytes ? thread_count(frame) : 1;
  const int64_t row_bytes = operands.row_bytes() ? operands.row_bytes() : 1;
  const int64_t scratch_bytes = (int64_t)variant->scratch_bytes(operands);
  if (!chunk) chunk = choose_chunk(operands, threads, scratch_bytes > row_bytes ? scratch_bytes : row_bytes);
  job->chunk = chunk < kOutputs ? kOutputs : (chunk + kOutputs - 1) / kOutputs * kOutputs;
  job->chunks = (operands.out + job->chunk - 1) / job->chunk;
  job->copies = threads == 1 || operands.rows <= kFewRows ? 1 : (operands.rows + kRows - 1) / kRows;

  const size_t copy_bytes = rounded(variant->copy_bytes(operands) + 1);
  job->thread_bytes = rounded(job->chunk * scratch_bytes);
  job->copy = static_cast<uint8_t*>(std::aligned_alloc(64, copy_bytes + threads * job->thread_bytes));
  if (!job->copy) {
    job->leave();
    return false;
  }
  job->scratch = job->copy + copy_bytes;
  for (int64_t helper = 1; helper < threads && helper < job->chunks; helper++) {
    job->users.fetch_add(1, std::memory_order_relaxed);
    if (!schedule(frame, job)) {
      job->users.fetch_sub(1, std::memory_order_relaxed);
      break;
    }
  }
  job->run();
  Job::wait(job->done, job->chunks);
  job->leave();
  return true;
}

// Computes a product; `frame` gives the threads, or is null: only this one. Returns false if memory is full.
bool run_product(const Operands& operands, const Variant* variant, int64_t chunk, const XLA_FFI_CallFrame* frame) {
  for (int64_t row = 0; row < operands.rows; row += kMostRows) {
    Operands part = operands;
    part.rows = operands.rows - row < kMostRows ? operands.rows - row : kMostRows;
    part.x += row * operands.in * (operands.x_is_bfloat16 ? 2 : 4);
    part.y += 4 * row * operands.out;
    if (!run_job(part, variant, chunk, frame)) return false;
  }
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
