"""The first batch as people can check it: which tokens are scored, one by one, and where they came from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from rich.text import Text

from gkd.monitor.text import NEWLINE_MARK, clean
from gkd.types import Decode, Rollout, TokenBatch

# Two styles a source, taken in turn, so that the border between two tokens is seen.
SOURCE_STYLES: dict[str, tuple[str, str]] = {
    "student": ("#ffffff on #14692f", "#ffffff on #259b4c"),
    "teacher": ("#ffffff on #0b5c8a", "#ffffff on #2288c4"),
    "dataset": ("#000000 on #c99a12", "#000000 on #ecd06f"),
}
_OTHER_STYLE = ("#ffffff on #5b3f8c", "#ffffff on #8463bd")  # sources of plugins
_NOT_SCORED = "dim"


class _Piece(NamedTuple):
    text: str
    scored: bool
    token: bool  # False: a remark in place of tokens left out


def render_first_batch(
    rollouts: Sequence[Rollout],
    decode: Decode,
    max_rows: int = 2,
    *,
    max_tokens: int = 160,
    scored: Sequence[Sequence[bool]] | None = None,
) -> Text:
    """Some rollouts token by token: scored ones coloured by their source, with a legend; the others dim.

    `decode` gets one id at a time. `scored[i][j]` says whether the loss counts token j of rollout i (prompt and
    completion together): hand in the mask that the step really uses and a mistake in it shows. Without it all
    completion tokens count as scored. Beyond `max_tokens` a prompt or completion loses its middle.
    Raises ValueError if a mask's length is not its rollout's.
    """
    rows = _choose(rollouts, max_rows)
    text = Text("first batch: ")
    sources = [rollouts[row].source for row in rows]
    for source in dict.fromkeys(sources):
        text.append(f" scored, {source} ", SOURCE_STYLES.get(source, _OTHER_STYLE)[0]).append("  ")
    text.append("not scored", _NOT_SCORED)
    for row in rows:
        rollout, styles = rollouts[row], SOURCE_STYLES.get(rollouts[row].source, _OTHER_STYLE)
        text.append(f"\n\n{_title(rollout)}\n", "bold")
        for count, piece in enumerate(_pieces(rollout, decode, max_tokens, scored[row] if scored else None)):
            text.append(piece.text, styles[count % 2] if piece.scored else _NOT_SCORED)
    return text


def first_batch_text(
    rollouts: Sequence[Rollout],
    decode: Decode,
    max_rows: int = 2,
    *,
    max_tokens: int = 160,
    scored: Sequence[Sequence[bool]] | None = None,
) -> str:
    """The same without colours: every scored token stands in brackets; brackets of the text get a backslash."""
    lines = ["first batch: [scored] tokens in brackets, the others bare"]
    for row in _choose(rollouts, max_rows):
        lines += ["", _title(rollouts[row])]
        pieces = _pieces(rollouts[row], decode, max_tokens, scored[row] if scored else None)
        lines.append("".join(_bracketed(piece) for piece in pieces))
    return "\n".join(lines) + "\n"


def scored_tokens(rollouts: Sequence[Rollout], micro_batches: Sequence[TokenBatch]) -> list[list[bool]]:
    """For each rollout, which of its tokens the micro-batches score: the output at t scores the token at t + 1."""
    masks = {rollout.sample_id: [False] * len(rollout.token_ids) for rollout in rollouts}
    for batch in micro_batches:
        width = batch.input_ids.shape[1]
        starts = [row * width for row in range(len(batch.sample_ids))]
        if batch.sequence_lengths is not None:
            starts = [0, *accumulate(batch.sequence_lengths[:-1])]
        for position in batch.score_index.tolist():
            sequence = bisect_right(starts, position) - 1
            masks[batch.sample_ids[sequence]][position - starts[sequence] + 1] = True
    return [masks[rollout.sample_id] for rollout in rollouts]


def _choose(rollouts: Sequence[Rollout], max_rows: int) -> list[int]:
    """Rows to show, in order: the first of each source before a second of any."""
    firsts = {rollout.source: row for row, rollout in reversed(list(enumerate(rollouts)))}
    by_need = sorted(range(len(rollouts)), key=lambda row: (row not in firsts.values(), row))
    return sorted(by_need[:max_rows])


def _title(rollout: Rollout) -> str:
    version = "" if rollout.weights_version is None else f", weights v{rollout.weights_version}"
    prompt, completion = len(rollout.draw.prompt.token_ids), len(rollout.completion_ids)
    turns = rollout.conversation and f", {rollout.conversation.turns} turns of {len(rollout.scored_places)}"
    return f"{rollout.sample_id}{version}: {prompt} prompt + {completion} completion tokens{turns or ''}"


def _pieces(rollout: Rollout, decode: Decode, max_tokens: int, scored: Sequence[bool] | None) -> Iterator[_Piece]:
    ids, prompt = rollout.token_ids, len(rollout.draw.prompt.token_ids)
    if scored is None:
        scored = [False] * len(ids)
        for place in rollout.scored_places:
            scored[prompt + place] = True
    if len(scored) != len(ids):
        raise ValueError(f"{rollout.sample_id}: a mask of {len(scored)} for {len(ids)} tokens")
    for part in (range(prompt), range(prompt, len(ids))):
        left_out = max(0, len(part) - max_tokens)
        head = (max_tokens + 1) // 2
        for position in part[:head] if left_out else part:
            yield _Piece(_visible(ids[position], decode), scored[position], True)
        if left_out:
            yield _Piece(f" ... {left_out} tokens ... ", False, False)
            for position in part[head + left_out :]:
                yield _Piece(_visible(ids[position], decode), scored[position], True)


def _visible(token_id: int, decode: Decode) -> str:
    """A token as it can be seen: a line end as a sign, a token without visible text as its id."""
    return clean(decode([token_id]), newline=NEWLINE_MARK) or f"<{token_id}>"


def _bracketed(piece: _Piece) -> str:
    if not piece.token:
        return piece.text
    escaped = piece.text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    return f"[{escaped}]" if piece.scored else escaped
