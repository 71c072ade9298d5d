// The kernel, for all shapes.
#pragma once

#include "whole.cuh"

namespace gkd {

template <class Shape>
struct WorkOfShape {
  using Type = RowWork<Shape>;
};
template <template <class> class D, Dtype kLogits, Dtype kGradient, int kThreads>
struct WorkOfShape<WholeShape<D, kLogits, kGradient, kThreads>> {
  using Type = WholeRow<WholeShape<D, kLogits, kGradient, kThreads>>;
};
template <class Shape>
using WorkOf = typename WorkOfShape<Shape>::Type;

// On chip the grid is a team for each row. From memory it is a few blocks that go over the rows: only what a few rows
// hold can be found in the cache again.
template <class Shape>
GKD_KERNEL(Shape::kThreads, Shape::kOnChip ? 3 : 1)
score_rows_kernel(GKD_ARGUMENT Job<float> job, GKD_ARGUMENT Launch launch) {
  if constexpr (Shape::kOnChip) {
    const Team<Shape::kThreads> everybody{0, launch.ranks};
    everybody.announce();
    const int64_t row = launch.first_row + (device::block_index() >> launch.rank_shift);
    const int rank = int(device::block_index()) & (launch.ranks - 1);
    if (job.alive && !job.alive[row]) {
      ignore_row<Shape::kThreads>(job, row, rank, launch.ranks);
      everybody.wait_for_start();
    } else {
      WorkOf<Shape>(job, launch, row, rank).run();
    }
  } else {
    for (int64_t row = launch.first_row + device::block_index(); row < launch.end_row; row += device::block_count()) {
      if (job.alive && !job.alive[row]) {
        ignore_row<Shape::kThreads>(job, row, 0, 1);
      } else {
        WorkOf<Shape>(job, launch, row, 0).run();
        device::sync_block();  // statistics alone use one piece of scratch, and the next row writes to it
      }
    }
  }
}

}  // namespace gkd
