// wgmma: a collective of 128 threads that reads shared memory and writes accumulators some time after it was issued.
//
// Each thread's accumulators are taken away when it issues (what it finds there until the wait is poison) and given
// back by the wait that covers their last use. A product runs once all 128 threads have issued it: at once, or when a
// wait asks for it, so that both an operand overwritten too early and one read too early show.
#include "machine.h"
#include "primitives.h"
#include <algorithm>

namespace inception_fast::emulated {

namespace {

struct Operand {
  uint32_t start, lead, stride, span; // span: bytes of the swizzle's pattern, 0 without
};

Operand decode(uint64_t descriptor) {
  Operand o{};
  o.start = uint32_t(descriptor & 0x3fff) << 4;
  o.lead = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  o.stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  uint32_t swizzle = uint32_t(descriptor >> 62);
  o.span = swizzle ? 256u >> swizzle : 0;
  if (descriptor >> 49 & 7)
    fail("wgmma: a matrix descriptor with a base offset, which is not modelled");
  if (descriptor & (3ull << 14 | 3ull << 30 | 3ull << 46 | 0x3ffull << 52))
    fail("wgmma: a matrix descriptor with bits set that mean nothing: 0x%llx",
         static_cast<unsigned long long>(descriptor));
  if (o.span && (o.start & (o.span - 1)) + 32 > o.span)
    fail("wgmma: 32 bytes of K from byte %u of a swizzled row of %u", o.start & (o.span - 1), o.span);
  return o;
}

// 8 elements of row r, from element 8 * half of the 16 along K.
uint32_t chunk_address(const Operand &o, int r, int half) {
  if (!o.span)
    return o.start + uint32_t(r / 8) * o.stride + uint32_t(r % 8) * 16 + uint32_t(half) * o.lead;
  uint32_t address = o.start + uint32_t(r / 8) * o.stride + uint32_t(r % 8) * o.span + uint32_t(half) * 16;
  return address ^ ((address >> 7 & (o.span / 16 - 1)) << 4);
}

const float *half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (int i = 0; i < 65536; i++)
      all[i] = from_half(uint16_t(i));
    return all;
  }();
  return table.data();
}

// rows x 16 floats; transposed: [16][rows].
void gather(const Cta &cta, uint64_t descriptor, int rows, int element, bool transposed, float *to) {
  Operand o = decode(descriptor);
  const float *table = half_table();
  for (int r = 0; r < rows; r++)
    for (int half = 0; half < 2; half++) {
      int64_t offset = int64_t(chunk_address(o, r, half)) - kSharedBase;
      if (offset < 0 || offset + 16 > cta.shared_bytes)
        fail("wgmma: row %d lies at offset %lld of %u bytes of shared memory", r, static_cast<long long>(offset),
             cta.shared_bytes);
      uint16_t chunk[8];
      std::memcpy(chunk, cta.seen + offset, 16);
      for (int i = 0; i < 8; i++) {
        float v = element == int(hopper::Element::float16) ? table[chunk[i]] : from_bfloat16(chunk[i]);
        to[transposed ? (half * 8 + i) * rows + r : r * 16 + half * 8 + i] = v;
      }
    }
}

// Where element i of thread t's accumulators lies in the 64 x n product.
int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

void multiply(const Cta &cta, GroupOperation &op) {
  alignas(64) float a[64 * 16], b[16 * 256];
  int n = op.n;
  gather(cta, op.a, 64, op.element, false, a);
  gather(cta, op.b, n, op.element, true, b);
  float *values = op.accumulator->values.data();
  if (!op.accumulate)
    std::fill(values, values + 64 * n, 0.0f);
  for (int m = 0; m < 64; m++) {
    float *row = values + m * n;
    for (int k = 0; k < 16; k++) {
      float v = a[m * 16 + k];
      const float *column = b + k * n;
      for (int j = 0; j < n; j++)
        row[j] += v * column[j];
    }
  }
}

// By its number; those that everybody has waited for are gone.
GroupOperation &operation(Warpgroup &group, size_t number) { return group.operations[number - group.first]; }

void complete(const Cta &cta, Warpgroup &group, size_t until) {
  for (; group.done < until; group.done++) {
    GroupOperation &op = operation(group, group.done);
    if (op.kind == GroupOperation::product)
      multiply(cta, op);
  }
}

Warpgroup &own_group() { return self().cta->groups[self().index / kGroup]; }

// This thread's part of its warpgroup's next instruction.
GroupOperation &join(Warpgroup &group, const GroupOperation &mine) {
  Fiber &fiber = self();
  if (fiber.cta->fibers.size() < size_t(fiber.index / kGroup + 1) * kGroup)
    fail("wgmma in a warpgroup of fewer than 128 threads");
  size_t at = fiber.group_next++;
  if (at == group.first + group.operations.size())
    group.operations.push_back(mine);
  GroupOperation &op = operation(group, at);
  if (op.kind != mine.kind)
    fail("threads of a warpgroup are at different wgmma instructions");
  if (op.n != mine.n || op.element != mine.element || op.a != mine.a || op.b != mine.b ||
      op.accumulate != mine.accumulate)
    fail("threads of a warpgroup issue one wgmma with different operands");
  op.arrived++;
  return op;
}

