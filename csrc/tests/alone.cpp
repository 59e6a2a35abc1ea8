// The decision of csrc/cpu/alone.h on machines that are made up: how many of the calls of some
// seconds begin alone.  Prints "ok", or each machine on which that is wrong and exits with 1.
#include "cpu/alone.h"

#include <cstdio>

namespace {

constexpr int64_t kMicro = 1'000, kMilli = 1'000'000, kSecond = 1'000 * kMilli;

struct Machine {
  const char* name;
  int64_t gap;         // between two calls
  int64_t work;        // of a call on two threads
  int64_t every;       // a thread has no core in each so-manieth region, 0: never
  int64_t away;        // for so long
  int64_t sleeping;    // how late a thread comes that sleeps
  double least, most;  // the share of calls that begin alone
};

constexpr Machine kMachines[] = {
    {"idle", 0, 50 * kMicro, 0, 0, 4 * kMilli, 0, 0},
    {"idle, pauses in which threads fall asleep", 20 * kMilli, 50 * kMicro, 0, 0, 4 * kMilli, 0, 0},
    {"a call of 1 ms, an interruption of 4 ms each 100 calls", 0, kMilli, 100, 4 * kMilli,
     4 * kMilli, 0, 0},
    {"a call of 50 us, an interruption of 2 ms each second", 0, 50 * kMicro, 20'000, 2 * kMilli,
     4 * kMilli, 0, 0.15},
    {"other processes have the cores", 0, 50 * kMicro, 2, 4 * kMilli, 10 * kMilli, 0.95, 1},
    {"they have them for slices of 4 ms", 0, 50 * kMicro, 60, 4 * kMilli, 10 * kMilli, 0.95, 1},
};

// Ten seconds of calls; alone a call takes twice its time.
double share_alone(const Machine& m) {
  attn::cpu::Alone alone;
  int64_t time = kSecond, calls = 0, by_itself = 0, regions = 0, end = -kSecond;
  while (time < 11 * kSecond) {
    ++calls;
    if (alone.now_is(time)) {
      ++by_itself, time += 2 * m.work + m.gap;
      continue;
    }
    const bool awake = alone.awake(time), sleeps = time - end > 5 * kMilli;
    const int64_t late = sleeps ? m.sleeping : 0;
    const int64_t away = m.every && ++regions % m.every == 0 ? m.away : 0;
    time = end = time + late + m.work + away;
    alone.learn(time, m.work, away + (awake ? late : 0));
    time += m.gap;
  }
  return double(by_itself) / double(calls);
}

// After the others have gone, a machine is used whole again.
bool recovers() {
  attn::cpu::Alone alone;
  int64_t time = kSecond;
  for (; time < 5 * kSecond; time += 50 * kMicro)
    if (!alone.now_is(time)) alone.learn(time, 50 * kMicro, 10 * kMilli);
  int64_t by_itself = 0;
  for (; time < 12 * kSecond; time += 50 * kMicro) {
    if (alone.now_is(time))
      by_itself += time > 7 * kSecond;
    else
      alone.learn(time, 50 * kMicro, 0);
  }
  return by_itself == 0;
}

}  // namespace

int main() {
  int wrong = 0;
  for (const Machine& m : kMachines) {
    const double share = share_alone(m);
    if (share >= m.least && share <= m.most) continue;
    ++wrong;
    std::printf("%s: %.3f of the calls begin alone, allowed are %.2f to %.2f\n", m.name, share,
                m.least, m.most);
  }
  if (!recovers()) ++wrong, std::printf("calls begin alone after the other processes have gone\n");
  if (wrong) return 1;
  std::printf("ok\n");
  return 0;
}
