// Every way through the kernels once, for ThreadSanitizer: whether barriers order all that threads share.
#include <cstdio>
#include <cstring>
#include <vector>

#include "run_rows.h"

namespace {

using namespace gkd;

constexpr int kRows = 2, kColumns = 1003;

struct Case {
  Kind kind;
  Dtype dtype, gradient;
  int ranks;
  bool extras, given, stats_only = false;
  bool whole = false, starts_again = false;  // value and gradient at once, and a row that this cannot do
};

std::string run_case(const Case& c) {
  const int size = c.dtype == Dtype::float32 ? 4 : 2;
  std::vector<char> student(kRows * (kColumns + 8) * size), teacher = student;
  for (size_t i = 0; i < student.size(); ++i) student[i] = char(i * 7 % 61), teacher[i] = char(i * 5 % 59);
  std::vector<float> stats(kRows * kStats, 1.0f), sums(kRows * kSums, 0.5f), value(kRows), by(kRows * kByproducts);
  std::vector<float> hard(kRows, 0.5f), kl_weights(2 * kRows, 0.5f);
  std::vector<int64_t> labels(kRows, 3);
  Job<float> job{};
  job.student = {student.data(), c.dtype, kColumns};
  job.teacher = {teacher.data() + size, c.dtype, kColumns + 1};
  job.gradient = {student.data(), c.gradient, c.gradient == c.dtype ? kColumns : 2 * kColumns};
  job.rows = kRows, job.columns = kColumns, job.gradient_columns = kColumns;
  job.kind = c.kind, job.parameter = 0.3, job.temperature = 2, job.scale = 1;
  (c.given ? const_cast<float*&>(job.given_stats) : job.stats) = stats.data();
  (c.given ? const_cast<float*&>(job.given_sums) : job.sums) = sums.data();
  if (c.whole) job.stats = job.sums = nullptr;
  const uint16_t impossible = 0xff80;  // -inf as bfloat16
  if (c.starts_again) std::memcpy(teacher.data() + size, &impossible, 2);
  if (c.stats_only) {
    job.gradient = {}, job.sums = nullptr;
  } else {
    job.value = value.data();
  }
  if (c.kind == Kind::mixed_kl) job.kl_weights = kl_weights.data();
  if (c.extras) job.byproducts = by.data(), job.labels = labels.data(), job.hard_weight = hard.data();
  const std::string error = emulation::run_rows(job, {c.ranks, 1, 0});
  return error.empty() ? emulation::run_rows(job, {c.ranks, 2, 1}) : error;
}

std::string run_topk_case(Dtype dtype) {
  constexpr int kSlots = 5;
  std::vector<char> logits(kRows * kColumns * (dtype == Dtype::float32 ? 4 : 2));
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = char(i * 7 % 61);
  std::vector<int64_t> ids{3, 900, -1, 31, 32, -1, -1, -1, -1, -1};  // the second row has none
  std::vector<float> on_k(kRows * kSlots), tail(kRows), logsumexp(kRows), off_k(kRows, 0.5f);
  const Matrix student{logits.data(), dtype, kColumns};
  const TopkRows rows{student, ids.data(), kRows, kColumns, kSlots, 2.0};
  for (const int blocks : {1, 2}) {
    std::string error = emulation::run_topk_log_probs({rows, on_k.data(), tail.data(), logsumexp.data()}, blocks, 0);
    if (!error.empty()) return error;
    error = emulation::run_topk_gradient({rows, on_k.data(), off_k.data(), logsumexp.data(), student}, blocks, 1);
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace

int main() {
  using enum Dtype;
  for (const Dtype dtype : {bfloat16, float32}) {
    const std::string error = run_topk_case(dtype);
    if (!error.empty()) return std::printf("%s\n", error.c_str()), 1;
  }
  for (const Kind kind : {Kind::forward_kl, Kind::jsd, Kind::mixed_kl}) {
    for (const int ranks : {0, 1, 2, 4}) {
      for (const bool extras : {false, true}) {
        for (const bool given : {false, true}) {
          const std::pair<Dtype, Dtype> dtypes[] = {{bfloat16, bfloat16}, {float32, float32}, {float32, bfloat16}};
          for (const auto& [dtype, gradient] : dtypes) {
            const std::string error = run_case({kind, dtype, gradient, ranks, extras, given});
            if (!error.empty()) return std::printf("%s\n", error.c_str()), 1;
          }
        }
      }
      const std::string error = run_case({kind, bfloat16, bfloat16, ranks, false, false, true});
      if (!error.empty()) return std::printf("%s\n", error.c_str()), 1;
    }
  }
  for (const Kind kind : {Kind::forward_kl, Kind::reverse_kl, Kind::jsd}) {
    for (const int ranks : {1, 2, 4}) {
      for (const bool again : {false, true}) {
        const std::string error = run_case({kind, bfloat16, bfloat16, ranks, false, false, false, true, again});
        if (!error.empty()) return std::printf("%s\n", error.c_str()), 1;
      }
    }
  }
  return 0;
}
