// The kernel for value and gradient of a whole row at once, where both sides are in half precision and nothing else is
// wanted. All other calls are those of rows.cuh, and so are rows that this cannot do: without a distribution, or with an
// infinite cross sum.
//
//   1 stats     as there, and a cross sum where the divergence is known from it
//   2 sums      where the gradient still needs some
//   3 gradient
// The first warp of a block works out what the row's passes have in common and shares it.
#pragma once

#include "forms.cuh"
#include "rows.cuh"

namespace gkd {

template <class Form>
struct RowForm {
  Form form;
  uint32_t usable;  // otherwise the form is not to be used
};

template <template <class> class D_, Dtype kLogits_, Dtype kGradient_, int kThreads_>
struct WholeShape {
  using D = D_<CudaMath>;
  using Form = typename HalfForm<D>::Type;
  using Sums = RowSums<Form::kSums ? 2 : 1, false>;
  using Rest = Shape<D_, 8, kThreads_, true, false>;  // for what this cannot do
  static constexpr int kGroup = 8, kThreads = kThreads_;
  static constexpr bool kOnChip = true, kDtypesKnown = true;
  static constexpr Dtype kLogits = kLogits_, kGradient = kGradient_;
  static int shared_bytes(const Job<float>&, int ranks, int slice) {
    return scratch_bytes(ranks) + 2 * slice_bytes(slice, 2 * kGroup);
  }
  static GKD_INLINE int scratch_bytes(int ranks) {
    const int own = (4 * (stats_words(ranks) + sums_words(ranks)) + 15) / 16 * 16, rest = Rest::scratch_bytes(ranks);
    return own > rest ? own : rest;
  }
  static GKD_INLINE int stats_words(int ranks) {
    return scratch_words(BitSums<Form::kCross>::kWords, kThreads, ranks) + int(sizeof(RowForm<Form>) / 4);
  }
  static GKD_INLINE int sums_words(int ranks) { return combine_words<Sums>(kThreads, ranks); }
};

// With the kernel for all other calls, of which Shape is the one for these dtypes.
template <class Shape>
GKD_RARE void start_again(const Job<float>& job, const Launch& launch, int64_t row, int rank) {
  const Team<Shape::kThreads> team{rank, launch.ranks};
  team.arrive(), team.wait();  // nobody uses the scratch any more
  team.announce();
  Launch rest = launch;
  rest.stats_words = Shape::stats_words(launch.ranks);
  RowWork<Shape>(job, rest, row, rank).run();
}

template <class Shape>
struct WholeRow {
  using D = typename Shape::D;
  using Form = typename Shape::Form;
  using Sums = typename Shape::Sums;
  using Bits = Group<Shape::kGroup>;
  static constexpr int kGroup = Shape::kGroup, kThreads = Shape::kThreads;
  using Values = float[kGroup];

  const Job<float>& job;
  const Launch& launch;
  const int64_t row;
  const Team<kThreads> team;
  uint32_t *const stats_scratch, *const sums_scratch;
  const Slice<Shape> slice;

  GKD_DEVICE WholeRow(const Job<float>& job_, const Launch& launch_, int64_t row_, int rank)
      : job(job_), launch(launch_), row(row_), team{rank, launch_.ranks},
        stats_scratch(reinterpret_cast<uint32_t*>(device::shared_memory())),
        sums_scratch(stats_scratch + launch.stats_words),
        slice(job, launch, row, rank, device::shared_memory() + launch.scratch_bytes) {}

  // After the team has announced itself.
  GKD_DEVICE void run() const {
    slice.load();
    RowForm<Form> found = find_form();
    if (!found.usable) return start_again<typename Shape::Rest>(job, launch, row, team.rank);
    Form& form = found.form;
    Sums sums;
    if constexpr (Form::kSums) {
      find_sums(form, sums);
      team.combine(sums, sums_scratch);
      form.finish(sums.at(0), sums.at(1));
    }
    write_gradient(form, sums);
    if constexpr (Form::kValue) team.reduce(sums, sums_scratch);
    if (team.rank == 0 && device::thread_index() == 0 && job.value) {
      job.value[row] = form.value(sums.at(0)) * float(job.scale);
    }
  }

