#include "order.h"

#include <stdexcept>

namespace inception_fast::cpu {

namespace {

// Neighbouring operators that run the same number of images at a time.
struct Stage {
  int first, last;
  int32_t images;
};

std::vector<Stage> stages_of(const std::vector<Accesses> &operators, int32_t batch) {
  std::vector<Stage> stages;
  for (size_t i = 0; i < operators.size(); ++i) {
    int32_t images = operators[i].images;
    if (stages.empty() || stages.back().images != images)
      stages.push_back({static_cast<int>(i), 0, images});
    stages.back().last = static_cast<int>(i) + 1;
  }
  for (size_t i = 0; i < stages.size(); ++i) {
    int32_t next = i + 1 < stages.size() ? stages[i + 1].images : batch;
    if (stages[i].images <= 0 || next % stages[i].images != 0)
      throw std::invalid_argument(operators[stages[i].first].where + " runs " + std::to_string(stages[i].images) +
                                  " images at a time; allowed: a divisor of the " + std::to_string(next) +
                                  " that come together behind it");
  }
  return stages;
}

} // namespace

std::vector<Run> runs_of(const std::vector<Accesses> &operators, int32_t batch) {
  bool whole = true;
  for (const Accesses &each : operators)
    whole = whole && each.images == 0;
  if (whole)
    return {{0, static_cast<int>(operators.size()), 0}};
  std::vector<Stage> stages = stages_of(operators, batch);
  std::vector<Run> runs;
  for (int32_t image = 0; image < batch; image += stages[0].images)
    for (const Stage &stage : stages) {
      int32_t there = image + stages[0].images;
      if (there % stage.images != 0)
        break;
      runs.push_back({stage.first, stage.last, there - stage.images});
    }
  return runs;
}

std::vector<bool> follow(const std::vector<Run> &runs, const std::vector<Accesses> &operators,
                         const std::vector<Buffer> &buffers) {
  bool by_image = !operators.empty() && operators[0].images > 0;
  Ledger ledger(buffers, by_image);
  std::vector<bool> fences(operators.size());
  for (const Run &run : runs)
    for (int i = run.first; i < run.last; ++i) {
      const Accesses &each = operators[i];
      auto images_of = [&](const View &view) {
        return by_image ? Images{held_at(run.image, buffers[view.buffer].n), each.images} : Images{0, 1};
      };
      for (const View &view : each.reads)
        ledger.read(view, images_of(view), each.where);
      for (const View &view : each.writes)
        ledger.write(view, images_of(view), each.where);
      if (ledger.fence(each.reads, each.writes, each.serial))
        fences[i] = true;
    }
  ledger.finish();
  return fences;
}

} // namespace inception_fast::cpu
