// Shares work between XLA's threads.

#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "xla/ffi/api/c_api.h"

namespace phi3_jax {

inline size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Returns false if there was an error, which it destroys.
inline bool succeeded(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  if (!error) return true;
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
  return false;
}

// Returns the number of threads; 1 without a frame.
inline int64_t thread_count(const XLA_FFI_CallFrame* frame) {
  if (!frame) return 1;
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame->ctx,
                                             &count};
  return succeeded(frame->api, frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) && count > 1 ? count : 1;
}

// Work in parts that threads take one after the other, in two phases. `Work` has
//
//   int64_t parts(int phase) const
//   void run(int phase, int64_t part, int64_t thread)   with a number for each thread, from 0
//   uint8_t* memory                                     which is freed at the end
//
// Whoever leaves the job last deletes it.
template <typename Work>
struct Job {
  Work work;
  std::atomic<int64_t> next[2] = {}, done[2] = {};
  std::atomic<int64_t> threads{0}, users{1};

  explicit Job(const Work& work) : work(work) {}

  void run() {
    const int64_t thread = threads.fetch_add(1, std::memory_order_relaxed);
    for (int phase = 0; phase < 2; phase++) {
      if (phase) wait(0);
      const int64_t parts = work.parts(phase);
      for (int64_t part; (part = next[phase].fetch_add(1, std::memory_order_relaxed)) < parts;) {
        work.run(phase, part, thread);
        done[phase].fetch_add(1, std::memory_order_release);
      }
    }
  }

  // Waits for parts that other threads have begun. Threads that have not begun any are not waited for, so that jobs
  // on all threads of a pool cannot wait for each other.
  void wait(int phase) {
    for (int turn = 0; done[phase].load(std::memory_order_acquire) < work.parts(phase); turn++) {
      if (turn > 1000) sched_yield();
    }
  }

  void leave() {
    if (users.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    std::free(work.memory);
    this->~Job();
    std::free(this);
  }

  static void help(void* data) {
    Job* job = static_cast<Job*>(data);
    job->run();
    job->leave();
  }

  bool schedule(const XLA_FFI_CallFrame* frame) {
    users.fetch_add(1, std::memory_order_relaxed);
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, frame->ctx, help,
                                             this};
    if (succeeded(frame->api, frame->api->XLA_FFI_ThreadPool_Schedule(&args))) return true;
    users.fetch_sub(1, std::memory_order_relaxed);
    return false;
  }
};

// Does the work on so many threads, this one included, and waits for its end. Returns false if memory is full.
template <typename Work>
bool share(const Work& work, int64_t threads, const XLA_FFI_CallFrame* frame) {
  void* memory = std::malloc(sizeof(Job<Work>));
  if (!memory) {
    std::free(work.memory);
    return false;
  }
  Job<Work>* job = new (memory) Job<Work>(work);
  const int64_t first = work.parts(0), second = work.parts(1), parts = first > second ? first : second;
  for (int64_t helper = 1; helper < threads && helper < parts; helper++) {
    if (!job->schedule(frame)) break;
  }
  job->run();
  job->wait(1);
  job->leave();
  return true;
}

}  // namespace phi3_jax
