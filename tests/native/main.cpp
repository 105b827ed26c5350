// native_driver tests | tiers | apart | fuzz KEY=VALUE... | layer KEY=VALUE...
//
// Exit codes: 0 fine, 1 a plan differs from its truth, 2 a mistake in the command.
#include "fuzz.h"
#include "layer.h"
#include "plan.h"
#include "team.h"

#include <functional>
#include <iostream>
#include <map>
#include <stdexcept>

#include <sched.h>

using namespace native_driver;

namespace {

using Setters = std::map<std::string, std::function<void(const std::string &)>>;

std::function<void(const std::string &)> to(std::string &field) {
  return [&field](const std::string &value) { field = value; };
}

std::function<void(const std::string &)> to(int &field, int least) {
  return [&field, least](const std::string &value) {
    bool digits = !value.empty() && value.size() < 10 && value.find_first_not_of("0123456789") == std::string::npos;
    field = digits ? std::stoi(value) : least - 1;
    if (field < least)
      throw std::invalid_argument("'" + value + "'; allowed: a whole number from " + std::to_string(least));
  };
}

void read_options(int argc, char **argv, const Setters &setters) {
  std::string allowed;
  for (const auto &[key, setter] : setters)
    allowed += (allowed.empty() ? "" : ", ") + key;
  for (int i = 2; i < argc; ++i) {
    std::string option = argv[i], key = option.substr(0, option.find('='));
    auto found = setters.find(key);
    if (found == setters.end() || key.size() == option.size())
      throw std::invalid_argument("'" + option + "'; allowed: KEY=VALUE with " + allowed);
    found->second(option.substr(key.size() + 1));
  }
}

// 0 if a thread of several cores leaves the one that it is on, and may use the same cores as before.
int apart() {
  using namespace inception_fast::cpu;
  cpu_set_t before, after;
  sched_getaffinity(0, sizeof before, &before);
  int core = this_core(), moved = 0;
  for (int i = 0; i < 100; ++i) {
    leave_core(core);
    moved += this_core() != core;
    core = this_core();
  }
  sched_getaffinity(0, sizeof after, &after);
  std::cout << "left its core " << moved << " of 100 times, " << CPU_COUNT(&before) << " cores before, "
            << CPU_COUNT(&after) << " after\n";
  // The scheduler may put it back at once, but not every other time.
  bool left = CPU_COUNT(&before) > 1 ? moved >= 50 : moved == 0;
  return left && CPU_EQUAL(&before, &after) ? 0 : 1;
}

int run(int argc, char **argv) {
  std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "tests") {
    for (const auto &[name, about] : fuzz_tests())
      std::cout << name << ": " << about << "\n";
  } else if (mode == "tiers") {
    for (const auto *tier : inception_fast::cpu::runnable_tiers())
      std::cout << tier->name << "\n";
  } else if (mode == "apart") {
    return apart();
  } else if (mode == "fuzz") {
    Fuzz o;
    read_options(argc, argv,
                 {{"test", to(o.test)}, {"tier", to(o.tier)}, {"seed", to(o.seed, 0)}, {"seeds", to(o.seeds, 1)}});
    std::cout << fuzz(o) << " plans are right\n";
  } else if (mode == "layer") {
    Layer l;
    int tall = 0;
    read_options(argc, argv,
                 {{"kind", to(l.kind)},
                  {"tier", to(l.tier)},
                  {"type", to(l.type)},
                  {"n", to(l.n, 1)},
                  {"h", to(l.h, 1)},
                  {"w", to(l.w, 1)},
                  {"c", to(l.c, 1)},
                  {"oc", to(l.oc, 1)},
                  {"mid", to(l.mid, 1)},
                  {"kh", to(l.kh, 1)},
                  {"kw", to(l.kw, 1)},
                  {"repeats", to(l.repeats, 0)},
                  {"threads", to(l.threads, 1)},
                  {"first_tall", to(tall, 0)}});
    l.first_tall = tall != 0;
    std::cout << run_layer(l) << "\n";
  } else {
    throw std::invalid_argument("'" + mode + "'; allowed: tests, tiers, fuzz, layer");
  }
  return 0;
}

} // namespace

int main(int argc, char **argv) {
  try {
    return run(argc, argv);
  } catch (const std::invalid_argument &error) {
    std::cerr << "native_driver: " << error.what() << "\n";
    return 2;
  } catch (const std::exception &error) {
    std::cerr << "wrong: " << error.what() << "\n";
    return 1;
  }
}
