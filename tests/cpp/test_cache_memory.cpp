// The limit on KV caches: who waits for whom, and what makes room.
#include <sys/wait.h>
#include <tda/engine.h>
#include <unistd.h>

#include <random>
#include <thread>

#include "check.h"
#include "engine/cache_memory.h"
#include "tiny_checkpoint.h"

using tda::CacheMemory;
using tda::FinishReason;
using tda::GenerateOptions;
using tda::Token;

namespace {

constexpr std::int64_t kRoom = 20;  // tokens whose KV caches fit
const std::vector<Token> kPrompt = {1, 5, 9, 13};

/// That make a cache of so many tokens, prompt and all.
GenerateOptions tokens(std::int64_t count) {
  return {.max_new_tokens = count - std::ssize(kPrompt), .ignore_eos = true};
}

class Limited {
 public:
  Limited() {
    tda::EngineOptions options = {.threads = 1};
    options.cache_memory = kRoom * tda::Engine(checkpoint_.folder(), options).kv_bytes_per_token();
    options.before_step = [this] {
      if (before_step) before_step();
    };
    engine_.emplace(checkpoint_.folder(), options);
  }
  const tda::Engine& engine() const { return *engine_; }
  tda::Generation start(std::int64_t count) const { return engine().start(kPrompt, tokens(count)); }

  /// Whether `work`, of one step, need not wait for memory.
  bool has_room_for(const std::function<void()>& work) {
    int calls = 0;
    before_step = [&] {
      if (++calls > 1) throw tda::Error("waits");
    };
    bool has_room = true;
    try {
      work();
    } catch (const tda::Error& error) {
      CHECK(std::string(error.what()) == "waits");
      has_room = false;
    }
    before_step = {};
    return has_room;
  }
  bool has_room_for(std::int64_t count) {
    return has_room_for([&] { start(count).next(); });
  }

  std::function<void()> before_step;  // called by who waits, too

 private:
  const TinyCheckpoint checkpoint_;
  std::optional<tda::Engine> engine_;
};

}  // namespace

TEST(shares_are_given_in_the_order_of_asking) {
  CacheMemory memory(10);
  std::vector<std::int64_t> order;
  std::atomic<std::int64_t> last = 0;  // of those that wait
  std::vector<std::jthread> threads;
  {
    const CacheMemory::Share held = memory.take(6, {});
    for (const std::int64_t bytes : {8, 3, 9}) {  // none beside the one before
      threads.emplace_back([&, bytes] {
        const CacheMemory::Share share = memory.take(bytes, [&] { last = bytes; });
        order.push_back(bytes);
      });
      while (last != bytes) std::this_thread::yield();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(order.empty());
  }
  threads.clear();
  CHECK((order == std::vector<std::int64_t>{8, 3, 9}));
}

TEST(no_share_is_lost_whoever_leaves) {
  CacheMemory memory(100);
  std::atomic<std::int64_t> taken = 0, got = 0, left = 0;
  std::vector<std::jthread> threads;
  for (unsigned seed = 0; seed < 8; ++seed)
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      for (int i = 0; i < 50; ++i) {
        const std::int64_t bytes = 1 + random() % 100;
        try {
          CacheMemory::Share share = memory.take(bytes, [&] {
            if (random() % 8 == 0) throw tda::Error("leaves");
          });
          const CacheMemory::Share moved = std::move(share);
          CHECK((taken += bytes) <= 100);
          ++got;
          if (random() % 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          taken -= bytes;
        } catch (const tda::Error&) {
          ++left;
        }
      }
    });
  threads.clear();
  CHECK(got > 0 && left > 0 && got + left == 8 * 50);
  memory.take(100, [] { throw tda::Error("some are still taken"); });
}

