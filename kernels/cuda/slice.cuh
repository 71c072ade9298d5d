// A thread's part of a row: which groups, where they lie in global memory and on chip, and how they come there.
#pragma once

#include "shape.cuh"

namespace gkd {

constexpr int kStages = 4;  // commit groups that a slice is loaded in

// One matrix as a thread sees it.
template <class Shape>
struct Side {
  static constexpr int kGroup = Shape::kGroup, kThreads = Shape::kThreads;
  Dtype given_dtype;
  bool aligned;  // whole groups can be moved by the widest accesses
  char* group;   // the thread's first group: in global memory
  char* slot;    // and on chip

  GKD_DEVICE Dtype dtype() const { return Shape::kDtypesKnown ? Shape::kLogits : given_dtype; }
  GKD_DEVICE int group_bytes() const { return Group<kGroup>::bytes(dtype()); }
  GKD_DEVICE char* address(int iteration) const {
    return group + int64_t(iteration) * (kThreads * kGroup * size_of(dtype()));
  }
  GKD_DEVICE char* slot_of(int iteration) const { return slot + iteration * (kThreads * group_bytes()); }
};

template <class Shape>
struct Slice {
  static constexpr int kGroup = Shape::kGroup, kThreads = Shape::kThreads;
  Geometry<kGroup> geometry;
  Side<Shape> student, teacher;
  int iterations;               // of the block
  int count;                    // the thread's groups
  int whole_first, whole_end;   // of which these lie wholly inside of the row

  GKD_DEVICE Slice(const Job<float>& job, const Launch& launch, int64_t row, int rank, char* memory)
      : geometry(row_of(job.student, row, logits_of(job.student)), size_of(logits_of(job.student)), int(job.columns),
                 rank, launch.slice) {
    const Dtype dtype = logits_of(job.student);
    student = side(job.student, dtype, row, memory);
    teacher = side(job.teacher, logits_of(job.teacher), row,
                   memory + slice_bytes(launch.slice, Group<kGroup>::bytes(dtype)));
    iterations = iterations_below(launch.slice);
    count = iterations_below(geometry.end - group_of(0));
    whole_first = group_of(0) < geometry.inner_first;
    whole_end = iterations_below(geometry.inner_end - group_of(0));
    whole_end = whole_end < count ? whole_end : count;
  }

  GKD_DEVICE int group_of(int iteration) const {
    return geometry.first + iteration * kThreads + device::thread_index();
  }
  GKD_DEVICE Side<Shape> side(const Matrix& matrix, Dtype dtype, int64_t row, char* memory) const {
    char* row_start = row_of(matrix, row, dtype);
    const int size = size_of(dtype);
    return {dtype, geometry.fits(row_start, size), row_start + int64_t(geometry.column(group_of(0))) * size,
            memory + device::thread_index() * Group<kGroup>::bytes(dtype)};
  }
  // The first iteration of a stage.
  GKD_DEVICE int stage_first(int stage) const { return iterations * stage / kStages; }
  GKD_DEVICE int stage_end(int stage) const {
    const int end = stage_first(stage + 1);
    return end < count ? end : count;
  }

  // Starts the copies of all stages. What cannot be copied by wide accesses, groups at the row's ends and rows of
  // another alignment, is gathered by columns.
  GKD_DEVICE void load() const {
    const bool wide = student.aligned && teacher.aligned;
    Copying copying(*this, whole_first);
    int i = whole_first;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const int end = wide ? min(stage_end(stage), whole_end) : 0;
#pragma unroll 1
      for (; i < end; ++i) copying.copy_group();
      device::commit_copies();
    }
    if (!wide) return gather(0, count);
    if (whole_first > 0) gather(0, min(count, 1));
    if (whole_end < count) gather(max(whole_end, whole_first), count);
  }

 private:
  GKD_DEVICE static Dtype logits_of(const Matrix& matrix) {
    return Shape::kDtypesKnown ? Shape::kLogits : matrix.dtype;
  }
  GKD_DEVICE static int max(int a, int b) { return a > b ? a : b; }
  GKD_DEVICE static int min(int a, int b) { return a < b ? a : b; }
  // How many of this thread's groups are among the first `groups`.
  GKD_DEVICE static int iterations_below(int groups) {
    return groups > 0 ? int(unsigned(groups + kThreads - 1) / unsigned(kThreads)) : 0;
  }
  // The way of the copies through both matrices.
  struct Copying {
    const Slice& slice;
    const char *student, *teacher;
    char *student_slot, *teacher_slot;

    GKD_DEVICE Copying(const Slice& slice_, int i)
        : slice(slice_), student(slice.student.address(i)), teacher(slice.teacher.address(i)),
          student_slot(slice.student.slot_of(i)), teacher_slot(slice.teacher.slot_of(i)) {}
    GKD_DEVICE void copy_group() {
      step(student_slot, student, slice.student), step(teacher_slot, teacher, slice.teacher);
    }
    GKD_DEVICE static void step(char*& to, const char*& from, const Side<Shape>& side) {
      if (side.group_bytes() == 16) {
        device::copy_async_16(to, from);
      } else {
        device::copy_async_8(to, from);
      }
      to += kThreads * side.group_bytes(), from += kThreads * kGroup * size_of(side.dtype());
    }
  };
  GKD_DEVICE void gather(int first, int end) const {
#pragma unroll 1
    for (int i = first; i < end; ++i) gather(student, i), gather(teacher, i);
  }
  GKD_DEVICE void gather(const Side<Shape>& from, int i) const {
    Group<kGroup> bits;
    bits.gather(from.address(i), from.dtype(), geometry, group_of(i));
    bits.store(from.slot_of(i), from.dtype());
  }
};

// The same groups of the gradient. Its dtype may be another.
template <class Shape>
struct Output {
  static constexpr int kGroup = Shape::kGroup, kThreads = Shape::kThreads;
  Dtype dtype;
  char* group;      // the thread's first
  int group_bytes;  // from one to its next
  unsigned wide;    // how many, from the first whole one on, can be written by the widest accesses

  GKD_DEVICE Output(const Matrix& matrix, int64_t row, const Slice<Shape>& slice)
      : dtype(Shape::kDtypesKnown ? Shape::kGradient : matrix.dtype) {
    const Side<Shape> side = slice.side(matrix, dtype, row, nullptr);
    group = side.group, group_bytes = kThreads * kGroup * size_of(dtype);
    const int whole = slice.whole_end - slice.whole_first;
    wide = side.aligned && whole > 0 ? unsigned(whole) : 0u;
  }
  GKD_DEVICE char* address(int i) const { return group + int64_t(i) * group_bytes; }
  GKD_DEVICE bool is_wide(int i, const Slice<Shape>& slice) const { return unsigned(i - slice.whole_first) < wide; }
};

}  // namespace gkd
