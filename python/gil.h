// Giving up the GIL and taking it, also while the interpreter ends under a thread's feet.
//
// Before Python 3.14 a thread that asks for the GIL when the interpreter is ending is unwound where
// it stands (pthread_exit), and unwinding C++ frames with destructors ends the process. So a thread
// that comes back from native code that late waits instead, as it does from 3.14 on.
#pragma once

#include <nanobind/nanobind.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <thread>

class InterpreterEnd {
 public:
  /// Called once, when the module is made.
  static void watch() {
    namespace nb = nanobind;
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(&begin));
    pthread_atfork(nullptr, nullptr, [] { asking_ = 0; });  // the child has no other threads
  }

  /// Around what asks for the GIL.
  template <class Ask>
  static void guard(const Ask& ask) {
    ++asking_;
    if (has_begun_ && std::this_thread::get_id() != ender_) {
      --asking_;
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
    ask();
    --asking_;
  }

 private:
  /// Run by the ending thread: from its return on nobody asks for the GIL.
  static void begin() {
    ender_ = std::this_thread::get_id();
    has_begun_ = true;
    PyThreadState* state = PyEval_SaveThread();
    while (asking_ > 0) std::this_thread::yield();
    PyEval_RestoreThread(state);
  }

  inline static std::atomic<int> asking_ = 0;  // threads that wait for the GIL
  inline static std::atomic<bool> has_begun_ = false;
  inline static std::thread::id ender_;
};

/// Without the GIL for as long as it lives.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
    InterpreterEnd::guard([this] { PyEval_RestoreThread(state_); });
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

/// With the GIL for as long as it lives.
class GilAcquired {
 public:
  GilAcquired() {
    InterpreterEnd::guard([this] { state_ = PyGILState_Ensure(); });
  }
  ~GilAcquired() { PyGILState_Release(state_); }
  GilAcquired(const GilAcquired&) = delete;
  GilAcquired& operator=(const GilAcquired&) = delete;

 private:
  PyGILState_STATE state_;
};