TEST(a_child_waits_for_nobody_in_its_parent) {
  CacheMemory memory(10);
  CacheMemory::Share held = memory.take(7, {});
  std::atomic<bool> waits = false;
  std::jthread other([&] { memory.take(8, [&] { waits = true; }); });
  while (!waits) std::this_thread::yield();
  const pid_t child = fork();
  if (child == 0) {
    int code = 1;
    try {
      const auto full = [] { throw tda::Error("waits"); };
      CacheMemory::Share all = memory.take(10, full);
      held = {};  // which is not the child's to give back
      all = {};
      all = memory.take(10, full);
      try {
        memory.take(1, full);
      } catch (const tda::Error&) {
        code = 0;
      }
    } catch (const tda::Error&) {
    }
    _exit(code);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
  held = {};
}

TEST(one_that_does_not_fit_waits) {
  Limited limited;
  std::optional first = limited.start(12);
  CHECK(limited.has_room_for(kRoom));  // it has not begun
  const auto token = first->next();
  CHECK(limited.has_room_for(8) && !limited.has_room_for(9));
  tda::Generation second = limited.start(9);
  int calls = 0;
  limited.before_step = [&] {
    if (++calls == 3) first.reset();
  };
  CHECK(second.next() == token);
  CHECK(calls == 4);  // the last one before its step
  CHECK(!limited.has_room_for(12) && limited.has_room_for(11));
  CHECK(second.stats().prompt_tokens == 4);
}

TEST(memory_is_free_with_the_last_token) {
  Limited limited;
  const std::vector<Token> expected = limited.engine().generate(kPrompt, tokens(kRoom)).tokens;
  tda::Generation generation = limited.start(kRoom);
  for (const Token token : expected) {
    if (token != expected.front()) CHECK(!limited.has_room_for(5));
    CHECK(generation.next() == token);
  }
  CHECK(limited.has_room_for(kRoom));
  CHECK(generation.finish_reason() == FinishReason::none);
  CHECK(generation.stats().new_tokens == kRoom - 4);
  CHECK(generation.stats().tokens_per_second > 0);
  generation.cancel();  // too late
  CHECK(!generation.next() && generation.finish_reason() == FinishReason::length);
}

TEST(cancelling_makes_room) {
  Limited limited;
  tda::Generation first = limited.start(kRoom);
  first.next();
  first.next();
  tda::Generation second = limited.start(kRoom);
  limited.before_step = [&] { second.cancel(); };
  CHECK(!second.next());  // it waited
  CHECK(second.finish_reason() == FinishReason::cancelled);
  CHECK(!limited.has_room_for(5));
  first.cancel();  // though nobody asks it for a token
  CHECK(limited.has_room_for(kRoom));
  CHECK(first.finish_reason() == FinishReason::cancelled);
  CHECK(!first.next() && first.stats().new_tokens == 2);
  limited.start(kRoom).cancel();  // before it began
  CHECK(limited.has_room_for(kRoom));
}

TEST(another_thread_may_cancel_at_any_time) {
  Limited limited;
  for (int i = 0; i < 50; ++i) {
    tda::Generation generation = limited.start(kRoom);
    {
      const std::jthread other([&] { generation.cancel(); });
      for (int tokens = 0; generation.next(); ++tokens)
        CHECK(generation.stats().new_tokens == tokens + 1);
    }
    CHECK(generation.finish_reason() != FinishReason::none);
    CHECK(limited.has_room_for(kRoom));
  }
}

TEST(an_error_makes_room) {
  Limited limited;
  tda::Generation generation = limited.start(kRoom);
  generation.next();
  limited.before_step = [] { throw tda::Error("enough"); };
  CHECK_THROWS(generation.next(), tda::Error, "enough");
  CHECK(limited.has_room_for(kRoom));
  const std::vector<std::uint32_t> none(2);
  generation = limited.start(kRoom);
  CHECK_THROWS(generation.next(none), tda::OptionError, "allowed");
  CHECK(limited.has_room_for(kRoom));
}

TEST(what_never_fits_is_refused) {
  const Limited limited;
  const std::int64_t each = limited.engine().kv_bytes_per_token();
  CHECK(limited.engine().cache_memory() == kRoom * each);
  const std::string message = "cache_memory: found " + std::to_string(21 * each) +
                              " bytes needed for the KV cache of 21 tokens, new ones included, "
                              "expected at most " +
                              std::to_string(kRoom * each) +
                              ": ask for fewer tokens, or give the engine more";
  CHECK_THROWS(limited.start(21), tda::OptionError, message);
  const std::vector<Token> long_text(21, 5);
  CHECK_THROWS(limited.engine().logits(long_text), tda::OptionError, "KV cache of 21 tokens");
  CHECK_THROWS(limited.engine().score(long_text, 3), tda::OptionError, "KV cache of 21 tokens");
  const TinyCheckpoint checkpoint;
  CHECK_THROWS(tda::Engine(checkpoint.folder(), {.cache_memory = -1}), tda::OptionError,
               "cache_memory -1: expected 0 (no limit) or more bytes");
}

TEST(scores_and_logits_count_sessions_do_not) {
  Limited limited;
  tda::Session session = limited.engine().session(30);
  session.prefill(kPrompt);
  tda::Generation generation = limited.start(16);
  generation.next();
  const auto logits = [&](std::int64_t count) {
    limited.engine().logits(std::vector<Token>(count, 5));
  };
  CHECK(limited.has_room_for([&] { logits(4); }));
  CHECK(!limited.has_room_for([&] { logits(5); }));
  const std::vector<Token> text(5, 5);
  CHECK(!limited.has_room_for([&] { limited.engine().score(text, 4); }));
  session.decode(5);
}

int main() { return run_tests(); }