// Accumulators that this thread may not touch: the ones it has just issued a product on.
void take(Warpgroup &group, GroupOperation &op, float *d) {
  int t = self().index % kGroup;
  if (!op.accumulator) {
    for (auto &other : group.accumulators)
      if (other->registers[t] == d)
        op.accumulator = other;
    if (!op.accumulator) {
      op.accumulator = std::make_shared<Accumulator>();
      op.accumulator->n = op.n;
      op.accumulator->values.assign(64 * op.n, float_of(kPoison));
      group.accumulators.push_back(op.accumulator);
    }
  }
  Accumulator &acc = *op.accumulator;
  if (acc.n != op.n || (acc.registers[t] && acc.registers[t] != d))
    fail("wgmma of n = %d on accumulators that one of n = %d still writes", op.n, acc.n);
  acc.users[t]++;
  if (acc.registers[t])
    return;
  if (!group.fenced[t])
    fail("wgmma on accumulators that the thread may have touched, without wgmma_fence");
  acc.registers[t] = d;
  for (int i = 0; i < op.n / 2; i++) {
    acc.values[row_of(t, i) * op.n + column_of(t, i)] = d[i];
    d[i] = float_of(kPoison);
  }
}

void give_back(Accumulator &acc) {
  int t = self().index % kGroup;
  float *d = acc.registers[t];
  acc.registers[t] = nullptr;
  for (int i = 0; i < acc.n / 2; i++) {
    if (bits_of(d[i]) != kPoison)
      fail("accumulator %d was written between wgmma and its wait", i);
    d[i] = acc.values[row_of(t, i) * acc.n + column_of(t, i)];
  }
}

// This thread has waited for an operation; with the last one on some accumulators, it has them back.
void leave(Warpgroup &group, GroupOperation &op) {
  int t = self().index % kGroup;
  op.left++;
  if (op.kind != GroupOperation::product || --op.accumulator->users[t])
    return;
  give_back(*op.accumulator);
  group.fenced[t] = false;
}

bool complete_for(const Fiber &fiber) {
  return static_cast<const Warpgroup *>(fiber.wait.object)->done >= fiber.wait.value;
}

bool all_issued(const Warpgroup &group, size_t until) {
  for (size_t i = group.done; i < until; i++)
    if (group.operations[i - group.first].arrived < kGroup)
      return false;
  return true;
}

std::string describe_issue(const Fiber &) { return "the other threads of its warpgroup, in wgmma_wait"; }

} // namespace

bool run_due_products() {
  Machine &m = machine();
  for (auto due = m.due.begin(); due != m.due.end();) {
    if (due->group->done < due->until && !all_issued(*due->group, due->until)) {
      ++due;
      continue;
    }
    Due now = *due;
    due = m.due.erase(due);
    if (now.group->done < now.until) {
      m.current = now.fiber;
      complete(*now.fiber->cta, *now.group, now.until);
      return true;
    }
  }
  return false;
}

void wgmma_fence() {
  Warpgroup &group = own_group();
  join(group, {});
  group.fenced[self().index % kGroup] = true;
}

void wgmma(int n, int element, float *d, uint64_t a, uint64_t b, bool accumulate) {
  maybe_yield();
  Warpgroup &group = own_group();
  GroupOperation mine;
  mine.kind = GroupOperation::product;
  mine.n = n;
  mine.element = element;
  mine.a = a;
  mine.b = b;
  mine.accumulate = accumulate;
  GroupOperation &op = join(group, mine);
  take(group, op, d);
  size_t at = self().group_next;
  if (op.arrived == kGroup && immediately(machine().options.products))
    complete(*self().cta, group, at);
}

void wgmma_commit() {
  GroupOperation mine;
  mine.kind = GroupOperation::commit;
  join(own_group(), mine);
}

void wgmma_wait(int pending) {
  Fiber &fiber = self();
  Warpgroup &group = own_group();
  size_t until = 0; // operations before this one have to be complete
  int commits = 0;
  for (size_t i = fiber.group_next; i > fiber.group_waited && !until; i--)
    if (operation(group, i - 1).kind == GroupOperation::commit && commits++ == pending)
      until = i;
  if (!until)
    return;
  if (group.done < until) {
    machine().due.push_back({&fiber, &group, until});
    block_until({complete_for, &group, until, describe_issue});
    // Another thread's wait may have completed these; this block can be gone before anybody asks again.
    machine().due.remove_if([&](const Due &due) { return due.fiber == &fiber; });
  }
  for (; fiber.group_waited < until; fiber.group_waited++)
    leave(group, operation(group, fiber.group_waited));
  while (!group.operations.empty() && group.first < group.done && group.operations.front().left == kGroup) {
    group.operations.pop_front();
    group.first++;
  }
  group.accumulators.remove_if([](const std::shared_ptr<Accumulator> &acc) {
    return std::all_of(acc->registers, acc->registers + kGroup, [](float *d) { return d == nullptr; });
  });
}

} // namespace inception_fast::emulated