 private:
  // The thread's slots of a group on chip.
  struct Slots {
    char *student, *teacher;
    GKD_DEVICE Slots(const Slice<Shape>& slice, int i)
        : student(slice.student.slot_of(i)), teacher(slice.teacher.slot_of(i)) {}
    GKD_DEVICE void next() { student += kThreads * 2 * kGroup, teacher += kThreads * 2 * kGroup; }
  };

  GKD_DEVICE RowForm<Form> find_form() const {
    const Scale scale(launch);
    BitSums<Form::kCross> sums = find_stats(scale);
    RowForm<Form> found;
    if (team.in_first_warp()) {
      const float weight = (job.row_scale ? job.row_scale[row] : 1.0f) * launch.scale;
      found = {Form(sums, Exponents(sums, scale.bits), divergence_of<D>(job, row), weight), sums.usable()};
    }
    team.share(found, stats_scratch + scratch_words(sums.kWords, kThreads, team.ranks));
    return found;
  }
  // For the first warp.
  GKD_DEVICE BitSums<Form::kCross> find_stats(const Scale& scale) const {
    RunningSums<Form::kCross> running;
    running.clear();
    Slots slots(slice, 0);
    device::wait_copies<kStages - 1>();
    if (slice.stage_end(0) > 0) running.begin(top_of(slots.student), top_of(slots.teacher), scale);
    add_stage<0>(0, slots, running, scale);
    auto sums = running.total();
    team.wait_for_start();
    team.reduce(sums, stats_scratch);
    return sums;
  }
  // From iteration i on.
  template <int kStage>
  GKD_DEVICE void add_stage(int i, Slots slots, RunningSums<Form::kCross>& running, const Scale& scale) const {
    device::wait_copies<kStages - 1 - kStage>();
    const int end = slice.stage_end(kStage);
#pragma unroll 1
    for (; i < end; ++i, slots.next()) {
      Values s, t;
      const Bits student = read(slots.student, s), teacher = read(slots.teacher, t);
      running.add(s, largest<Shape::kLogits>(student), t, largest<Shape::kLogits>(teacher), scale);
    }
    if constexpr (kStage + 1 < kStages) add_stage<kStage + 1>(i, slots, running, scale);
  }
  GKD_DEVICE static float top_of(const char* slot) {
    Values x;
    return largest<Shape::kLogits>(read(slot, x));
  }
  GKD_DEVICE static Bits read(const char* slot, Values& x) {
    Bits bits;
    bits.load(slot, Shape::kLogits);
    bits.unpack(x, Shape::kLogits);
    return bits;
  }

  GKD_DEVICE void find_sums(const Form& form, Sums& sums) const {
    if constexpr (Form::kSums) {
      Slots slots(slice, 0);
#pragma unroll 1
      for (int i = 0; i < slice.count; ++i, slots.next()) {
        Values s, t;
        read(slots.student, s), read(slots.teacher, t);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) form.add(s[k], t[k], sums.sum[0], sums.sum[1]);
      }
    }
  }
  GKD_DEVICE void find_gradient(const Slots& slots, const Form& form, float& value, Values& gradient) const {
    Values s, t;
    read(slots.student, s), read(slots.teacher, t);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) gradient[k] = form.gradient(s[k], t[k], value);
  }
  GKD_DEVICE void write_gradient(const Form& form, Sums& sums) const {
    const Output<Shape> to(job.gradient, row, slice);
    const int wide_end = slice.whole_first + int(to.wide);
    Slots slots(slice, slice.whole_first);
    char* address = to.address(slice.whole_first);
    Values gradient;
#pragma unroll 1
    for (int i = slice.whole_first; i < wide_end; ++i, slots.next()) {
      find_gradient(slots, form, sums.sum[0], gradient);
      store_group(address, Shape::kGradient, gradient);
      address += kThreads * kGroup * size_of(Shape::kGradient);
    }
#pragma unroll 1
    for (int i = 0; i < slice.count; ++i) {
      if (to.is_wide(i, slice)) i = wide_end;
      if (i >= slice.count) break;
      find_gradient(Slots(slice, i), form, sums.sum[0], gradient);
      scatter(to.address(i), Shape::kGradient, gradient, slice.geometry, slice.group_of(i));
    }
    write_padding(job, row, team);
  }
};

}  // namespace gkd
