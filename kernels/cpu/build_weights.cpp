// The part of the builder that packs weights: which there are, where they go, and who fills their memory.
#include "build.h"

#include <algorithm>
#include <atomic>

namespace inception_fast::cpu {

void Builder::queue_packing(const ConvOp &op, int part, const ConvArrays &arrays) {
  Weights from{{}, arrays.scale.data, arrays.shift.data};
  for (const WeightArray &each : arrays.weights) {
    const std::vector<int64_t> &strides = each.strides;
    from.blocks.push_back({each.data, int32_t(each.shape[0]), strides[0], strides[1], strides[2], strides[3]});
  }
  packings_.push_back({plan_->ops_.size(), part, plan_->panels_.size() - 1, packed_, from});
  packed_ += (packed_size(op, plan_->panels_.back(), plan_->tier_->lanes) + 15) / 16 * 16;
}

ConvOp &Builder::packed_op(const Packing &packing) const {
  auto &kernel = plan_->ops_[packing.op].kernel;
  if (PairOp *pair = std::get_if<PairOp>(&kernel))
    return packing.part ? pair->second : pair->first;
  return std::get<ConvOp>(kernel);
}

std::vector<int64_t> Builder::packing() const {
  std::vector<int64_t> out;
  for (const Packing &packing : packings_) {
    const ConvOp &op = packed_op(packing);
    out.insert(out.end(), {packing.position, op.c, op.oc, op.kh, op.kw, op.groups, int64_t(op.x.type), op.row_taps,
                           op.row_depth, op.tiled, op.joined, op.tile_h, op.tile_w, op.depthwise});
    for (const Panel &panel : plan_->panels_[packing.panels])
      out.insert(out.end(), {panel.packed, panel.column, panel.width});
  }
  return out;
}

void Builder::pack_all() {
  plan_->packed_ = std::make_shared<Memory>(packed_ * sizeof(float));
  struct Item {
    size_t packing;
    int64_t position;
    const Weights *from;
    const ConvOp *op;
    const Panel *panel;
  };
  struct Work {
    std::vector<Item> items;
    std::vector<std::atomic<bool>> finite;
    std::atomic<size_t> next{0};
    float *to;
    int lanes;
  };
  Work work;
  work.finite = std::vector<std::atomic<bool>>(packings_.size());
  work.to = plan_->packed_->data();
  work.lanes = plan_->tier_->lanes;
  for (size_t i = 0; i < packings_.size(); ++i) {
    work.finite[i] = true;
    for (const Panel &panel : plan_->panels_[packings_[i].panels])
      work.items.push_back({i, packings_[i].position, &packings_[i].from, &packed_op(packings_[i]), &panel});
  }
  auto body = [](void *context, const Worker &, Barrier &) {
    Work &work = *static_cast<Work *>(context);
    for (size_t i = work.next++; i < work.items.size(); i = work.next++) {
      const Item &item = work.items[i];
      float *to = work.to + item.position + item.panel->packed;
      if (!pack(*item.op, *item.panel, *item.from, work.lanes, to))
        work.finite[item.packing] = false;
    }
  };
  int threads = packed_ > (1 << 18) ? std::min(available_cores(), 16) : 1;
  Lease team(threads, 0);
  team->run(threads, body, &work);
  for (const std::atomic<bool> &finite : work.finite)
    plan_->finite_.push_back(finite);
}

void Builder::point_at_weights() {
  for (size_t i = 0; i < packings_.size(); ++i) {
    ConvOp &op = packed_op(packings_[i]);
    op.packed = plan_->packed_->data() + packings_[i].position;
    op.skip = plan_->finite_[i];
  }
}

} // namespace inception_fast::cpu
