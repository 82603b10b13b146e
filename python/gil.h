// Releasing and acquiring the GIL, also while the interpreter is shutting down.
//
// Before Python 3.14, a thread that requests the GIL during shutdown is ended by pthread_exit, and
// unwinding C++ frames with destructors then aborts the process. So a thread that returns from
// native code that late blocks forever instead, as Python 3.14 does itself.
#pragma once

#include <nanobind/nanobind.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <thread>

class InterpreterEnd {
 public:
  /// Called once, when the module is created.
  static void watch() {
    namespace nb = nanobind;
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(&begin));
    pthread_atfork(nullptr, nullptr, [] { requests_ = 0; });  // the child has no other threads
  }

  /// Brackets a request for the GIL.
  template <class Request>
  static void guard(const Request& request) {
    ++requests_;
    if (has_begun_ && std::this_thread::get_id() != ender_) {
      --requests_;
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
    request();
    --requests_;
  }

 private:
  /// Called at shutdown. After it returns no thread requests the GIL.
  static void begin() {
    ender_ = std::this_thread::get_id();
    has_begun_ = true;
    PyThreadState* state = PyEval_SaveThread();
    while (requests_ > 0) std::this_thread::yield();
    PyEval_RestoreThread(state);
  }

  inline static std::atomic<int> requests_ = 0;  // threads requesting the GIL
  inline static std::atomic<bool> has_begun_ = false;
  inline static std::thread::id ender_;
};

/// Releases the GIL while it lives.
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

/// Holds the GIL while it lives.
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
