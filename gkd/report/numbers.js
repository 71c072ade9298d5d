// Numbers for the charts of a report: how they are written, where the ticks stand, which points are drawn.
"use strict";

const SECOND_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

function compact(value) {
  const size = Math.abs(value);
  const [unit, letter] = size >= 1e9 ? [1e9, "G"] : size >= 1e6 ? [1e6, "M"] : size >= 1e4 ? [1e3, "k"] : [1, ""];
  return `${Number((value / unit).toPrecision(4))}${letter}`;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2).replace("e-", "e−");
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e4) return compact(value);
  return size >= 0.1 && size < 10 ? value.toFixed(3) : value.toPrecision(size < 0.1 ? 3 : 4);
}

function duration(seconds) {
  if (seconds < 10) return `${Number(seconds.toFixed(1))}s`;
  const whole = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86400)}d${two(Math.floor((whole % 86400) / 3600))}h`;
}

function ticks(low, high, count, steps) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const round = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const step = (steps && steps.find((s) => s >= rough)) || round;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12) + step * 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const stride = Math.max(1, Math.ceil((last - first) / 6));
  const factors = last - first <= 2 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = first; power <= last; power += stride) for (const f of factors) found.push(f * 10 ** power);
  return found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
}

function tickLabel(value) {
  const short = Number(value.toPrecision(3)); // 3 * 0.1 is not 0.3
  return short !== 0 && Math.abs(short) < 1e-3 ? short.toExponential().replace("e-", "e−") : compact(short);
}

// Index of the first of the ascending `xs` that is >= x.
function lowerBound(xs, x) {
  let low = 0, high = xs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low;
}

function nearest(xs, x) {
  const after = Math.min(lowerBound(xs, x), xs.length - 1);
  return after > 0 && x - xs[after - 1] < xs[after] - x ? after - 1 : after;
}

// Each point as the mean of its surroundings, weighted by keep^distance: the same to both sides, so that nothing is
// shifted to the right, and only by what there is, so that the ends are not drawn towards zero. Gaps stay gaps.
function smoothed(ys, keep) {
  const sums = ys.map((y) => y ?? 0), weights = ys.map((y) => (y === null ? 0 : 1));
  const pass = (order) => {
    let sum = 0, weight = 0;
    for (const i of order) {
      sums[i] += sum;
      weights[i] += weight;
      sum = keep * (sum + (ys[i] ?? 0));
      weight = keep * (weight + (ys[i] === null ? 0 : 1));
    }
  };
  const forwards = [...ys.keys()];
  pass(forwards);
  pass(forwards.reverse());
  return ys.map((y, i) => (y === null ? null : sums[i] / weights[i]));
}

// At most four points a pixel column: first, least, greatest, last. No peak is lost, however long the run.
function thinned(xs, ys, start, end, toX) {
  if (end - start < 4 * toX.width) return Array.from({ length: end - start }, (_, i) => start + i);
  const kept = [];
  for (let i = start; i < end;) {
    const column = Math.floor(toX(xs[i]));
    let low = i, high = i, last = i;
    for (; last < end && Math.floor(toX(xs[last])) === column; last++) {
      if (ys[last] === null) continue;
      if (ys[low] === null || ys[last] < ys[low]) low = last;
      if (ys[high] === null || ys[last] > ys[high]) high = last;
    }
    kept.push(...[...new Set([i, low, high, last - 1])].sort((a, b) => a - b));
    i = last;
  }
  return kept;
}

function linePath(xs, ys, indexes, toX, toY) {
  let path = "", open = false;
  for (const i of indexes) {
    const y = ys[i] === null ? NaN : toY(ys[i]);
    if (!Number.isFinite(y)) { open = false; continue; }
    path += `${open ? "L" : "M"}${toX(xs[i]).toFixed(1)} ${y.toFixed(1)}`;
    if (!open) path += "h0"; // a point between two gaps is seen too
    open = true;
  }
  return path;
}
